"""Each function of the package as its definition says, slow and obvious, in NumPy alone; layers and network of such.

The layers take `f`, the functions that they are made of, so that ops.py can have them computed by PyTorch as well, and
p, their parameters by name.
"""

import numpy as np

NONE, ONE = ((0, 0), (0, 0)), ((1, 1), (1, 1))


def conv2d(x, w, b=None, stride=1, padding=NONE):
    """y[n, i, j, o] = b[o] + sum_{u, v, c} x_padded[n, i*stride + u, j*stride + v, c] w[u, v, c, o], pixel by pixel."""
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    kh, kw, _, O = w.shape
    OH, OW = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    y = np.zeros((x.shape[0], OH, OW, O), x.dtype)
    for i in range(OH):
        for j in range(OW):
            patch = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw]
            y[:, i, j] = np.einsum("nuvc,uvco->no", patch, w)
    return y if b is None else y + b


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x, axis=-1):
    e = np.exp(x)
    return e / e.sum(axis, keepdims=True)


def group_norm(x, gamma, beta, groups, eps=1e-6, silu=False):
    """Image by image, group by group."""
    y = np.empty_like(x)
    size = x.shape[-1] // groups
    for n in range(x.shape[0]):
        for k in range(groups):
            one = (n, ..., slice(k * size, (k + 1) * size))
            y[one] = (x[one] - x[one].mean()) / np.sqrt(x[one].var() + eps)
    y = y * gamma + beta
    return y * sigmoid(y) if silu else y


def attention(q, k, v, heads=1):
    """Image by image, head by head."""
    y = np.empty_like(q)
    d = q.shape[2] // heads
    for n in range(q.shape[0]):
        for h in range(heads):
            c = slice(h * d, (h + 1) * d)
            y[n, :, c] = softmax(q[n, :, c] @ k[n, :, c].T / np.sqrt(d)) @ v[n, :, c]
    return y


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


def at(p, name):
    """The parameters of a layer's part."""
    return {key.removeprefix(name + "."): value for key, value in p.items() if key.startswith(name + ".")}


def dense(f, p, x):
    return f.linear(x, p["w"], p["b"])


def conv(f, p, x, stride=1, padding=ONE):
    return f.conv2d(x, p["w"], p["b"], stride=stride, padding=padding)


def norm(f, p, x, silu, groups, eps):
    y = f.group_norm(x, p["gamma"], p["beta"], groups=groups, eps=eps)
    return f.silu(y) if silu else y


def res_block(f, p, x, temb, groups, eps):
    h = conv(f, at(p, "conv1"), norm(f, at(p, "norm1"), x, True, groups, eps))
    h = h + dense(f, at(p, "time"), temb)[:, None, None, :]
    h = conv(f, at(p, "conv2"), norm(f, at(p, "norm2"), h, True, groups, eps))
    return h + (conv(f, at(p, "shortcut"), x, padding=NONE) if "shortcut.w" in p else x)


def attention_block(f, p, x, heads, groups, eps):
    N, H, W, C = x.shape
    h = norm(f, at(p, "norm"), x, False, groups, eps).reshape(N, H * W, C)
    h = f.attention(*(dense(f, at(p, f"attention.{name}"), h) for name in "qkv"), heads=heads)
    return x + dense(f, at(p, "attention.out"), h).reshape(N, H, W, C)


def encoded(t, channels, form):
    half = channels // 2
    angle = t[:, None] / 10000 ** (np.arange(half) / (half - form.startswith("ddpm")))
    first, second = [np.sin(angle), np.cos(angle)][:: -1 if form in ("improved", "ddpm_flipped") else 1]
    return np.stack([first, second], axis=2 if form == "interleaved" else 1).reshape(-1, channels)


def unet(f, p, x, t, rng=None, labels=None, *, channels, blocks, attention, groups, heads=1, head_channels=None,
         norm_eps=1e-6, downsample_padding=0, middle_attention=True, center_input=False, patch=1,
         encoding="ddpm"):  # fmt: skip
    """eps_theta(x_t, t) of Ho et al. 2020 and the options that there are to it, layer by layer, without dropout."""

    def attend(name, h):
        n = h.shape[3] // head_channels if head_channels else heads
        return attention_block(f, at(p, name), h, n, groups, norm_eps)

    def block(name, h):
        return res_block(f, at(p, name), h, temb, groups, norm_eps)

    temb = f.silu(dense(f, at(p, "time1"), f.array(encoded(t, channels[0], encoding))))
    temb = dense(f, at(p, "time2"), temb)
    if "class_embedding.w" in p:  # the last of which is "no label", if there may be none
        temb = temb + p["class_embedding.w"][np.full(len(t), -1) if labels is None else labels]
    temb = f.silu(temb)
    x = 2 * x - 1 if center_input else x
    # pixel (patch i + a, patch j + b) is part patch a + b of the channels at (i, j)
    within = [(a, b) for a in range(patch) for b in range(patch)]
    h = conv(f, at(p, "conv_in"), f.concat(*(x[:, a::patch, b::patch] for a, b in within), axis=3))
    skips, last, halving = [h], len(channels) - 1, ONE if downsample_padding else ((0, 1), (0, 1))
    for i in range(len(channels)):
        for j in range(blocks):
            h = block(f"down.{i}.res.{j}", h)
            h = attend(f"down.{i}.attention.{j}", h) if attention[i] else h
            skips.append(h)
        if i < last:
            h = conv(f, at(p, f"down.{i}.resize"), h, 2, halving)
            skips.append(h)
    h = block("middle1", h)
    h = attend("middle_attention", h) if middle_attention else h
    h = block("middle2", h)
    for i in range(len(channels)):
        for j in range(blocks + 1):
            h = block(f"up.{i}.res.{j}", f.concat(h, skips.pop(), axis=3))
            h = attend(f"up.{i}.attention.{j}", h) if attention[last - i] else h
        if i < last:
            h = conv(f, at(p, f"up.{i}.resize"), f.upsample(h))
    h = conv(f, at(p, "conv_out"), norm(f, at(p, "norm_out"), h, True, groups, norm_eps))
    N, H, W, C = h.shape  # and back, to patch^2 images of C / patch^2 channels, a row of each in turn
    h = h.reshape(N, H, W, patch, patch, -1)
    columns = lambda a: f.concat(*(h[:, :, :, None, a, b] for b in range(patch)), axis=3).reshape(
        N, H, 1, W * patch, -1
    )
    return f.concat(*map(columns, range(patch)), axis=2).reshape(N, H * patch, W * patch, -1)


# the weights that Ho et al. start as zero, in a U-Net of two levels with one block each and attention in the lower
BLOCKS = "down.0.res.0 down.1.res.0 middle1 middle2 up.0.res.0 up.0.res.1 up.1.res.0 up.1.res.1".split()
ATTENTIONS = "down.1.attention.0 middle_attention up.0.attention.0 up.0.attention.1".split()
STARTS_AS_ZERO = {f"{b}.conv2.w" for b in BLOCKS} | {f"{a}.attention.out.w" for a in ATTENTIONS} | {"conv_out.w"}


def rounded(x, bits):
    """Numbers with a mantissa of so many bits, to the nearest, halfway to even."""
    fraction, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.rint(np.ldexp(fraction, bits + 1)), exponent - bits - 1).astype(x.dtype)
