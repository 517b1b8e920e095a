"""Convolution, upsampling, group norm and attention against reference.py; the layers that hold their weights."""

import itertools
import math

import numpy as np
import pytest
import reference
from gradcheck import check_op
from hypothesis import assume, given
from hypothesis import strategies as st

from tinyddpm.autograd.backward import backward
from tinyddpm.autograd.conv import conv2d, correlate, correlate_grad_x, upsample
from tinyddpm.autograd.functional import column_sums
from tinyddpm.autograd.fused import attention, group_norm
from tinyddpm.autograd.tensor import Parameter, Tensor
from tinyddpm.network.nn import Attention, Conv2d, GroupNorm, Linear, Module

SEEDS = st.integers(0, 2**32 - 1)
small = st.integers(1, 4)
sides = st.integers(0, 3)


@given(
    n=st.integers(1, 3), h=st.integers(1, 7), w=st.integers(1, 7), c=small, o=small, kh=small, kw=small,
    stride=st.integers(1, 3), padding=st.tuples(st.tuples(sides, sides), st.tuples(sides, sides)), seed=SEEDS,
)  # fmt: skip
def test_conv2d_with_any_kernel_stride_and_padding(n, h, w, c, o, kh, kw, stride, padding, seed):
    assume(h + sum(padding[0]) >= kh and w + sum(padding[1]) >= kw)
    rng = np.random.default_rng(seed)
    x, f, b = rng.standard_normal((n, h, w, c)), rng.standard_normal((kh, kw, c, o)), rng.standard_normal(o)
    expected = reference.conv2d(x, f, b, stride, padding)
    np.testing.assert_allclose(conv2d(Tensor(x), f, b, stride=stride, padding=padding).data, expected, atol=1e-12)
    check_op(conv2d, x, f, b, stride=stride, padding=padding)


@given(
    size=st.integers(1, 9),
    k=st.integers(1, 5),
    stride=st.integers(1, 4),
    pads=st.tuples(st.integers(0, 6), st.integers(0, 6)),
)
def test_the_gradient_for_the_image_reaches_exactly_the_pixels_that_were_seen(size, k, stride, pads):
    assume(size + sum(pads) >= k)
    out = (size + sum(pads) - k) // stride + 1
    seen = [sum(0 <= p - (i * stride - pads[0]) < k for i in range(out)) for p in range(size)]
    dx = correlate_grad_x(np.ones((1, out, 1, 1)), np.ones((k, 1, 1, 1)), stride, (pads, (0, 0)), (1, size, 1, 1))
    assert dx.ravel().tolist() == seen


def test_conv2d_padding_forms():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 5, 5, 3)), Parameter(rng.standard_normal((3, 3, 3, 4)))
    same = conv2d(x, w, padding=1).data
    assert same.shape == (2, 5, 5, 4)
    np.testing.assert_array_equal(same, conv2d(x, w, padding=((1, 1), (1, 1))).data)
    one_sided = conv2d(x, w, stride=2, padding=((0, 1), (0, 1))).data
    np.testing.assert_allclose(one_sided, reference.conv2d(x, w.data, 0, 2, ((0, 1), (0, 1))), atol=1e-12)


def test_conv2d_on_inputs_that_are_not_contiguous():
    rng = np.random.default_rng(0)
    x, w = (
        rng.standard_normal((3, 5, 6, 2)).transpose(1, 2, 3, 0),
        rng.standard_normal((4, 3, 2, 2)).transpose(2, 3, 1, 0),
    )
    check_op(conv2d, x, w[:2], None)
    np.testing.assert_allclose(
        conv2d(Tensor(x), w[:2]).data, reference.conv2d(x, w[:2], 0, 1, ((0, 0), (0, 0))), atol=1e-12
    )


def test_convolution_is_linear_in_the_image_so_its_gradient_is_its_transpose():
    rng = np.random.default_rng(0)
    w, pad = rng.standard_normal((3, 2, 2, 3)), ((1, 0), (2, 1))
    x = rng.standard_normal((2, 6, 5, 2))
    y = correlate(x, w, 2, pad)
    g = rng.standard_normal(y.shape)
    assert math.isclose((y * g).sum(), (x * correlate_grad_x(g, w, 2, pad, x.shape)).sum(), rel_tol=1e-12)


@given(n=st.integers(1, 3), h=small, w=small, c=small, seed=SEEDS)
def test_upsample(n, h, w, c, seed):
    x = np.random.default_rng(seed).standard_normal((n, h, w, c))
    np.testing.assert_array_equal(upsample(Tensor(x)).data, reference.upsample(x))
    check_op(upsample, x)


@given(
    n=st.integers(1, 3), between=st.lists(small, max_size=3), groups=st.integers(1, 3), size=st.integers(1, 3),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]), silu=st.booleans(), seed=SEEDS,
)  # fmt: skip
def test_group_norm_plain_and_with_silu(n, between, groups, size, eps, silu, seed):
    assume(math.prod(between) * size > 1)
    rng = np.random.default_rng(seed)
    C = groups * size
    x, gamma, beta = 2 * rng.standard_normal((n, *between, C)) + 1, rng.standard_normal(C), rng.standard_normal(C)
    y = group_norm(Tensor(x), gamma, beta, groups=groups, eps=eps, silu=silu).data
    np.testing.assert_allclose(y, reference.group_norm(x, gamma, beta, groups, eps, silu), atol=1e-10)
    # with two or three numbers in a group the variance may come near 0, where differences of 1e-5 are too coarse
    check_op(group_norm, x, gamma, beta, groups=groups, eps=max(eps, 1e-2), silu=silu)


def test_epsilon_of_group_norm():
    x, one, zero = np.full((1, 2, 2), 1e-3) * [[[1], [-1]]], np.ones(2), np.zeros(2)
    default = group_norm(Tensor(x), one, zero, groups=1).data
    np.testing.assert_allclose(default, x / np.sqrt(1e-6 + 1e-6), rtol=1e-12)  # variance 1e-6, epsilon of Ho et al.
    layer = GroupNorm(2, 1, eps=0.5).to(dtype="float64")
    np.testing.assert_allclose(layer(Tensor(x)).data, x / np.sqrt(1e-6 + 0.5), rtol=1e-12)


def test_group_norm_of_one_number_is_beta():
    x = np.random.default_rng(0).standard_normal((3, 1, 4))
    y = group_norm(Tensor(x), np.ones(4), np.arange(4.0), groups=4).data
    np.testing.assert_array_equal(y, np.broadcast_to(np.arange(4.0), y.shape))


def test_group_norm_keeps_its_precision_where_the_mean_is_large():
    x = np.random.default_rng(0).standard_normal((2, 64, 8))
    y = group_norm(
        Tensor((x + 1000).astype(np.float32)), np.ones(8, np.float32), np.zeros(8, np.float32), groups=2
    ).data
    np.testing.assert_allclose(y, reference.group_norm(x, 1, 0, 2, 1e-6, False), atol=1e-3)


@given(n=st.integers(1, 3), l=small, s=small, heads=st.integers(1, 3), d=st.integers(1, 3), seed=SEEDS)
def test_attention_with_any_number_of_heads(n, l, s, heads, d, seed):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, length, heads * d)) for length in (l, s, s))
    np.testing.assert_allclose(
        attention(Tensor(q), k, v, heads=heads).data, reference.attention(q, k, v, heads), atol=1e-12
    )
    check_op(attention, q, k, v, heads=heads)


def test_attention_has_one_head_unless_asked_for_more():
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
    np.testing.assert_array_equal(attention(Tensor(q), k, v).data, attention(Tensor(q), k, v, heads=1).data)


def test_attention_with_large_scores_does_not_overflow():
    q = np.full((1, 2, 4), 100, np.float32)
    y = attention(Tensor(q), q, q * np.array([[[1], [2]]], np.float32)).data
    np.testing.assert_allclose(y, 150)


@given(shape=st.tuples(small, small, small), seed=SEEDS)
def test_column_sums(shape, seed):
    x = np.random.default_rng(seed).standard_normal(shape)
    np.testing.assert_allclose(column_sums(x), x.sum(axis=1), atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- modules


def make_layers():
    rng = np.random.default_rng(0)
    return [
        (Linear(6, 5, rng), (3, 6), (3, 5)),
        (Conv2d(6, 5, 3, rng, stride=2, padding=1), (2, 7, 8, 6), (2, 4, 4, 5)),
        (GroupNorm(6, 3), (2, 3, 3, 6), (2, 3, 3, 6)),
        (Attention(6, 2, rng), (2, 5, 6), (2, 5, 6)),
    ]


@pytest.mark.parametrize(("layer", "before", "after"), make_layers())
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_parameter_of_a_layer_gets_a_gradient_of_its_dtype(layer, before, after, dtype):
    layer.to(dtype=dtype)
    if isinstance(layer, Attention):  # starts as zero, which hides its other gradients
        layer.out.w.data = np.ones_like(layer.out.w.data)
    x = Parameter(np.random.default_rng(1).standard_normal(before).astype(dtype))
    y = layer(x)
    assert y.shape == after and y.dtype == dtype
    gradients = backward((y * y).mean())
    assert set(gradients) == {x, *layer.parameters()}
    assert all(g.dtype == dtype and g.shape == p.shape for p, g in gradients.items())


def test_initial_weights_have_the_variance_of_glorot_and_bengio():
    rng = np.random.default_rng(0)
    for layer, fan_in, fan_out in ((Linear(300, 500, rng), 300, 500), (Conv2d(30, 50, 3, rng), 270, 450)):
        assert abs(layer.w.data.var() / (2 / (fan_in + fan_out)) - 1) < 0.02
        assert layer.w.dtype == np.float32 and not layer.b.data.any()
    assert not Conv2d(3, 4, 3, rng, scale=0.0).w.data.any()
    assert not Attention(4, 1, rng).out.w.data.any()


class Nested(Module):
    def __init__(self):
        rng = np.random.default_rng(0)
        self.scale = Parameter(np.ones(3, np.float32))
        self.blocks = [Linear(2, 3, rng), Linear(3, 2, rng)]
        self.norm = GroupNorm(4, 2)
        self.absent = None
        self.numbers = [1, 2]
        self.more = (Parameter(np.ones(5, np.float32)), {"tied": self.scale, "deep": Linear(1, 1, rng)})


class TestModule:
    def test_names_and_order(self):
        names = ["scale", "blocks.0.w", "blocks.0.b", "blocks.1.w", "blocks.1.b", "norm.gamma", "norm.beta"]
        names += ["more.0", "more.1.deep.w", "more.1.deep.b"]  # the tied one is listed where it is met first
        assert list(Nested().named_parameters()) == names
        assert Nested().size == 3 + 6 + 3 + 6 + 2 + 4 + 4 + 5 + 1 + 1
        assert Nested().dtype == np.float32 and Nested().device == "cpu"

    def test_state_goes_out_and_in(self):
        a, b = Nested(), Nested()
        a.scale.data[...] = 7
        state = a.state_dict()
        a.scale.data[...] = 8  # a state is a copy
        kept = b.scale.data
        b.load_state_dict(state)
        assert b.scale.data is kept and (b.scale.data == 7).all()  # loaded in place

    def test_a_state_that_does_not_fit_is_refused_whole(self):
        a = Nested()
        state = {name: value + 1 for name, value in a.state_dict().items()}
        del state["norm.beta"]
        state["extra"] = np.zeros(1)
        state["scale"] = np.zeros(5)
        before = a.state_dict()
        with pytest.raises(ValueError) as error:
            a.load_state_dict(state)
        for part in ("norm.beta is missing", "extra is unknown", r"scale has shape (5,) instead of (3,)", "Nested"):
            assert part in str(error.value)
        assert all((before[name] == value).all() for name, value in a.state_dict().items())

    def test_conversion(self):
        a = Nested()
        assert a.to(dtype="float64") is a
        assert {p.dtype for p in a.parameters()} == {np.dtype("float64")}
        for bad in ("int32", np.int64, "float16", "longdouble"):  # of the last two, no noise can be drawn
            with pytest.raises(ValueError, match="dtype: expected 'float32' or 'float64', got"):
                a.to(dtype=bad)

    def test_devices(self):
        a = Nested().to("cpu")
        assert a.device == "cpu"
        for bad in ("gpu", "cuda:x", "cuda:-1", ""):
            with pytest.raises(ValueError, match="is unknown; use 'cpu', 'cuda' or 'cuda:N'"):
                a.to(bad)


class TestBadInput:
    x, w = np.zeros((2, 5, 5, 3)), np.zeros((3, 3, 3, 4))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": np.zeros((5, 5, 3))}, r"x: expected images \(N, H, W, C\), none of them 0, got shape \(5, 5, 3\)"),
            ({"x": np.zeros((0, 5, 5, 3))}, r"got shape \(0, 5, 5, 3\)"),
            (
                {"w": np.zeros((3, 3, 2, 4))},
                r"w: expected filters \(kh, kw, 3, O\), none of them 0, for.*got \(3, 3, 2, 4\)",
            ),
            ({"w": np.zeros((0, 1, 3, 4))}, r"w: expected filters .* none of them 0, for .* got \(0, 1, 3, 4\)"),
            ({"b": np.zeros(3)}, r"b: expected shape \(4,\).*got \(3,\)"),
            ({"stride": 0}, "stride: expected an integer >= 1, got 0"),
            ({"stride": 1.5}, "stride: expected an integer >= 1, got 1.5"),
            ({"padding": -1}, r"padding: expected an integer >= 0 or \(\(top, bottom\), \(left, right\)\)"),
            ({"padding": (1, 1)}, "padding: expected .* got .1, 1."),
            ({"padding": ((0, 1), (0, -1))}, "padding: expected"),
            ({"x": np.zeros((1, 2, 5, 3))}, r"x: height 2 with padding \(0, 0\) is less than the kernel's 3"),
            ({"x": np.zeros((1, 5, 1, 3)), "padding": ((0, 0), (0, 1))}, r"x: width 1 with padding \(0, 1\)"),
        ],
    )
    def test_conv2d(self, change, message):
        inputs = {"x": self.x, "w": self.w, "b": np.zeros(4)} | change
        with pytest.raises(ValueError, match=message):
            conv2d(**inputs)

    def test_upsample(self):
        with pytest.raises(ValueError, match=r"x: expected images \(N, H, W, C\), got shape \(2, 3\)"):
            upsample(np.zeros((2, 3)))

    def test_group_norm(self):
        x, one = np.zeros((2, 3, 6)), np.ones(6)
        for groups in (0, 4, 7, 2.0):
            with pytest.raises(ValueError, match=f"groups: {groups} does not divide the 6 channels of x"):
                group_norm(x, one, one, groups=groups)
        with pytest.raises(ValueError, match=r"gamma, beta: expected shape \(6,\).*got \(6,\), \(5,\)"):
            group_norm(x, one, np.ones(5), groups=2)
        with pytest.raises(ValueError, match=r"x: expected \(N, ..., C\), no axis of them empty"):
            group_norm(np.zeros((0, 3, 6)), one, one, groups=2)

    def test_attention(self):
        x = np.zeros((2, 3, 6))
        for heads in (0, 4, 2.0):
            with pytest.raises(ValueError, match=f"heads: {heads} does not divide the 6 channels of q"):
                attention(x, x, x, heads=heads)
        for q, k, v in itertools.permutations([x, x, np.zeros((2, 4, 6))][::-1]):
            if k.shape != v.shape:
                with pytest.raises(ValueError, match="q, k, v: expected"):
                    attention(q, k, v)
        for other in (np.zeros((2, 3, 4)), np.zeros((1, 3, 6))):
            with pytest.raises(ValueError, match="q, k, v: expected"):
                attention(x, other, other)
        with pytest.raises(ValueError, match="q, k, v: expected none of them empty"):
            attention(x[:, :0], x, x)
