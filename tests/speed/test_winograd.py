"""The fast 3x3 convolution: its matrices, its stated error in float32, its gradients, and where it is used."""

import threading

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from tinyddpm import Diffusion, UNet, make_schedule, sample
from tinyddpm.autograd import conv
from tinyddpm.autograd.backward import backward
from tinyddpm.autograd.conv import conv2d
from tinyddpm.autograd.tensor import Parameter
from tinyddpm.network.nn import Module
from tinyddpm.speed import winograd
from tinyddpm.speed.winograd import A_T, B_T, BAND, POINTS, ConstantFilters, G, bands, conv3x3

ONE = ((1, 1), (1, 1))
SHAPES = st.tuples(st.integers(1, 4), *[st.integers(1, 9 * BAND)] * 2, *[st.integers(1, 9)] * 2)


def drawn(shape, seed=0):
    """Images, filters, bias and an incoming gradient in float32, as they come and in float64."""
    N, H, W, C, O = shape
    rng = np.random.default_rng(seed)
    narrow = [rng.standard_normal(s).astype(np.float32) for s in ((N, H, W, C), (3, 3, C, O), (O,), (N, H, W, O))]
    for a in narrow:
        a.flags.writeable = False
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


def errors(ours, exact):
    """Of each result the largest, as a share of the largest value."""
    for a, e in zip(ours, exact, strict=True):
        assert a.dtype == np.float32 and a.shape == e.shape
    return np.array([np.abs(a - e).max() / np.abs(e).max() for a, e in zip(ours, exact, strict=True)])


def test_the_identity_is_exact():
    """A^T ((G w) * (B^T x)) = direct sums, and its transposes are the gradients."""
    rng = np.random.default_rng(0)
    x, w, dy = rng.standard_normal(6), rng.standard_normal(3), rng.standard_normal(4)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)
    close(A_T @ ((G @ w) * (B_T @ x)), [w @ x[i : i + 3] for i in range(4)])
    close(G.T @ ((A_T.T @ dy) * (B_T @ x)), [dy @ x[k : k + 4] for k in range(3)])
    close(B_T.T @ ((A_T.T @ dy) * (G @ w)), np.convolve(dy, w))


def test_the_matrices_evaluate_polynomials():
    points = np.array(POINTS)[:, None]
    np.testing.assert_array_equal(A_T.T[:5], points ** np.arange(4))
    np.testing.assert_array_equal(A_T.T[5], [0, 0, 0, 1])
    np.testing.assert_allclose(G[:5] / G[:5, :1], points ** np.arange(3), rtol=1e-14)
    assert G[5, :2].tolist() == [0, 0] and G[5, 2] > 0
    np.testing.assert_allclose(np.linalg.norm(B_T, axis=1), 1, rtol=1e-14)


@pytest.mark.parametrize("size", [1, 4, 7, 14, 4 * BAND, 4 * BAND + 1, 28, 100])
def test_bands_cover_all_rows_and_no_more(size):
    assert np.concatenate([np.arange(size)[band.outputs] for band in bands(size)]).tolist() == list(range(size))
    for band in bands(size):
        rows = np.arange(size)[band.outputs]
        wanted = sorted({r + k for r in rows for k in (-1, 0, 1)} & set(range(size)))
        assert np.arange(size)[band.inputs].tolist() == wanted
        assert band.D.shape == (6 * -(-len(rows) // 4), len(wanted)) and band.S.shape == (len(rows), len(band.D))
        assert len(rows) <= 4 * BAND
        for matrix, transpose in ((band.D, band.D_T), (band.S, band.S_T)):
            np.testing.assert_array_equal(matrix.T, transpose)
            assert matrix.flags.c_contiguous and transpose.flags.c_contiguous  # half as fast otherwise


@given(shape=SHAPES, seed=SEEDS)
def test_it_equals_direct_sums_for_images_of_any_size(shape, seed):
    (x, w, b, g), (x64, w64, b64, g64) = drawn(shape, seed)
    ours, exact = all_of(x, w, b, g), (reference.conv2d(x64, w64, b64, 1, ONE), *all_direct(x64, w64, b64, g64)[1:])
    # an output may be what little is left of large terms, so the measure is how large they can be
    scale = lambda image, filters: 2e-6 * np.abs(image).max() * np.abs(filters).sum((0, 1, 2)).max()
    limits = scale(x64, w64), scale(g64, w64.swapaxes(2, 3)), scale(x64, g64), scale(np.ones(1), g64)
    for a, e, limit in zip(ours, exact, limits, strict=True):
        assert a.dtype == np.float32 and np.abs(a - e).max() <= limit
    np.testing.assert_allclose(conv3x3(x, w, None)[0], ours[0] - b, atol=limits[0])


@pytest.mark.parametrize("shape", [(3, 28, 28, 32, 32), (2, 14, 14, 64, 64), (3, 7, 7, 128, 128), (2, 16, 16, 512, 16)])
def test_its_error_is_as_stated(shape):
    """On random images and filters, forward and gradients within 1e-5 of the largest value, 20 times direct sums'."""
    narrow, wide = drawn(shape)
    exact = all_direct(*wide)
    ours, direct = errors(all_of(*narrow), exact), errors([a.astype(np.float32) for a in all_direct(*narrow)], exact)
    assert (ours < 1e-5).all() and (ours < 20 * direct)[:3].all(), (ours, direct)


def test_where_the_filter_cancels_most_of_the_image_direct_sums_lose_digits_too():
    x = np.sin(np.linspace(0, np.pi, 28)).reshape(1, 28, 1, 1).repeat(9, 2).repeat(32, 3)
    w = np.zeros((3, 3, 32, 8))
    w[:, 1] = np.array([1, -2, 1]).reshape(3, 1, 1)  # second derivative along the height
    inside = lambda y: [y[:, 1:-1]]
    exact = inside(conv.correlate(x, w, 1, ONE))
    x, w = x.astype(np.float32), w.astype(np.float32)
    assert errors(inside(conv3x3(x, w, None)[0]), exact) < 20 * errors(inside(conv.correlate(x, w, 1, ONE)), exact)


def test_a_whole_network_in_float32_is_as_good_as_its_float64_twin():
    rng, nets = np.random.default_rng(0), [UNet(channels=(16, 32, 64), blocks=1), UNet(channels=(16, 32, 64), blocks=1)]
    for p, q in zip(nets[0].parameters(), nets[1].to(dtype="float64").parameters(), strict=True):
        p.data = (p.data + 0.05 * rng.standard_normal(p.shape)).astype(np.float32)
        q.data = p.data.astype(np.float64)
    x, g, t = *rng.standard_normal((2, 4, 16, 16, 1)).astype(np.float32), np.arange(4) * 200
    y, exact = (net(x.astype(net.dtype), t) for net in nets)
    assert errors([y.data], [exact.data]) < 1e-5
    ours, exact = (backward((out * g.astype(out.dtype)).sum()) for out in (y, exact))
    vector = lambda gradients, net: np.concatenate([gradients[p].ravel() for p in net.parameters()])
    ours, exact = vector(ours, nets[0]), vector(exact, nets[1])
    assert np.linalg.norm(ours - exact) < 1e-5 * np.linalg.norm(exact)


def test_a_nan_stays_in_its_image():
    (x, w, b, g), _ = drawn((9, 6, 5, 8, 9))
    bad = x.copy()
    bad[4, 3, 2, 1] = np.nan
    y, others = conv3x3(bad, w, b)[0], np.arange(9) != 4
    np.testing.assert_array_equal(y[others], conv3x3(x, w, b)[0][others])
    assert np.isnan(y[4, 2:5, 1:4]).all()


@pytest.mark.parametrize("shape", [(2, 6, 5, 8, 9), (2, 6, 5 * BAND, 8, 9)])  # one band across, and two
def test_views_of_any_strides(shape):
    (x, w, b, g), _ = drawn(shape)
    plain = all_of(x, w, b, g)
    backwards = lambda a: np.ascontiguousarray(a[:, ::-1, ::-1])[:, ::-1, ::-1]
    for odd in (np.asfortranarray, backwards):
        for a, e in zip(all_of(odd(x), odd(w), b, odd(g)), plain, strict=True):
            np.testing.assert_array_equal(a, e)
    x, g = (np.broadcast_to(a[:1, :1, :1], a.shape) for a in (x, g))
    wide = [a.astype(np.float64) for a in (x, w, b, g)]
    assert (errors(all_of(x, w, b, g), all_direct(*wide)) < 1e-5).all()


IMAGES = (2, 8, 8, 8)


@pytest.mark.parametrize(
    ("used", "shape", "O", "change"),
    [
        (True, IMAGES, 8, {}), (True, (2, 8, 8, 16), 9, {"padding": ONE}), (True, IMAGES, 8, {"padding": [[1, 1]] * 2}),
        (True, IMAGES, 8, {"padding": np.ones((2, 2), int)}), (False, IMAGES, 8, {"dtype": "float64"}),
        (False, (2, 8, 8, 7), 8, {}), (False, IMAGES, 7, {}),
        (False, (1, 8, 15, 8), 8, {}), (True, (1, 8, 16, 8), 8, {}),  # too few pixels, and enough
        (False, IMAGES, 8, {"stride": 2}), (False, IMAGES, 8, {"padding": 0}),
        (False, IMAGES, 8, {"padding": ((0, 1), (1, 1))}), (False, IMAGES, 8, {"kernel": (3, 1)}),
        (False, IMAGES, 8, {"kernel": (1, 1)}),
    ],
)  # fmt: skip
def test_where_conv2d_and_its_gradients_use_it(used, shape, O, change, monkeypatch):
    settings = {"padding": 1, "kernel": (3, 3), "dtype": "float32"} | change
    kernel, dtype, rng = settings.pop("kernel"), settings.pop("dtype"), np.random.default_rng(0)
    leaves = [Parameter(rng.standard_normal(s).astype(dtype)) for s in (shape, (*kernel, shape[3], O), (O,))]
    wide, calls, real = [Parameter(p.data.astype(np.float64)) for p in leaves], [], winograd.conv3x3
    monkeypatch.setattr(winograd, "conv3x3", lambda *a: calls.append(a) or real(*a))
    y = conv2d(*leaves, **settings)
    assert len(calls) == used
    exact, u = conv2d(*wide, **settings), rng.standard_normal(y.shape).astype(dtype)
    gradients, exact_gradients = backward((y * u).sum()), backward((exact * u.astype(np.float64)).sum())
    pairs = [(y.data, exact.data), *((gradients[p], exact_gradients[q]) for p, q in zip(leaves, wide, strict=True))]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


class TestConstantFilters:
    (x, w, b, g), _ = drawn((2, 8, 8, 8, 8))

    @pytest.fixture
    def transformed(self, monkeypatch):
        """Which filters were transformed."""
        seen, real = [], winograd.filters
        monkeypatch.setattr(winograd, "filters", lambda w: seen.append(w) or real(w))
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

        def work():
            with kept.in_force():
                conv3x3(self.x, self.w, self.b)
                with other.in_force():
                    conv3x3(self.x, self.w, self.b)
                conv3x3(self.x, self.w, self.b)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(transformed) == 2

    def test_sampling_keeps_them(self, transformed):
        unet, shape = UNet(channels=(8, 8), blocks=1, attention=(False, False)), (8, 16, 16, 1)
        diffusion = Diffusion(make_schedule("cosine", 3))
        of_a_model = sum(p.shape[:2] == (3, 3) and min(p.shape[2:]) >= 8 for p in unet.parameters()) - 1  # of stride 2
        levels, wrapped = np.zeros(shape, np.float32) - 1, lambda x, t: unet(x, t)
        for use, count in (
            (lambda: sample(diffusion, unet, shape, workers=2), of_a_model),
            (lambda: diffusion.bits_per_dim(unet, levels, workers=2, progress=False), of_a_model),
            (lambda: sample(diffusion, wrapped, shape, workers=2), 3 * 2 * of_a_model),  # each time
        ):
            transformed.clear()
            use()
            assert len(transformed) == count
