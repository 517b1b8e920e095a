"""Against PyTorch: every op, the layers, the U-Net and the optimiser, their values and all their gradients."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, basic_indices, mutually_broadcastable_shapes

from tinyddpm import UNet, backward
from tinyddpm.autograd import functional, tensor
from tinyddpm.autograd.conv import conv2d, upsample
from tinyddpm.autograd.fused import attention, group_norm
from tinyddpm.network.nn import Attention, Conv2d, GroupNorm, Linear, Module
from tinyddpm.network.unet import AttentionBlock, ResBlock, timestep_encoding
from tinyddpm.training.optim import EMA, Adam, clip_norm

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
F = torch.nn.functional

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
DTYPES = st.sampled_from(sorted(TOLERANCE))
RNGS = st.integers(0, 2**32 - 1).map(np.random.default_rng)
SHAPES = array_shapes(min_dims=0, max_dims=4, max_side=4)
SIDES, HALVES, WIDTHS = st.integers(1, 4), st.sampled_from([1, 2]), st.sampled_from([8, 16])

# numbers whose sums do not cancel: a result of one element has no larger one beside it to measure it by
positive = lambda rng, *shapes: [rng.uniform(0.5, 2, shape) for shape in shapes]


def close(ours, theirs, scale=None):
    """Relative to the largest element: another may be what little is left of large terms, and has their rounding."""
    theirs = theirs.detach()
    assert ours.shape == theirs.shape
    scale = float(theirs.abs().max() if scale is None else scale)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE[ours.dtype.name] * scale)


def agree(ours, theirs, *inputs, **settings):
    """Hold `ours` equal to `theirs` at the arrays `inputs`: the value, and the gradient with respect to each of them.

    If `ours` is a module, `theirs` takes its parameters by name, and their gradients are compared as well. Ours runs in
    both precisions, torch in float64 on the same numbers: so what is seen in float32 is our rounding, not torch's too.
    """
    rng = np.random.default_rng(2**32)  # not one of RNGS, or the gradient would be drawn like the inputs
    module = ours if isinstance(ours, Module) else Module()
    for p in module.parameters():  # away from 0 and 1, behind which a mistake could hide
        p.data = (p.data + 0.1 * rng.standard_normal(p.shape)).astype(np.float32)
    inputs = [x.astype(np.float32) for x in inputs]
    twins = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in [*inputs, *module.state_dict().values()]]
    names = dict(zip(module.named_parameters(), twins[len(inputs) :]))
    z = theirs(*twins[: len(inputs)], **names, **settings)
    u = rng.uniform(0, 2, z.shape).astype(np.float32)
    z.backward(torch.tensor(u, dtype=torch.float64))
    # a layer's gradients are measured together: that of the keys' bias is only rounding, as the softmax ignores it
    largest, layers = {}, [*range(len(inputs)), *(name.rpartition(".")[0] for name in names)]
    for layer, twin in zip(layers, twins):
        largest[layer] = max(largest.get(layer, 0), twin.grad.abs().max())
    for dtype in TOLERANCE:
        leaves = [tensor.Parameter(x.astype(dtype)) for x in inputs] + module.to(dtype=dtype).parameters()
        y = ours(*leaves[: len(inputs)], **settings)
        gradients = backward((y * u.astype(dtype)).sum())
        assert y.dtype == dtype and gradients.keys() == set(leaves)
        close(y.data, z)
        for leaf, twin, layer in zip(leaves, twins, layers):
            close(gradients[leaf], twin.grad, largest[layer])


# -------------------------------------------------------------------------- twins of the layers: images (N, C, H, W)

dense = lambda x, w, b=None: F.linear(x, w.T, b)
at = lambda p, name: {key.removeprefix(name + "."): w for key, w in p.items() if key.startswith(name + ".")}
double = lambda x: F.interpolate(x, scale_factor=2, mode="nearest")


def conv(x, w, b=None, stride=1, padding=((1, 1), (1, 1))):
    return F.conv2d(F.pad(x, (*padding[1], *padding[0])), w.permute(3, 2, 0, 1).contiguous(), b, stride)


def norm(x, gamma, beta, groups, eps=1e-6, silu=False):
    y = F.group_norm(x, groups, gamma, beta, eps)
    return F.silu(y) if silu else y


def attend(q, k, v, heads):
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def self_attention(x, heads, **p):
    return dense(attend(*(dense(x, **at(p, name)) for name in "qkv"), heads), **at(p, "out"))


def res_block(x, temb, rng, groups, **p):
    h = conv(norm(x, **at(p, "norm1"), groups=groups, silu=True), **at(p, "conv1"))
    h = h + dense(temb, **at(p, "time"))[:, :, None, None]
    h = conv(norm(h, **at(p, "norm2"), groups=groups, silu=True), **at(p, "conv2"))
    return h + (conv(x, **at(p, "shortcut"), padding=((0, 0), (0, 0))) if "shortcut.w" in p else x)


def attention_block(x, groups, heads, **p):
    h = norm(x, **at(p, "norm"), groups=groups).flatten(2).transpose(1, 2)
    return x + self_attention(h, heads, **at(p, "attention")).transpose(1, 2).reshape(x.shape)


def encoding(t, channels):
    angle = torch.tensor(t)[:, None] / 10000 ** torch.linspace(0, 1, channels // 2, dtype=torch.float64)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def unet(x, t, channels, blocks, attention, heads, groups, **p):
    def block(h, level, i):
        h = res_block(h, temb, None, groups, **at(p, f"{level}.res.{i}"))
        attend = at(p, f"{level}.attention.{i}")
        return attention_block(h, groups, heads, **attend) if attend else h

    temb = F.silu(dense(F.silu(dense(encoding(t, channels[0]), **at(p, "time1"))), **at(p, "time2")))
    skips, last = [conv(x, **at(p, "conv_in"))], len(channels) - 1
    for level in range(last + 1):
        for i in range(blocks):
            skips.append(block(skips[-1], f"down.{level}", i))
        if level < last:
            skips.append(conv(skips[-1], **at(p, f"down.{level}.resize"), stride=2, padding=((0, 1), (0, 1))))
    h = res_block(skips[-1], temb, None, groups, **at(p, "middle1"))
    h = attention_block(h, groups, heads, **at(p, "middle_attention"))
    h = res_block(h, temb, None, groups, **at(p, "middle2"))
    for level in range(last + 1):
        for i in range(blocks + 1):
            h = block(torch.cat([h, skips.pop()], dim=1), f"up.{level}", i)
        if level < last:
            h = conv(double(h), **at(p, f"up.{level}.resize"))
    return conv(norm(h, **at(p, "norm_out"), groups=groups, silu=True), **at(p, "conv_out"))


def channels_last(function, **fixed):
    """Make of a `function` of images (N, C, ...) one of images (N, ..., C)."""
    return lambda x, *rest, **more: function(x.movedim(-1, 1), *rest, **fixed, **more).movedim(1, -1)


# --------------------------------------------------------------------------------------------------------------- ops


@pytest.mark.parametrize("name", ["neg", "exp", "log", "sqrt", "tanh", "sigmoid", "silu"])
@given(shape=SHAPES, rng=RNGS)
def test_elementwise(name, shape, rng):
    ours, theirs = (getattr(a if hasattr(a, name) else b, name) for a, b in ((tensor, functional), (torch, F)))
    low = 0.5 if name in ("log", "sqrt") else -1  # the derivative of SiLU vanishes at -1.28
    agree(ours, theirs, rng.uniform(low, 3, shape))


@given(shape=SHAPES, rng=RNGS)
def test_normal_cdf_and_at_least(shape, rng):
    x = rng.uniform(-3, 3, shape)
    agree(functional.normal_cdf, torch.special.ndtr, x)
    agree(functional.at_least, lambda x, least: x.clamp(min=least), x, least=-0.5)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
@given(shapes=mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4), rng=RNGS)
def test_arithmetic_broadcasts(name, shapes, rng):
    a, b = positive(rng, *shapes.input_shapes)
    agree(getattr(tensor, name), getattr(torch, name), -a, b)


@given(shape=SHAPES, exponent=st.sampled_from([0, 1, 2, 3, -1, 0.5, -2.5]), rng=RNGS)
def test_power(shape, exponent, rng):
    sign = rng.choice([-1, 1], shape) if isinstance(exponent, int) else 1
    agree(tensor.power, torch.pow, sign * rng.uniform(0.5, 2, shape), exponent=exponent)


@given(n=SIDES, k=SIDES, m=SIDES, lead=mutually_broadcastable_shapes(num_shapes=2, max_dims=2, max_side=3), rng=RNGS)
def test_matmul_and_linear(n, k, m, lead, rng):
    x, y = lead.input_shapes
    x, y, z, w, b = positive(rng, (*x, n, k), (*y, k, m), (n, k + 1), (k, m), m)
    agree(tensor.matmul, torch.matmul, x, y)
    agree(functional.linear, dense, x, w)
    agree(functional.linear, dense, x[..., 0, :], w, b)
    agree(Linear(k + 1, m + 1, rng), dense, z)


@pytest.mark.parametrize("name", ["sum", "mean"])
@given(shape=array_shapes(max_dims=4, max_side=4), keepdims=st.booleans(), rng=RNGS, data=st.data())
def test_reductions_over_any_axes(name, shape, keepdims, rng, data):
    axis = data.draw(st.none() | st.sets(st.integers(-len(shape), -1), min_size=1).map(tuple))
    agree(getattr(tensor, f"reduce_{name}"), getattr(torch, name), *positive(rng, shape), axis=axis, keepdims=keepdims)


@given(shape=array_shapes(max_dims=4, max_side=5), rng=RNGS, data=st.data())
def test_reshape_transpose_getitem(shape, rng, data):
    x = rng.standard_normal(shape)
    agree(tensor.reshape, torch.reshape, x, shape=tuple(data.draw(st.permutations(shape))))
    agree(tensor.transpose, lambda x, axes: x.permute(axes), x, axes=tuple(data.draw(st.permutations(range(x.ndim)))))
    index = data.draw(basic_indices(shape, allow_newaxis=True))
    chosen = np.arange(x.size).reshape(shape)[index].tolist()  # torch's own slices have no negative step
    assume(np.size(chosen))
    agree(tensor.getitem, lambda x, index: x.flatten()[torch.tensor(chosen)], x, index=index)


@given(shape=array_shapes(min_dims=2, min_side=3, max_side=5), parts=st.lists(SIDES, min_size=1), rng=RNGS,
       data=st.data())  # fmt: skip
def test_softmax_and_concat_along_any_axis(shape, parts, rng, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    agree(functional.softmax, lambda x, axis: F.softmax(x, axis), rng.standard_normal(shape), axis=axis)
    xs = [rng.standard_normal(shape).repeat(n, axis) for n in parts]
    agree(functional.concat, lambda *xs, axis: torch.cat(xs, axis), *xs, axis=axis)


@given(shape=SHAPES, p=st.sampled_from([0, 0.1, 0.5]), seed=st.integers(0, 99))
def test_mse_and_dropout(shape, p, seed):
    x, y = np.random.default_rng(seed).standard_normal((2, *shape))
    agree(functional.mse, F.mse_loss, x, y)
    ours = lambda x: functional.dropout(x, p, np.random.default_rng(seed))
    kept = torch.tensor(tensor.as_array(ours(np.ones(shape))) > 0)
    agree(ours, lambda x: x * kept / (1 - p), x)


@given(
    n=SIDES, h=st.integers(1, 7), w=st.integers(1, 7), c=SIDES, o=SIDES, kernel=st.tuples(SIDES, SIDES), rng=RNGS,
    stride=st.integers(1, 3), padding=st.tuples(*[st.tuples(*[st.integers(0, 3)] * 2)] * 2), bias=st.booleans(),
)  # fmt: skip
def test_conv2d_and_upsample(n, h, w, c, o, kernel, stride, padding, bias, rng):
    assume(h + sum(padding[0]) >= kernel[0] and w + sum(padding[1]) >= kernel[1])
    x, *filters = positive(rng, (n, h, w, c), (*kernel, c, o), o)[: 2 + bias]
    agree(conv2d, channels_last(conv), x, *filters, stride=stride, padding=padding)
    agree(Conv2d(c, o, min(kernel), rng, stride, padding), channels_last(conv, stride=stride, padding=padding), x)
    agree(upsample, channels_last(double), x)


@given(n=SIDES, space=array_shapes(max_dims=3, max_side=4), groups=SIDES, size=SIDES, silu=st.booleans(),
       eps=st.sampled_from([1e-6, 1e-3]), rng=RNGS)  # fmt: skip
def test_group_norm(n, space, groups, size, silu, eps, rng):
    C = groups * size
    assume(C > 1 and np.prod(space) * size >= 4)  # of one or two numbers the norm leaves only 0 or +-1
    x, gamma, beta = (rng.standard_normal(shape) for shape in ((n, *space, C), C, C))
    agree(group_norm, channels_last(norm), x, gamma, beta, groups=groups, eps=eps, silu=silu)
    agree(GroupNorm(C, groups, eps), channels_last(norm, groups=groups, eps=eps), x, silu=silu)


@given(n=SIDES, l=st.integers(2, 6), s=st.integers(3, 6), heads=SIDES, d=st.integers(2, 4), rng=RNGS)
def test_attention(n, l, s, heads, d, rng):
    q, k, v = (rng.standard_normal((n, length, heads * d)) for length in (l, s, s))
    agree(attention, attend, q, k, v, heads=heads)
    agree(Attention(heads * d, heads, rng), lambda x, **p: self_attention(x, heads, **p), k)


@given(n=SIDES, h=st.integers(2, 5), w=st.integers(2, 5), a=WIDTHS, b=WIDTHS, groups=HALVES, heads=HALVES, rng=RNGS)
def test_blocks(n, h, w, a, b, groups, heads, rng):
    x, temb = rng.standard_normal((n, h, w, a)), rng.standard_normal((n, 6))
    agree(ResBlock(a, b, 6, groups, 0.1, rng), channels_last(res_block, groups=groups), x, temb, rng=None)
    agree(AttentionBlock(a, heads, groups, rng), channels_last(attention_block, groups=groups, heads=heads), x)


@given(
    levels=st.lists(st.tuples(WIDTHS, st.booleans()), min_size=1, max_size=3), blocks=HALVES, heads=HALVES,
    groups=HALVES, images=st.tuples(SIDES, SIDES), n=SIDES, rng=RNGS,
)  # fmt: skip
def test_unet(levels, blocks, heads, groups, images, n, rng):
    channels, attention = zip(*levels)
    config = dict(channels=channels, blocks=blocks, attention=attention, heads=heads, groups=groups)
    x = rng.standard_normal((n, 2 ** len(levels), 3 * 2 ** (len(levels) - 1), images[0]))
    agree(UNet(*images, **config, rng=rng), channels_last(unet, **config), x, t=rng.integers(0, 1000, n))


@given(t=st.lists(st.integers(0, 10**4), min_size=1), half=st.integers(2, 64))
def test_timestep_encoding(t, half):
    close(timestep_encoding(np.array(t), 2 * half), encoding(t, 2 * half))


@given(dtype=DTYPES, size=st.integers(1, 9), b1=st.sampled_from([0.0, 0.9]), b2=st.sampled_from([0.9, 0.999]), rng=RNGS,
       eps=st.sampled_from([1e-8, 1e-2]), decay=st.sampled_from([0, 0.1]))  # fmt: skip
def test_adam(dtype, size, b1, b2, eps, decay, rng):
    theta, *gradients = rng.standard_normal((21, size)).astype(dtype)
    twin = torch.tensor(theta, requires_grad=True)
    ours = Adam(theta, 0.1, (b1, b2), eps, decay)
    theirs = torch.optim.AdamW([twin], 0.1, (b1, b2), eps, decay)
    for n, g in enumerate(gradients):
        twin.grad, theirs.param_groups[0]["lr"] = torch.tensor(g), 0.1 / (n + 1)
        ours.step(g, 0.1 / (n + 1))
        theirs.step()
    close(theta, twin)


@given(dtype=DTYPES, sizes=st.lists(SIDES, min_size=1), rng=RNGS, share=st.sampled_from([0.1, 0.9, 1.1, 10]))
def test_clip_norm(dtype, sizes, rng, share):
    g = rng.uniform(1e6, 2e6, sum(sizes)).astype(dtype)  # beside its norm the 1e-6 that torch adds is nothing
    twins = torch.tensor(g).split(sizes)
    for twin in twins:
        twin.grad = twin.clone()
    max_norm = share * float(np.linalg.norm(g))
    close(clip_norm(g, max_norm), torch.nn.utils.clip_grad_norm_(twins, max_norm))
    close(g, torch.cat([twin.grad for twin in twins]))


@given(dtype=DTYPES, decay=st.sampled_from([0, 0.5, 0.9999]), rng=RNGS)
def test_ema(dtype, decay, rng):
    ema = EMA(Linear(3, 2, rng).to(dtype=dtype), decay)
    average = torch.tensor(ema.average)
    for n, theta in enumerate(rng.standard_normal((20, 8)).astype(dtype)):
        ema.update(theta)
        average = torch.optim.swa_utils.get_ema_avg_fn(min(decay, (1 + n) / (10 + n)))(average, torch.tensor(theta), n)
    close(ema.average, average)
