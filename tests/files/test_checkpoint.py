"""A training that ends at any moment goes on as if it never had: checkpoints, their damage, faults, kill -9."""

import errno
import itertools
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
import types

import numpy as np
import pytest
import tiny_training
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_training import DIFFUSION, IMAGES, SMALL, Lazy, assert_same_weights, in_a_copy, names, on_linux

from tinyddpm import Diffusion, ImageFolder, Schedule, UNet, load_model, make_schedule, save_model
from tinyddpm.files import replacing
from tinyddpm.files.checkpoint import differences, run_config
from tinyddpm.files.replacing import previous
from tinyddpm.files.run_folder import MetricsLog
from tinyddpm.files.tensors import Stored
from tinyddpm.network.nn import Linear, Module
from tinyddpm.speed.workers import shared_array

KILLS = int(os.environ.get("KILLS", 50))  # KILLS=200 pytest -m slow -k any_moment


class Scale(Module):
    """A network of one's own."""

    def __init__(self, rng):
        self.dense = Linear(1, 1, np.random.default_rng(rng))

    def __call__(self, x, t):
        return self.dense(x)


def training(path, steps=6, *, unet=None, net=(), rng=0, dtype="float32", images=IMAGES, workers=1, **changes):
    """A network, SMALL but for what `net` says, or what `unet` makes with `rng`, and its training, on from `path`."""
    unet = unet(rng) if unet else UNet(**SMALL | dict(net), rng=rng).to(dtype=dtype)
    images = images.astype(dtype)
    return tiny_training.training(path, steps, unet=unet, images=images, workers=workers, **changes)


def in_parts(path, parts, **changes):
    """Train for each number of steps in turn, with so many workers, save, and forget; return the network and its
    average in the end, the last metrics, what each step came to, and the checkpoint after it."""
    log, files = [], {}
    for n, (steps, workers) in enumerate(parts):
        unet, states = training(path, workers=workers, rng=n, **changes)
        for state in itertools.islice(states, steps):
            log.append((state.step, state.loss, state.grad_norm, state.lr))
            state.save(path)
            files[state.step] = path.read_bytes()
        states.close()
    return types.SimpleNamespace(unet=unet, average=state.ema.model, metrics=state.metrics(), log=log, files=files)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return in_parts(tmp_path_factory.mktemp("run") / "run.safetensors", [(6, 1)])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


class TestResume:
    @settings(max_examples=5)
    @given(stops=st.lists(st.integers(1, 5), max_size=3), workers=st.lists(st.integers(1, 3), min_size=4, max_size=4))
    def test_it_goes_on_bit_for_bit_from_any_step_with_any_number_of_workers(
        self, run, tmp_path_factory, stops, workers
    ):
        stops = sorted({*stops, 6})
        parts = [(after - before, n) for before, after, n in zip([0, *stops], stops, workers)]
        again = in_parts(tmp_path_factory.mktemp("run") / "b", parts)
        assert_same_weights(again.unet, run.unet)
        assert_same_weights(again.average, run.average)
        assert again.log == run.log and [step for step, *_ in run.log] == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize("changes", [
        dict(flip=True, net=dict(dropout=0.3, classes=3, label_dropout=0.3), labels=np.arange(23) % 3),
        dict(diffusion=Diffusion(make_schedule("cosine", 12), "v", "learned_range", "hybrid"),
             net=dict(out_channels=2), dtype="float64"),
        dict(batch=18, micro_batch=1, unet=Scale),
    ])  # fmt: skip
    def test_with_whatever_is_random(self, tmp_path, changes):
        whole, parts = (in_parts(tmp_path / f"{len(p)}", p, steps=2, **changes) for p in ([(2, 1)], [(1, 2), (1, 1)]))
        assert_same_weights(whole.unet, parts.unet)
        assert whole.log == parts.log

    def test_without_decay_it_may_go_on_for_longer(self, path):
        """In micro-batches as they were chosen at its beginning."""
        changes = dict(decay_steps=0, micro_batch=None)
        whole, states = training(None, 3, **changes)
        list(states)
        for steps, taken in ((2, [1, 2]), (3, [3])):
            unet, states = training(path, steps, rng=steps - 2, **changes)
            assert [(last := state).step for state in states] == taken
            last.save(path)
        assert_same_weights(whole, unet)

    def test_a_run_at_its_end_yields_its_last_state_again(self, run, path):
        path.write_bytes(run.files[6])
        unet, states = training(path, rng=1)
        (state,) = states
        assert state.last and state.metrics() == run.metrics
        assert_same_weights(unet, run.unet)
        assert_same_weights(state.ema.model, run.average)
        state.save(path)
        assert path.read_bytes() == previous(path).read_bytes() == run.files[6]

    def test_a_checkpoint_is_a_model_with_the_averaged_weights_and_knows_the_seconds(self, path):
        _, states = training(path)  # where there is no checkpoint it begins
        first, second = next(states), next(states)
        with pytest.raises(RuntimeError, match="save: the training is at step 2, and this state of 1 is gone"):
            first.save(path)
        assert first.step == 1 and not list(path.parent.iterdir())
        second.seconds = 1000.0
        second.save(path)
        unet, diffusion = load_model(path)
        assert_same_weights(unet, second.ema.model)
        assert {f"training.{vector}" for vector in ("theta", "m", "v")} < load_file(path).keys()
        np.testing.assert_array_equal(diffusion.schedule.beta, DIFFUSION.schedule.beta)
        third = next(training(path)[1])
        assert third.step == 3 and 1000 < third.seconds < 1100

    def test_a_model_is_no_checkpoint(self, path):
        for save, advice in (
            (lambda: save_file({"w": np.zeros(3)}, path), "$"),
            (lambda: save_model(path, UNet(**SMALL), DIFFUSION), r"; it is a model, .* train\(\*load_model\(path\), "),
        ):
            save()
            with pytest.raises(ValueError, match=f"run.safetensors is no checkpoint of a training{advice}"):
                next(training(path)[1])


class Own(Diffusion):
    """A diffusion of one's own."""


def with_another(i):
    """The images, one of which is another."""
    images = IMAGES.copy()
    images[i] *= -1
    return images


class TestAnotherRun:
    @pytest.mark.parametrize(("changes", "fields"), [
        (dict(batch=12, micro_batch=5, lr=0.02, decay_steps=4, max_norm=2.0, ema_decay=0.9, seed=4, flip=True, steps=9),
         "batch: 11 there, 12 here; decay_steps: 3 there, 4 here; ema_decay: 0.995 there, 0.9 here; "
         "flip: False there, True here; lr: 0.01 there, 0.02 here; max_norm: 1.0 there, 2.0 here; "
         "micro_batch: 4 there, 5 here; seed: 3 there, 4 here; and 1 more"),
        (dict(steps=9, warmup_steps=4), "steps: 6 there, 9 here; warmup_steps: 3 there, 4 here"),
        (dict(decay_steps=0), "decay_steps: 3 there, 0 here"),
        (dict(labels=[0] * 23, net=dict(classes=1)), "labels: None there, some here; unet.classes: None there, 1 here"),
        (dict(images=IMAGES[:22]), "images: 23 of 4 x 4 x 1 there, 22 of 4 x 4 x 1 here"),
        (dict(images=with_another(0)), "images: as many there as here, but others, or in another order"),
        (dict(images=with_another(-1)), "images: as many there as here, but others, or in another order"),
        (dict(dtype="float64"),
         "dtype: 'float32' there, 'float64' here; images: as many there as here, but others, or in another order"),
        (dict(net=dict(channels=(6,), dropout=0.1)),
         "unet.channels: [4] there, [6] here; unet.dropout: 0.0 there, 0.1 here"),
        (dict(unet=lambda rng: UNet(**SMALL).to(precision="tf32")), "precision: 'float32' there, 'tf32' here"),
        (dict(unet=lambda rng: Linear(1, 1, np.random.default_rng(rng))),
         "parameters: None there, {'w': [1, 1], 'b': [1]} here; "
         "types: ['UNet', 'Diffusion'] there, ['Linear', 'Diffusion'] here"),
        (dict(diffusion=Own(DIFFUSION.schedule)), "types: ['UNet', 'Diffusion'] there, ['UNet', 'Own'] here"),
        (dict(diffusion=Diffusion(Schedule([0.1] * 20))),
         "beta: None there, some here; schedule.name: 'linear' there, 'custom' here; "
         "schedule.parameters.beta_end: 0.6 there, None here"),
        (dict(diffusion=Diffusion(make_schedule("linear", 21, beta_end=0.5), "v")),
         "T: 20 there, 21 here; diffusion.objective: 'eps' there, 'v' here; "
         "schedule.parameters.beta_end: 0.6 there, 0.5 here"),
    ])  # fmt: skip
    def test_with_another_configuration_is_refused_by_field(self, run, path, changes, fields):
        path.write_bytes(run.files[2])
        previous(path).write_bytes(run.files[1])  # which is not to be tried
        unet, states = training(path, **changes)
        before = unet.state_dict()
        with pytest.raises(ValueError) as error:
            next(states)
        assert str(error.value) == f"{path} is of another run: {fields}"
        differing = error.value.differing.values()
        assert len(differing) > 0 and all(there != here for there, here in differing)
        assert_same_weights(unet, before)

    def test_with_a_folder_that_has_changed_is_refused_in_words(self, tmp_path):
        for i in range(6):
            Image.new("L", (4, 4)).save(tmp_path / f"{i}.png")
        labels = np.arange(6) % 2
        of = lambda size=4, labels=labels: run_config(UNet(**SMALL), DIFFUSION, ImageFolder(tmp_path, size), labels)
        before = of()
        others = {
            "labels: others there than here": of(labels=1 - labels),
            "labels: some there, None here": of(labels=None),
            "images: 6 of 4 x 4 x 3 there, 6 of 5 x 5 x 3 here": of(size=5),
        }
        (tmp_path / "5.png").rename(tmp_path / "9.png")
        others["images: as many there as here, but files with other names"] = of()
        (tmp_path / "9.png").unlink()
        others["images: 6 of 4 x 4 x 3 there, 5 of 4 x 4 x 3 here"] = of()
        for difference, config in others.items():
            assert differences(before, config) == [difference]


class TestDamage:
    """What a disk may do to a file, and what comes of it."""

    @given(data=st.data())
    def test_no_bit_can_flip_and_no_file_be_cut_short_unnoticed(self, run, data, tmp_path_factory):
        path, flipped = tmp_path_factory.mktemp("damaged") / "run.safetensors", bytearray(run.files[4])
        header, length = 8 + int.from_bytes(flipped[:8], "little"), len(flipped)
        at = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, length - 1)))
        flipped[at] ^= 1 << data.draw(st.integers(0, 7))
        unreadable = "run.safetensors is not a readable safetensors file"
        for content, said in (
            (flipped, f"damaged since it was written|{unreadable}|no checkpoint"),
            (run.files[4][: data.draw(st.integers(0, length - 1))], unreadable),
        ):
            path.write_bytes(content)
            unet, states = training(path)
            before = unet.state_dict()
            with pytest.raises(ValueError, match=said):
                next(states)
            assert_same_weights(unet, before)
            with pytest.raises(ValueError):
                load_model(path)

    def test_nor_can_the_bits_that_say_there_is_a_checksum(self, run, path):
        assert run.files[4].count(b'"sha256"') == 1
        path.write_bytes(run.files[4].replace(b'"sha256"', b'"sha257"'))
        for load in (lambda: next(training(path)[1]), lambda: load_model(path)):
            with pytest.raises(ValueError, match="run.safetensors has been damaged since it was written"):
                load()

    @pytest.mark.parametrize("fault", ["run.safetensors .* it ends after .*", "been damaged .*", "Input/output error"])
    def test_it_goes_on_from_the_one_before_and_says_so(self, run, path, monkeypatch, fault):
        """If it is cut short, a bit has changed, or it is on a bad sector."""
        whole = run.files[4]
        spoilt = {"been damaged .*": whole[:-1] + bytes([whole[-1] ^ 1]), "Input/output error": whole}
        path.write_bytes(spoilt.get(fault, whole[:-1]))
        previous(path).write_bytes(run.files[3])
        read = Stored.read

        def fails(tensor, dtype):
            if tensor.file.name == str(path) and fault == "Input/output error":
                raise OSError(errno.EIO, "Input/output error")
            return read(tensor, dtype)

        monkeypatch.setattr(Stored, "read", fails)
        unet, states = training(path, rng=1)
        with pytest.warns(UserWarning, match=f"{fault}; going on from the one before it, run.previous.safetensors"):
            assert [state.step for state in states] == [4, 5, 6]
        assert_same_weights(unet, run.unet)

    def test_both_may_be_damaged(self, run, path):
        path.write_bytes(run.files[4][:-1])
        previous(path).write_bytes(run.files[3][:100])
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="run.previous.safetensors is not a readable"):
            next(training(path)[1])
        path.unlink()
        assert next(training(path)[1]).step == 1  # whoever removes a checkpoint begins anew


def dies_in_the_next_step(path, where):
    """Train for a step, log it and save it, in a copy of this process that kills itself before the `where`-th line of
    the code that writes files; return whether it did."""
    lines, package = itertools.count(1), os.path.dirname(replacing.__file__)

    def before_a_line(frame, event, argument):
        if event == "line" and next(lines) == where:
            os.kill(os.getpid(), signal.SIGKILL)
        return before_a_line

    def trains():
        state, log = next(training(path, 1000, decay_steps=0)[1]), MetricsLog(path.with_name("metrics.csv"))
        sys.settrace(lambda frame, *_: before_a_line if frame.f_code.co_filename.startswith(package) else None)
        log.write(state)
        state.save(path)
        os._exit(0)

    return in_a_copy(trains) == -signal.SIGKILL


@pytest.mark.slow
@on_linux
def test_killed_anywhere_in_writing_it_goes_on_from_this_checkpoint_or_the_one_before_and_loses_nothing(path):
    """kill -9, again and again: in the end all is to the bit as if nothing had been."""
    before, outcomes = 0, []
    for where in itertools.count(1):
        if not dies_in_the_next_step(path, where):
            break
        # without a warning, which is an error here
        goes_on_after = next(training(path, 1000, decay_steps=0)[1]).step - 1
        outcomes.append(goes_on_after - before)
        before += outcomes[-1]
        # the log, the two checkpoints, those that were not finished, and the second name that one of them was to have
        assert len(list(path.parent.iterdir())) <= 5
    assert outcomes[0] == 0 and set(outcomes) == {0, 1} and len(outcomes) > 50
    unet, states = training(path, before + 2, decay_steps=0)
    log = MetricsLog(path.with_name("metrics.csv"))
    for state in states:
        log.write(state)
    whole, states = training(None, before + 2, decay_steps=0)
    losses = [state.loss for state in states]
    assert_same_weights(unet, whole)
    assert [column.tolist() for column in log.losses()] == [losses, [*range(1, before + 3)]]
    assert names(path.parent) == {path.name, previous(path).name, "metrics.csv"}


@pytest.mark.slow
@on_linux
def test_killed_at_any_moment_again_and_again_it_goes_on_and_loses_nothing(path, tmp_path):
    """kill -9 of a run that saves and logs every step: in the end all is to the bit as if nothing had been."""
    csv, moments, in_writing, on_disk = tmp_path / "metrics.csv", np.random.default_rng(0), 0, 0
    began, saved = shared_array((1,), "int64"), shared_array((1,), "int64")

    def life(path, csv, workers, steps=10**6):
        unet = UNet(channels=(32, 32), blocks=1, attention=(False, True))  # so large that much of the time is writing
        log = MetricsLog(csv)
        for state in tiny_training.training(path, steps, unet=unet, workers=workers, decay_steps=0, lr=1e-3)[1]:
            began[0] = began[0] or state.step
            log.write(state)
            state.save(path)
            saved[0] = state.step
        return unet.state_dict()

    for n in range(KILLS):
        began[0] = 0
        process = multiprocessing.get_context("fork").Process(target=life, args=(path, csv, 1 + n % 2))
        process.start()
        while not began[0] and process.is_alive() and n < KILLS - 10:  # the last ten may not get to their first step
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.15))
        assert process.is_alive(), f"life {n} ended by itself"
        process.kill()
        process.join()
        in_writing += any(path.parent.glob(f".{path.name}.*.part"))  # the next one removes it
        assert began[0] in (0, on_disk + 1)
        on_disk = max([tiny_training.step_in(p) for p in (path, previous(path)) if p.exists()], default=0)
        assert on_disk >= saved[0]
    assert 0 < in_writing < KILLS
    weights, whole = life(path, csv, 2, on_disk + 5), life(tmp_path / "whole", tmp_path / "whole.csv", 2, on_disk + 5)
    assert_same_weights(weights, whole)
    assert_same_weights(load_file(path), load_file(tmp_path / "whole"))
    columns = dict(delimiter=",", skiprows=1, usecols=(0, 1, 2, 3))  # not the times
    np.testing.assert_array_equal(np.loadtxt(csv, **columns), np.loadtxt(tmp_path / "whole.csv", **columns))


WAVES = np.sin(np.arange(16.0) + np.arange(500)[:, None]).astype(np.float32).reshape(500, 4, 4, 1)


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize(("images", "workers"), [(WAVES, 1), (Lazy(WAVES), 2)], ids=["array", "folder"])
def test_three_thousand_steps_take_no_more_memory_threads_or_files_than_six_hundred(path, images, workers):
    reader, writer = multiprocessing.Pipe(duplex=False)

    def memory():
        """Of this process and its workers."""
        pids = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
        pages = sum(int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return pages * os.sysconf("SC_PAGE_SIZE")

    def trains():
        log, settings = MetricsLog(path.with_name("metrics.csv")), dict(batch=4, micro_batch=2, workers=workers)
        for state in tiny_training.training(None, 3000, unet=UNet(**SMALL), images=images, **settings)[1]:
            log.write(state)
            if state.step % 100 == 0:
                state.save(path)
            if state.step % 300 == 0:
                writer.send((memory(), threading.active_count(), len(os.listdir("/proc/self/fd"))))

    process = multiprocessing.get_context("fork").Process(target=trains)
    process.start()
    memories, threads, files = np.array([reader.recv() for _ in range(10)])[1:].T  # first, what is reused is filled
    process.join()
    assert memories.max() - memories[0] < 2**20, memories
    assert set(threads) == {threads[0]} and set(files) == {files[0]}
