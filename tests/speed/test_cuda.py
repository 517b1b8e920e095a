"""The package on a GPU, as its users run it: all that lives there agrees with what a CPU computes.

`pytest -m gpu` on a machine with a GPU; `pytest -m gpu --cuda emulated` on real CuPy, on a CPU, which is slow: networks
and images are small.
"""

import itertools
import pathlib
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ideal import moved
from reference import rounded
from strategies import SEEDS
from tiny_training import TINY

from tinyddpm import Diffusion, UNet, backward, load_digits, make_schedule, sample, train
from tinyddpm.autograd import functional
from tinyddpm.autograd.conv import conv2d, convolve
from tinyddpm.autograd.functional import PRECISIONS, column_sums, joined, product, softmax_rows, softmax_rows_grad
from tinyddpm.autograd.fused import attention, group_norm, normalise
from tinyddpm.autograd.tensor import Parameter
from tinyddpm.backend import array_module, device_of, is_array, like, on_device, to_device, to_numpy
from tinyddpm.diffusion import editing
from tinyddpm.exchange.diffusers import load_diffusers, save_diffusers
from tinyddpm.files.model import load_model, save_model
from tinyddpm.files.pictures import grid
from tinyddpm.files.run_folder import MetricsLog
from tinyddpm.network.nn import Linear
from tinyddpm.speed.ranks import Ranks
from tinyddpm.training.optim import EMA, Adam, clip_norm, flat_gradient, flatten

pytestmark = pytest.mark.gpu
ROOT = pathlib.Path(__file__).parents[2]

FLOATS = st.sampled_from(["float32", "float64"])
BITS = {"float32": 23, "tf32": 10, "bf16": 7, "fp16": 10}
IN_FULL = ((1, 1), (1, 1))  # the padding of a 3x3 convolution


def to_cuda(x):
    return to_device(x, "cuda") if isinstance(x, np.ndarray) else x


def close(on_cuda, on_cpu, dtype="float32", more=1):
    """Equal but for rounding, relative to the largest number; of the same type, and the one really on the GPU."""
    assert device_of(on_cuda) == "cuda:0" and isinstance(on_cpu, (np.ndarray, np.generic))
    assert on_cuda.shape == on_cpu.shape and on_cuda.dtype == on_cpu.dtype == np.dtype(dtype)
    scale = np.abs(on_cpu).max(initial=1e-30)
    tolerance = more * (1e-5 if dtype == "float32" else 1e-12)
    np.testing.assert_allclose(to_numpy(on_cuda), on_cpu, rtol=0, atol=tolerance * scale)


WAYS = st.sampled_from(["plain", "transposed", "strided", "cut", "repeated"])


def laid_out(x, how):
    """The same numbers, otherwise in memory; of "repeated", the first of each leading axis again and again."""
    if not is_array(x) or x.ndim == 0:
        return x
    if how == "transposed" and x.ndim > 1:
        return x.swapaxes(-1, -2).copy().swapaxes(-1, -2)
    if how == "strided":
        return x.repeat(2, axis=-1)[..., ::2]
    if how == "cut":
        return array_module(x).concatenate([x, x], axis=-1)[..., : x.shape[-1]]
    if how == "repeated" and x.ndim > 1:
        return array_module(x).broadcast_to(x[(slice(0, 1),) * (x.ndim - 1)], x.shape)
    return x


def close_op(f, *inputs, dtype, way="plain"):
    """The value of a paired function that returns (y, pull), and what it pulls back."""
    inputs = [x.astype(dtype) if isinstance(x, np.ndarray) else x for x in inputs]
    (y, pull), (y_cuda, pull_cuda) = (f(*(laid_out(to(x), way) for x in inputs)) for to in (lambda x: x, to_cuda))
    close(y_cuda, y, dtype)
    g = np.random.default_rng(0).standard_normal(y.shape).astype(dtype)
    pulled, pulled_cuda = pull(laid_out(g, way)), pull_cuda(laid_out(to_cuda(g), way))
    pulled, pulled_cuda = (p if isinstance(p, tuple) else (p,) for p in (pulled, pulled_cuda))
    for a, b in zip(pulled_cuda, pulled, strict=True):
        a, b = (x() if callable(x) else x for x in (a, b))
        close(a, b, dtype, more=10)


def pair(**more):
    """Two networks alike, the second on a GPU."""
    return [moved(UNet(**TINY | more), by=0.05).to(device) for device in ("cpu", "cuda")]


def digits(n, size=8):
    return (np.random.default_rng(0).integers(0, 256, (n, size, size, 1)) / 127.5 - 1).astype(np.float32)


# ------------------------------------------------------------------------------------------- each function and its twin


@given(dtype=FLOATS, seed=SEEDS, n=st.integers(1, 3), H=st.integers(1, 9), W=st.integers(1, 9), C=st.integers(1, 9),
       O=st.integers(1, 9), kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)), stride=st.integers(1, 3),
       pads=st.tuples(*[st.integers(0, 3)] * 4), pointwise=st.booleans(), bias=st.booleans(), way=WAYS,
       at_a_time=st.sampled_from([1, 200, 2**25]))  # fmt: skip
def test_convolve(dtype, seed, n, H, W, C, O, kernel, stride, pads, pointwise, bias, way, at_a_time):
    from tinyddpm.speed import cuda

    kernel, stride, pads = ((1, 1), 1, (0, 0, 0, 0)) if pointwise else (kernel, stride, pads)
    (kh, kw), (top, bottom, left, right) = kernel, pads
    H, W = max(H, kh - top - bottom), max(W, kw - left - right)
    r = np.random.default_rng(seed)
    x, w, b = r.standard_normal((n, H, W, C)), r.standard_normal((kh, kw, C, O)), r.standard_normal(O)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "COLUMNS", at_a_time)  # a batch in parts
        pad = (top, bottom), (left, right)
        close_op(convolve, x, w, b if bias else None, stride, pad, "float32", dtype=dtype, way=way)


@given(dtype=FLOATS, seed=SEEDS, n=st.integers(1, 3), L=st.integers(1, 9), W=st.none() | st.integers(1, 5),
       silu=st.booleans(), way=WAYS, groups=st.integers(1, 4),
       D=st.integers(1, 5) | st.sampled_from([255, 256, 257, 300]))  # fmt: skip
def test_normalise(dtype, seed, n, L, W, groups, D, silu, way):
    r = np.random.default_rng(seed)
    x = 1 + 2 * r.standard_normal((n, L, groups * D) if W is None else (n, L, W, groups * D))
    gamma, beta = r.standard_normal((2, groups * D))
    close_op(normalise, x, gamma, beta, groups, 1e-3, silu, dtype=dtype, way=way)


@given(dtype=FLOATS, seed=SEEDS, rows=st.integers(1, 20), size=st.integers(1, 70), in_place=st.booleans(), way=WAYS)
def test_softmax_rows(dtype, seed, rows, size, in_place, way):
    x, g = np.random.default_rng(seed).standard_normal((2, 2, 3, rows, size)).astype(dtype)
    x = 3 * x - 500
    sent, sent_g = to_cuda(x), to_cuda(g)
    if not in_place:
        x, g, sent, sent_g = (laid_out(a, way) for a in (x, g, sent, sent_g))
    y = softmax_rows(sent, out=sent if in_place else None)
    assert (y is sent) == in_place
    close(y, softmax_rows(x), dtype)
    dx = softmax_rows_grad(y, sent_g, out=sent_g if in_place else None)
    close(dx, softmax_rows_grad(softmax_rows(x), g), dtype, more=10)


@given(dtype=FLOATS, seed=SEEDS, lead=st.sampled_from([(), (1,), (3,), (2, 3)]), n=st.integers(1, 5),
       k=st.integers(1, 5), m=st.integers(1, 5), ways=st.tuples(WAYS, WAYS), precision=st.sampled_from(PRECISIONS),
       scale=st.sampled_from([1.0, 0.25]))  # fmt: skip
def test_product(dtype, seed, lead, n, k, m, ways, precision, scale):
    r = np.random.default_rng(seed)
    a, b = r.standard_normal((*lead, n, k)).astype(dtype), r.standard_normal((*lead, k, m)).astype(dtype)
    sent = [laid_out(to_cuda(x), way) for x, way in zip((a, b), ways)]
    bits = BITS[precision] if dtype == "float32" else 52
    a, b = (rounded(laid_out(x, way), bits) for x, way in zip((a, b), ways))
    close(product(*sent, precision, scale), product(a, b, scale=scale), dtype)


one_for_all = lambda a: array_module(a).broadcast_to(a[:1], a.shape)  # of a batch
along = lambda axis: lambda *xs: joined(*xs, axis=axis)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("f", "shapes"), [
    (product, [(2, 3, 4), (4, 5)]), (product, [(1, 3, 4), (2, 4, 5)]), (product, [(2, 1, 3, 4), (6, 4, 5)]),
    (product, [(0, 4), (4, 5)]), (product, [(3, 0), (0, 5)]),
    (lambda a, b: product(one_for_all(a), b), [(4, 5, 5), (4, 5, 5)]),
    (column_sums, [(7, 5)]), (column_sums, [(3, 7, 5)]), (column_sums, [(2, 3, 1, 4)]), (column_sums, [(1, 1)]),
    (along(-1), [(2, 3, 4), (2, 3, 1)]), (along(1), [(2, 3), (2, 5)]), (along(0), [(2, 3), (4, 3)]),
    (along(-1), [(2, 1), (2, 2), (2, 3)]), (lambda a, b: joined(a[..., ::2], b, axis=-1), [(3, 4, 6), (3, 4, 6)]),
])  # fmt: skip
def test_twins_of_arrays_of_any_shape(f, shapes, dtype):
    r = np.random.default_rng(0)
    arrays = [r.standard_normal(shape).astype(dtype) for shape in shapes]
    close(f(*map(to_cuda, arrays)), f(*arrays), dtype)


def test_bad_input():
    ones = lambda *shape, dtype=np.float64: to_cuda(np.ones(shape, dtype))
    x, w, b = (ones(*shape, dtype=np.float16) for shape in ((1, 4, 4, 2), (3, 3, 2, 2), (2,)))
    half = "a GPU computes in float32 or float64, got float16; see precision"
    for call, message, error in [
        (lambda: product(ones(3, 4), ones(5, 6)), None, ValueError),
        (lambda: product(ones(3, 4), ones(2, 5, 6)), None, ValueError),
        (lambda: product(ones(2, 3, 4), ones(3, 4, 5)), None, ValueError),
        (lambda: product(ones(3, 4), ones(4, 3), "half"), "precision: unknown 'half'; known: float32, tf32, bf16, fp16",
         ValueError),
        (lambda: joined(ones(2, 3), ones(4, 3), axis=-1), None, ValueError),
        (lambda: softmax_rows(ones(3, 0)), r"x: expected rows of numbers, got shape \(3, 0\)", ValueError),
        (lambda: conv2d(x, w, b), half, TypeError),
        (lambda: group_norm(x, b, b, groups=1), half, TypeError),
        (lambda: functional.softmax(x), half, TypeError),
        (lambda: functional.linear(x, w[0, 0], b), half, TypeError),
        (lambda: clip_norm(b, 1.0), half, TypeError),
        (lambda: ones(1, dtype="f") @ to_device(np.ones(1), "cuda:99"),
         "device: 'cuda:99' is not there; this machine has cuda:0", RuntimeError),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_clipping_and_average(dtype, weight_decay):
    r = np.random.default_rng(0)
    theta = r.standard_normal(40_000).astype(dtype)
    results = []
    for device in ("cpu", "cuda"):
        model = Linear(1, 1, r)
        model.w, model.b = (Parameter(to_device(part.copy(), device)) for part in np.split(theta, [30_000]))
        flat = flatten(model.parameters())
        adam, ema = Adam(flat, 1e-2, weight_decay=weight_decay), EMA(model, 0.9)
        norms = []
        for step, max_norm in enumerate([1e-2, 1e9, 1.0], start=1):  # of every number, every second, every third
            numbers = np.random.default_rng(step).standard_normal(40_000 * step).astype(dtype)
            gradient = to_device(numbers, device)[::step]
            norms.append(float(clip_norm(gradient, max_norm)))
            adam.step(gradient)
            ema.update(flat)
        results.append((flat, adam.m, adam.v, ema.average, norms))
    for on_cpu, on_cuda in zip(*[r[:4] for r in results]):
        close(on_cuda, on_cpu, dtype)
    np.testing.assert_allclose(results[1][4], results[0][4], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    for device in ("cpu", "cuda"):
        theta, gradient = to_device(np.ones(70_000, np.float32), device), np.append(np.ones(69_999), bad)
        adam, gradient = Adam(theta), to_device(gradient.astype(np.float32), device)
        with np.errstate(invalid="ignore"):
            clip_norm(gradient, 1.0)
        assert np.isnan(to_numpy(gradient)).all()
        adam.step(gradient)
        assert (to_numpy(theta) == 1).all() and not to_numpy(adam.m).any() and not to_numpy(adam.v).any()


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("precision", PRECISIONS)
def test_factors_are_rounded_and_sums_are_not(precision):
    r, low = np.random.default_rng(0), lambda x: rounded(x, BITS[precision]).astype(np.float64)
    a, b = r.standard_normal((3, 5, 300)).astype(np.float32), r.standard_normal((3, 300, 4)).astype(np.float32)
    turned = lambda a: a.swapaxes(1, 2).copy().swapaxes(1, 2)  # stored column by column
    for of in (lambda a: a, turned, one_for_all):
        expected = low(of(a)) @ low(b)
        close(product(of(to_cuda(a)), to_cuda(b), precision), expected.astype(np.float32))
        coarse = np.abs(product(of(a), b, precision) - expected).max() > 1e-3
        assert coarse == (precision != "float32"), "a CPU rounds nothing"
    fine = product(to_cuda(a.astype(float)), to_cuda(b.astype(float)), precision)  # of float64, neither
    np.testing.assert_allclose(to_numpy(fine), a.astype(float) @ b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_convolution_and_attention_in_any_precision(precision):
    r, bits = np.random.default_rng(0), BITS[precision]
    x, w, g = (r.standard_normal(s).astype(np.float32) for s in ((2, 5, 6, 3), (3, 3, 3, 4), (2, 5, 6, 4)))
    y, pull = convolve(rounded(x, bits), rounded(w, bits), None, 1, IN_FULL, "float32")
    dx, dw, _ = (gradient() for gradient in pull(rounded(g, bits)))
    y_cuda, pull = convolve(*map(to_cuda, (x, w)), None, 1, IN_FULL, precision)
    dx_cuda, dw_cuda, db_cuda = (gradient() for gradient in pull(to_cuda(g)))
    for got, expected in ((y_cuda, y), (dx_cuda, dx), (dw_cuda, dw), (db_cuda, g.sum(axis=(0, 1, 2)))):
        close(got, expected)
    q, k, v = r.standard_normal((3, 2, 4, 6)).astype(np.float32)
    exact, _ = attention.raw(q, k, v, heads=2)
    ours, pull = attention.raw(*map(to_cuda, (q, k, v)), heads=2, precision=precision)
    ours, gradients = to_numpy(ours), pull(to_cuda(g[:, :4, 0, :][..., [0, 1, 2, 3, 0, 1]].copy()))
    error = np.abs(ours - to_numpy(exact)).max()
    assert error < 1e-5 if precision == "float32" else 1e-6 < error < 2.0 ** (2 - bits)
    assert all(array_module(gradient).isfinite(gradient).all() for gradient in gradients)


def test_bf16_of_what_is_not_finite_and_of_ties():
    from tinyddpm.speed import cuda

    x = [np.inf, -np.inf, 0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3.4e38, 1.1 * 2.0**-133, np.nan, -np.nan]
    expected = [np.inf, -np.inf, 0.0, -0.0, 1, 1 + 2**-6, -1, np.inf, 2.0**-133, *[np.nan] * 4]
    carrying = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)  # are no numbers either
    x = to_cuda(np.append(np.array(x, np.float32), carrying))
    bits = to_numpy(cuda.rounded(x, "bf16")).astype(np.uint32) << 16
    np.testing.assert_array_equal(bits.view(np.float32), np.array(expected, np.float32))


class Faint(Diffusion):
    """Its loss is so small that in fp16 all gradients would be 0."""

    def loss(self, model, x0, rng):
        return super().loss(model, x0, rng) * 1e-6


@pytest.mark.parametrize(("precision", "kind", "tolerance"), [
    ("float32", Diffusion, 1e-5), *((p, Diffusion, 8 * 2.0 ** -BITS[p]) for p in PRECISIONS[1:]), ("fp16", Faint, 0.05),
])  # fmt: skip
def test_training_in_any_precision(precision, kind, tolerance):
    """Gradients of the loss as in float32, but for the bits of a product, also where they are too small for fp16."""
    unet, twin = moved(UNet(**TINY)), moved(UNet(**TINY)).to("cuda", precision=precision)
    assert twin.precision == twin.conv_in.precision == twin.middle_attention.attention.q.precision == precision
    diffusion, settings = kind(make_schedule("cosine", 6)), {"steps": 1, "batch": 32, "lr": 1e-30, "max_norm": 1e9}
    exact = next(train(unet, diffusion, digits(32), micro_batch=32, **settings))
    state = next(train(twin, diffusion, digits(32), **settings))
    np.testing.assert_allclose([state.loss, state.grad_norm], [exact.loss, exact.grad_norm], rtol=tolerance)
    if kind is Diffusion:  # the bits of the faintest gradients are few
        close(state.optimizer.m, exact.optimizer.m, more=tolerance / 1e-5)
    assert state.ema.model.precision == precision


# --------------------------------------------------------------------------------------------------- whole computations

PROCESSES = [("eps", "small", "simple"), ("v", "large", "min_snr"), ("eps", "small", "weighted_eps"),
             ("x0", "large", "weighted_mu"), ("v", "learned_range", "hybrid"), ("x0", "learned_range", "vlb"),
             ("v", "small", "vlb")]  # fmt: skip
SIMPLE = Diffusion(make_schedule("cosine", 6, input_scale=0.7))
SHORT = Diffusion(make_schedule("linear", 10, beta_end=0.7))
STEEP = Diffusion(make_schedule("linear", 50, beta_end=0.3))


def process(objective, variance, loss_type):
    diffusion = Diffusion(SIMPLE.schedule, objective, variance, loss_type)
    return diffusion, *pair(out_channels=2 if variance == "learned_range" else 1)


def close_losses(diffusion, unet, twin, x0, dtype="float32", more=1):
    """The gradients all together: some are zero but for rounding, such as that of the keys' bias, to which softmax is
    blind."""
    losses = [diffusion.loss(u, x, np.random.default_rng(1)) for u, x in ((unet, x0), (twin, to_cuda(x0)))]
    close(losses[1].data, losses[0].data, dtype)
    flat, flat_cuda = (flat_gradient(backward(loss), u.parameters()) for loss, u in zip(losses, (unet, twin)))
    close(flat_cuda, flat, dtype, more)


@pytest.mark.parametrize("kinds", PROCESSES)
def test_losses_gradients_and_likelihood(kinds):
    diffusion, unet, twin = process(*kinds)
    close_losses(diffusion, unet, twin, digits(4))
    if kinds[0] == "eps":
        bits, bits_cuda = (diffusion.bits_per_dim(u, digits(4), progress=False) for u in (unet, twin))
        np.testing.assert_allclose(bits_cuda.terms, bits.terms, rtol=1e-4)
        np.testing.assert_allclose(bits_cuda.prior, bits.prior, rtol=1e-4)
    if kinds[1] == "large":
        unet.to(dtype="float64"), twin.to(dtype="float64")
        close_losses(diffusion, unet, twin, digits(3).astype(np.float64), "float64")


@pytest.mark.parametrize("micro_batch", [8, 3])
def test_training(micro_batch):
    """Three steps, 12 images, in the same micro-batches: the same noise, losses, norms, weights and average."""
    unet, twin = pair(heads=2, dropout=0.3)
    settings = {"lr": 1e-3, "warmup_steps": 0, "ema_decay": 0.5, "workers": 1, "micro_batch": micro_batch}
    states = [list(train(u, SIMPLE, digits(12), 3, batch=8, **settings)) for u in (unet, twin)]
    losses, losses_cuda = ([(s.loss, s.grad_norm) for s in of] for of in states)
    np.testing.assert_allclose(losses_cuda, losses, rtol=1e-5)
    average, average_cuda = (of[-1].ema.model for of in states)
    assert twin.device == average_cuda.device == "cuda:0"
    for ours, theirs in ((twin, unet), (average_cuda, average)):
        close_weights(ours.state_dict(), theirs.state_dict())


def close_weights(ours, theirs):
    for name, value in theirs.items():
        if not name.endswith(".k.b"):  # its gradient is zero but for rounding, of which Adam makes steps as any
            np.testing.assert_allclose(ours[name], value, atol=2e-5, err_msg=name)


class Two(Ranks):
    """One of two ranks, of which the second runs when the first is through, and finds what that one has `left`."""

    def __init__(self, rank, left):
        super().__init__()
        self.rank, self.size, self.world, self.left = rank, 2, self, left
        self.mpi = SimpleNamespace(IN_PLACE=None)

    def allgather(self, value):
        return [value, value]

    def Bcast(self, host):
        self.left.append(host.copy()) if self.rank == 0 else np.copyto(host, self.left.pop(0))

    def Allreduce(self, where, host):
        self.left.append(host.copy()) if self.rank == 0 else np.add(host, self.left.pop(0), out=host)


def test_a_batch_is_shared_by_as_many_gpus_as_there_are_ranks():
    """Both have the first one's weights, and in the end the gradient of one that takes both halves, whose noise is
    theirs."""
    settings, left = dict(diffusion=SIMPLE, images=digits(12), steps=1, batch=7, warmup_steps=0), []
    whole = next(train(pair()[1], micro_batch=4, **settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no rank has nothing to do
        first, second = (next(train(pair(rng=rank)[1], ranks=Two(rank, left), **settings)) for rank in (0, 1))
    assert 0 < first.loss < whole.loss and second.run.config["micro_batch"] == 4 and not left
    np.testing.assert_allclose([second.grad_norm, second.loss], [whole.grad_norm, whole.loss], rtol=1e-5)
    close(second.optimizer.m, to_numpy(whole.optimizer.m))


@pytest.mark.filterwarnings("ignore:images")  # are expected in [-1, 1]
def test_training_that_blows_up_says_so_in_time_and_leaves_weights_and_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("tinyddpm.training.train.LOOK_EVERY", 4)
    unet, images = pair()[1], digits(8)
    steps = train(unet, SIMPLE, images, 100, batch=8, lr=1e-3, warmup_steps=0)
    next(steps)
    before, images[:] = unet.state_dict(), np.nan
    with pytest.raises(FloatingPointError, match="step 2: the loss is nan"):
        for state in steps:
            assert state.step < 4
    after = unet.state_dict()
    assert all((after[name] == value).all() for name, value in before.items())

    nobody_looked = "step 1: the loss is nan"
    with pytest.raises(FloatingPointError, match=nobody_looked):
        list(train(unet, SIMPLE, images, 3, batch=4))  # but at the last
    state = next(train(unet, SIMPLE, images, 100, batch=8))
    assert not state.seen
    with pytest.raises(FloatingPointError, match=nobody_looked):
        state.save(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_to_the_bit_and_from_one_device_to_another(tmp_path):
    """On another device in the same micro-batches, and to rounding."""

    def run(device, steps, path):
        unet = moved(UNet(**TINY)).to(device)
        states = train(unet, STEEP, digits(6), 10, batch=4, lr=1e-3, warmup_steps=0, resume=path, flip=True)
        *_, last = itertools.islice(states, steps)
        last.save(path)
        states.close()
        return unet.state_dict()

    whole = run("cuda", 4, tmp_path / "whole")
    for steps in (1, 3):
        parts = run("cuda", steps, tmp_path / "parts")
    for name, w in whole.items():
        np.testing.assert_array_equal(parts[name], w, err_msg=name)
    on_cpu = run("cpu", 4, tmp_path / "cpu")
    for device, steps in (("cpu", 1), ("cuda", 2), ("cpu", 1)):
        mixed = run(device, steps, tmp_path / "mixed")
    close_weights(mixed, on_cpu)


def test_the_log_of_a_gpu_waits_until_somebody_looks(tmp_path):
    path = tmp_path / "metrics.csv"
    log, states = MetricsLog(path), train(pair()[1], STEEP, digits(4), 3, batch=4)
    log.write(next(states)), log.write(next(states))
    assert not path.exists()
    log.write(next(states))  # the last one is looked at
    assert len(path.read_text().splitlines()) == 4


def test_a_loss_of_several_ranks_is_its_step_s_whenever_somebody_looks():
    settings = dict(batch=4, micro_batch=2, max_norm=1e9, lr=1e-3, warmup_steps=0)
    runs = [train(pair()[1], STEEP, digits(6), 4, ranks=Two(0, []), **settings) for _ in "ab"]
    at_once, later = [state.loss for state in runs[0]], list(runs[1])
    assert [state.loss for state in later] == at_once and len(set(at_once)) == 4


def test_what_is_on_another_device_is_named():
    (unet, twin), x, t = pair(), digits(2), np.array([1, 2])
    for net, images in ((unet, to_cuda(x)), (twin, x)):
        with pytest.raises(ValueError, match="conv2d: inputs must be on one device, got cpu, cuda:0; move arrays by"):
            net(images, t)
    with pytest.raises(TypeError, match="images: expected a NumPy array, got <class 'cupy.ndarray'>"):
        next(train(twin, SIMPLE, to_cuda(x), 1))
    with pytest.raises(TypeError, match="t: expected a NumPy array of integers"):
        twin(to_cuda(x), to_cuda(t))
    with pytest.warns(UserWarning, match="images: expected images in"):  # on another scale
        next(train(twin, SIMPLE, 5 + digits(4), 1, batch=4))


@pytest.mark.parametrize(("method", "more"), [
    ("ddpm", {}), ("ddpm", {"steps": 4, "clip": False}), ("ddpm", {"clip": "dynamic"}),
    ("ddim", {"eta": 0.5, "steps": 3}), ("dpm++", {"steps": 4}),
])  # fmt: skip
@pytest.mark.parametrize("kinds", [PROCESSES[0], PROCESSES[4]])
def test_the_same_seed_gives_the_same_images(method, more, kinds):
    diffusion, unet, twin = process(*kinds)
    seen, seen_cuda = [], []
    images = sample(diffusion, unet, (3, 8, 8, 1), method, rng=5, callback=lambda t, x, x0: seen.append(x), **more)
    watch = lambda t, x, x0: seen_cuda.append((t, x, x0))
    images_cuda = sample(diffusion, twin, (3, 8, 8, 1), method, rng=5, callback=watch, **more)
    close(images_cuda, images, more=10)
    assert len(seen) == len(seen_cuda) and {device_of(a) for _, *arrays in seen_cuda for a in arrays} == {"cuda:0"}
    assert grid(images_cuda).tobytes() == grid(to_numpy(images_cuda)).tobytes()


def test_checkpoints_cross_devices(tmp_path):
    unet, twin = pair()
    save_model(tmp_path / "a", unet, SIMPLE)
    save_model(tmp_path / "b", twin, SIMPLE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded, _ = load_model(tmp_path / "b")
    assert loaded.device == "cpu"
    for folder, model in (("c", unet), ("d", twin)):
        save_diffusers(tmp_path / folder, model, Diffusion(make_schedule("linear", 1000)))
    files, same = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*.*")} for f in (tmp_path / "c", tmp_path / "d"))
    assert len(files) == 4 and files == same
    assert load_diffusers(tmp_path / "d")[0].device == "cpu"
    loaded.to("cuda")
    x, t = to_cuda(digits(2)), np.array([0, 3])
    assert (to_numpy(loaded(x, t).data) == to_numpy(twin(x, t).data)).all()
    state = unet.state_dict()
    twin.load_state_dict({name: 2 * value for name, value in state.items()})
    assert twin.device == "cuda:0" and all((v == 2 * state[name]).all() for name, v in twin.state_dict().items())
    back = twin.to("cpu")
    assert back is twin and twin.device == "cpu" and isinstance(twin.conv_in.w.data, np.ndarray)


def test_labels_and_guidance():
    (unet, twin), labels = pair(classes=3, label_dropout=0.2), np.array([2, 0, 2])
    x, t = digits(3), np.array([0, 3, 3])
    y, y_cuda = unet(x, t, labels=labels), twin(to_cuda(x), t, labels=labels)
    close(y_cuda.data, y.data)
    g, g_cuda = (backward((y * y).sum())[net.class_embedding.w] for y, net in ((y, unet), (y_cuda, twin)))
    close(g_cuda, g, more=10)
    assert not g[1].any() and g[2].any()
    dropped = lambda u, x: u(x, np.zeros(3, int), np.random.default_rng(1), labels).data
    close(dropped(twin, to_cuda(x)), dropped(unet, x))
    for more in ({}, {"guidance": 2.0}):
        told, told_cuda = (sample(SHORT, u, (3, 8, 8, 1), labels=labels, **more) for u in (unet, twin))
        close(told_cuda, told, more=20)


HALF = np.arange(8) < np.full((8, 1), 4)
EDITING = [
    lambda u, x: editing.denoise(SHORT, u, x, 0.3, steps=3),
    lambda u, x: editing.sdedit(SHORT, u, x, 0.5),
    lambda u, x: editing.invert(SHORT, u, x, steps=5, iterations=2),
    lambda u, x: editing.interpolate(SHORT, u, x[:1], x[1:2], count=3, steps=4),
    lambda u, x: editing.inpaint(SHORT, u, x, like(HALF, x).astype(bool), steps=4, jump=2, resamplings=2),
]


@pytest.mark.parametrize("use", EDITING)
def test_what_starts_from_pictures(use):
    """The pictures may come from either device; what is made of them is where the model is."""
    unet, twin = pair()
    expected = use(unet, digits(2))
    for pictures in (digits(2), to_cuda(digits(2))):
        close(use(twin, pictures), expected, more=20)
    assert device_of(use(unet, to_cuda(digits(2)))) == "cpu"


# -------------------------------------------------------------------------------------------------------------- devices


def test_arrays_move():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    y = to_device(x, "cuda")
    assert is_array(y) and device_of(y) == "cuda:0" and (to_numpy(y) == x).all() and array_module(y).__name__ == "cupy"
    assert to_device(y, "cuda:0") is y and to_device(y, "cpu") is not y
    assert device_of(like(x, y)) == "cuda:0" and like(x.astype("float64"), y).dtype == np.float32
    assert (to_numpy(to_device(x.T, "cuda")) == x.T).all()


def test_all_of_it_on_the_second_gpu(tmp_path):
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs a second GPU")
    device, (unet, twin) = "cuda:1", pair()
    for where in ("cuda:0", device):  # each has its own of what is kept for the next time
        with on_device(where):
            assert device_of(column_sums(to_device(np.ones((3, 2)), where))) == where
    twin.to(device)
    uses = [(lambda u, x: sample(SIMPLE, u, (2, 8, 8, 1), steps=2), 1e-4), *((use, 1e-3) for use in EDITING)]
    for use, tolerance in uses:
        made, made_cuda = (use(u, digits(2)) for u in (unet, twin))
        assert device_of(made_cuda) == device
        np.testing.assert_allclose(to_numpy(made_cuda), made, atol=tolerance)
    states = [list(train(u, SIMPLE, digits(4), 2, batch=4, workers=1))[-1] for u in (unet, twin)]
    np.testing.assert_allclose(states[1].loss, states[0].loss, rtol=1e-5)
    assert states[1].ema.model.device == device and device_of(states[1].optimizer.m) == device
    bits = [SIMPLE.bits_per_dim(u, digits(2), progress=False).total for u in (unet, twin)]
    np.testing.assert_allclose(bits[1], bits[0], rtol=1e-4)
    save_model(tmp_path / "a", twin, SIMPLE)
    assert twin.to(dtype="float64").device == device and twin.to("cuda:0").device == "cuda:0"
    with on_device(device):  # what one calls oneself wants its device to be the current one
        x = to_device(digits(2), device)
        assert device_of(SIMPLE.loss(moved(UNet(**TINY)).to(device), x, np.random.default_rng(0)).data) == device


# ------------------------------------------------------------------------------------------------ on a machine with one


@pytest.fixture
def real(request):
    if request.config.getoption("--cuda") not in (None, "real"):
        pytest.skip("for a real GPU")


def run_tests(*arguments, under=()):
    """pytest in a process of its own."""
    command = [*under, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("tests", ["autograd", "network", "peers/test_torch.py"])
def test_the_tests_of_ops_and_networks_pass_on_it(real, tests):
    if tests.startswith("peers"):
        pytest.importorskip("torch")
    run_tests("--cuda", "real", "-k", "not 50000", f"tests/{tests}")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_no_kernel_reads_or_writes_where_it_should_not(real, tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs NVIDIA's compute-sanitizer")
    under = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    tests = "test_convolve or test_normalise or test_softmax_rows or test_twins_of_arrays"
    run_tests("-m", "gpu", "tests/speed/test_cuda.py", "-k", tests, under=under)


@pytest.mark.parametrize("config", [{}, {"heads": 4, "attention": (False, True, True)}])
def test_a_whole_step_of_the_default_network(real, config):
    unet, twin = moved(UNet(**config)), moved(UNet(**config)).to("cuda")
    close_losses(Diffusion(make_schedule("linear", 1000)), unet, twin, digits(64, 28), more=10)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_learns_digits(real, precision):
    images, _ = load_digits()
    unet = UNet(channels=(16, 32, 64), blocks=1).to("cuda", precision=precision)
    settings = {"lr": 4e-3, "seed": 1}
    states = list(train(unet, Diffusion(make_schedule("cosine", 300)), images, 200, batch=64, **settings))
    losses = [state.loss for state in states]
    assert np.mean(losses[:5]) > 0.5 and np.mean(losses[-50:]) < 0.15
