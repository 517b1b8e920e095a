"""What a training step and a sampler's step ask of a GPU: kernels, copies, waiting, memory. Counted, on a GPU that
computes nothing: `pytest -m gpu --cuda null`.

The ceilings are a little above what was counted when they were set.
"""

import contextlib

import numpy as np
import pytest

from tinyddpm import Diffusion, UNet, make_schedule, sample, train
from tinyddpm.backend import to_device

pytestmark = pytest.mark.gpu

MNIST = {"channels": (32, 64, 128), "blocks": 2}  # UNet's defaults
EXAMPLE = {"channels": (16, 32, 64), "blocks": 1}
CIFAR = {"channels": (128, 256, 256, 256), "attention": (False, True, False, False), "in_channels": 3,
         "out_channels": 3, "groups": 32}  # fmt: skip
MB = 2**20
DIFFUSION = Diffusion(make_schedule("linear", 1000))


@pytest.fixture
def counts(request):
    if request.config.getoption("--cuda") != "null":
        pytest.skip("counts with --cuda null")
    import cuda_on_cpu

    return cuda_on_cpu.counts


def begin_training(config, batch, size, precision="float32", **settings):
    images = np.zeros((batch, size, size, config.get("in_channels", 1)), np.float32)
    return train(UNet(**config).to("cuda", precision=precision), DIFFUSION, images, 10, batch, **settings)


def nobody_waits(counts):
    assert not counts.synchronisations and set(counts.copies) == {"host to device"}


@pytest.mark.parametrize(("config", "batch", "size", "precision", "launches", "memory"), [
    (MNIST, 64, 28, "float32", 900, 620 * MB), (EXAMPLE, 32, 28, "float32", 612, 125 * MB),
    (CIFAR, 8, 32, "float32", 1090, 1070 * MB), (EXAMPLE, 32, 28, "tf32", 612, 125 * MB),
    (EXAMPLE, 32, 28, "bf16", 1000, 130 * MB), (EXAMPLE, 32, 28, "fp16", 1000, 130 * MB),
])  # fmt: skip
def test_a_training_step(counts, config, batch, size, precision, launches, memory):
    steps = begin_training(config, batch, size, precision)
    next(steps)  # at first there is more to do
    for _ in range(2):
        counts.reset()
        state = next(steps)
        nobody_waits(counts)
        assert counts.launches.total() <= launches
        assert counts.copies["host to device"] <= 7 and counts.memset == 0
        state_bytes = 4 * batch * size * size * config.get("in_channels", 1)
        assert counts.copied_bytes["host to device"] < 2.5 * state_bytes + 32 * 1024
        assert counts.peak_in_use <= memory
    assert isinstance(state.loss, float)
    assert counts.synchronisations.total() == 2, "to look is to wait for the loss, and to fetch the norm as well"
    assert state.loss == state.look()[0] and counts.synchronisations.total() == 2, "but once"


def test_micro_batches_save_memory(counts):
    peaks = []
    for micro_batch in (None, 2):
        steps = begin_training(EXAMPLE, 32, 28, micro_batch=micro_batch)
        next(steps)
        counts.reset()
        next(steps)
        nobody_waits(counts)
        peaks.append(counts.peak_in_use)
        steps.close()
        del steps
    assert peaks[1] < 0.4 * peaks[0]


def test_now_and_then_training_looks_whether_all_is_finite(counts, monkeypatch):
    monkeypatch.setattr("tinyddpm.training.train.LOOK_EVERY", 3)
    steps, waited = begin_training(EXAMPLE, 4, 8), []
    for _ in range(7):
        counts.reset()
        next(steps)
        waited.append(counts.synchronisations.total() > 0)
    assert waited == [True, False, True, False, False, True, False]  # at first, at the weights to begin with


@pytest.mark.parametrize(("method", "settings"), [
    ("ddpm", {}), ("ddim", {"eta": 1.0}), ("dpm++", {}), ("ddpm", {"clip": "dynamic"}), ("ddpm", {"clip": False}),
])  # fmt: skip
def test_a_sampler_s_step(counts, method, settings):
    unet, seen = UNet(**MNIST).to("cuda"), []

    def callback(t, x, x0):
        seen.append((counts.launches.total(), counts.copies.total(), counts.peak_in_use))
        nobody_waits(counts)

    counts.reset()
    with contextlib.suppress(FloatingPointError):  # nothing was computed, so it may be anything
        sample(DIFFUSION, unet, (64, 28, 28, 1), method, 5, callback=callback, **settings)
    launches, copies, _ = np.diff(seen, axis=0).T
    assert len(seen) == 5 and (launches <= 325).all() and (copies <= 6).all()
    assert seen[-1][2] < 230 * MB
    assert counts.synchronisations.total() == 1, "at the end, to see whether the images are finite"


def test_counts_can_fail(counts):
    """They see what they are there for."""
    import cupy

    def some_of_everything():
        x = to_device(np.ones((4, 256), np.float32), "cuda")
        y = x @ x.T
        z = cupy.zeros_like(y)
        z[:] = y
        float((y * 2).sum())

    some_of_everything()  # for the first time, when all is compiled
    counts.reset()
    before = counts.in_use
    some_of_everything()
    assert counts.launches == {"cublasGemmEx": 1, "cupy_multiply__float32_float_float32": 1, "cupy_sum": 1}
    assert counts.copies == {"host to device": 1, "device to host": 1, "device to device": 1}
    assert counts.copied_bytes == {"host to device": 4096, "device to host": 4, "device to device": 64}
    assert counts.synchronisations == {"streamSynchronize": 1} and counts.memset == 1
    assert counts.peak_in_use - before == 4096 + 3 * 512 + 512 and counts.in_use == before
    cupy.get_default_memory_pool().free_all_blocks()
    assert counts.synchronisations["free"] > 0
