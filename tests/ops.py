"""Every op and every layer of the package, a row each: what it computes, in NumPy and in PyTorch, and of what.

These tables drive the tests of autograd/, network/ and peers/test_torch.py. An op's row is drawn from as often as a
test has examples: ops of the same kind share what they are given.
"""

import math
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import reference
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, basic_indices, mutually_broadcastable_shapes
from strategies import SEEDS

from tinyddpm import UNet
from tinyddpm.autograd import conv, functional, fused, tensor
from tinyddpm.network.nn import Attention, Conv2d, GroupNorm, Linear
from tinyddpm.network.unet import AttentionBlock, ResBlock

SHAPES = array_shapes(min_dims=0, max_dims=4, max_side=4)
SIDES = st.integers(1, 4)


def drawn(arrange):
    """A strategy of what arrange(draw, rng) returns."""
    return st.composite(lambda draw: arrange(draw, np.random.default_rng(draw(SEEDS))))()


def sides(count):
    return st.tuples(*[SIDES] * count)


def positive(rng, *shapes):
    """Numbers whose sums do not cancel: a result of one element has no larger one beside it to measure it by."""
    return [np.asarray(rng.uniform(0.5, 2, shape)) for shape in shapes]


def normal(rng, *shapes):
    return [np.asarray(rng.standard_normal(shape)) for shape in shapes]


# ------------------------------------------------------------------------------------------ inputs, and settings


def one(low, high):
    return drawn(lambda draw, rng: ([np.asarray(rng.uniform(low, high, draw(SHAPES)))], {}))


@drawn
def of_silu(draw, rng):
    """Not near -1.28, where its derivative vanishes."""
    x = rng.uniform(0.25, 4, shape := draw(SHAPES))
    return [np.asarray(rng.choice([-1, 1], shape) * x - 1.28)], {}


@drawn
def of_at_least(draw, rng):
    x = rng.uniform(0.1, 2, shape := draw(SHAPES))
    return [np.asarray(rng.choice([-1, 1], shape) * x - 0.5)], {"least": -0.5}


@drawn
def two(draw, rng):
    """Two arrays that broadcast, or one and a number."""
    shapes = draw(mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4)).input_shapes
    a, b = (np.asarray(x * draw(st.sampled_from([-1, 1]))) for x in positive(rng, *shapes))
    return list(draw(st.sampled_from([(a, b), (a, b), (a, -3.0), (1.5, b)]))), {}


@drawn
def of_mse(draw, rng):
    shape = draw(SHAPES)
    return normal(rng, shape, shape), {}


@drawn
def of_power(draw, rng):
    exponent, (x,) = draw(st.sampled_from([0, 1, 2, 3, -1, 0.5, -2.5])), positive(rng, draw(SHAPES))
    sign = rng.choice([-1, 1], x.shape) if isinstance(exponent, int) else 1
    return [np.asarray(sign * x)], {"exponent": exponent}


@drawn
def of_matmul(draw, rng):
    (n, k, m), lead = draw(sides(3)), draw(mutually_broadcastable_shapes(num_shapes=2, max_dims=2, max_side=3))
    return positive(rng, (*lead.input_shapes[0], n, k), (*lead.input_shapes[1], k, m)), {}


@drawn
def of_linear(draw, rng):
    c, o = draw(sides(2))
    x, w, b = positive(rng, (*draw(array_shapes(min_dims=0, max_dims=3, max_side=4)), c), (c, o), o)
    return [x, w, draw(st.sampled_from([b, None]))], {}


@drawn
def of_reduction(draw, rng):
    (x,) = positive(rng, draw(array_shapes(max_dims=4, max_side=4)))
    axis = st.integers(-x.ndim, x.ndim - 1)
    some = st.sets(st.integers(0, x.ndim - 1), min_size=1).map(tuple)
    return [x], {"axis": draw(st.none() | axis | some), "keepdims": draw(st.booleans())}


@drawn
def of_reshape(draw, rng):
    shape = draw(array_shapes(max_dims=4, max_side=5))
    return normal(rng, shape), {"shape": tuple(draw(st.permutations(shape) | st.just([-1])))}


@drawn
def of_transpose(draw, rng):
    (x,) = normal(rng, draw(array_shapes(max_dims=4, max_side=5)))
    axes = st.permutations(range(x.ndim)) | st.permutations(range(-x.ndim, 0)) | st.just(())
    return [x], {"axes": tuple(draw(axes))}


@drawn
def of_getitem(draw, rng):
    (x,) = normal(rng, draw(array_shapes(max_dims=4, max_side=5)))
    index = draw(basic_indices(x.shape, allow_newaxis=True))
    assume(x[index].size)
    return [x], {"index": index}


@drawn
def of_softmax(draw, rng):
    (x,) = normal(rng, draw(array_shapes(min_dims=2, max_dims=4, min_side=3, max_side=5)))
    return [x], {"axis": draw(st.integers(-x.ndim, x.ndim - 1))}


@drawn
def of_concat(draw, rng):
    shape = draw(array_shapes(max_dims=4, max_side=4))
    axis, lengths = draw(st.integers(-len(shape), len(shape) - 1)), draw(st.lists(SIDES, min_size=1, max_size=4))
    return [x.repeat(n, axis) for x, n in zip(normal(rng, *[shape] * len(lengths)), lengths)], {"axis": axis}


@drawn
def of_embedding(draw, rng):
    K, C = draw(sides(2))
    index = draw(st.lists(st.integers(0, K - 1), min_size=1, max_size=6))
    return positive(rng, (K, C)), {"index": np.array(index, draw(st.sampled_from(["int64", "uint8"])))}


@drawn
def of_conv2d(draw, rng):
    (n, c, o, kh, kw), (h, w) = draw(sides(5)), draw(st.tuples(*[st.integers(1, 7)] * 2))
    padding = draw(st.tuples(*[st.tuples(*[st.integers(0, 3)] * 2)] * 2))
    assume(h + sum(padding[0]) >= kh and w + sum(padding[1]) >= kw)
    x, f, b = positive(rng, (n, h, w, c), (kh, kw, c, o), o)
    return [x, f, draw(st.sampled_from([b, None]))], {"stride": draw(st.integers(1, 3)), "padding": padding}


@drawn
def of_upsample(draw, rng):
    return positive(rng, draw(sides(4))), {}


@drawn
def of_group_norm(draw, rng):
    n, groups, size = draw(sides(3))
    between, C = draw(array_shapes(min_dims=0, max_dims=3, max_side=4)), groups * size
    assume(C > 1 and math.prod(between) * size >= 4)  # of one or two numbers the norm leaves only 0 or +-1
    # with few numbers in a group the variance may come near 0, where differences of 1e-5 are too coarse
    settings = {"groups": groups, "eps": draw(st.sampled_from([1e-2, 0.1])), "silu": draw(st.booleans())}
    return normal(rng, (n, *between, C), C, C), settings


@drawn
def of_attention(draw, rng):
    (n, heads), d = draw(sides(2)), draw(st.integers(2, 4))
    l, s = draw(st.integers(2, 6)), draw(st.integers(3, 6))
    return normal(rng, *((n, length, heads * d) for length in (l, s, s))), {"heads": heads}


# ------------------------------------------------------------------------------------------ the same in PyTorch


def torch_conv2d(torch, x, w, b=None, stride=1, padding=reference.NONE):
    x = torch.nn.functional.pad(x, (0, 0, *padding[1], *padding[0])).movedim(3, 1)
    return torch.nn.functional.conv2d(x, w.permute(3, 2, 0, 1).contiguous(), b, stride).movedim(1, 3)


def torch_group_norm(torch, x, gamma, beta, groups, eps=1e-6, silu=False):
    y = torch.nn.functional.group_norm(x.movedim(-1, 1), groups, gamma, beta, eps).movedim(1, -1)
    return torch.nn.functional.silu(y) if silu else y


def torch_attention(torch, q, k, v, heads=1):
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def torch_getitem(torch, x, index):
    chosen = np.arange(x.numel()).reshape(x.shape)[index]  # its own slices have no negative step
    return x.flatten()[torch.tensor(chosen.tolist())]


class Op(NamedTuple):
    """`numpy` and `torch` take what the op takes, after PyTorch itself the latter, which is None where the former
    computes on tensors too; `error` is how far from NumPy's value the op's may be, relative or absolute."""

    op: Callable
    drawn: st.SearchStrategy  # of its inputs and its settings
    numpy: Callable
    torch: Callable | None = None
    error: float = 0.0


# fmt: off
OPS = [
    Op(tensor.add, two, operator.add),
    Op(tensor.sub, two, operator.sub),
    Op(tensor.mul, two, operator.mul),
    Op(tensor.div, two, operator.truediv),
    Op(tensor.neg, one(-3, 3), operator.neg),
    Op(tensor.power, of_power, lambda x, exponent: x**exponent, error=1e-15),
    Op(tensor.exp, one(-3, 3), np.exp, lambda torch, x: x.exp()),
    Op(tensor.log, one(0.5, 3), np.log, lambda torch, x: x.log()),
    Op(tensor.sqrt, one(0.5, 3), np.sqrt, lambda torch, x: x.sqrt()),
    Op(tensor.tanh, one(-2, 2), np.tanh, lambda torch, x: x.tanh()),
    Op(tensor.matmul, of_matmul, operator.matmul, error=1e-12),
    Op(tensor.reduce_sum, of_reduction, np.sum, lambda torch, x, **over: torch.sum(x, **over), error=5e-15),
    Op(tensor.reduce_mean, of_reduction, np.mean, lambda torch, x, **over: torch.mean(x, **over), error=5e-15),
    Op(tensor.reshape, of_reshape, lambda x, shape: x.reshape(shape)),
    Op(tensor.transpose, of_transpose, lambda x, axes: np.transpose(x, axes or None),
       lambda torch, x, axes: x.permute(axes or tuple(range(x.ndim))[::-1])),
    Op(tensor.getitem, of_getitem, lambda x, index: x[index], torch_getitem),
    Op(functional.sigmoid, one(-3, 3), reference.sigmoid, lambda torch, x: x.sigmoid(), 1e-13),
    Op(functional.silu, of_silu, lambda x: x / (1 + np.exp(-x)), lambda torch, x: torch.nn.functional.silu(x), 1e-13),
    Op(functional.softmax, of_softmax, reference.softmax, lambda torch, x, axis: x.softmax(axis), 1e-12),
    Op(functional.concat, of_concat, lambda *xs, axis: np.concatenate(xs, axis),
       lambda torch, *xs, axis: torch.cat(xs, axis)),
    Op(functional.linear, of_linear, lambda x, w, b: x @ w + (0 if b is None else b),
       lambda torch, x, w, b: torch.nn.functional.linear(x, w.T, b), 1e-12),
    Op(functional.embedding, of_embedding, lambda w, index: w[index.astype(int)]),
    Op(functional.at_least, of_at_least, lambda x, least: np.maximum(x, least), lambda torch, x, least: x.clamp(min=least)),
    Op(functional.normal_cdf, one(-3, 3), np.vectorize(lambda x: math.erfc(-x / math.sqrt(2)) / 2),
       lambda torch, x: torch.special.ndtr(x), 1e-14),
    Op(functional.mse, of_mse, lambda a, b: np.square(a - b).mean(),
       lambda torch, a, b: torch.nn.functional.mse_loss(a, b), 1e-12),
    Op(conv.conv2d, of_conv2d, reference.conv2d, torch_conv2d, 1e-12),
    Op(conv.upsample, of_upsample, lambda x: x.repeat(2, axis=1).repeat(2, axis=2),
       lambda torch, x: x.repeat_interleave(2, 1).repeat_interleave(2, 2)),
    Op(fused.group_norm, of_group_norm, reference.group_norm, torch_group_norm, 1e-10),
    Op(fused.attention, of_attention, reference.attention, torch_attention, 1e-12),
]
# fmt: on
NAMES = [row.op.__name__ for row in OPS]
NUMPY = SimpleNamespace(array=np.asarray, **{row.op.__name__: row.numpy for row in OPS})


# -------------------------------------------------------------------------------------------------------- layers


@drawn
def a_linear(draw, rng):
    c, o = draw(sides(2))
    return Linear(c, o, rng), reference.dense, positive(rng, (draw(SIDES), c)), {}


@drawn
def a_conv2d(draw, rng):
    kernel, stride, padding = draw(st.tuples(SIDES, st.integers(1, 3), st.tuples(*[st.tuples(SIDES, SIDES)] * 2)))
    fixed = {"stride": stride, "padding": padding}
    return Conv2d(2, 3, kernel, rng, **fixed), reference.conv, positive(rng, (2, *draw(sides(2)), 2)), fixed


@drawn
def a_group_norm(draw, rng):
    fixed = {"groups": draw(SIDES), "eps": draw(st.sampled_from([1e-6, 0.1]))}
    x, C = *normal(rng, (2, 2, *draw(sides(1)), 2 * fixed["groups"])), 2 * fixed["groups"]
    return GroupNorm(C, **fixed), reference.norm, [x, draw(st.booleans())], fixed


@drawn
def an_attention(draw, rng):
    heads, n, L = draw(st.tuples(SIDES, SIDES, st.integers(3, 6)))
    return Attention(2 * heads, heads, rng), reference.self_attention, normal(rng, (n, L, 2 * heads)), {"heads": heads}


@drawn
def a_res_block(draw, rng):
    (n, a, b), groups, eps = draw(sides(3)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1e-6, 0.1]))
    inputs = [*normal(rng, (n, 2, 3, 4 * a), (n, 6)), None]
    return ResBlock(4 * a, 4 * b, 6, groups, 0.1, rng, eps), reference.res_block, inputs, {"groups": groups, "eps": eps}


@drawn
def an_attention_block(draw, rng):
    n, a, heads = draw(sides(3))
    fixed = {"groups": draw(st.sampled_from([1, 2])), "eps": draw(st.sampled_from([1e-6, 0.1])), "heads": heads}
    C = 4 * a * heads
    return AttentionBlock(C, rng=rng, **fixed), reference.attention_block, normal(rng, (n, 2, 3, C)), fixed


@drawn
def a_unet(draw, rng):
    """A network of any shape and with any options, its images, timesteps and labels."""
    levels = draw(st.lists(st.tuples(st.sampled_from([4, 8, 12]), st.booleans()), min_size=1, max_size=3))
    pick = lambda *values: draw(st.sampled_from(values))
    channels, attention = zip(*levels)
    config = dict(
        channels=channels, attention=attention, blocks=pick(1, 2), groups=pick(1, 2), norm_eps=pick(1e-6, 0.1),
        downsample_padding=pick(0, 1), middle_attention=pick(True, False), center_input=pick(False, True),
        patch=pick(1, 2, 3), **pick({}, {"heads": 2}, {"heads": 4}, {"head_channels": 2}),
    )  # fmt: skip
    classes, (inputs, outputs) = pick(None, 3), pick((1, 1), (3, 3), (3, 6))
    side, n = config["patch"] * 2 ** (len(levels) - 1), draw(st.integers(1, 3))
    labels = rng.integers(0, classes, n) if classes else None
    (x,), t = normal(rng, (n, side, 2 * side, inputs)), rng.integers(0, 1000, n)
    return UNet(inputs, outputs, **config, classes=classes, rng=rng), reference.unet, [x, t, None, labels], config


# strategies of a layer, what computes the same in reference.py, the inputs of both, and the settings of the latter
LAYERS = {
    "Linear": a_linear, "Conv2d": a_conv2d, "GroupNorm": a_group_norm, "Attention": an_attention,
    "ResBlock": a_res_block, "AttentionBlock": an_attention_block, "UNet": a_unet,
}  # fmt: skip
