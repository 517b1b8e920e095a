"""Each function of the package as its definition says, slow and obvious, in NumPy alone."""

import numpy as np


def conv2d(x, w, b, stride, padding):
    """y[n, i, j, o] = b[o] + sum_{u, v, c} x_padded[n, i*stride + u, j*stride + v, c] w[u, v, c, o], pixel by pixel."""
    (top, bottom), (left, right) = padding
    x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    kh, kw, _, O = w.shape
    OH, OW = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    y = np.zeros((x.shape[0], OH, OW, O), x.dtype)
    for i in range(OH):
        for j in range(OW):
            patch = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw]
            y[:, i, j] = np.einsum("nuvc,uvco->no", patch, w) + b
    return y


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x)
    return e / e.sum(-1, keepdims=True)


def group_norm(x, gamma, beta, groups, eps, with_silu):
    """Image by image, group by group."""
    y = np.empty_like(x)
    size = x.shape[-1] // groups
    for n in range(x.shape[0]):
        for k in range(groups):
            one = (n, ..., slice(k * size, (k + 1) * size))
            y[one] = (x[one] - x[one].mean()) / np.sqrt(x[one].var() + eps)
    y = y * gamma + beta
    return silu(y) if with_silu else y


def attention(q, k, v, heads):
    """Image by image, head by head."""
    y = np.empty_like(q)
    d = q.shape[2] // heads
    for n in range(q.shape[0]):
        for h in range(heads):
            c = slice(h * d, (h + 1) * d)
            y[n, :, c] = softmax(q[n, :, c] @ k[n, :, c].T / np.sqrt(d)) @ v[n, :, c]
    return y


def upsample(x):
    return x.repeat(2, axis=1).repeat(2, axis=2)


def adam(theta, gradients, lr, b1, b2, eps, weight_decay):
    """Algorithm 1 of Kingma & Ba, with decoupled decay; one number at a time."""
    theta = [float(p) for p in theta]
    m, v = [0.0] * len(theta), [0.0] * len(theta)
    for n, gradient in enumerate(gradients, start=1):
        for i, g in enumerate(map(float, gradient)):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            mhat, vhat = m[i] / (1 - b1**n), v[i] / (1 - b2**n)
            theta[i] -= lr * (mhat / (vhat**0.5 + eps) + weight_decay * theta[i])
    return np.array(theta)


def unet(
    p, x, t, channels, blocks, attention_at, heads, groups, eps=1e-6, padding=((0, 1), (0, 1)), head_channels=None,
    labels=None,
):  # fmt: skip
    """eps_theta(x_t, t) of Ho et al. 2020 from the parameters p = {name: array}, layer by layer."""

    def conv(name, x, stride=1, padding=((1, 1), (1, 1))):
        return conv2d(x, p[name + ".w"], p[name + ".b"], stride, padding)

    def dense(name, x):
        return x @ p[name + ".w"] + p[name + ".b"]

    def norm(name, x):
        return group_norm(x, p[name + ".gamma"], p[name + ".beta"], groups, eps, False)

    def block(name, x):
        h = conv(name + ".conv1", silu(norm(name + ".norm1", x)))
        h = h + dense(name + ".time", silu(temb))[:, None, None, :]
        h = conv(name + ".conv2", silu(norm(name + ".norm2", h)))
        if name + ".shortcut.w" in p:
            x = conv(name + ".shortcut", x, padding=((0, 0), (0, 0)))
        return x + h

    def attend(name, x):
        N, H, W, C = x.shape
        h = norm(name + ".norm", x).reshape(N, H * W, C)
        q, k, v = (dense(f"{name}.attention.{part}", h) for part in "qkv")
        h = attention(q, k, v, C // head_channels if head_channels else heads)
        return x + dense(name + ".attention.out", h).reshape(N, H, W, C)

    half = channels[0] // 2
    angle = t[:, None] / 10000 ** (np.arange(half) / (half - 1))
    temb = dense("time2", silu(dense("time1", np.concatenate([np.sin(angle), np.cos(angle)], axis=1))))
    if labels is not None:
        temb = temb + p["class_embedding.w"][labels]

    h = conv("conv_in", x)
    skips = [h]
    for i in range(len(channels)):
        for j in range(blocks):
            h = block(f"down.{i}.res.{j}", h)
            h = attend(f"down.{i}.attention.{j}", h) if attention_at[i] else h
            skips.append(h)
        if i < len(channels) - 1:
            h = conv(f"down.{i}.resize", h, 2, padding)
            skips.append(h)
    h = block("middle1", h)
    if "middle_attention.norm.gamma" in p:
        h = attend("middle_attention", h)
    h = block("middle2", h)
    for u, i in enumerate(reversed(range(len(channels)))):
        for j in range(blocks + 1):
            h = block(f"up.{u}.res.{j}", np.concatenate([h, skips.pop()], axis=3))
            h = attend(f"up.{u}.attention.{j}", h) if attention_at[i] else h
        if i > 0:
            h = conv(f"up.{u}.resize", upsample(h))
    return conv("conv_out", silu(norm("norm_out", h)))


# the weights that Ho et al. start as zero, in a U-Net of two levels with one block each and attention in the lower
BLOCKS = "down.0.res.0 down.1.res.0 middle1 middle2 up.0.res.0 up.0.res.1 up.1.res.0 up.1.res.1".split()
ATTENTIONS = "down.1.attention.0 middle_attention up.0.attention.0 up.0.attention.1".split()
STARTS_AS_ZERO = {f"{b}.conv2.w" for b in BLOCKS} | {f"{a}.attention.out.w" for a in ATTENTIONS} | {"conv_out.w"}
