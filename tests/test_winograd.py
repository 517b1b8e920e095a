"""The fast 3x3 convolution: exact in exact arithmetic, in float32 within its stated error; where it is used."""

from fractions import Fraction

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from tinyddpm import conv, winograd
from tinyddpm.conv import conv2d
from tinyddpm.tensor import Parameter, backward
from tinyddpm.winograd import A_T, B_T, G

ONE = ((1, 1), (1, 1))
shapes = st.tuples(st.integers(1, 5), *[st.integers(1, 13)] * 2, *[st.integers(1, 9)] * 2)


def drawn(shape, seed=0):
    """Images, filters and an incoming gradient in float32, as they come and in float64."""
    N, H, W, C, O = shape
    rng = np.random.default_rng(seed)
    narrow = [rng.standard_normal(s).astype(np.float32) for s in ((N, H, W, C), (3, 3, C, O), (N, H, W, O))]
    wide = [a.astype(np.float64) for a in narrow]
    for a in narrow:
        a.flags.writeable = False
    return narrow, wide


def error(ours, exact):
    """The largest, as a share of the largest value."""
    assert ours.dtype == np.float32 and ours.shape == exact.shape
    return np.abs(ours - exact).max() / np.abs(exact).max()


def turned(w):
    return w[::-1, ::-1].swapaxes(2, 3)


def test_the_identity_is_exact():
    """A^T ((G w) * (B^T x)) = direct sums, in fractions; so is its gradient for w."""
    rational = lambda m: [[Fraction(float(x)).limit_denominator(24) for x in row] for row in m]
    for matrix in (A_T, B_T, G):
        np.testing.assert_array_equal(np.array(rational(matrix), dtype=float).astype(np.float32), matrix)
    product = lambda m, v: [sum(a * b for a, b in zip(row, v, strict=True)) for row in m]
    rng = np.random.default_rng(0)
    x, w, dy = ([Fraction(int(i)) for i in rng.integers(-9, 10, n)] for n in (6, 3, 4))
    a_t, b_t, g = rational(A_T), rational(B_T), rational(G)
    y = product(a_t, [p * q for p, q in zip(product(g, w), product(b_t, x), strict=True)])
    assert y == [sum(w[k] * x[i + k] for k in range(3)) for i in range(4)]
    dv = [p * q for p, q in zip(product(zip(*a_t), dy), product(b_t, x), strict=True)]
    assert product(zip(*g), dv) == [sum(dy[i] * x[i + k] for i in range(4)) for k in range(3)]


def test_the_matrices_evaluate_polynomials():
    points = np.array([0, 1, -1, 2, -2])
    np.testing.assert_array_equal(A_T[:, :5], points ** np.arange(4)[:, None])
    np.testing.assert_array_equal(A_T[:, 5], [0, 0, 0, 1])
    scale = np.array([1 / 4, -1 / 6, -1 / 6, 1 / 24, 1 / 24])
    np.testing.assert_allclose(G[:5], scale[:, None] * points[:, None] ** np.arange(3), rtol=1e-7)
    np.testing.assert_array_equal(G[5], [0, 0, 1])


@given(shape=shapes, seed=st.integers(0, 2**32 - 1))
def test_it_equals_direct_sums_for_images_of_any_size(shape, seed):
    (x, w, g), (x64, w64, g64) = drawn(shape, seed)
    y = reference.conv2d(x64, w64, np.zeros(shape[4]), 1, ONE)
    scale = np.abs(x64).max() * np.abs(w64).sum((0, 1, 2)).max()  # an output may be what little is left of large terms
    assert np.abs(winograd.correlate(x, winograd.filters(w)) - y).max() < 2e-6 * scale
    dw = conv.correlate_grad_w(x64, g64, w.shape, 1, ONE)
    assert (
        np.abs(winograd.correlate_grad_w(x, g) - dw).max() < 2e-6 * np.abs(x64).max() * np.abs(g64).sum((0, 1, 2)).max()
    )


@pytest.mark.parametrize(
    "shape", [(16, 28, 28, 32, 32), (16, 14, 14, 64, 64), (16, 7, 7, 128, 128), (2, 8, 8, 512, 16)]
)
def test_its_error_is_as_stated(shape):
    """On random images and filters, forward and both gradients within 1e-5 of the largest value."""
    (x, w, g), (x64, w64, g64) = drawn(shape)
    exact = conv.correlate(x64, w64, 1, ONE)
    assert error(winograd.correlate(x, winograd.filters(w)), exact) < 1e-5
    assert error(winograd.correlate(g, winograd.filters(turned(w))), conv.correlate(g64, turned(w64), 1, ONE)) < 1e-5
    assert error(winograd.correlate_grad_w(x, g), conv.correlate_grad_w(x64, g64, w.shape, 1, ONE)) < 1e-5


def test_where_the_filter_cancels_most_of_the_image_direct_sums_lose_digits_too():
    x = np.sin(np.linspace(0, np.pi, 28)).reshape(1, 28, 1, 1).repeat(9, 2).repeat(32, 3)
    w = np.zeros((3, 3, 32, 8))
    w[:, 1] = np.array([1, -2, 1]).reshape(3, 1, 1)  # second derivative along the height
    exact = conv.correlate(x, w, 1, ONE)[:, 1:-1]
    x, w = x.astype(np.float32), w.astype(np.float32)
    cols, _ = conv.columns(x, 3, 3, 1, ONE)
    direct = (cols @ w.reshape(-1, 8)).reshape(1, 28, 9, 8)[:, 1:-1]
    assert error(winograd.correlate(x, winograd.filters(w))[:, 1:-1], exact) < 20 * error(direct, exact)


def test_a_nan_stays_in_its_image():
    (x, w, g), _ = drawn((9, 6, 5, 8, 9))
    bad = x.copy()
    bad[4, 3, 2, 1] = np.nan
    y, others = winograd.correlate(bad, winograd.filters(w)), np.arange(9) != 4
    np.testing.assert_array_equal(y[others], winograd.correlate(x, winograd.filters(w))[others])
    assert np.isnan(y[4, 2:5, 1:4]).all()


def test_views_of_any_strides():
    (x, w, g), _ = drawn((2, 6, 5, 8, 9))
    y, dw = winograd.correlate(x, winograd.filters(w)), winograd.correlate_grad_w(x, g)
    backwards = lambda a: np.ascontiguousarray(a[:, ::-1, ::-1])[:, ::-1, ::-1]
    for odd in (np.asfortranarray, backwards):
        np.testing.assert_array_equal(winograd.correlate(odd(x), winograd.filters(odd(w))), y)
        np.testing.assert_array_equal(winograd.correlate_grad_w(odd(x), odd(g)), dw)
    x, g = (np.broadcast_to(a[:1, :1, :1], a.shape) for a in (x, g))
    exact = conv.correlate_grad_w(x.astype(float), g.astype(float), w.shape, 1, ONE)
    assert error(winograd.correlate_grad_w(x, g), exact) < 1e-5


class TestWhereItIsUsed:
    @pytest.mark.parametrize(
        ("kernel", "stride", "padding", "C", "O", "dtype", "used"),
        [
            ((3, 3), 1, 1, 8, 8, "float32", True),
            ((3, 3), 1, ((1, 1), (1, 1)), 16, 9, "float32", True),
            ((3, 3), 1, [[1, 1], [1, 1]], 8, 8, "float32", True),
            ((3, 3), 1, np.ones((2, 2), int), 8, 8, "float32", True),
            ((3, 3), 1, 1, 8, 8, "float64", False),
            ((3, 3), 1, 1, 7, 8, "float32", False),
            ((3, 3), 1, 1, 8, 7, "float32", False),
            ((3, 3), 2, 1, 8, 8, "float32", False),
            ((3, 3), 1, 0, 8, 8, "float32", False),
            ((3, 3), 1, ((0, 1), (1, 1)), 8, 8, "float32", False),
            ((3, 1), 1, 1, 8, 8, "float32", False),
            ((1, 1), 1, 1, 8, 8, "float32", False),
        ],
    )
    def test_by_conv2d_and_its_gradients(self, kernel, stride, padding, C, O, dtype, used, monkeypatch):
        rng = np.random.default_rng(0)
        x, w = (Parameter(rng.standard_normal(s).astype(dtype)) for s in ((2, 6, 5, C), (*kernel, C, O)))
        calls = []
        for name in ("correlate", "correlate_grad_w"):
            real = getattr(winograd, name)
            monkeypatch.setattr(winograd, name, lambda *a, f=real: calls.append(f.__name__) or f(*a))
        y = conv2d(x, w, stride=stride, padding=padding)
        u = rng.standard_normal(y.shape).astype(dtype)
        gradients = backward((y * u).sum())
        assert sorted(calls) == (["correlate", "correlate", "correlate_grad_w"] if used else [])
        wide = [Parameter(p.data.astype(np.float64)) for p in (x, w)]
        exact = conv2d(*wide, stride=stride, padding=padding)
        exact_gradients = backward((exact * u.astype(np.float64)).sum())
        np.testing.assert_allclose(y.data, exact.data, atol=1e-5 * np.abs(exact.data).max())
        for ours, theirs in zip((x, w), wide, strict=True):
            scale = np.abs(exact_gradients[theirs]).max()
            np.testing.assert_allclose(gradients[ours], exact_gradients[theirs], atol=1e-5 * scale)

    def test_not_for_arrays_of_another_kind(self):
        class OnADevice:
            dtype = np.dtype("float32")

        assert not conv._takes_winograd(OnADevice(), (3, 3, 8, 8), 1, ONE)
        assert conv._takes_winograd(np.ones((1, 4, 4, 8), np.float32), (3, 3, 8, 8), 1, ONE)
