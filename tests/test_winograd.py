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
from tinyddpm.winograd import A_T, B_T, PIXELS, G

ONE = ((1, 1), (1, 1))
shapes = st.tuples(st.integers(1, 5), *[st.integers(1, 13)] * 2, *[st.integers(1, 9)] * 2)


def drawn(shape, seed=0):
    """Images, filters and an incoming gradient in float32, as they come and in float64."""
    N, H, W, C, O = shape
    rng = np.random.default_rng(seed)
    narrow = [rng.standard_normal(s).astype(np.float32) for s in ((N, H, W, C), (3, 3, C, O), (N, H, W, O))]
    return narrow, [a.astype(np.float64) for a in narrow]


def error(ours, exact):
    """The largest, as a share of the largest value."""
    assert ours.dtype == np.float32 and ours.shape == exact.shape
    return np.abs(ours - exact).max() / np.abs(exact).max()


def turned(w):
    return w[::-1, ::-1].swapaxes(2, 3)


def test_the_identity_is_exact():
    """A^T ((G w) * (B^T x)) = direct sums, in fractions; so is its gradient for w."""
    rational = lambda m: [[Fraction(float(x)).limit_denominator(24) for x in row] for row in m]
    product = lambda m, v: [sum(a * b for a, b in zip(row, v, strict=True)) for row in m]
    rng = np.random.default_rng(0)
    x, w, dy = ([Fraction(int(i)) for i in rng.integers(-9, 10, n)] for n in (6, 3, 4))
    a_t, b_t, g = rational(A_T), rational(B_T), rational(G)
    y = product(a_t, [p * q for p, q in zip(product(g, w), product(b_t, x), strict=True)])
    assert y == [sum(w[k] * x[i + k] for k in range(3)) for i in range(4)]
    dv = [p * q for p, q in zip(product(zip(*a_t), dy), product(b_t, x), strict=True)]
    assert product(zip(*g), dv) == [sum(dy[i] * x[i + k] for i in range(4)) for k in range(3)]


@given(shape=shapes, seed=st.integers(0, 2**32 - 1))
def test_it_equals_direct_sums_for_images_of_any_size(shape, seed):
    (x, w, g), (x64, w64, g64) = drawn(shape, seed)
    y = reference.conv2d(x64, w64, np.zeros(shape[4]), 1, ONE)
    scale = np.abs(x64).max() * np.abs(w64).sum()  # a single output may be what little is left of large terms
    assert np.abs(winograd.correlate(x, winograd.filters(w)) - y).max() < 2e-6 * scale
    dw = conv.correlate_grad_w(x64, g64, w.shape, 1, ONE)
    assert np.abs(winograd.correlate_grad_w(x, g) - dw).max() < 2e-6 * np.abs(x64).max() * np.abs(g64).sum()


@pytest.mark.parametrize(
    "shape", [(16, 28, 28, 32, 32), (16, 14, 14, 64, 64), (16, 7, 7, 128, 128), (3, 32, 30, 128, 16)]
)
def test_its_error_is_as_stated(shape):
    """Forward and both gradients within 1e-5 of the largest value, where direct sums are within 1e-6."""
    (x, w, g), (x64, w64, g64) = drawn(shape)
    exact = conv.correlate(x64, w64, 1, ONE)
    assert error(winograd.correlate(x, winograd.filters(w)), exact) < 1e-5
    cols, _ = conv.columns(x, 3, 3, 1, ONE)
    assert error((cols @ w.reshape(-1, shape[4])).reshape(exact.shape), exact) < 1e-6
    assert error(winograd.correlate(g, winograd.filters(turned(w))), conv.correlate(g64, turned(w64), 1, ONE)) < 1e-5
    assert error(winograd.correlate_grad_w(x, g), conv.correlate_grad_w(x64, g64, w.shape, 1, ONE)) < 1e-5


@pytest.mark.parametrize("pixels", [1, 100, 300, PIXELS])
def test_chunks_do_not_change_the_result(pixels, monkeypatch):
    (x, w, g), (x64, w64, g64) = drawn((7, 6, 5, 8, 9))
    monkeypatch.setattr(winograd, "PIXELS", pixels)
    assert error(winograd.correlate(x, winograd.filters(w)), conv.correlate(x64, w64, 1, ONE)) < 1e-5
    assert error(winograd.correlate_grad_w(x, g), conv.correlate_grad_w(x64, g64, w.shape, 1, ONE)) < 1e-5
    images = {1: 1, 100: 2, 300: 6, PIXELS: 66}[pixels]  # of 2 tiles of 4 rows of 5 + 1 pixels
    assert [s.start for s in winograd._chunks(100, 2, 5)] == list(range(0, 100, images))


def test_views_of_any_strides():
    (x, w, g), _ = drawn((2, 6, 5, 8, 9))
    odd = lambda a: np.asfortranarray(a)[::1]
    same = winograd.correlate(odd(x)[:, ::-1][:, ::-1], winograd.filters(odd(w)))
    np.testing.assert_array_equal(same, winograd.correlate(x, winograd.filters(w)))
    spread = np.broadcast_to(g[:1, :1, :1], g.shape)
    np.testing.assert_array_equal(winograd.correlate_grad_w(x, spread), winograd.correlate_grad_w(x, spread.copy()))


class TestWhereItIsUsed:
    @pytest.mark.parametrize(
        ("kernel", "stride", "padding", "C", "O", "dtype", "used"),
        [
            ((3, 3), 1, 1, 8, 8, "float32", True),
            ((3, 3), 1, ((1, 1), (1, 1)), 16, 9, "float32", True),
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
