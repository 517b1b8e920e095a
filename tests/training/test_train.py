"""The training loop: algorithm 1 by hand, workers and micro-batches, what it takes and what it refuses."""

import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from tinyddpm import (
    Adam,
    Diffusion,
    ImageFolder,
    Schedule,
    UNet,
    backward,
    load_model,
    make_schedule,
    sample,
    save_model,
    train,
)
from tinyddpm.autograd.functional import mse
from tinyddpm.autograd.tensor import Parameter, Tensor, op
from tinyddpm.files.pictures import grid
from tinyddpm.network.nn import Linear, Module
from tinyddpm.speed.micro_batches import GROUPS, READ_AHEAD
from tinyddpm.training.batches import batch_indices
from tinyddpm.training.optim import flat_gradient, flatten

TINY = dict(channels=(4, 8), blocks=1, attention=(False, True), groups=2)
DIFFUSION = Diffusion(make_schedule("linear", 20, beta_end=0.6))
IMAGES = np.random.default_rng(0).uniform(-1, 1, (23, 4, 4, 1)).astype(np.float32)


class Nans(np.random.Generator):
    """Draws no numbers."""

    def uniform(self, low, high, size):
        return np.full(size, np.nan)


NANS = Nans(np.random.PCG64(0))


class Probe(Module):
    """A model with one parameter, that predicts it everywhere."""

    def __init__(self, dtype):
        self.w = Parameter(np.zeros((1, 1, 1, 1), dtype))

    def __call__(self, x, t):
        return self.w * np.ones_like(x)


class TestTrain:
    def run(self, steps=4, **changes):
        unet = UNet(**TINY, dropout=changes.pop("dropout", 0.0))
        states = list(train(unet, DIFFUSION, IMAGES, **(dict(steps=steps, batch=11, micro_batch=4, seed=3) | changes)))
        return unet, states

    def test_it_yields_its_state_after_every_step(self):
        unet, states = self.run(steps=7, lr=0.01, warmup_steps=4, decay_steps=2)
        assert [s.step for s in states] == [1, 2, 3, 4, 5, 6, 7]
        np.testing.assert_allclose([s.lr for s in states], [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01, 0.005])
        assert all(math.isfinite(s.loss) and s.grad_norm > 0 for s in states)
        assert math.isclose(self.run(steps=1, lr=0.01, warmup_steps=1000)[1][0].lr, 0.01 / 1000)
        assert states[-1].optimizer.n == 7 and states[-1].ema.n == 7
        assert any(
            (a != b).any() for a, b in zip(unet.state_dict().values(), states[-1].ema.model.state_dict().values())
        )

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_bitwise_the_same_for_any_number_of_workers_and_any_run(self, dropout):
        results = [self.run(workers=workers, dropout=dropout) for workers in (1, 2, 3, 2)]
        unet, states = results[0]
        for other, others in results[1:]:
            for (name, value), again in zip(unet.state_dict().items(), other.state_dict().values()):
                np.testing.assert_array_equal(value, again, err_msg=name)
            np.testing.assert_array_equal(states[-1].ema.average, others[-1].ema.average)
            assert [s.loss for s in states] == [s.loss for s in others]

    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are only threads")
    def test_threads_and_processes_give_the_same_bits_in_groups_of_micro_batches_too(self, monkeypatch):
        """Large enough for the fast convolution, and more micro-batches than groups."""
        images = np.random.default_rng(1).uniform(-1, 1, (50, 16, 16, 1)).astype(np.float32)
        settings = dict(steps=2, batch=2 * GROUPS + 3, micro_batch=1, lr=0.01, warmup_steps=0)
        results = []
        for workers, platform in ((1, "linux"), (2, "linux"), (3, "linux"), (2, "win32")):
            monkeypatch.setattr(sys, "platform", platform)
            unet = UNet(channels=(8, 8), blocks=1, attention=(False, True))
            states = list(train(unet, DIFFUSION, images, workers=workers, **settings))
            results.append((unet.state_dict(), [(s.loss, s.grad_norm) for s in states]))
        for state, seen in results[1:]:
            assert seen == results[0][1]
            for name, value in results[0][0].items():
                np.testing.assert_array_equal(value, state[name], err_msg=name)

    def test_micro_batches_are_chosen_from_the_batch_and_the_size_of_the_images(self):
        """A quarter of the batch, unless that is more than a shard; the random numbers show where they begin."""
        for batch, size, expected in ((8, 4, 4), (20, 4, 5), (200, 32, 16), (9, 100, 1)):
            images = np.zeros((3, size, size, 1), np.float32)
            model = lambda: Probe(np.float32)
            by_default, chosen = (
                next(train(model(), DIFFUSION, images, steps=1, batch=batch, workers=1, **more)).loss
                for more in ({}, {"micro_batch": expected})
            )
            other = next(
                train(model(), DIFFUSION, images, steps=1, batch=batch, workers=1, micro_batch=expected + 1)
            ).loss
            assert by_default == chosen != other

    def test_the_parameters_leave_the_shared_memory_with_the_end(self):
        """Or a process that is forked later, for something else, would change this one's model."""
        unet = UNet(**TINY)
        for close in (False, True):
            training = train(unet, DIFFUSION, IMAGES, steps=2, batch=4)
            theta = next(training).optimizer.theta
            assert all(np.shares_memory(p.data, theta) for p in unet.parameters())
            trained = unet.state_dict()
            if close:
                training.close()
            else:
                list(training)
                trained = None
            assert not any(np.shares_memory(p.data, theta) for p in unet.parameters())
            for name, value in (trained or {}).items():
                np.testing.assert_array_equal(unet.state_dict()[name], value)

    def test_the_seed_decides(self):
        assert self.run(seed=3)[1][-1].loss != self.run(seed=4)[1][-1].loss

    def test_dropout_is_active_while_training(self):
        assert self.run(dropout=0.5)[1][-1].loss != self.run(dropout=0.0)[1][-1].loss

    @pytest.mark.parametrize("label_dropout", [0.0, 0.4])
    def test_each_image_is_learned_with_its_own_label(self, label_dropout):
        """Which is drawn on it; a generator comes along if labels are to be dropped."""
        seen, labels = [], np.arange(len(IMAGES)) % 5
        images = np.zeros_like(IMAGES) + labels.reshape(-1, 1, 1, 1).astype(np.float32) / 2 - 1

        class Look:
            def loss(self, model, x0, rng):
                np.testing.assert_allclose(x0[:, 0, 0, 0], model.keywords["labels"] / 2 - 1, rtol=1e-6)
                assert model.keywords.get("rng") is (rng if label_dropout else None)
                seen.extend(model.keywords["labels"])
                return DIFFUSION.loss(model, x0, rng)

        unet = UNet(**TINY, classes=5, label_dropout=label_dropout)
        list(train(unet, Look(), images, steps=3, batch=11, micro_batch=4, labels=labels.tolist(), workers=1))
        assert len(seen) == 33 and len(set(seen)) == 5

    def test_with_labels_it_is_bitwise_the_same_for_any_number_of_workers(self):
        outcomes = []
        for workers in (1, 2):
            unet = UNet(**TINY, classes=5, label_dropout=0.5)
            labels = np.arange(len(IMAGES)) % 5
            states = list(train(unet, DIFFUSION, IMAGES, 3, 11, micro_batch=4, labels=labels, workers=workers))
            outcomes.append((states[-1].ema.average.copy(), [s.loss for s in states]))
        np.testing.assert_array_equal(outcomes[0][0], outcomes[1][0])
        assert outcomes[0][1] == outcomes[1][1]

    def test_images_that_are_read_when_indexed_give_the_same_bits(self):
        """A few batches ahead of use, in threads of this process, whoever differentiates."""

        class Folder:
            shape, dtype, asked, readers = IMAGES.shape, IMAGES.dtype, [], []

            def __len__(self):
                return len(IMAGES)

            def __getitem__(self, indices):
                self.asked.append(list(indices))
                self.readers.append(threading.get_ident())
                return IMAGES[indices]

        whole, states = self.run(steps=6, flip=True)
        for workers in (1, 2):
            folder, before = Folder(), threading.active_count()
            Folder.asked.clear(), Folder.readers.clear()
            unet = UNet(**TINY)
            training = train(unet, DIFFUSION, folder, 6, 11, micro_batch=4, seed=3, workers=workers, flip=True)
            losses = [next(training).loss]
            deadline = time.monotonic() + 10
            while len(folder.asked) < 1 + 3 * (1 + READ_AHEAD) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)  # and no more
            ahead = [list(batch_indices(23, step, 11, 3)[start : start + 4]) for step in range(1 + READ_AHEAD)
                     for start in (0, 4, 8)]  # fmt: skip
            assert sorted(folder.asked[1:]) == sorted(ahead)  # the first were to look at, and for the checkpoint
            losses += [state.loss for state in training]
            assert losses == [state.loss for state in states] and threading.get_ident() not in folder.readers[1:]
            assert threading.active_count() == before
            for name, value in whole.state_dict().items():
                np.testing.assert_array_equal(value, unet.state_dict()[name], err_msg=name)

    def test_an_image_that_cannot_be_read_surfaces(self):
        class Folder:
            shape, dtype = IMAGES.shape, IMAGES.dtype

            def __len__(self):
                return len(IMAGES)

            def __getitem__(self, indices):
                if len(indices) == 4:
                    raise OSError("no picture can be read any more")
                return IMAGES[indices]

        before = threading.active_count()
        with pytest.raises(OSError, match="no picture can be read any more"):
            next(train(UNet(**TINY), DIFFUSION, Folder(), 6, 11, micro_batch=4))
        assert threading.active_count() == before and not multiprocessing.active_children()

    @pytest.mark.parametrize("workers", [1, 2])
    def test_half_of_the_images_are_flipped_anew_each_time(self, workers):
        """Left to right, and none of those that are in memory."""
        images, seen = np.full((6, 4, 4, 1), -1, np.float32), []
        images[:, 0, 0, 0] = 0.1 + np.arange(6) / 10  # a light in the upper left corner that tells which it is
        before = images.copy()

        class Look:
            def loss(self, model, x0, rng):
                assert ((x0 > -1).sum(axis=(1, 2, 3)) == 1).all() and (x0[:, 0, [0, 3], 0].max(axis=1) > -1).all()
                return DIFFUSION.loss(model, x0, rng) * 0 + float((x0[:, 0, 3, 0] > 0).sum())

        for seed in (0, 0, 1):
            states = list(
                train(UNet(**TINY), Look(), images, 20, 6, micro_batch=3, flip=True, workers=workers, seed=seed)
            )
            seen.append([state.loss for state in states])
        assert seen[0] == seen[1] != seen[2]
        assert 0.45 < np.mean(seen) / 3 < 0.55 and len(set(seen[0])) > 2  # each half of six is weighted with one half
        np.testing.assert_array_equal(images, before)

        class Folder:  # that hands out what it keeps
            shape, dtype = images.shape, images.dtype
            __len__ = lambda self: 6
            __getitem__ = lambda self, indices: images if len(indices) == 6 else images[indices]

        images.flags.writeable = False
        list(train(UNet(**TINY), Look(), Folder(), 2, 6, micro_batch=6, flip=True, workers=workers))
        (state,) = train(UNet(**TINY), Look(), images, 1, 6, workers=workers)
        assert state.loss == 0

    def test_bad_labels(self):
        unet = UNet(**TINY, classes=5)
        for bad in ([1, 2], [[1]] * len(IMAGES), 3):
            with pytest.raises(ValueError, match=f"labels: expected {len(IMAGES)}, one for each image, got shape"):
                next(train(unet, DIFFUSION, IMAGES, 3, labels=bad))
        for worst in (-1, 5):  # of a single image, whose turn would come later
            labels = np.zeros(len(IMAGES), int)
            labels[batch_indices(len(IMAGES), 1, 11, 0)[0]] = worst
            with pytest.raises(ValueError, match="labels: expected 23 integers in 0 ... 4, .* got shape"):
                next(train(unet, DIFFUSION, IMAGES, 3, 11, labels=labels, workers=1))
        with pytest.raises(ValueError, match="labels: this network knows no classes"):
            next(train(UNet(**TINY), DIFFUSION, IMAGES, 3, labels=np.zeros(len(IMAGES), int)))
        with pytest.raises(TypeError, match="labels: expected a NumPy array of integers, one of 5 classes"):
            next(train(unet, DIFFUSION, IMAGES, 3, workers=1))
        with pytest.raises(ValueError, match="labels: this model is to learn with and without them, so give some"):
            next(train(UNet(**TINY, classes=5, label_dropout=0.1), DIFFUSION, IMAGES, 3))

    def test_micro_batches_add_up_to_the_batch(self):
        """The gradient is that of the mean over the batch, of whatever sizes its micro-batches are."""
        gradients = []

        class Recorder(Module):
            def __init__(self):
                self.w = Parameter(np.ones((1, 1, 1, 1)))

            def __call__(self, x, t):
                return Tensor(x) * self.w

        class Fixed(Diffusion):
            def loss(self, model, x0, rng):
                return mse(model(x0, None), 0 * x0 + 0.3)

        images = IMAGES.astype(np.float64)
        for micro_batch in (1, 4, 11, 50):
            model = Recorder()
            (state,) = train(
                model, Fixed(DIFFUSION.schedule), images, steps=1, batch=11, micro_batch=micro_batch, max_norm=1e9
            )
            gradients.append((state.loss, state.grad_norm))
        x = images[batch_indices(23, 0, 11, 0)]
        loss, gradient = ((x - 0.3) ** 2).mean(), abs((2 * (x - 0.3) * x).mean())
        np.testing.assert_allclose(gradients, [(loss, gradient)] * 4, rtol=1e-12)

        batch = 2 * GROUPS + 5  # more micro-batches than groups: some of these have two, some three
        settings = dict(steps=1, batch=batch, micro_batch=1, max_norm=1e9)
        (state,) = train(Recorder(), Fixed(DIFFUSION.schedule), images, **settings)
        x = images[batch_indices(23, 0, batch, 0)]
        expected = ((x - 0.3) ** 2).mean(), abs((2 * (x - 0.3) * x).mean())
        np.testing.assert_allclose((state.loss, state.grad_norm), expected, rtol=1e-12)

    def test_two_steps_are_the_algorithm_by_hand(self):
        """Every micro-batch with noise of its own, clipping, warm-up, Adam, and then the average."""
        settings = dict(batch=11, micro_batch=4, lr=0.01, warmup_steps=3, max_norm=0.1, ema_decay=0.15, seed=3)
        unet = UNet(**TINY).to(dtype="float64")
        images = IMAGES.astype(np.float64)
        states = list(train(unet, DIFFUSION, images, steps=2, **settings))

        by_hand = UNet(**TINY).to(dtype="float64")
        parameters = by_hand.parameters()
        theta = flatten(parameters)
        adam, average = Adam(theta), theta.copy()
        for step, d in enumerate([1 / 10, 0.15]):  # (1 + n) / (10 + n), at most the decay
            x0 = images[batch_indices(23, step, 11, 3)]
            loss, gradient = 0, 0
            for start in (0, 4, 8):
                rng = np.random.default_rng(np.random.SeedSequence(3, spawn_key=(1, step, start)))
                part = DIFFUSION.loss(by_hand, x0[start : start + 4], rng) * (min(4, 11 - start) / 11)
                loss += part.item()
                gradient = gradient + flat_gradient(backward(part), parameters)
            norm = np.sqrt((gradient**2).sum())
            assert norm > 0.1
            adam.step(gradient * (0.1 / norm), lr=0.01 * (step + 1) / 3)
            average = d * average + (1 - d) * theta
            np.testing.assert_allclose([states[step].loss, states[step].grad_norm], [loss, norm], rtol=1e-12)
        for name, value in unet.state_dict().items():
            np.testing.assert_allclose(by_hand.state_dict()[name], value, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(states[-1].ema.average, average, atol=1e-12)

    @pytest.mark.skipif(sys.platform != "linux", reason="the workers are threads there, see test_workers.py")
    def test_as_many_workers_as_asked_for_are_at_it(self):
        barrier = multiprocessing.get_context("fork").Barrier(3, timeout=10)

        class Meeting(UNet):
            def __call__(self, x, t, rng=None):
                barrier.wait()  # passes only if three workers are at it
                return super().__call__(x, t, rng)

        list(train(Meeting(**TINY), DIFFUSION, IMAGES, steps=2, batch=12, micro_batch=4, workers=3))

    def test_moving_the_model_while_it_trains_is_noticed(self):
        unet = UNet(**TINY)
        training = train(unet, DIFFUSION, IMAGES, steps=3, batch=4)
        next(training)
        unet.to(dtype="float64").to(dtype="float32")
        with pytest.raises(RuntimeError, match="step 2: the model's parameters were moved or replaced while it trains"):
            next(training)

    @pytest.mark.parametrize(("value", "slope"), [(np.inf, 0.0), (1.0, np.inf), (np.nan, 0.0)])
    def test_loss_and_gradient_must_both_be_finite(self, value, slope):
        @op
        def broken(x):
            return x.sum() * 0 + value, lambda g: np.full_like(x, slope)

        class Broken(Diffusion):
            def loss(self, model, x0, rng):
                return broken(model.w)

        model = Linear(1, 1, np.random.default_rng(0))
        before = model.w.data.copy()
        with pytest.raises(FloatingPointError, match="step 1: the loss is"), np.errstate(invalid="ignore"):
            next(train(model, Broken(DIFFUSION.schedule), IMAGES, steps=1, batch=4))
        np.testing.assert_array_equal(model.w.data, before)

    def test_a_float64_model_trains_in_float64(self):
        unet = UNet(**TINY).to(dtype="float64")
        (state,) = train(unet, DIFFUSION, IMAGES.astype(np.float64), steps=1, batch=4)
        assert unet.dtype == state.ema.average.dtype == state.optimizer.m.dtype == np.float64

    @pytest.mark.slow
    def test_the_loss_falls(self):
        unet = UNet(**TINY)
        images = np.ones((8, 4, 4, 1), np.float32) * np.linspace(-0.6, 0.6, 8, dtype=np.float32)[:, None, None, None]
        losses = [
            s.loss for s in train(unet, DIFFUSION, images, steps=150, batch=16, lr=5e-3, warmup_steps=10, workers=1)
        ]
        assert np.mean(losses[-30:]) < 0.5 * np.mean(losses[:10])

    def test_stopping_early_ends_the_workers(self):
        before = threading.active_count()
        training = train(UNet(**TINY), DIFFUSION, IMAGES, steps=100, batch=4)
        assert [s.step for s in itertools.islice(training, 2)] == [1, 2]
        training.close()
        assert threading.active_count() == before and not multiprocessing.active_children()

    @pytest.mark.filterwarnings("ignore:images")  # are expected in [-1, 1]
    def test_a_loss_that_is_not_finite_stops_it_before_the_weights_are_touched(self):
        unet = UNet(**TINY)
        images = IMAGES.copy()
        images[batch_indices(23, 1, 11, 3)[5]] = np.nan
        assert batch_indices(23, 1, 11, 3)[5] not in batch_indices(23, 0, 11, 3)
        training = train(unet, DIFFUSION, images, steps=5, batch=11, micro_batch=4, lr=0.01, seed=3)
        next(training)
        good = unet.state_dict()
        with pytest.raises(
            FloatingPointError,
            match="step 2: the loss is nan, .* norm nan; if all images are finite, try a lower lr than 0.01",
        ):
            next(training)
        assert all((good[name] == value).all() for name, value in unet.state_dict().items())

    def test_an_exception_in_a_worker_surfaces(self):
        class Broken(UNet):
            def __call__(self, x, t, rng=None):
                raise ZeroDivisionError("in the model")

        with pytest.raises(ZeroDivisionError, match="in the model"):
            next(train(Broken(**TINY), DIFFUSION, IMAGES, steps=1, batch=4))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
            ({"batch": 0}, "batch: expected an integer >= 1, got 0"),
            ({"micro_batch": 1.5}, "micro_batch: expected an integer >= 1, got 1.5"),
            ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
            ({"seed": None}, "seed: expected an integer >= 0, got None"),
            ({"warmup_steps": -1}, "warmup_steps: expected an integer >= 0, got -1"),
            ({"decay_steps": 0.5}, "decay_steps: expected an integer >= 0, got 0.5"),
            ({"lr": -1}, "lr: expected a number > 0, got -1"),
            ({"max_norm": 0}, "max_norm: expected a number > 0, got 0"),
            ({"batch": 4.0}, "batch: expected an integer >= 1, got 4.0"),
            ({"ema_decay": 1}, r"decay: expected a number in \[0, 1\), got 1"),
            ({"workers": -2}, "workers: expected an integer >= 1, got -2"),
            (
                {"images": IMAGES[:0]},
                r"images: expected float32 \(M, H, W, C\) with M >= 1, got float32 \(0, 4, 4, 1\)",
            ),
            ({"images": IMAGES[0]}, r"images: expected float32 \(M, H, W, C\)"),
            ({"images": IMAGES.astype(np.float64)}, r"images: expected float32 .* got float64 \(23, 4, 4, 1\)$"),
            (
                {"images": np.zeros((9, 4, 4, 1), np.uint8)},
                r"images: .* uint8 .*; of 8-bit levels k, images are k / 127.5",
            ),
            ({"images": np.zeros((9, 4, 4, 3), np.float32)}, "images: expected 1 channels, as the network has, got"),
            ({"model": UNet(**TINY, rng=NANS)}, "time1.w: 64 of its 64 numbers are nan or infinite"),
        ],
    )
    def test_bad_input(self, change, message):
        arguments = dict(model=UNet(**TINY), images=IMAGES, steps=1, batch=4) | change
        with pytest.raises(ValueError, match=message):
            next(train(diffusion=DIFFUSION, **arguments))


def test_a_model_that_has_learned_learns_more(tmp_path):
    """Of a file, say, from other images: it begins with the weights that it has, and so does their average."""
    settings = dict(batch=23, lr=1e-9, warmup_steps=0)
    for state in train(UNet(**TINY), DIFFUSION, IMAGES, 30, batch=23, lr=0.01, warmup_steps=0):
        last = state
    save_model(tmp_path / "first.safetensors", last.ema.model, DIFFUSION)
    unet, diffusion = load_model(tmp_path / "first.safetensors")
    state = next(train(unet, diffusion, IMAGES, 1, **settings))
    anew = next(train(UNet(**TINY), DIFFUSION, IMAGES, 1, **settings))
    assert state.loss < 0.9 * anew.loss
    np.testing.assert_allclose(state.ema.average, last.ema.average, atol=1e-7)
    next(train(unet, diffusion, -IMAGES[:9].repeat(2, axis=1), 1, **settings))  # other images, of another size


class Source:
    """Images that are read when they are indexed, and recognised by what a user says."""

    def __init__(self, images):
        self.images, self.shape, self.dtype, self.fingerprint = images, images.shape, images.dtype, "mine"

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        return self.images[indices]


@dataclasses.dataclass(frozen=True)
class Weighted(Diffusion):
    """A diffusion with an array in it, that cannot be hashed."""

    weights: np.ndarray = None


LIGHT = np.repeat(IMAGES, 4, axis=0) / 2 + 0.5


@pytest.mark.parametrize("source", [np.asarray, Source])
@pytest.mark.parametrize(
    "diffusion", [DIFFUSION, Weighted(DIFFUSION.schedule, weights=np.ones(20))], ids=["ours", "own"]
)
@pytest.mark.parametrize(
    ("images", "said"),
    [
        (LIGHT, "0.* to 0.99.*; if black is 0 and white is 1"),
        (255 * LIGHT, "0.* to 254; if"),
        (0 * LIGHT + 9, "9 to 9; if"),
    ],
)
def test_images_on_another_scale_are_warned_about(source, diffusion, images, said):
    with pytest.warns(UserWarning, match=rf"images: expected images in \[-1, 1\], got values from {said}") as seen:
        for _ in range(2):
            next(train(UNet(**TINY), diffusion, source(images), steps=3, batch=23, micro_batch=6, workers=1))
    assert len(seen) == 2 and {w.filename for w in seen} == {__file__}  # once for each training, where it is called


def test_a_folder_of_light_pictures_is_on_its_scale(tmp_path):
    """A batch of it may be light all over, and no worker takes that for another scale."""
    grid(np.linspace(0.2, 1, 1024, dtype=np.float32).reshape(1, 32, 32, 1), gap=0).save(tmp_path / "1.png")
    images = ImageFolder(tmp_path, 32)
    assert images[:].min() >= 0
    next(train(UNet(3, 3, **TINY), Diffusion(DIFFUSION.schedule), images, 1, 4, workers=1))


def test_workers_do_not_say_it_again(tmp_path):
    """In a process of its own, since copies of this one would tell pytest, and nobody else."""
    script = """
        import warnings
        warnings.simplefilter("always")
        from tiny_training import DIFFUSION, IMAGES, TINY, UNet, train
        list(train(UNet(**TINY), DIFFUSION, 255 * (IMAGES + 1), steps=3, batch=23, micro_batch=6, workers=2))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.count("expected images") == 1, done.stderr


def test_images_on_another_scale_are_warned_about_before_they_go_to_a_device(monkeypatch):
    monkeypatch.setattr(UNet, "device", "nowhere")
    with pytest.warns(UserWarning, match=r"images: expected images in \[-1, 1\], got values from -9"):
        with pytest.raises(ValueError, match="device: 'nowhere' is unknown"):
            next(train(UNet(**TINY), DIFFUSION, 100 * IMAGES, steps=1))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("last", [False, True], ids=["saved on the way", "the last step"])
def test_weights_that_are_not_finite_are_noticed_before_they_are_kept(last, workers, tmp_path):
    """A step may be taken too far though loss and gradient are finite. What was saved before stays, and it is said what
    to do."""
    path, unet = tmp_path / "run.safetensors", UNet(**TINY)
    next(train(unet, DIFFUSION, IMAGES, 1, 8)).save(path)
    before = path.read_bytes()
    settings = dict(batch=8, lr=1e38, warmup_steps=0, workers=workers)
    message = "step 1: it has left numbers in average that are not finite; if all images are finite, try a lower lr"
    with pytest.raises(FloatingPointError, match=message), np.errstate(over="ignore", invalid="ignore"):
        for state in train(unet, DIFFUSION, IMAGES, 1 if last else 5, **settings):
            assert not last
            state.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("objective", "loss_type"),
    [
        ("eps", "hybrid"),
        pytest.param("v", "hybrid", marks=pytest.mark.slow),
        pytest.param("x0", "vlb", marks=pytest.mark.slow),
    ],
)
def test_a_variance_is_learned(objective, loss_type):
    """The bound gets tighter, and the model's second half of channels says something about the variance."""
    schedule = Schedule(np.linspace(0.02, 0.5, 10), input_scale=0.8)
    diffusion = Diffusion(schedule, objective, "learned_range", loss_type)
    unet = UNet(**TINY, out_channels=2)
    levels = np.round(IMAGES.clip(-1, 1) * 127.5 + 127.5) / np.float32(127.5) - 1
    before = diffusion.bits_per_dim(unet, levels, progress=False).total
    list(train(unet, diffusion, levels, steps=60, batch=16, lr=3e-3, workers=1))
    after = diffusion.bits_per_dim(unet, levels, progress=False).total
    assert after < before - 0.2
    x = np.random.default_rng(0).standard_normal((4, *IMAGES.shape[1:])).astype(np.float32)
    v = unet(x, np.array([1, 4, 7, 9])).data[..., 1:]
    assert np.abs(v).max() > 0.01
    assert np.isfinite(sample(diffusion, unet, (2, *IMAGES.shape[1:]))).all()


@pytest.mark.parametrize("name", ["lr", "max_norm", "ema_decay"])
def test_settings_that_are_no_numbers(name):
    for bad in ("0.1", None, [0.1]):
        with pytest.raises(ValueError, match=f"^{name}: expected a number .*, got {re.escape(repr(bad))}"):
            next(train(UNet(**TINY), DIFFUSION, IMAGES, steps=1, **{name: bad}))


def test_numbers_of_numpy_are_numbers_too(tmp_path):
    """And do not lend their precision to what they meet."""
    settings = dict(lr=0.01, max_norm=0.5, ema_decay=0.9, batch=11, micro_batch=4, warmup_steps=1, seed=3)
    outcomes = []
    for number in (lambda x: x, lambda x: np.float64(x) if isinstance(x, float) else np.int64(x)):
        unet = UNet(**TINY)
        numbers = {name: number(value) for name, value in settings.items()}
        *_, state = train(unet, DIFFUSION, IMAGES, number(3), **numbers)
        assert unet.dtype == state.ema.average.dtype == np.float32
        state.save(tmp_path / "run")
        outcomes.append((state.ema.average.tobytes(), unet.state_dict(), state.loss))
    assert outcomes[0][0] == outcomes[1][0] and outcomes[0][2] == outcomes[1][2]


def test_images_that_are_no_array():
    with pytest.raises(TypeError, match="images: expected a NumPy array, got <class 'list'>"):
        next(train(UNet(**TINY), DIFFUSION, IMAGES.tolist(), steps=1))


def test_partial_models_are_models_too():
    """Whatever takes (x_t, t) will do: here a model with its generator bound, as `train` does for dropout."""
    unet = UNet(**TINY, dropout=0.5)
    bound = functools.partial(unet, rng=np.random.default_rng(0))
    assert math.isfinite(DIFFUSION.loss(bound, IMAGES, np.random.default_rng(0)).item())
