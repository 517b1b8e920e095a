"""The plain way runs on its own: within `plain()` no twin is used, and what comes out is the same, to rounding."""

import functools
import pathlib
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import tinyddpm
from tinyddpm import Diffusion, UNet, backend, backward, load_digits, make_schedule, sample, train
from tinyddpm.autograd.functional import column_sums
from tinyddpm.backend import on_device, plain, to_device, to_numpy
from tinyddpm.diffusion.editing import inpaint, interpolate


@pytest.fixture
def asked(monkeypatch):
    """A list of the kinds for which a twin was looked for."""
    kinds, twins = [], backend._twins
    monkeypatch.setattr(backend, "_twins", lambda kind: kinds.append(kind) or twins(kind))
    return kinds


def trained(dtype):
    """The states of a few steps of training, of a network that has all that a U-Net can have; its initial parameters,
    and samples, bits and edited pictures of it, by name."""
    images, labels = (part[::200] for part in load_digits())
    images = images[:, 6:22, 6:22].astype(dtype)
    settings = dict(dropout=0.1, classes=10, label_dropout=0.2, patch=2, rng=1)
    unet = UNet(1, 2, (16, 32), 1, (False, True), **settings).to(dtype=dtype)
    diffusion = Diffusion(make_schedule("cosine", 8, input_scale=0.5), "v", "learned_range", "hybrid")
    begin = np.concatenate([p.data.ravel() for p in unet.parameters()])
    settings = dict(batch=8, micro_batch=4, warmup_steps=0, lr=2e-3, flip=True, workers=2)
    states = list(train(unet, diffusion, images, 3, labels=labels, **settings))
    net, x, two, known = states[-1].ema.model, images[::25], labels[::25], np.arange(16)[:, None] < np.full(16, 8)
    return states, begin, {
        "losses": np.array([s.loss for s in states]),
        "norms": np.array([s.grad_norm for s in states]),
        "ddpm": sample(diffusion, net, x.shape, "ddpm", 3, labels=two, guidance=2.0),
        "dpm++": sample(diffusion, net, x.shape, "dpm++", 3, labels=two),
        "bits": diffusion.bits_per_dim(net, x, progress=False, labels=two).terms,
        "interpolated": interpolate(diffusion, net, x[:1], x[1:2], 3, 4),
        "inpainted": inpaint(diffusion, net, x, known, 2, 2, 2),
    }  # fmt: skip


@pytest.mark.parametrize("dtype, rounding", [("float64", 1e-13), ("float32", 1e-5)])
def test_training_and_samples_with_every_twin_switched_off(dtype, rounding, asked):
    """A last digit or two is lost in Winograd's convolutions, and another in Adam, which divides even the smallest
    gradients by themselves. Of what three steps change, tiles of 8 rows make 1e-4, another order of sums 3e-5."""
    with plain(), threadpool_limits(1, "blas"):  # two would wait for each other where others are at work
        plainly, begin, of_plain = trained(dtype)
    assert not asked
    fast, _, of_fast = trained(dtype)
    assert "cpu" in asked
    for name, expected in of_plain.items():
        tolerance = rounding * np.abs(expected).max()
        np.testing.assert_allclose(of_fast[name], expected, 0, tolerance, err_msg=name, strict=True)
    for vector in (lambda s: s.optimizer.theta, lambda s: s.ema.average):
        a, b = vector(plainly[-1]), vector(fast[-1])
        assert np.linalg.norm(a - b) < 20 * rounding * np.linalg.norm(a - begin)  # of what the training changed


def test_it_holds_in_its_own_thread_and_block_only(asked):
    x = np.ones((3, 2))
    with pytest.raises(KeyError), plain():
        with plain():
            column_sums(x)
        column_sums(x)
        assert not asked
        thread = threading.Thread(target=column_sums, args=(x,))
        thread.start()
        thread.join()
        assert asked == ["cpu"]
        raise KeyError
    column_sums(x)
    assert asked == ["cpu", "cpu"]


BY_HAND = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # nothing from elsewhere

import numpy as np
import tinyddpm
from tinyddpm.backend import plain
from tinyddpm.diffusion.process import Diffusion
from tinyddpm.diffusion.sample import sample
from tinyddpm.diffusion.schedule import make_schedule
from tinyddpm.network.unet import UNet
from tinyddpm.training.batches import Batches
from tinyddpm.training.loop import batch_gradient, descend, micro_batch_gradient
from tinyddpm.training.optim import EMA, Adam, flatten

unet = UNet(channels=(8, 16), blocks=1, attention=(False, True))
diffusion = Diffusion(make_schedule("cosine", 20), "x0")
images = np.ones((8, 8, 8, 1), np.float32)
batches, optimizer, ema = Batches(images, None, 4, 2, seed=0), Adam(flatten(unet.parameters()), 1e-2), EMA(unet, 0.5)
with plain(), batch_gradient(unet, micro_batch_gradient(unet, diffusion, batches), batches, range(15)) as gradient:
    losses = [loss for _, _, (loss, _) in descend(gradient, optimizer, ema, 15, lambda step: 1e-2)]
    drawn = sample(diffusion, ema.model, (2, 8, 8, 1), steps=5)
assert losses[-1] < 0.5 * losses[0] and drawn.mean() > 0.3, (losses, drawn.mean())
print(tinyddpm.__file__, *sorted(name for name in sys.modules if name.startswith("tinyddpm.") and name.count(".") == 1))
"""


def test_without_the_rooms_that_are_only_faster_or_practical(tmp_path):
    """What a learner reads is all that is needed to train and to sample."""
    package, copy = pathlib.Path(tinyddpm.__file__).parent, tmp_path / "tinyddpm"
    for room in ("autograd", "network", "diffusion", "training"):
        shutil.copytree(package / room, copy / room, ignore=shutil.ignore_patterns("train.py", "__py*"))
    (copy / "__init__.py").touch()
    for file in ("backend.py", "arguments.py", "bar.py"):
        shutil.copy(package / file, copy)
    (tmp_path / "by_hand.py").write_text(BY_HAND)
    result = subprocess.run([sys.executable, "by_hand.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    where, *rooms = result.stdout.split()
    assert where == str(copy / "__init__.py")
    assert " ".join(rooms).replace("tinyddpm.", "") == "arguments autograd backend bar diffusion network training"


@pytest.mark.gpu
def test_on_a_gpu_too(asked):
    """CuPy takes what is written for NumPy."""
    x0, labels = (part[::2500] for part in load_digits())
    diffusion = Diffusion(make_schedule("cosine", 20), "x0", loss_type="vlb")
    found = []
    for device in ("cpu", "cuda"):
        unet = UNet(1, 1, (8, 16), 1, (False, True), classes=10, rng=1).to(device)
        x = to_device(x0, device)
        with plain(), on_device(device):
            net = functools.partial(unet, labels=labels)
            gradients = backward(diffusion.loss_at(net, x, np.array([0, 3, 9, 19]), x[::-1].copy()))
            drawn = sample(diffusion, unet, x0.shape, "ddpm", 3, labels=labels)
        found.append([to_numpy(gradients[p]) for p in unet.parameters()] + [to_numpy(drawn)])
    assert not asked
    for on_cpu, on_gpu in zip(*found):
        np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=1e-4 * np.abs(on_cpu).max())
