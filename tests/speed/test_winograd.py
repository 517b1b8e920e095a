"""The fast 3x3 convolution: its matrices, its stated error in float32, its gradients, and where it is used."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gradcheck import read_only
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from tinyddpm import Diffusion, UNet, make_schedule, sample
from tinyddpm.autograd import conv
from tinyddpm.autograd.conv import conv2d
from tinyddpm.autograd.tensor import Parameter
from tinyddpm.network.nn import Module
from tinyddpm.speed import winograd
from tinyddpm.speed.winograd import BAND, TILE, ConstantFilters, areas, bands, conv3x3, matrices, tile_rows

ONE = ((1, 1), (1, 1))
SHAPES = st.tuples(st.integers(1, 4), *[st.integers(1, TILE * BAND + 4)] * 2, *[st.integers(1, 9)] * 2)


def drawn(shape, seed=0, layout="plain"):
    """Images, filters, bias and an incoming gradient in float32, only to be read, and the same in float64."""
    (N, H, W, C, O), rng = shape, np.random.default_rng(seed)
    shapes = (N, H, W, C), (3, 3, C, O), (O,), (N, H, W, O)
    narrow = [read_only(rng.standard_normal(s).astype(np.float32), layout) for s in shapes]
    return narrow, [a.astype(np.float64) for a in narrow]


def all_of(x, w, b, g):
    """y, dx, dw and db of the fast convolution."""
    y, pull = conv3x3(x, w, b)
    dx, dw, db = pull(g)
    return y, dx, dw, db()


def all_direct(x, w, b, g):
    """The same by direct sums."""
    grad_x, grad_w = conv.correlate_grad_x(g, w, 1, ONE, x.shape), conv.correlate_grad_w(x, g, w.shape, 1, ONE)
    return conv.correlate(x, w, 1, ONE) + b, grad_x, grad_w, g.sum((0, 1, 2))


@pytest.mark.parametrize("r", range(1, TILE + 1))
def test_r_outputs_of_a_filter_take_r_plus_2_multiplications(r):
    B_T, G, A_T = matrices(r)
    assert (B_T.shape, G.shape, A_T.shape) == ((r + 2, r + 2), (r + 2, 3), (r, r + 2))
    x, w = np.random.default_rng(r).standard_normal((2, r + 2))
    np.testing.assert_allclose(A_T @ ((G @ w[:3]) * (B_T @ x)), np.correlate(x, w[:3]), atol=1e-12)


@pytest.mark.parametrize(
    ("height", "r"), [(1, 1), (7, 7), (8, 8), (9, 5), (14, 7), (16, 8), (28, 7), (32, 8), (100, 8)]
)
def test_tiles_are_few_and_of_equal_size(height, r):
    assert tile_rows(height) == r


@pytest.mark.parametrize("N", [1, 5, 9, 16, 40])
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (28, 28), (20, 300)])
def test_areas_cover_all_images_in_parts_of_equal_size(N, size):
    seen = np.zeros((N, *size))
    for images, band in areas(N, *size):
        seen[images, band.outputs] += 1
        n = len(range(N)[images])
        assert n == 1 or n * len(band.D) // (tile_rows(size[0]) + 2) * size[1] <= winograd.ROWS
    assert (seen == 1).all()
    rows = min(BAND, math.ceil(size[0] / tile_rows(size[0]))) * size[1]
    assert len(areas(N, *size)) == len(bands(size[0])) * math.ceil(N / max(1, winograd.ROWS // rows))  # and no more


@pytest.mark.parametrize("size", [1, 4, 7, 14, TILE * BAND, TILE * BAND + 1, 28, 100])
def test_bands_cover_all_rows_and_no_more(size):
    r = tile_rows(size)
    assert np.concatenate([np.arange(size)[band.outputs] for band in bands(size)]).tolist() == list(range(size))
    for band in bands(size):
        rows, inputs = np.arange(size)[band.outputs], np.arange(size)[band.inputs]
        assert inputs.tolist() == sorted({r + k for r in rows for k in (-1, 0, 1)} & set(range(size)))
        assert band.D.shape == ((r + 2) * -(-len(rows) // r), len(inputs)) and len(rows) <= r * BAND
        for matrix, transpose in ((band.D, band.D_T), (band.S, band.S_T)):
            np.testing.assert_array_equal(matrix.T, transpose)
            assert matrix.flags.c_contiguous and transpose.flags.c_contiguous  # half as fast otherwise


@given(shape=SHAPES, seed=SEEDS, layout=st.sampled_from(["plain", "transposed", "strided"]))
def test_it_equals_direct_sums_for_images_of_any_size(shape, seed, layout):
    (x, w, b, g), (x64, w64, b64, g64) = drawn(shape, seed, layout)
    ours, exact = all_of(x, w, b, g), all_direct(x64, w64, b64, g64)
    # an output may be what little is left of large terms, so the measure is how large they can be
    scale = lambda image, filters: 2e-6 * np.abs(image).max() * np.abs(filters).sum((0, 1, 2)).max()
    limits = scale(x64, w64), scale(g64, w64.swapaxes(2, 3)), scale(x64, g64), scale(np.ones(1), g64)
    for a, e, limit in zip(ours, exact, limits, strict=True):
        assert a.dtype == np.float32 and a.shape == e.shape and np.abs(a - e).max() <= limit
    np.testing.assert_allclose(conv3x3(x, w, None)[0], ours[0] - b, atol=limits[0])


@pytest.mark.parametrize(
    "shape",
    [(3, 28, 28, 32, 32), (2, 14, 14, 64, 64), (3, 7, 7, 128, 128), (2, 16, 16, 512, 16), (2, 32, 32, 64, 64),
     (2, 8, 8, 256, 64), (1, 16, 16, 1, 8), (3, 12, 12, 32, 32), (3, 10, 10, 32, 32), (3, 4, 4, 64, 64)],
)  # fmt: skip
def test_its_error_is_as_stated(shape):
    """On random images and filters, forward and gradients within 1e-5 of the largest value."""
    narrow, wide = drawn(shape)
    for ours, exact in zip(all_of(*narrow), all_direct(*wide), strict=True):
        assert np.abs(ours - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("r", "most"), [(1, 3), (2, 3.5), (3, 4.7), (4, 4.7), (5, 11.4), (6, 11.8), (7, 23.3), (8, 31.4)]
)
def test_the_points_lose_few_digits(r, most):
    """By how much errors at the points come out larger, where these are independent; back likewise."""
    B_T, G, A_T = matrices(r)
    size = np.linalg.norm(B_T, axis=1) * np.linalg.norm(G, axis=1)  # of u and v, of random filters and images
    assert np.linalg.norm(A_T * size, axis=1).max() < most
    assert np.linalg.norm(B_T.T * (np.linalg.norm(G, axis=1) * np.linalg.norm(A_T, axis=0)), axis=1).max() < most


@pytest.mark.parametrize("shape", [(37, 20, 13, 3, 5), (9, 70, 31, 4, 3)])
def test_images_cut_into_parts_and_many_bands(shape, monkeypatch):
    assert len(areas(*shape[:3])) > 4
    narrow, _ = drawn(shape)
    cut = all_of(*narrow)
    monkeypatch.setattr(winograd, "ROWS", 10**6)
    for a, e in zip(cut, all_of(*narrow), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5 * np.abs(e).max())
    for a, e in zip(cut, all_direct(*narrow), strict=True):
        np.testing.assert_allclose(a, e, atol=2e-5 * np.abs(e).max())


def test_a_nan_reaches_both_pairs_of_tiles_that_share_it_and_no_more():
    (x, w, b, g), _ = drawn((1, 48, 5, 8, 9))
    bad = x.copy()
    bad[0, 16, 2, 1] = np.nan  # the first row of the second band of 16
    assert np.unique(np.nonzero(np.isnan(conv3x3(bad, w, b)[0]))[1]).tolist() == list(range(32))


def test_a_nan_stays_in_its_image():
    (x, w, b, g), _ = drawn((9, 6, 5, 8, 9))
    bad = x.copy()
    bad[4, 3, 2, 1] = np.nan
    y, others = conv3x3(bad, w, b)[0], np.arange(9) != 4
    np.testing.assert_array_equal(y[others], conv3x3(x, w, b)[0][others])
    assert np.isnan(y[4, 2:5, 1:4]).all()


IMAGES = (2, 8, 8, 8)


@pytest.mark.parametrize(("used", "shape", "O", "change"), [
    (True, IMAGES, 8, {}), (True, (2, 8, 8, 16), 9, {"padding": ONE}), (True, IMAGES, 8, {"padding": [[1, 1]] * 2}),
    (True, IMAGES, 8, {"padding": np.ones((2, 2), int)}), (False, IMAGES, 8, {"dtype": "float64"}),
    (True, (2, 8, 8, 1), 8, {}), (True, IMAGES, 1, {}),
    (False, (8, 3, 8, 8), 8, {}), (True, (8, 4, 8, 8), 8, {}),  # too few rows, and enough
    (False, IMAGES, 129, {}), (True, IMAGES, 128, {}), (False, (2, 8, 8, 129), 8, {}),
    (False, (1, 8, 15, 8), 8, {}), (True, (1, 8, 16, 8), 8, {}),  # too few pixels, and enough
    (False, IMAGES, 8, {"stride": 2}), (False, IMAGES, 8, {"padding": 0}),
    (False, IMAGES, 8, {"padding": ((0, 1), (1, 1))}), (False, IMAGES, 8, {"kernel": (3, 1)}),
    (False, IMAGES, 8, {"kernel": (1, 1)}),
])  # fmt: skip
def test_where_conv2d_uses_it(used, shape, O, change, recorded):
    settings, calls = {"padding": 1, "kernel": (3, 3), "dtype": "float32"} | change, recorded(winograd, "conv3x3")
    kernel, dtype = settings.pop("kernel"), settings.pop("dtype")
    conv2d(*(np.ones(s, dtype) for s in (shape, (*kernel, shape[3], O), O)), **settings)
    assert len(calls) == used


class TestConstantFilters:
    (x, w, b, g), _ = drawn((2, 8, 8, 8, 8))

    @pytest.fixture
    def transformed(self, monkeypatch):
        """Which filters were transformed."""
        seen, real = [], winograd.filters
        monkeypatch.setattr(winograd, "filters", lambda w, r: seen.append(w) or real(w, r))
        return seen

    def kept(self):
        """What is kept of a model with this one filter."""
        model = Module()
        model.filters = [Parameter(self.w)]
        return ConstantFilters(model)

    def test_a_filter_is_transformed_once(self, transformed):
        plain, kept = all_of(self.x, self.w, self.b, self.g), self.kept()
        assert len(transformed) == 2  # forward, and with its channels exchanged backward
        for new in (2, 0, 0):
            transformed.clear()
            with kept.in_force():
                for a, e in zip(all_of(self.x, self.w, self.b, self.g), plain, strict=True):
                    np.testing.assert_array_equal(a, e)
            assert len(transformed) == new
        conv3x3(self.x, self.w, self.b)  # outside of a block what is kept is not used
        assert len(transformed) == 1

    def test_what_is_no_parameter_of_the_model_is_not_kept(self):
        """A model may compute filters, even in one place in memory again and again."""
        scratch = self.w.copy()
        for kept in (self.kept(), ConstantFilters(lambda x, t: x)):
            with kept.in_force():
                for _ in range(3):
                    scratch += 1
                    expected = conv3x3(self.x, scratch.copy(), self.b)[0]
                    np.testing.assert_array_equal(conv3x3(self.x, scratch, self.b)[0], expected)

    def test_threads_share_what_is_kept_and_blocks_nest(self, transformed):
        kept, other = self.kept(), self.kept()

        def work(_):
            with kept.in_force():
                conv3x3(self.x, self.w, self.b)
                with other.in_force():
                    conv3x3(self.x, self.w, self.b)
                conv3x3(self.x, self.w, self.b)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))
        assert len(transformed) == 2

    def test_sampling_keeps_them(self, transformed):
        unet, shape = UNet(channels=(8, 8), blocks=1, attention=(False, False)), (8, 16, 16, 1)
        diffusion, levels, wrapped = Diffusion(make_schedule("cosine", 3)), np.zeros(shape) - 1, lambda x, t: unet(x, t)
        of_a_model = sum(p.shape[:2] == (3, 3) for p in unet.parameters()) - 1  # of stride 2
        for use, count in (
            (lambda: sample(diffusion, unet, shape, workers=2), of_a_model),
            (lambda: diffusion.bits_per_dim(unet, np.float32(levels), workers=2, progress=False), of_a_model),
            (lambda: sample(diffusion, wrapped, shape, workers=2), 3 * 2 * of_a_model),  # each time
        ):
            transformed.clear()
            use()
            assert len(transformed) == count
