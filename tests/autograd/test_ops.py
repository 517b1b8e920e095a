"""Every op, by the table of ops.py: its value, its gradients in float64, the same in float32; edges, and bad input."""

import numpy as np
import pytest
import reference
from gradcheck import check_op
from hypothesis import given
from hypothesis import strategies as st
from ops import NAMES, OPS

from tinyddpm.autograd import conv, functional, fused, tensor
from tinyddpm.autograd.backward import backward
from tinyddpm.autograd.conv import conv2d, upsample
from tinyddpm.autograd.functional import at_least, concat, dropout, linear, logistic, mse, normal_cdf, silu, softmax
from tinyddpm.autograd.fused import attention, group_norm
from tinyddpm.autograd.tensor import Parameter, Tensor, matmul, op, reduce_sum

normal, ones = np.random.default_rng(0).standard_normal, lambda *shape: np.ones(shape)


def test_every_op_of_the_package_has_its_row():
    defined = [x for module in (tensor, functional, conv, fused) for x in vars(module).values()]
    assert {row.op for row in OPS} == {x for x in defined if hasattr(x, "raw")} and len(set(NAMES)) == len(OPS)


@pytest.mark.parametrize("row", OPS, ids=NAMES)
@given(data=st.data(), layout=st.sampled_from(["plain", "transposed", "strided"]))
def test_value_gradients_dtypes_and_manners(row, data, layout):
    inputs, settings = data.draw(row.drawn)
    value = row.op(*inputs, **settings).data
    np.testing.assert_allclose(value, row.numpy(*inputs, **settings), row.error, row.error, strict=True)
    check_op(row.op, *inputs, layout=layout, **settings)


def test_gradients_of_convolutions_padded_as_widely_as_the_filter():
    for kernel, padding in (((2, 3), ((2, 0), (0, 1))), ((3, 2), ((1, 0), (0, 2))), ((1, 1), ((1, 1), (1, 1)))):
        check_op(conv2d, normal((2, 4, 5, 3)), normal((*kernel, 3, 2)), None, padding=padding)


X, W, ONE_OFF = *normal((2, 10, 10)), np.where(np.arange(100) == 7, 1.5, 1).reshape(10, 10)


def zeroes_its_value(x, w):
    y = x * w
    return y, lambda g: (g * w + np.multiply(y, 0, out=y), g * x)


def halves_what_it_saved(x, w):
    saved = 2 * w
    return x * w, lambda g: (g * np.multiply(saved, 0.5, out=saved), g * x)


WRONG = {
    "a gradient a thousandth too large": (lambda x, w: (x * w, lambda g: (1.001 * g * w, g * x)), AssertionError, "0:"),
    "no gradient": (lambda x, w: (x * w, lambda g: (g * w, 0 * x)), AssertionError, "input 1:"),
    "one element of many": (lambda x, w: (x * w, lambda g: (g * w * ONE_OFF, g * x)), AssertionError, "input 0:"),
    "float64": (lambda x, w: (x * w, lambda g: (g * w * np.float64(1), g * x)), AssertionError, None),
    "an input written to": (lambda x, w: (np.multiply(x, w, out=x), lambda g: (g * w, g)), ValueError, "read-only"),
    "g written to": (lambda x, w: (x * w, lambda g: (g * w, np.multiply(g, x, out=g))), ValueError, "read-only"),
    "its value written to": (zeroes_its_value, ValueError, "read-only"),
    "what it saved written to": (halves_what_it_saved, AssertionError, None),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_the_checker_notices_what_is_wrong(what):
    function, error, message = WRONG[what]
    with pytest.raises(error, match=message):
        check_op(op(function), X, W)


def test_a_power_of_zero_has_a_gradient_at_zero():
    x = Parameter(np.zeros(3))
    assert backward((x**0 + x).sum())[x].tolist() == [1, 1, 1]


def test_the_logistic_function_neither_overflows_nor_warns():
    for dtype in (np.float32, np.float64):
        x = np.array([-1e4, -200, -50, 0, 50, 200, 1e4], dtype)
        np.testing.assert_allclose(logistic(x), [0, 0, np.exp(-50), 0.5, 1, 1, 1], rtol=1e-6, atol=1e-40)
        y, pull = silu.raw(x)
        assert not np.isnan(y).any() and not np.isnan(pull(np.ones_like(x))).any()


def test_softmax_ignores_shifts():
    for shift in (1e4, -1e4):
        np.testing.assert_allclose(softmax(Tensor(X + shift)).data, reference.softmax(X), rtol=1e-9)


def test_the_normal_distribution():
    """Against tables of it, and out on the left to many digits, where 1 - Phi(x) would have lost them all."""
    x = np.array([-10.0, -6.0, -1.0, 0.0, 1.0, 1.96, 40.0])
    values = [7.619853024160527e-24, 9.865876450376946e-10, 0.15865525393145707, 0.5, 0.8413447460685429,
              0.9750021048517795, 1.0]  # fmt: skip
    np.testing.assert_allclose(normal_cdf(x).data, values, rtol=1e-12)


def test_at_least_has_no_gradient_where_x_is_the_least():
    x = Parameter(np.array([-1.0, 0.5, 0.6, 2.0]))
    y = at_least(x, least=0.5)
    assert y.data.tolist() == [0.5, 0.5, 0.6, 2.0] and backward(y.sum())[x].tolist() == [0, 0, 1, 1]


def test_what_is_left_out_has_the_default_of_the_documentation():
    x, w, gamma, q = 1e-3 * normal((2, 5, 5, 3)), normal((3, 3, 3, 4)), normal(3), Tensor(normal((2, 5, 4)))
    for ours, asked in (
        (conv2d(x, w), conv2d(x, w, None, stride=1, padding=((0, 0), (0, 0)))),
        (conv2d(x, w, padding=1), conv2d(x, w, padding=((1, 1), (1, 1)))),
        (attention(q, q, q), attention(q, q, q, heads=1)),
        (softmax(q), softmax(q, axis=2)),
        (concat(q, q), concat(q, q, axis=2)),
        (reduce_sum(q), reduce_sum(q, axis=None, keepdims=False)),
        (group_norm(x, gamma, gamma, groups=3), group_norm(x, gamma, gamma, groups=3, eps=1e-6, silu=False)),
    ):  # fmt: skip
        assert ours.shape == asked.shape
        np.testing.assert_array_equal(ours.data, asked.data)


def test_group_norm_of_one_number_is_beta_and_of_numbers_far_from_0_keeps_its_precision():
    y = group_norm(Tensor(normal((3, 1, 4))), ones(4), np.arange(4.0), groups=4).data
    np.testing.assert_array_equal(y, np.broadcast_to(np.arange(4.0), y.shape))
    x = normal((2, 64, 8))
    y = group_norm(*(a.astype(np.float32) for a in (x + 1000, ones(8), np.zeros(8))), groups=2).data
    np.testing.assert_allclose(y, reference.group_norm(x, 1, 0, 2), atol=1e-3)


def test_attention_to_one_position_is_its_value_and_large_scores_do_not_overflow():
    q, v = normal((2, 3, 4)), normal((2, 1, 4))
    np.testing.assert_array_equal(attention(Tensor(q), v, v).data, np.broadcast_to(v, q.shape))
    q = np.full((1, 2, 4), 100, np.float32)
    np.testing.assert_allclose(attention(Tensor(q), q, q * np.array([[[1], [2]]], np.float32)).data, 150)


def test_dropout_keeps_the_mean_and_drops_the_share_asked_for_of_value_and_gradient():
    x, generator = Parameter(np.full((200, 200), 2.0, np.float32)), np.random.default_rng
    assert dropout(x, 0.5) is x and dropout(x, 0.0, generator(0)) is x and isinstance(dropout(x.data, 0.5), Tensor)
    y, again, other = (dropout(x, 0.25, generator(seed)) for seed in (0, 0, 1))
    values = y.data.copy()
    assert (values == again.data).all() and (values != other.data).any()
    assert y.dtype == np.float32 and set(np.unique(values)) == {np.float32(0), np.float32(2 / 0.75)}
    assert abs((values == 0).mean() - 0.25) < 0.01
    np.testing.assert_allclose(backward(y.sum())[x], values / 2)
    # random numbers are from 0 up to but not including 1: those below p are dropped
    quarters = type("", (np.random.Generator,), {"random": lambda self, shape, dtype: np.arange(4, dtype=dtype) / 4})
    assert dropout(np.ones(4), 0.5, quarters(np.random.PCG64())).data.tolist() == [0, 0, 2, 2]


OF_CONV2D = dict(x=ones(2, 5, 5, 3), w=ones(3, 3, 3, 4), b=ones(4))
OF_GROUP_NORM = dict(x=ones(2, 3, 6), gamma=ones(6), beta=ones(6), groups=2)
OF_ATTENTION = dict.fromkeys("qkv", ones(2, 3, 6))
conv2d_of = lambda **change: lambda: conv2d(**OF_CONV2D | change)
group_norm_of = lambda **change: lambda: group_norm(**OF_GROUP_NORM | change)
attention_of = lambda **change: lambda: attention(**OF_ATTENTION | change)
Q, TWICE, RNG = ones(2), "mse: expected the same shape twice, and not an empty one, got", np.random.default_rng(0)
REFUSED = [
    (lambda: linear(ones(3, 5), ones(4, 2)),
     r"x: last axis must be 4 to fit w of shape \(4, 2\), got x of shape \(3, 5\)"),
    (lambda: linear(ones(), ones(4, 2)), r"x: last axis must be 4 .* got x of shape \(\)"),
    *((lambda w=w: linear(ones(3, 5), w), r"w: expected shape \(C, O\), got") for w in (ones(5), ones(2, 5, 3))),
    *((lambda b=b: linear(ones(3, 4), ones(4, 2), b), r"b: expected shape \(2,\) to fit w of shape \(4, 2\), got")
      for b in (ones(5), ones(1))),
    (lambda: concat(ones(2, 3), ones(2, 3), axis=5), "axis 5 is out of bounds"),
    (lambda: concat(ones(2, 3), ones(3, 3)), "must match|must have same shape"),  # NumPy's words, and CuPy's
    (lambda: mse(ones(0, 3), ones(0, 3)), TWICE),
    (lambda: mse(ones(3, 1), ones(3)), rf"{TWICE} \(3, 1\) and \(3,\)"),
    *((lambda p=p: dropout(Q, p, RNG), r"p: expected a number in \[0, 1\), got") for p in (-0.1, 1, 1.5)),
    *((lambda a=a, b=b: matmul(ones(*a), ones(*b)),
       f"matmul: both inputs need two axes or more, got {len(a)} and {len(b)}")
      for a, b in (((2,), (2,)), ((2,), (2, 2)), ((2, 2), (2,)))),
    (lambda: Tensor(ones(0)).mean(), r"x: an empty array has no mean, got shape \(0,\)"),
    (lambda: Tensor(Q)[np.array([0, 0])], "index: expected integers, slices", TypeError),
    (lambda: Tensor(Q) ** Tensor(Q), "exponent: expected a finite number"),
    (conv2d_of(x=ones(5, 5, 3)), r"x: expected images \(N, H, W, C\), none of them 0, got shape \(5, 5, 3\)"),
    (conv2d_of(x=ones(0, 5, 5, 3)), r"got shape \(0, 5, 5, 3\)"),
    (conv2d_of(w=ones(3, 3, 2, 4)), r"w: expected filters \(kh, kw, 3, O\), none of them 0, for.*got \(3, 3, 2, 4\)"),
    (conv2d_of(w=ones(0, 1, 3, 4)), r"w: expected filters .* none of them 0, for .* got \(0, 1, 3, 4\)"),
    (conv2d_of(b=ones(3)), r"b: expected shape \(4,\).*got \(3,\)"),
    *((conv2d_of(stride=stride), f"stride: expected an integer >= 1, got {stride}") for stride in (0, 1.5)),
    (conv2d_of(padding=-1), r"padding: expected an integer >= 0 or \(\(top, bottom\), \(left, right\)\)"),
    (conv2d_of(padding=(1, 1)), "padding: expected .* got .1, 1."),
    (conv2d_of(padding=((0, 1), (0, -1))), "padding: expected"),
    (conv2d_of(x=ones(1, 2, 5, 3)), r"x: height 2 with padding \(0, 0\) is less than the kernel's 3"),
    (conv2d_of(x=ones(1, 5, 1, 3), padding=((0, 0), (0, 1))), r"x: width 1 with padding \(0, 1\)"),
    (lambda: upsample(ones(2, 3)), r"x: expected images \(N, H, W, C\), got shape \(2, 3\)"),
    *((group_norm_of(groups=g), f"groups: {g} does not divide the 6 channels of x") for g in (0, 4, 7, 2.0)),
    (group_norm_of(beta=ones(5)), r"gamma, beta: expected shape \(6,\).*got \(6,\), \(5,\)"),
    (group_norm_of(x=ones(0, 3, 6)), r"x: expected \(N, ..., C\), no axis of them empty"),
    *((attention_of(heads=h), f"heads: {h} does not divide the 6 channels of q") for h in (0, 4, 2.0)),
    *((attention_of(**{name: ones(2, 4, 6)}), "q, k, v: expected") for name in "kv"),
    *((attention_of(k=other, v=other), "q, k, v: expected") for other in (ones(2, 3, 4), ones(1, 3, 6))),
    (attention_of(q=ones(2, 0, 6)), "q, k, v: expected none of them empty"),
    (attention_of(k=ones(2, 0, 6), v=ones(2, 0, 6)), "q, k, v: expected none of them empty"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message", "error"), [(*row, ValueError)[:3] for row in REFUSED])
def test_what_is_refused(call, message, error):
    with pytest.raises(error, match=message):
        call()
