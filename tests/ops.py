"""Every op of the package, a row each: what it computes, in NumPy and in PyTorch, and of what. And any network.

They drive the tests of autograd/, network/ and peers/test_torch.py.
"""

import functools
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
from tinyddpm.network.checks import ENCODINGS

SIDES = st.integers(1, 4)
SHAPES = array_shapes(min_dims=0, max_dims=4, max_side=4)
NO_SCALAR = array_shapes(max_dims=4, max_side=4)
PAIRS = mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4).map(lambda pair: pair.input_shapes)
PADDINGS = st.tuples(*[st.tuples(*[st.integers(0, 3)] * 2)] * 2)

sides = lambda count: st.tuples(*[SIDES] * count)
normal = lambda rng, *shapes: [np.asarray(rng.standard_normal(shape)) for shape in shapes]


def drawn(arrange):
    """A strategy of what arrange(draw, rng) returns; of an op, its inputs and its settings."""
    return st.composite(lambda draw: arrange(draw, np.random.default_rng(draw(SEEDS))))()


def positive(rng, *shapes, low=0.5, high=2.0):
    """Numbers whose sums do not cancel: a result of one element has no larger one beside it to measure it by."""
    return [np.asarray(rng.uniform(low, high, shape)) for shape in shapes]


def around(middle):
    """Numbers on both sides of one that they keep away from."""
    return lambda rng, shape: [np.asarray(middle + rng.choice([-1, 1], shape) * rng.uniform(0.25, 3, shape))]


def array(numbers, shapes=NO_SCALAR, **settings):
    """One array of such numbers, and settings from the strategies that are made for it."""
    make = lambda draw, x: ([x], {name: draw(of(x)) for name, of in settings.items()})
    return drawn(lambda draw, rng: make(draw, *numbers(rng, draw(shapes))))


def between(low, high):
    return array(functools.partial(positive, low=low, high=high), SHAPES)


@drawn
def two(draw, rng):
    """Two arrays that broadcast, or one and a number."""
    a, b = (np.asarray(x * draw(st.sampled_from([-1, 1]))) for x in positive(rng, *draw(PAIRS)))
    return list(draw(st.sampled_from([(a, b), (a, b), (a, -3.0), (1.5, b)]))), {}


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
def of_concat(draw, rng):
    shape, lengths = draw(NO_SCALAR), draw(st.lists(SIDES, min_size=1, max_size=4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    return [x.repeat(n, axis) for x, n in zip(normal(rng, *[shape] * len(lengths)), lengths)], {"axis": axis}


@drawn
def of_embedding(draw, rng):
    K, C = draw(sides(2))
    index = draw(st.lists(st.integers(0, K - 1), min_size=1, max_size=6))
    return positive(rng, (K, C)), {"index": np.array(index, draw(st.sampled_from(["int64", "uint8"])))}


@drawn
def of_conv2d(draw, rng):
    (n, c, o, kh, kw), (h, w), padding = draw(sides(5)), draw(st.tuples(*[st.integers(1, 7)] * 2)), draw(PADDINGS)
    assume(h + sum(padding[0]) >= kh and w + sum(padding[1]) >= kw)
    x, f, b = positive(rng, (n, h, w, c), (kh, kw, c, o), o)
    return [x, f, draw(st.sampled_from([b, None]))], {"stride": draw(st.integers(1, 3)), "padding": padding}


@drawn
def of_group_norm(draw, rng):
    (n, groups, size), between = draw(sides(3)), draw(array_shapes(min_dims=0, max_dims=3, max_side=4))
    assume(groups * size > 1 and math.prod(between) * size >= 4)  # of one or two numbers only 0 or +-1 is left
    # with few numbers in a group the variance may come near 0, where differences of 1e-5 are too coarse
    settings = {"groups": groups, "eps": draw(st.sampled_from([1e-2, 0.1])), "silu": draw(st.booleans())}
    return normal(rng, (n, *between, groups * size), groups * size, groups * size), settings


@drawn
def of_attention(draw, rng):
    n, heads, d, l, s = draw(st.tuples(SIDES, SIDES, *[st.integers(k, 6) for k in (2, 2, 3)]))
    return normal(rng, *((n, length, heads * d) for length in (l, s, s))), {"heads": heads}


def torch_getitem(torch, x, index):
    chosen = np.arange(x.numel()).reshape(x.shape)[index]  # its own slices have no negative step
    return x.flatten()[torch.tensor(chosen.tolist())]


def torch_conv2d(torch, x, w, b=None, stride=1, padding=reference.NONE):
    x = torch.nn.functional.pad(x, (0, 0, *padding[1], *padding[0])).movedim(3, 1)
    return torch.nn.functional.conv2d(x, w.permute(3, 2, 0, 1).contiguous(), b, stride).movedim(1, 3)


def torch_group_norm(torch, x, gamma, beta, groups, eps=1e-6, silu=False):
    y = torch.nn.functional.group_norm(x.movedim(-1, 1), groups, gamma, beta, eps).movedim(1, -1)
    return torch.nn.functional.silu(y) if silu else y


def torch_attention(torch, q, k, v, heads=1):
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Op(NamedTuple):
    """`numpy` and `torch` take what the op takes, after PyTorch itself the latter, which is None where the former
    computes on tensors too; `error` is how far from NumPy's value the op's may be, relative or absolute."""

    op: Callable
    drawn: st.SearchStrategy
    numpy: Callable
    torch: Callable | None = None
    error: float = 0.0


some_axes = lambda x: st.sets(st.integers(0, x.ndim - 1), min_size=1).map(tuple)
an_axis = lambda x: st.integers(-x.ndim, x.ndim - 1)
OVER = array(positive, axis=lambda x: st.none() | an_axis(x) | some_axes(x), keepdims=lambda x: st.booleans())

# fmt: off
OPS = [
    Op(tensor.add, two, operator.add),
    Op(tensor.sub, two, operator.sub),
    Op(tensor.mul, two, operator.mul),
    Op(tensor.div, two, operator.truediv),
    Op(tensor.neg, between(-3, 3), operator.neg),
    Op(tensor.power, of_power, lambda x, exponent: x**exponent, error=1e-15),
    Op(tensor.exp, between(-3, 3), np.exp, lambda torch, x: x.exp(), 1e-14),
    Op(tensor.log, between(0.5, 3), np.log, lambda torch, x: x.log(), 1e-14),
    Op(tensor.sqrt, between(0.5, 3), np.sqrt, lambda torch, x: x.sqrt(), 1e-14),
    Op(tensor.tanh, between(-2, 2), np.tanh, lambda torch, x: x.tanh(), 1e-14),
    Op(tensor.matmul, of_matmul, operator.matmul, error=1e-12),
    Op(tensor.reduce_sum, OVER, np.sum, lambda torch, x, **over: torch.sum(x, **over), 5e-15),
    Op(tensor.reduce_mean, OVER, np.mean, lambda torch, x, **over: torch.mean(x, **over), 5e-15),
    Op(tensor.reshape, array(normal, shape=lambda x: (st.permutations(x.shape) | st.just([-1])).map(tuple)),
       lambda x, shape: x.reshape(shape)),
    Op(tensor.transpose, array(normal, axes=lambda x: st.just(()) | st.permutations(range(-1, x.ndim - 1)).map(tuple)
                                    | st.permutations(range(-x.ndim, 0)).map(tuple)),
       lambda x, axes: np.transpose(x, axes or None),
       lambda torch, x, axes: x.permute(axes or tuple(range(x.ndim))[::-1])),
    Op(tensor.getitem, array(normal, index=lambda x: basic_indices(x.shape, allow_newaxis=True).filter(
                                         lambda index: x[index].size)),
       lambda x, index: x[index], torch_getitem),
    Op(functional.sigmoid, between(-3, 3), reference.sigmoid, lambda torch, x: x.sigmoid(), 1e-13),
    Op(functional.silu, array(around(-1.28), SHAPES),  # where its derivative is 0
       lambda x: x / (1 + np.exp(-x)), lambda torch, x: torch.nn.functional.silu(x), 1e-13),
    Op(functional.softmax, array(normal, array_shapes(min_dims=2, max_dims=4, min_side=3, max_side=5), axis=an_axis),
       reference.softmax, lambda torch, x, axis: x.softmax(axis), 1e-12),
    Op(functional.concat, of_concat, lambda *xs, axis: np.concatenate(xs, axis),
       lambda torch, *xs, axis: torch.cat(xs, axis)),
    Op(functional.linear, of_linear, lambda x, w, b: x @ w + (0 if b is None else b),
       lambda torch, x, w, b: torch.nn.functional.linear(x, w.T, b), 1e-12),
    Op(functional.embedding, of_embedding, lambda w, index: w[index.astype(int)]),
    Op(functional.at_least, array(around(-0.5), SHAPES, least=lambda x: st.just(-0.5)),
       lambda x, least: np.maximum(x, least), lambda torch, x, least: x.clamp(min=least)),
    Op(functional.normal_cdf, between(-3, 3), np.vectorize(lambda x: math.erfc(-x / math.sqrt(2)) / 2),
       lambda torch, x: torch.special.ndtr(x), 1e-14),
    Op(functional.mse, drawn(lambda draw, rng: (normal(rng, *[draw(SHAPES)] * 2), {})),
       lambda a, b: np.square(a - b).mean(), lambda torch, a, b: torch.nn.functional.mse_loss(a, b), 1e-12),
    Op(conv.conv2d, of_conv2d, reference.conv2d, torch_conv2d, 1e-12),
    Op(conv.upsample, array(positive, sides(4)), lambda x: x.repeat(2, axis=1).repeat(2, axis=2),
       lambda torch, x: x.repeat_interleave(2, 1).repeat_interleave(2, 2)),
    Op(fused.group_norm, of_group_norm, reference.group_norm, torch_group_norm, 1e-10),
    Op(fused.attention, of_attention, reference.attention, torch_attention, 1e-12),
]
# fmt: on
NAMES = [row.op.__name__ for row in OPS]
NUMPY = SimpleNamespace(array=np.asarray, **{row.op.__name__: row.numpy for row in OPS})


@drawn
def a_unet(draw, rng):
    """A network of any shape and with any options; the images, timesteps and labels it is called with; the settings for
    reference.py. Its layers all meet here, each as it is meant to be used."""
    pick, maybe = lambda *values: draw(st.sampled_from(values)), lambda **option: draw(st.sampled_from([{}, option]))
    levels = draw(st.lists(st.tuples(st.sampled_from([8, 12]), st.booleans()), min_size=1, max_size=3))
    config = dict(
        channels=[c for c, _ in levels], attention=[attends for _, attends in levels], groups=pick(1, 2),
        blocks=pick(1, 2) if len(levels) < 3 else 1, patch=pick(1, 2, 3), encoding=pick(*ENCODINGS),
        **maybe(norm_eps=0.1), **maybe(downsample_padding=1), **maybe(middle_attention=False),
        **maybe(center_input=True), **pick({}, {"heads": 2}, {"heads": 4}, {"head_channels": 2}),
    )  # fmt: skip
    known = pick({}, {"classes": 3}, {"classes": 3, "label_dropout": 0.5})  # with which -1 is no label, and None are -1
    side, n, (inputs, outputs) = config["patch"] * 2 ** (len(levels) - 1), draw(SIDES), pick((1, 1), (3, 3), (3, 6))
    labels = rng.integers(-1 if "label_dropout" in known else 0, 3, n) if known else None
    labels = None if "label_dropout" in known and draw(st.booleans()) else labels
    (x,), t = normal(rng, (n, side, 3 * side, inputs)), rng.integers(0, 1000, n)
    return UNet(inputs, outputs, **config, **known, rng=rng), [x, t, None, labels], config
