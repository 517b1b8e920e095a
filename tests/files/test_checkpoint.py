"""A training that ends at any moment goes on as if it never had: checkpoints, their damage, faults, kill -9."""

import errno
import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_training import DIFFUSION, IMAGES, TINY, in_a_copy, on_linux, step_in, training

from tinyddpm import Diffusion, ImageFolder, Schedule, UNet, load_model, make_schedule
from tinyddpm.files.checkpoint import differences, run_config
from tinyddpm.files.replacing import previous
from tinyddpm.files.run_folder import MetricsLog
from tinyddpm.files.tensors import Stored
from tinyddpm.network.nn import Linear, Module
from tinyddpm.speed.workers import shared_array
from tinyddpm.training.batches import batch_indices


class Own(Diffusion):
    """A diffusion of one's own."""


def one_after_another(path, parts, **changes):
    """Train for each number of steps in turn, save, and forget; return what is left in the end, and all losses."""
    losses = []
    for steps, workers in parts:
        unet, states = training(path, workers=workers, rng=len(losses), **changes)
        for state in itertools.islice(states, steps):
            losses.append((state.step, state.loss, state.grad_norm, state.lr))
        state.save(path)
        states.close()
    return unet.state_dict(), state.ema.model.state_dict(), losses


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


class TestResume:
    @settings(max_examples=5)
    @given(stops=st.lists(st.integers(1, 7), max_size=3), workers=st.lists(st.integers(1, 3), min_size=4, max_size=4))
    def test_it_goes_on_bit_for_bit_from_any_step_with_any_number_of_workers(self, tmp_path_factory, stops, workers):
        folder = tmp_path_factory.mktemp("run")
        stops = sorted({*stops, 8})
        parts = [(after - before, n) for before, after, n in zip([0, *stops], stops, workers)]
        whole, interrupted = one_after_another(folder / "a", [(8, 1)]), one_after_another(folder / "b", parts)
        for a, b in zip(whole[:2], interrupted[:2]):
            assert_same(a, b)
        assert whole[2] == interrupted[2] and [step for step, *_ in whole[2]] == list(range(1, 9))

    @pytest.mark.parametrize(
        "changes",
        [
            dict(flip=True),
            dict(unet=dict(dropout=0.3)),
            dict(unet=dict(classes=3, label_dropout=0.3), labels=np.arange(23) % 3),
            dict(dtype="float64"),
            dict(diffusion=Diffusion(make_schedule("cosine", 12), "v", "learned_range", "hybrid"),
                 unet=dict(out_channels=2)),
            dict(batch=18, micro_batch=1),
            dict(micro_batch=None, decay_steps=0),
        ],
    )  # fmt: skip
    def test_with_whatever_is_random(self, tmp_path, changes):
        changes, dtype = dict(changes), changes.get("dtype", "float32")
        options, outcomes = changes.pop("unet", {}), []
        changes.pop("dtype", None)
        for name, parts in (("whole", [(5, 1)]), ("parts", [(2, 2), (3, 1)])):
            losses = []
            for steps, workers in parts:
                unet = UNet(**TINY | options, rng=len(losses)).to(dtype=dtype)
                _, states = training(
                    tmp_path / name, 5, unet=unet, images=IMAGES.astype(dtype), workers=workers, **changes
                )
                losses += [(s.loss, s.save(tmp_path / name)) for s in itertools.islice(states, steps)]
                states.close()
            outcomes.append((unet.state_dict(), losses))
        assert_same(outcomes[0][0], outcomes[1][0])
        assert outcomes[0][1] == outcomes[1][1]

    def test_where_there_is_no_checkpoint_it_begins(self, tmp_path):
        _, states = training(tmp_path / "run")
        assert next(states).step == 1

    def test_a_run_at_its_end_yields_its_last_state_again(self, tmp_path):
        unet, states = training(tmp_path / "run")
        *_, last = states
        assert last.last
        last.save(tmp_path / "run")
        again, states = training(tmp_path / "run", rng=1)
        (state,) = states
        assert state.last and state.metrics() == last.metrics()
        assert_same(unet.state_dict(), again.state_dict())
        assert_same(last.ema.model.state_dict(), state.ema.model.state_dict())
        before = (tmp_path / "run").read_bytes()
        state.save(tmp_path / "run")
        assert load_file(tmp_path / "run").keys() == load_file(previous(tmp_path / "run")).keys()
        assert len(before) == len((tmp_path / "run").read_bytes())

    def test_without_decay_it_may_go_on_for_longer(self, tmp_path):
        whole, states = training(None, 6, decay_steps=0)
        list(states)
        unet, states = training(tmp_path / "run", 4, decay_steps=0)
        (*_, state) = states
        state.save(tmp_path / "run")
        unet, states = training(tmp_path / "run", 6, decay_steps=0)
        assert [state.step for state in states] == [5, 6]
        assert_same(whole.state_dict(), unet.state_dict())

    def test_the_seconds_go_on_too(self, tmp_path):
        _, states = training(tmp_path / "run")
        state = next(states)
        state.seconds = 1000.0
        state.save(tmp_path / "run")
        states.close()
        _, states = training(tmp_path / "run")
        assert 1000 < next(states).seconds < 1100

    def test_any_module_can_be_trained(self, tmp_path):
        class Scale(Module):
            def __init__(self, rng):
                self.dense = Linear(1, 1, np.random.default_rng(rng))

            def __call__(self, x, t):
                return self.dense(x)

        whole, states = training(None, unet=Scale(0))
        list(states)
        unet, states = training(tmp_path / "run", unet=Scale(0))
        next(states), next(states).save(tmp_path / "run")
        states.close()
        again, states = training(tmp_path / "run", unet=Scale(1))
        list(states)
        assert_same(whole.state_dict(), again.state_dict())
        with pytest.raises(ValueError, match="run was not written by save_model"):
            load_model(tmp_path / "run")

    def test_the_checkpoint_is_a_model_with_the_averaged_weights(self, tmp_path):
        _, states = training(tmp_path / "run")
        next(states), (state := next(states)).save(tmp_path / "run")
        unet, diffusion = load_model(tmp_path / "run")
        assert_same(unet.state_dict(), state.ema.model.state_dict())
        np.testing.assert_array_equal(diffusion.schedule.beta, DIFFUSION.schedule.beta)
        states.close()

    def test_a_state_that_is_gone_cannot_be_saved(self, tmp_path):
        _, states = training(tmp_path / "run")
        first = next(states)
        next(states)
        with pytest.raises(RuntimeError, match="save: the training is at step 2, and this state of 1 is gone"):
            first.save(tmp_path / "run")
        assert not list(tmp_path.iterdir())
        states.close()

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            (dict(batch=12), "batch: 11 there, 12 here"),
            (dict(micro_batch=5), "micro_batch: 4 there, 5 here"),
            (dict(lr=0.02), "lr: 0.01 there, 0.02 here"),
            (dict(warmup_steps=4), "warmup_steps: 3 there, 4 here"),
            (dict(decay_steps=4), "decay_steps: 3 there, 4 here"),
            (dict(decay_steps=0), "decay_steps: 3 there, 0 here"),
            (dict(steps=9), "steps: 8 there, 9 here"),
            (dict(max_norm=2.0), "max_norm: 1.0 there, 2.0 here"),
            (dict(ema_decay=0.9), "ema_decay: 0.995 there, 0.9 here"),
            (dict(seed=4), "seed: 3 there, 4 here"),
            (dict(flip=True), "flip: False there, True here"),
            (dict(labels=[0] * 23, unet=UNet(**TINY, classes=1)), "labels: None there, some here; unet.classes: None"),
            (dict(images=IMAGES[:22]), "images: 23 of 4 x 4 x 1 there, 22 of 4 x 4 x 1 here; and no more"),
            (dict(images=-IMAGES), "images: as many there as here, but others, or in another order; and no more"),
            (dict(unet=UNet(**TINY | dict(channels=(4, 6)))), "unet.channels: [4, 8] there, [4, 6] here"),
            (dict(unet=UNet(**TINY, dropout=0.1)), "unet.dropout: 0.0 there, 0.1 here"),
            (dict(unet=UNet(**TINY).to(precision="tf32")), "precision: 'float32' there, 'tf32' here"),
            (dict(unet=Linear(1, 1, np.random.default_rng(0))), "types: ['UNet', 'Diffusion'] there, ['Linear', 'Dif"),
            (dict(diffusion=Own(DIFFUSION.schedule)), "types: ['UNet', 'Diffusion'] there, ['UNet', 'Own'] here"),
            (dict(diffusion=Diffusion(Schedule([0.1] * 20))), "beta: None there, some here"),
            (dict(diffusion=Diffusion(DIFFUSION.schedule, "v")), "diffusion.objective: 'eps' there, 'v' here"),
            (dict(diffusion=Diffusion(make_schedule("linear", 21, beta_end=0.6))), "T: 20 there, 21 here; and no more"),
            (dict(diffusion=Diffusion(make_schedule("linear", 20, beta_end=0.5))),
             "schedule.parameters.beta_end: 0.6 there, 0.5 here"),
        ],
    )  # fmt: skip
    def test_a_run_with_another_configuration_is_refused_by_field(self, tmp_path, change, field):
        _, states = training(tmp_path / "run")
        next(states).save(tmp_path / "run")
        next(states).save(tmp_path / "run")  # so that there is a previous one, which is not to be tried
        unet, others = training(tmp_path / "run", **change)
        before = unet.state_dict()
        with pytest.raises(ValueError, match="run is of another run: ") as error, warnings.catch_warnings():
            warnings.simplefilter("error")
            next(others)
        assert field.removesuffix("; and no more") in str(error.value)
        assert not field.endswith("; and no more") or "; " not in str(error.value).split(field[:4], 1)[1]
        assert_same(before, unet.state_dict())
        states.close()

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda folder: (folder / "5.png").rename(folder / "9.png"), "as many there as here, but files with other"),
            (lambda folder: (folder / "5.png").unlink(), "6 of 4 x 4 x 3 there, 5 of 4 x 4 x 3 here"),
            (lambda folder: 5, "6 of 4 x 4 x 3 there, 6 of 5 x 5 x 3 here"),
        ],
    )
    def test_a_folder_that_has_changed_is_refused_in_words(self, tmp_path, change, reason):
        for i in range(6):
            Image.new("L", (4, 4)).save(tmp_path / f"{i}.png")
        unet, labels = UNet(**TINY), np.arange(6) % 2
        config = run_config(unet, DIFFUSION, ImageFolder(tmp_path, 4), labels)
        size = change(tmp_path)
        images = ImageFolder(tmp_path, size if size == 5 else 4)
        (line,) = differences(config, run_config(unet, DIFFUSION, images, labels))
        assert line.startswith(f"images: {reason}")
        (line,) = differences(config, config | {"labels": run_config(unet, DIFFUSION, images, 1 - labels)["labels"]})
        assert line == "labels: others there than here"

    def test_all_fields_that_differ_are_named(self, tmp_path):
        _, states = training(tmp_path / "run")
        next(states).save(tmp_path / "run")
        states.close()
        with pytest.raises(ValueError, match="another run: batch: 11 there, 5 here; lr: 0.01 there, 1.0 here$"):
            next(training(tmp_path / "run", batch=5, lr=1.0)[1])

    def test_a_model_is_no_checkpoint(self, tmp_path):
        save_file({"w": np.zeros(3)}, tmp_path / "run")
        with pytest.raises(ValueError, match="run is no checkpoint of a training"):
            next(training(tmp_path / "run")[1])
        assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint and the one before it."""
    path = tmp_path_factory.mktemp("run") / "run.safetensors"
    _, states = training(path)
    for state in itertools.islice(states, 4):
        state.save(path)
    states.close()
    return path.read_bytes(), previous(path).read_bytes()


class TestDamage:
    """What a disk may do to a file, and what comes of it."""

    @given(data=st.data())
    def test_no_bit_can_flip_unnoticed(self, run, data, tmp_path_factory):
        path, content = tmp_path_factory.mktemp("damaged") / "run.safetensors", bytearray(run[0])
        header = 8 + int.from_bytes(content[:8], "little")
        at = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1)))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        unet, states = training(path)
        before = unet.state_dict()
        with pytest.raises(ValueError, match="damaged since it was written|not a readable safetensors|no checkpoint"):
            next(states)
        assert_same(before, unet.state_dict())
        with pytest.raises(ValueError):
            load_model(path)

    def test_nor_can_the_bits_that_say_there_is_a_checksum(self, run, tmp_path):
        assert run[0].count(b'"sha256"') == 1
        (tmp_path / "run").write_bytes(run[0].replace(b'"sha256"', b'"sha257"'))
        for load in (lambda: next(training(tmp_path / "run")[1]), lambda: load_model(tmp_path / "run")):
            with pytest.raises(ValueError, match="run has been damaged since it was written"):
                load()

    @given(data=st.data())
    def test_no_file_can_be_cut_short_unnoticed(self, run, data, tmp_path_factory):
        path = tmp_path_factory.mktemp("damaged") / "run.safetensors"
        path.write_bytes(run[0][: data.draw(st.integers(0, len(run[0]) - 1))])
        with pytest.raises(ValueError, match="run.safetensors is not a readable safetensors file"):
            next(training(path)[1])

    @pytest.mark.parametrize("damage", ["cut", "flipped"])
    def test_then_it_goes_on_from_the_one_before_and_says_so(self, run, tmp_path, damage):
        path, content = tmp_path / "run.safetensors", bytearray(run[0])
        content[-1] ^= 1
        path.write_bytes(run[0][:-1] if damage == "cut" else content)
        previous(path).write_bytes(run[1])
        unet, states = training(path)
        with pytest.warns(
            UserWarning, match="run.safetensors .* going on from the one before it, run.previous.safeten"
        ):
            assert next(states).step == 4
        list(states)
        whole, states = training(None)
        list(states)
        assert_same(whole.state_dict(), unet.state_dict())

    def test_whoever_removes_a_checkpoint_begins_anew(self, run, tmp_path):
        previous(tmp_path / "run.safetensors").write_bytes(run[1])
        assert next(training(tmp_path / "run.safetensors")[1]).step == 1

    def test_a_bad_sector(self, run, tmp_path, monkeypatch):
        path, read = tmp_path / "run.safetensors", Stored.read
        path.write_bytes(run[0]), previous(path).write_bytes(run[1])

        def fails(tensor, dtype):
            if tensor.file.name == str(path):
                raise OSError(errno.EIO, "Input/output error")
            return read(tensor, dtype)

        monkeypatch.setattr(Stored, "read", fails)
        with pytest.warns(UserWarning, match="Input/output error; going on from the one before it, run.previous.safe"):
            assert next(training(path)[1]).step == 4

    def test_both_may_be_damaged(self, run, tmp_path):
        path = tmp_path / "run.safetensors"
        path.write_bytes(run[0][:-1])
        previous(path).write_bytes(run[1][:100])
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="run.previous.safetensors is not a readable"):
            next(training(path)[1])


@on_linux
class TestDisk:
    def save_or_tell(self, path):
        """Exit 0 if the state after 2 steps could be saved, 3 if that was an OSError that says which file it was."""
        _, states = training(path, workers=1)
        state = next(itertools.islice(states, 1, None))
        try:
            state.save(path)
        except OSError as error:
            os._exit(3 if f"cannot write {path}" in str(error) else 4)
        os._exit(0)

    @pytest.fixture
    def saved(self, tmp_path):
        _, states = training(tmp_path / "run", workers=1)
        next(states).save(tmp_path / "run")
        states.close()
        return tmp_path / "run", (tmp_path / "run").read_bytes()

    @pytest.mark.parametrize("size", [0, 1, 100, 4096, 20_000])
    def test_full(self, saved, size):
        """The system lets a file grow to `size` bytes only, as a full disk does."""
        import resource

        path, before = saved

        def with_little_space():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            self.save_or_tell(path)

        assert len(before) > 20_000
        assert in_a_copy(with_little_space) == 3
        assert path.read_bytes() == before and os.listdir(path.parent) == ["run"]
        assert in_a_copy(lambda: self.save_or_tell(path)) == 0  # there is space again

    def test_really_full(self, saved, tmp_path):
        path, before = saved
        disk = tmp_path / "disk"
        disk.mkdir()
        size = f"size={5 * len(before) // 2}"  # room for two, but not for a third while it is written
        if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        try:
            (disk / "run").write_bytes(before)
            _, states = training(disk / "run", workers=1)
            next(states).save(disk / "run")
            with pytest.raises(OSError, match="cannot write .*run: No space left on device"):
                next(states).save(disk / "run")
            assert sorted(os.listdir(disk)) == ["run", "run.previous"]
            next(states)  # the training itself can go on
            states.close()
            _, states = training(disk / "run", workers=1)
            assert next(states).step == 3
            states.close()
        finally:
            subprocess.run(["umount", disk], check=True)

    def test_read_only(self, saved):
        path, before = saved

        def as_somebody_without_rights():
            os.chdir(path.parent)
            path.parent.chmod(0o555)
            if os.getuid() == 0:
                os.setuid(65534)
            self.save_or_tell(pathlib.Path("run"))

        assert in_a_copy(as_somebody_without_rights) == 3
        path.parent.chmod(0o755)
        assert path.read_bytes() == before and os.listdir(path.parent) == ["run"]


def test_the_step_in_which_it_is_asked_to_stop_is_the_last(tmp_path):
    unet, states = training(None, 8, stop=lambda: len(asked.append(0) or asked) == 5)
    asked = []
    states = list(states)
    assert [s.step for s in states] == [1, 2, 3, 4, 5] and [s.last for s in states] == [False] * 4 + [True]
    assert [s.last for s in training(None, 3)[1]] == [False, False, True]


class TestFaults:
    @pytest.mark.filterwarnings("ignore:images")  # are expected in [-1, 1]
    def test_what_is_not_finite_is_never_saved(self, tmp_path):
        """The last good checkpoint stays, and the error names the step."""
        images = IMAGES.copy()
        images[batch_indices(23, 2, 11, 3)[0]] = np.nan
        assert batch_indices(23, 2, 11, 3)[0] not in [*batch_indices(23, 0, 11, 3), *batch_indices(23, 1, 11, 3)]
        _, states = training(tmp_path / "run", images=images)
        with pytest.raises(FloatingPointError, match="step 3: the loss is nan"):
            for state in states:
                state.save(tmp_path / "run")
        assert step_in(tmp_path / "run") == 2
        _, states = training(tmp_path / "run", images=images)
        with pytest.raises(FloatingPointError, match="step 3: the loss is nan"):
            next(states)

    def test_memory_that_does_not_suffice(self):
        class Huge(UNet):
            def __call__(self, x, t):
                np.empty(2**60, np.uint8)

        for workers in (1, 2):
            with pytest.raises(MemoryError, match="Unable to allocate"):
                next(training(None, unet=Huge(**TINY), workers=workers)[1])
            assert not multiprocessing.active_children()

    @on_linux
    def test_the_system_kills_a_worker_for_want_of_memory(self):
        class Killed(UNet):
            def __call__(self, x, t):
                os.kill(os.getpid(), signal.SIGKILL)

        with pytest.raises(RuntimeError, match="a worker was killed; if it was for want of memory, fewer workers"):
            next(training(None, unet=Killed(**TINY), workers=2)[1])
        assert not multiprocessing.active_children()

    @pytest.mark.parametrize("workers", [1, 2])
    def test_an_exception_of_a_worker_comes_with_its_traceback(self, workers):
        class Broken(UNet):
            def __call__(self, x, t):
                raise LookupError("in the model")

        before = threading.active_count()
        with pytest.raises(LookupError, match="in the model") as raised:
            next(training(None, unet=Broken(**TINY), workers=workers)[1])
        text = "".join(traceback.format_exception(raised.value))
        assert 'raise LookupError("in the model")' in text and "in differentiate" in text
        assert threading.active_count() == before and not multiprocessing.active_children()


# -------------------------------------------------------------------------------------------------------- kill -9


def at_step(path):
    """The step after which the run at `path` goes on; it has to do so without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, states = training(path, 100, workers=1)
        step = next(states).step
        states.close()
    return step - 1


def dies_in_the_next_save(path, where):
    """Train for a step and save it, in a copy of this process that kills itself before, after or in the middle of a
    call of the system, at the `where`-th of these places; return whether it did."""
    places = itertools.count(1)

    def place():
        if next(places) == where:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function):
        def wrapper(*args, **kwargs):
            place()
            result = function(*args, **kwargs)
            place()
            return WatchedFile(result) if function is path_open else result

        return wrapper

    class WatchedFile:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def fileno(self):
            return self.file.fileno()

        def write(self, content):
            for part in (content[: len(content) // 2], content[len(content) // 2 :]):
                self.file.write(part)
                self.file.flush()
                place()

    path_open = pathlib.Path.open

    def trains():
        _, states = training(path, 100, workers=1)
        state = next(states)
        for module, names in ((os, ("fsync", "replace", "link", "open", "close")), (pathlib.Path, ("open", "unlink"))):
            for name in names:
                setattr(module, name, watched(getattr(module, name)))
        state.save(path)
        os._exit(0)

    return in_a_copy(trains) == -signal.SIGKILL


@pytest.mark.slow
@on_linux
def test_killed_anywhere_in_writing_a_checkpoint_it_goes_on_from_this_one_or_the_one_before(tmp_path):
    path, outcomes = tmp_path / "run.safetensors", []
    _, states = training(path, 100, workers=1)
    next(states).save(path)
    states.close()
    for where in itertools.count(1):
        before = at_step(path)
        if not dies_in_the_next_save(path, where):
            break
        outcomes.append(at_step(path) - before)
        # the two checkpoints, the one that was not finished, and the second name that one of them was to have
        assert len(list(tmp_path.iterdir())) <= 4
    assert outcomes == sorted(outcomes) and set(outcomes) == {0, 1} and len(outcomes) > 15
    assert at_step(path) == before + 1 and sorted(p.suffix for p in tmp_path.iterdir()) == [".safetensors"] * 2


KILLS = int(os.environ.get("KILLS", 50))  # KILLS=200 pytest -s -m slow -k any_moment


@pytest.mark.slow
@on_linux
def test_killed_at_any_moment_again_and_again_it_goes_on_and_loses_nothing(tmp_path):
    """kill -9 of a run that saves and logs every step: in the end all is to the bit as if nothing had been."""
    path, csv = tmp_path / "run.safetensors", tmp_path / "metrics.csv"
    moments, in_writing = np.random.default_rng(0), 0
    settings = dict(decay_steps=0, lr=1e-3)

    def life(path, csv, workers, steps=10**6):
        unet = UNet(channels=(32, 32), blocks=1, attention=(False, True))  # so large that much of the time is writing
        log = MetricsLog(csv)
        for state in training(path, steps, unet=unet, workers=workers, **settings)[1]:
            began[0] = began[0] or state.step
            log.write(state)
            state.save(path)
            saved[0] = state.step
        return unet

    began, saved, on_disk = shared_array((1,), "int64"), shared_array((1,), "int64"), 0
    for n in range(KILLS):
        began[0] = 0
        process = multiprocessing.get_context("fork").Process(target=life, args=(path, csv, 1 + n % 2))
        process.start()
        while (
            not began[0] and process.is_alive() and n < KILLS - 10
        ):  # the last ten may not even get to their first step
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.15))
        assert process.is_alive(), f"life {n} ended by itself"
        process.kill()
        process.join()
        in_writing += any(path.parent.glob(".run.safetensors.*.part"))  # the next one removes it
        assert began[0] in (0, on_disk + 1)
        on_disk = max([step_in(p) for p in (path, previous(path)) if p.exists()], default=0)
        assert on_disk >= saved[0]
    assert 0 < in_writing < KILLS

    steps = on_disk + 5
    unet = life(path, csv, 2, steps)
    whole = life(tmp_path / "whole", tmp_path / "whole.csv", 2, steps)
    assert_same(whole.state_dict(), unet.state_dict())
    for name, x in load_file(tmp_path / "whole").items():
        np.testing.assert_array_equal(load_file(path)[name], x, err_msg=name)
    columns = dict(delimiter=",", skiprows=1, usecols=(0, 1, 2, 3))  # not the times
    np.testing.assert_array_equal(np.loadtxt(csv, **columns), np.loadtxt(tmp_path / "whole.csv", **columns))
    print(f"{KILLS} kills survived, {in_writing} of them while a checkpoint was written; {steps} steps")


SOAK = """
import multiprocessing, os, sys, threading
import numpy as np
from tinyddpm import Diffusion, UNet, make_schedule, train
from tinyddpm.files.run_folder import MetricsLog

def memory():  # of this process and its workers
    pids = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
    return sum(int(open(f"/proc/{pid}/statm").read().split()[1]) for pid in pids) * os.sysconf("SC_PAGE_SIZE")

class Folder:  # read when it is indexed
    shape, dtype = (500, 4, 4, 1), np.dtype(np.float32)
    __len__ = lambda self: 500
    def __getitem__(self, indices):
        waves = np.sin(np.arange(16.0) + np.asarray(indices)[:, None])
        return waves.astype(np.float32).reshape(-1, 4, 4, 1)


images = Folder() if sys.argv[2] == "folder" else Folder()[np.arange(500)]
unet, log = UNet(channels=(4, 4), blocks=1, attention=(False, True), groups=2), MetricsLog(sys.argv[1] + "/metrics.csv")
diffusion = Diffusion(make_schedule("linear", 20, beta_end=0.6))
for state in train(unet, diffusion, images, 3000, 4, micro_batch=2, workers=int(sys.argv[3])):
    log.write(state)
    if state.step % 100 == 0:
        state.save(sys.argv[1] + "/run.safetensors")
    if state.step % 300 == 0:
        print(memory(), threading.active_count(), len(os.listdir("/proc/self/fd")), flush=True)
"""


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize(("images", "workers"), [("array", 1), ("folder", 2)])
def test_three_thousand_steps_take_no_more_memory_threads_or_files_than_six_hundred(tmp_path, images, workers):
    command = [sys.executable, "-c", SOAK, tmp_path, images, str(workers)]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seen = np.array([list(map(int, line.split())) for line in result.stdout.splitlines()])
    assert len(seen) == 10
    memory, threads, files = seen[1:].T  # the first steps fill what is reused later
    assert memory.max() <= 1.02 * memory[0], memory
    assert set(threads) == {threads[0]} and set(files) == {files[0]}
