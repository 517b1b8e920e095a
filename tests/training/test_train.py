"""The training loop: algorithm 1 by hand, workers and micro-batches, what it takes and what it refuses."""

import dataclasses
import itertools
import multiprocessing
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_training import DIFFUSION, IMAGES, SMALL, TINY, Lazy, on_linux, training

from tinyddpm import Adam, Diffusion, ImageFolder, UNet, backward, load_model, save_model, train
from tinyddpm.autograd.tensor import Parameter, op
from tinyddpm.files.pictures import grid
from tinyddpm.network.nn import Module
from tinyddpm.speed.micro_batches import READ_AHEAD
from tinyddpm.training.batches import batch_indices
from tinyddpm.training.optim import flat_gradient, flatten


class Probe(Module):
    """A model with one parameter, by which it multiplies."""

    def __init__(self):
        self.w = Parameter(np.zeros((1, 1, 1, 1), np.float32))

    def __call__(self, x, t=None):
        return self.w * x


Loss = lambda loss: SimpleNamespace(loss=loss)  # a diffusion of one's own: loss(model, x0, rng)


class TestSteps:
    def test_what_is_not_said_is_as_the_documentation_has_it(self):
        (state,) = train(UNet(**SMALL), DIFFUSION, IMAGES[:2], 1, workers=1)
        usual = {"batch": 64, "lr": 1e-3, "warmup_steps": 100, "decay_steps": 0, "seed": 0, "max_norm": 1.0}
        usual |= {"ema_decay": 0.995, "flip": False}
        assert {name: state.run.config[name] for name in usual} == usual

    def test_time_is_that_of_all_steps_and_speed_that_of_the_last_ones(self, monkeypatch):
        """Of a clock that goes on by ever more whenever it is looked at; the last ones are two here."""
        clock = itertools.accumulate(itertools.count())
        monkeypatch.setattr("tinyddpm.training.train.time", SimpleNamespace(monotonic=lambda: next(clock)))
        monkeypatch.setattr("tinyddpm.training.train.LOOK_EVERY", 2)
        states = list(training(steps=4, workers=1)[1])
        seconds = [0, *(state.seconds for state in states)]
        assert np.diff(np.diff(seconds)).min() > 0
        expected = [11 / seconds[1], *(22 / (seconds[i] - seconds[i - 2]) for i in range(2, 5))]
        np.testing.assert_allclose([state.images_per_second for state in states], expected)

    def test_three_are_the_algorithm_by_hand(self):
        """Every micro-batch with noise of its own, clipping, a rate that rises and falls, Adam, then the average."""
        unet, by_hand = (UNet(**TINY).to(dtype="float64") for _ in range(2))
        images, settings = IMAGES.astype(np.float64), dict(lr=0.01, warmup_steps=2, decay_steps=2, max_norm=0.1, seed=3)
        states = list(train(unet, DIFFUSION, images, 3, 11, micro_batch=4, ema_decay=0.15, **settings))
        theta = flatten(parameters := by_hand.parameters())
        adam, average = Adam(theta), theta.copy()
        decays = [1 / 10, 0.15, 0.15]  # min(0.15, (1 + n) / (10 + n))
        for step, s, d, lr in zip(range(3), states, decays, [0.005, 0.01, 0.005]):
            x0, loss, gradient = images[batch_indices(23, step, 11, 3)], 0, 0
            for start in (0, 4, 8):
                rng = np.random.default_rng(np.random.SeedSequence(3, spawn_key=(1, step, start)))
                part = DIFFUSION.loss(by_hand, x0[start : start + 4], rng) * (min(4, 11 - start) / 11)
                loss, gradient = loss + part.item(), gradient + flat_gradient(backward(part), parameters)
            norm = np.sqrt((gradient**2).sum())
            assert norm > 0.1
            adam.step(gradient * (0.1 / norm), lr)
            average = d * average + (1 - d) * theta
            np.testing.assert_allclose([s.step, s.lr, s.loss, s.grad_norm], [step + 1, lr, loss, norm], rtol=1e-12)
        for name, value in unet.state_dict().items():
            np.testing.assert_allclose(by_hand.state_dict()[name], value, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(s.ema.average, average, atol=1e-12)
        assert s.optimizer.n == s.ema.n == 3 and unet.dtype == s.ema.average.dtype == s.optimizer.m.dtype == np.float64

    @pytest.mark.parametrize(("batch", "size", "expected"), [(8, 4, 4), (20, 4, 5), (200, 32, 32), (9, 100, 2)])
    def test_micro_batches_are_chosen_from_the_batch_and_the_size_of_the_images(self, batch, size, expected):
        """A quarter of the batch, unless that is more than a shard; the random numbers show where they begin."""
        drawn = Loss(lambda model, x0, rng: (model.w * 0).sum() + rng.random())
        images, sizes = np.zeros((3, size, size, 1), np.float32), (None, expected, expected + 1)
        states = [next(train(Probe(), drawn, images, 1, batch, micro_batch=size, workers=1)) for size in sizes]
        assert states[0].loss == states[1].loss != states[2].loss

    @pytest.mark.parametrize(("dropout", "label_dropout"), [(0.0, 0.0), (0.0, 0.4), (0.3, 0.0)])
    def test_each_image_is_learned_with_its_own_label(self, dropout, label_dropout):
        """Which is drawn on it; a generator comes along if something is to be dropped."""
        seen, labels = [], np.arange(len(IMAGES)) % 5
        images = np.zeros_like(IMAGES) + labels.reshape(-1, 1, 1, 1).astype(np.float32) / 2 - 1

        def loss(model, x0, rng):
            np.testing.assert_allclose(x0[:, 0, 0, 0], model.keywords["labels"] / 2 - 1, rtol=1e-6)
            assert model.keywords.get("rng") is (rng if dropout or label_dropout else None)
            seen.extend(model.keywords["labels"])
            return DIFFUSION.loss(model, x0, rng)

        unet = UNet(**SMALL, classes=5, label_dropout=label_dropout, dropout=dropout)
        list(train(unet, Loss(loss), images, 3, 11, micro_batch=4, labels=labels.tolist(), workers=1))
        assert len(seen) == 33 and len(set(seen)) == 5

    def test_half_of_the_images_are_flipped_anew_each_time(self):
        """Left to right, and none of those that are in memory."""
        images = np.full((6, 4, 4, 1), -1, np.float32)
        images[:, 0, 0, 0] = 0.1 + np.arange(6) / 10  # a light in the upper left corner that tells which it is
        before = images.copy()

        def count(model, x0, rng):
            assert ((x0 > -1).sum(axis=(1, 2, 3)) == 1).all() and (x0[:, 0, [0, 3], 0].max(axis=1) > -1).all()
            return (model.w * 0).sum() + float((x0[:, 0, 3, 0] > 0).sum())

        def flipped(steps, images=images, **changes):
            settings = dict(batch=6, micro_batch=3, flip=True, workers=1) | changes
            return [state.loss for state in train(Probe(), Loss(count), images, steps, **settings)]

        seen = [flipped(20, seed=seed) for seed in (0, 0, 1)]
        assert seen[0] == seen[1] != seen[2]
        assert 0.45 < np.mean(seen) / 3 < 0.55 and len(set(seen[0])) > 2  # each half of six is weighted with one half
        np.testing.assert_array_equal(images, before)
        images.flags.writeable = False
        keeps = type("Keeps", (Lazy,), {"__getitem__": lambda self, _: images})  # a folder that hands out what it keeps
        flipped(2, keeps(images), micro_batch=6)
        assert flipped(1, flip=False) == [0]


class TestWorkers:
    @on_linux
    def test_bitwise_the_same_for_any_number_of_them_and_any_run(self, monkeypatch):
        """In processes and threads, with all that is random, more micro-batches than groups, images that are read when
        indexed, and large enough for the fast convolution."""
        monkeypatch.setattr("tinyddpm.speed.micro_batches.GROUPS", 3)
        images = np.random.default_rng(1).uniform(-1, 1, (23, 16, 16, 1)).astype(np.float32)
        settings = dict(batch=7, micro_batch=1, lr=0.01, warmup_steps=0, labels=np.arange(23) % 5, flip=True)

        def outcome(workers, platform="linux", images=images):
            monkeypatch.setattr(sys, "platform", platform)
            unet = UNet(channels=(8,), blocks=1, attention=(True,), classes=5, label_dropout=0.4, dropout=0.3)
            states = list(train(unet, DIFFUSION, images, 2, workers=workers, **settings))
            return [(s.loss, s.grad_norm) for s in states], flatten(unet.parameters()), states[-1].ema.average

        first = outcome(1)
        for other in itertools.starmap(outcome, [(2,), (3,), (2, "win32"), (2, "linux", Lazy(images))]):
            assert first[0] == other[0]
            np.testing.assert_array_equal(first[1:], other[1:])

    @on_linux
    def test_as_many_as_asked_for_are_at_it(self):
        barrier = multiprocessing.get_context("fork").Barrier(3, timeout=10)  # passes only if three workers are at it
        waits = Loss(lambda model, x0, rng: barrier.wait() * 0 + model(x0).sum())
        list(train(Probe(), waits, IMAGES, 2, 12, micro_batch=4, workers=3))

    @pytest.mark.parametrize("close", [False, True])
    def test_the_parameters_leave_the_shared_memory_with_the_end(self, close):
        """Or a process that is forked later, for something else, would change this one's model."""
        unet, states = training(steps=2, unet=UNet(**SMALL))
        theta = next(states).optimizer.theta
        assert all(np.shares_memory(p.data, theta) for p in unet.parameters())
        states.close() if close else list(states)
        assert not any(np.shares_memory(p.data, theta) for p in unet.parameters())
        np.testing.assert_array_equal(flatten(unet.parameters()), theta)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_images_are_read_a_few_batches_ahead_of_use_in_threads_of_this_process(self, workers):
        asked, readers, before = [], [], threading.active_count()
        folder = Lazy(IMAGES, lambda indices: asked.append(list(indices)) or readers.append(threading.get_ident()))
        order = [list(batch_indices(23, step, 11, 3)[start : start + 4]) for step in range(7) for start in (0, 4, 8)]
        for state in training(None, 7, unet=Probe(), images=folder, workers=workers)[1]:
            ahead, deadline = 3 * min(7, state.step + READ_AHEAD), time.monotonic() + 10
            while len(asked) < 1 + ahead and time.monotonic() < deadline:
                time.sleep(0.001)
            assert sorted(asked[1:]) == sorted(order[:ahead])  # the first were to look at, and for the checkpoint
        assert threading.get_ident() not in readers[1:] and threading.active_count() == before

    def test_an_error_surfaces_and_nothing_outlives_it(self):
        class Unreadable(Lazy):
            def __getitem__(self, indices):
                return IMAGES[indices] if len(indices) != 4 else 1 / 0

        fails, before = Loss(lambda model, x0, rng: 1 / 0), threading.active_count()
        for images, diffusion in ((Unreadable(IMAGES), DIFFUSION), (IMAGES, fails), (Lazy(IMAGES), DIFFUSION)):
            _, states = training(None, 100, unet=Probe(), images=images, diffusion=diffusion, workers=2)
            with pytest.raises(ZeroDivisionError):
                assert [s.step for s in itertools.islice(states, 2)] == [1, 2]
                states.close() or 1 / 0  # the caller has had enough
            assert threading.active_count() == before and not multiprocessing.active_children()


class TestWhatGoesWrong:
    def test_moving_the_model_while_it_trains_is_noticed(self):
        unet, states = training(unet=UNet(**SMALL))
        next(states)
        unet.to(dtype="float64").to(dtype="float32")
        with pytest.raises(RuntimeError, match="step 2: the model's parameters were moved or replaced while it trains"):
            next(states)

    @pytest.mark.parametrize(("value", "slope"), [(np.inf, 0.0), (1.0, np.inf), (np.nan, 0.0)])
    def test_a_loss_or_gradient_that_is_not_finite_stops_it_before_the_weights_are_touched(self, value, slope):
        count = itertools.count(1)

        @op
        def loss(w):
            broken = next(count) == 2
            return w.sum() * 0 + (value if broken else 1), lambda g: np.full_like(w, slope if broken else 1)

        model = Probe()
        states = train(model, Loss(lambda model, x0, rng: loss(model.w)), IMAGES, 5, 4, lr=0.5, workers=1)
        next(states)
        before, advice = model.w.data.copy(), "if all images are finite, try a lower lr than 0.5$"
        message = f"step 2: the loss is {value}, the gradient's norm {slope}; {advice}"
        with pytest.raises(FloatingPointError, match=message), np.errstate(invalid="ignore"):
            next(states)
        np.testing.assert_array_equal(model.w.data, before)

    @pytest.mark.parametrize("last", [False, True], ids=["saved on the way", "the last step"])
    def test_weights_that_are_not_finite_are_noticed_before_they_are_kept(self, last, tmp_path):
        """A step may be taken too far though loss and gradient are finite. What was saved before stays, and it is said
        what to do."""
        path, settings = tmp_path / "run.safetensors", dict(unet=UNet(**SMALL), warmup_steps=0, workers=1)
        next(training(None, **settings)[1]).save(path)
        before = path.read_bytes()
        message = "step 1: it has left numbers in average that are not finite; if all images are finite, try a lower lr"
        with pytest.raises(FloatingPointError, match=message), np.errstate(over="ignore", invalid="ignore"):
            for state in training(None, 1 if last else 5, lr=1e38, decay_steps=0, **settings)[1]:
                assert not last
                state.save(path)
        assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


WITH_CLASSES, ZEROS, WITHOUT_NUMBERS = UNet(**SMALL, classes=5), np.zeros(len(IMAGES), int), UNet(**SMALL)
WITHOUT_NUMBERS.time1.w.data[:] = np.nan
OUT_OF_RANGE = np.where(np.arange(len(IMAGES)) == batch_indices(len(IMAGES), 1, 11, 0)[0], [[-1], [5]], 0)  # in step 2
BAD = [
    ({"seed": None}, "^seed: expected an integer >= 0, got None$"),
    ({"images": IMAGES[:0]}, r"images: expected float32 \(M, H, W, C\) with M >= 1, got float32 \(0, 4, 4, 1\)"),
    ({"images": IMAGES[0]}, r"images: expected float32 \(M, H, W, C\)"),
    ({"images": IMAGES.astype(np.float64)}, r"images: expected float32 .* got float64 \(23, 4, 4, 1\)$"),
    ({"images": np.uint8(IMAGES > 0)}, r"images: .* uint8 .*; of 8-bit levels k, images are k / 127.5"),
    ({"images": IMAGES.repeat(3, axis=3)}, "images: expected 1 channels, as the network has, got"),
    ({"images": IMAGES.tolist()}, "images: expected a NumPy array, got <class 'list'>", TypeError),
    ({"model": WITHOUT_NUMBERS}, "time1.w: 64 of its 64 numbers are nan or infinite"),
    *[({"labels": bad}, "labels: expected 23, one for each image, got shape") for bad in ([1, 2], [[1]] * 23, 3)],
    *[({"labels": bad, "model": WITH_CLASSES}, "labels: expected 23 integers in 0 ... 4, .* got shape")
      for bad in OUT_OF_RANGE],
    ({"labels": ZEROS}, "labels: this network knows no classes"),
    ({"model": WITH_CLASSES}, "labels: expected a NumPy array of integers, one of 5 classes", TypeError),
    ({"model": UNet(**SMALL, classes=5, label_dropout=0.1)}, "labels: this model is to learn with and without them"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message", "error"), [(*row, ValueError)[:3] for row in BAD])
def test_bad_input(change, message, error):
    with pytest.raises(error, match=message):
        next(train(**dict(model=UNet(**SMALL), diffusion=DIFFUSION, images=IMAGES, steps=3, batch=11) | change))


def test_numbers_of_numpy_are_numbers_too(tmp_path):
    """And do not lend their precision to what they meet."""
    settings = dict(steps=2, batch=11, micro_batch=4, lr=0.01, max_norm=0.5, ema_decay=0.9, seed=3, warmup_steps=1)
    *_, last = train(UNet(**SMALL), DIFFUSION, IMAGES, **settings)
    *_, state = train(UNet(**SMALL), DIFFUSION, IMAGES, **{name: np.array(n)[()] for name, n in settings.items()})
    state.save(tmp_path / "run")
    assert (state.ema.average.tobytes(), state.loss) == (last.ema.average.tobytes(), last.loss)


class TestLearning:
    def test_a_model_that_has_learned_learns_more(self, tmp_path):
        """Of a file, say, from other images: it begins with the weights that it has, and so does their average."""
        *_, last = train(UNet(**SMALL), DIFFUSION, IMAGES, 20, 23, micro_batch=23, lr=0.02, warmup_steps=0)
        save_model(tmp_path / "first.safetensors", last.ema.model, DIFFUSION)
        unet, diffusion = load_model(tmp_path / "first.safetensors")
        settings = dict(batch=23, lr=1e-9, warmup_steps=0)
        state, anew = (next(train(model, diffusion, IMAGES, 1, **settings)) for model in (unet, UNet(**SMALL)))
        assert state.loss < 0.9 * anew.loss
        np.testing.assert_allclose(state.ema.average, last.ema.average, atol=1e-7)
        next(train(unet, diffusion, -IMAGES[:9].repeat(2, axis=1), 1, **settings))  # other images, of another size


@dataclasses.dataclass(frozen=True)
class Weighted(Diffusion):
    """A diffusion with an array in it, that cannot be hashed."""

    weights: np.ndarray = None


class TestScale:
    @pytest.mark.parametrize("source", [np.asarray, Lazy])
    @pytest.mark.parametrize("diffusion", [DIFFUSION, Weighted(DIFFUSION.schedule, weights=np.ones(20))])
    def test_images_on_another_are_warned_about(self, source, diffusion):
        images, said = source(IMAGES.repeat(4, axis=0) / 2 + 0.5), "0.* to 0.99.*; if black is 0 and white is 1"
        with pytest.warns(UserWarning, match=rf"images: expected images in \[-1, 1\], got values from {said}") as seen:
            for _ in range(2):
                next(train(UNet(**SMALL), diffusion, images, 3, 23, micro_batch=12, workers=1))
        assert len(seen) == 2 and {w.filename for w in seen} == {__file__}  # once for each training, where it is called

    def test_a_folder_of_light_pictures_is_on_it(self, tmp_path):
        """A batch of it may be light all over, and no worker takes that for another scale."""
        grid(np.linspace(0.2, 1, 1024, dtype=np.float32).reshape(1, 32, 32, 1), gap=0).save(tmp_path / "1.png")
        images = ImageFolder(tmp_path, 32)
        assert images[:].min() >= 0
        next(train(UNet(3, 3, **SMALL), Diffusion(DIFFUSION.schedule), images, 1, 4, workers=1))

    def test_workers_do_not_say_it_again(self, tmp_path):
        """Into a file, since pytest hears nothing of copies of this process."""
        with (tmp_path / "said").open("ab", buffering=0) as said, warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_: said.write(f"{message}\n".encode())
            images, diffusion = 255 * (IMAGES + 1), Diffusion(DIFFUSION.schedule)
            list(train(UNet(**SMALL), diffusion, images, 3, 23, micro_batch=6, workers=2))
        assert (tmp_path / "said").read_text().count("expected images") == 1

    def test_it_is_warned_about_before_images_go_to_a_device(self, monkeypatch):
        monkeypatch.setattr(UNet, "device", "nowhere")
        with pytest.warns(UserWarning, match=r"images: expected images in \[-1, 1\], got values from -9"):
            with pytest.raises(ValueError, match="device: 'nowhere' is unknown"):
                next(train(UNet(**SMALL), DIFFUSION, 100 * IMAGES, steps=1))
