"""What a training leaves in its folder: checkpoints, pictures, the log; tests/examples look at it as a user does."""

import json
import os
import signal
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import in_a_copy, on_linux

from tinyddpm import Diffusion, UNet, load_model, make_schedule, train
from tinyddpm.files.checkpoint import differences
from tinyddpm.files.run_folder import MetricsLog, begin_folder, ended, model_in, recorded, set_aside, write_options

DIFFUSION = Diffusion(make_schedule("cosine", 20), "x0")
IMAGES = np.random.default_rng(0).uniform(-1, 1, (12, 4, 4, 1)).astype(np.float32)


def training(steps=7, **settings):
    unet = UNet(channels=(4, 4), blocks=1, attention=(False, True), groups=2, image_size=4)
    return train(unet, DIFFUSION, IMAGES, steps, batch=4, workers=1, **settings)


def names(folder):
    return {path.name for path in folder.iterdir()} - {"loss.png"}  # which takes matplotlib


def test_what_is_written_and_when(tmp_path, capsys):
    drawn, seen = [], []
    for state in recorded(
        training(), tmp_path, 7, save_every=3, draw_every=2, draw=lambda state: drawn.append(state.step)
    ):
        seen.append((state.step, names(tmp_path)))
    assert drawn == [2, 4, 6]  # step 7 is the last, of which the caller makes what it likes
    log, new = {"metrics.csv"}, {"metrics.csv", "checkpoint.safetensors"}
    both = new | {"checkpoint.previous.safetensors"}
    assert seen == [(1, log), (2, log), (3, new), (4, new), (5, new), (6, both), (7, both)]
    assert np.loadtxt(tmp_path / "metrics.csv", delimiter=",", skiprows=1)[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    *_, alone = training()
    for model in (state.ema.model, load_model(tmp_path / "checkpoint.safetensors")[0]):  # nothing is changed by looking
        for name, w in alone.ema.model.state_dict().items():
            np.testing.assert_array_equal(model.state_dict()[name], w)
    err = capsys.readouterr().err
    assert "7/7" in err and f"{state.images_per_second:.0f} images/s" in err


def test_a_run_that_goes_on(tmp_path, capsys):
    """The bar begins where it is, and the log has each line once."""
    for _ in recorded(training(stop=lambda: True), tmp_path, 7):
        pass
    steps = [s.step for s in recorded(training(resume=tmp_path / "checkpoint.safetensors"), tmp_path, 7)]
    assert steps == [2, 3, 4, 5, 6, 7]
    out, err = capsys.readouterr()
    assert (out + err).count("resumed  at step 2") == 1 and "7/7" in err
    assert np.loadtxt(tmp_path / "metrics.csv", delimiter=",", skiprows=1)[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_that_has_ended(tmp_path, capsys):
    begin_folder(tmp_path, {"steps": 7})
    says = f"ended    this run has had its 7 steps; --start {tmp_path} with a new --out learns on from it"
    for stopped, said in ((True, ""), (False, "resumed  at step 2 of 7"), (False, says)):
        for _ in recorded(
            training(resume=tmp_path / "checkpoint.safetensors", stop=[bool, lambda: True][stopped]), tmp_path, 7
        ):
            pass
        text = "".join(capsys.readouterr())
        assert ended(tmp_path) != stopped and said in text and ("ended" in text) == (said == says)
    (tmp_path / "options.json").write_text("[]")
    assert not ended(tmp_path) and not ended(tmp_path / "nowhere")


def test_what_a_run_has_learned_so_far(tmp_path):
    """The model is of before, once the run went on; alone, it will do."""
    assert model_in(tmp_path) == tmp_path and model_in(str(tmp_path / "nowhere")) == tmp_path / "nowhere"
    for name in ("model.safetensors", "checkpoint.safetensors"):
        (tmp_path / name).touch()
        assert model_in(tmp_path) == model_in(tmp_path / name) == tmp_path / name


def test_what_cannot_be_written_is_told_the_first_time_and_the_last(tmp_path, capsys):
    def full(state):
        raise OSError("no space")

    (tmp_path / "metrics.csv").mkdir()
    *_, state = recorded(training(), tmp_path, 7, save_every=3, draw_every=2, draw=full)
    assert state.step == 7 and (tmp_path / "checkpoint.safetensors").exists()
    text = "".join(capsys.readouterr())
    assert text.count("no grid after") == text.count("no grid after 2 steps: no space") == 1
    assert text.count("no line in metrics.csv after 1 steps: ") == 1
    assert text.count("no line in metrics.csv after 7 steps: ") >= 1 == text.count("after 1 steps")


def test_an_error_goes_on_to_the_caller_who_is_told_what_is_kept(tmp_path, capsys):
    def broken(at=5, **settings):
        for state in training(**settings):
            if state.step == at:
                raise ArithmeticError(str(at))
            yield state

    with pytest.raises(ArithmeticError, match="5"):
        list(recorded(broken(), tmp_path, 7, save_every=2))
    assert "the checkpoint after 4 steps is kept: --resume goes on from it" in "".join(capsys.readouterr())
    with pytest.raises(ArithmeticError, match="6"):  # what was kept before the run went on
        list(recorded(broken(6, resume=tmp_path / "checkpoint.safetensors"), tmp_path, 7, save_every=100))
    assert "the checkpoint after 4 steps is kept" in "".join(capsys.readouterr())
    (tmp_path / "other").mkdir()
    with pytest.raises(ArithmeticError):
        list(recorded(broken(), tmp_path / "other", 7, save_every=100))
    assert "is kept" not in "".join(capsys.readouterr())


def test_begin_folder(tmp_path):
    options = {"lr": 0.1, "channels": [8, 16], "steps": 5, "labels": None}
    assert begin_folder(tmp_path, options) is None
    assert not differences(json.loads((tmp_path / "options.json").read_text()), options)
    assert begin_folder(tmp_path, options | {"lr": 0.2}) is None and not (tmp_path / "earlier-1").exists()
    for _ in recorded(training(), tmp_path, 7):
        pass
    (tmp_path / "step_2.png").touch()
    before = names(tmp_path)
    (tmp_path / "notes.txt").touch()  # the user's own
    assert begin_folder(tmp_path, options, resume=True) is None and names(tmp_path) == before | {"notes.txt"}
    assert json.loads((tmp_path / "options.json").read_text())["lr"] == 0.2  # for it may be refused yet
    (tmp_path / "options.json").unlink()  # and if it is not there, it is not made, for the same reason
    assert begin_folder(tmp_path, options, resume=True) is None and names(tmp_path) == (before | {"notes.txt"}) - {
        "options.json"
    }
    write_options(tmp_path, options)
    others = ["step_*.png", "samples.png"]
    assert begin_folder(tmp_path, options | {"lr": 0.3}, others=others) == tmp_path / "earlier-1"
    assert names(tmp_path / "earlier-1") == before
    assert names(tmp_path) == {"options.json", "earlier-1", "notes.txt"}  # nothing half-written
    assert json.loads((tmp_path / "earlier-1" / "options.json").read_text()) == options
    assert json.loads((tmp_path / "options.json").read_text())["lr"] == 0.3


def test_what_was_in_a_folder_is_set_aside(tmp_path):
    for n in (1, 2):
        (tmp_path / "a").write_text(str(n))
        (tmp_path / "stays").touch()
        assert set_aside(tmp_path, ["a", "none"]) == tmp_path / f"earlier-{n}"
    assert [(tmp_path / f"earlier-{n}" / "a").read_text() for n in (1, 2)] == ["1", "2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["earlier-1", "earlier-2", "stays"]


def states_of(*steps, loss=0.5):
    """What the log needs to know of some states."""
    names = ("step", "loss", "grad_norm", "lr", "images_per_second", "seconds")
    return [
        types.SimpleNamespace(
            seen=True, metrics=lambda step=step: dict(zip(names, (step, loss / step, 1, 0.1, 9, step)))
        )
        for step in steps
    ]


class TestLog:
    HEADER = "step,loss,grad_norm,lr,images_per_second,seconds"

    def write(self, path, states):
        log = MetricsLog(path)
        for state in states:
            log.write(state)
        log.close()

    def test_it_has_the_numbers_of_each_step(self, tmp_path):
        states = list(training(4))
        self.write(tmp_path / "metrics.csv", states)
        header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
        assert header == self.HEADER == ",".join(states[0].metrics())
        for line, state in zip(lines, states, strict=True):
            step, loss, grad_norm, lr, speed, seconds = line.split(",")
            assert (int(step), float(loss), float(grad_norm)) == (state.step, state.loss, state.grad_norm)
            assert float(lr) == state.lr and float(speed) > 0 and abs(float(seconds) - state.seconds) < 1e-3
        assert states[-1].seconds > states[0].seconds > 0

    def test_each_line_is_there_as_soon_as_it_is_written(self, tmp_path):
        log = MetricsLog(tmp_path / "metrics.csv")
        for n, state in enumerate(states_of(1, 2, 3), 1):
            log.write(state)
            assert len((tmp_path / "metrics.csv").read_text().splitlines()) == n + 1
        losses, steps = log.losses()
        assert steps.tolist() == [1, 2, 3] and losses.tolist() == [0.5, 0.25, 0.5 / 3]
        log.close()

    @given(kept=st.integers(0, 6), cut=st.integers(0, 30))
    def test_a_run_that_goes_on_leaves_no_line_out_and_none_twice(self, tmp_path_factory, kept, cut):
        """It was killed later than the checkpoint, perhaps in the middle of a line."""
        path = tmp_path_factory.mktemp("log") / "metrics.csv"
        self.write(path, states_of(*range(1, 7)))
        whole = path.read_text()
        path.write_text(whole + "7,0.1,1,0.1,9,7\n"[: cut % 16])
        self.write(path, states_of(*range(kept + 1, 9)))
        lines = path.read_text().splitlines()
        assert [int(line.split(",")[0]) for line in lines[1:]] == list(range(1, 9)) and lines[0] == self.HEADER
        assert path.read_text().startswith(whole) and not list(path.parent.glob("*.part"))

    @pytest.mark.parametrize("old", [b"a,b\n1,2\n", b"\xff\x00\n1,", b"step,loss\n1,2\n", b"\n"])
    def test_a_file_of_another_kind_is_left_alone(self, tmp_path, old):
        (tmp_path / "metrics.csv").write_bytes(old)
        with pytest.raises(FileExistsError, match="path: .*metrics.csv is another file, it begins with '"):
            MetricsLog(tmp_path / "metrics.csv").write(*states_of(2))
        assert (tmp_path / "metrics.csv").read_bytes() == old

    @pytest.mark.parametrize(
        "odd", ["1,a,1,1,1,1\n", "1,1,1\n", "1,1,1,1,1,1,1\n", f"{'9' * 5000},1,1,1,1,1\n", "\0\0\n", "1,1,1,1,1,1"]
    )
    def test_lines_that_are_none_go(self, tmp_path, odd):
        (tmp_path / "metrics.csv").write_text(f"{self.HEADER}\n1,0.5,1,0.1,9,1\n{odd}")
        self.write(tmp_path / "metrics.csv", states_of(2))
        assert (tmp_path / "metrics.csv").read_text() == f"{self.HEADER}\n1,0.5,1,0.1,9,1\n2,0.25,1,0.1,9,2\n"

    def test_an_empty_file_is_none(self, tmp_path):
        (tmp_path / "metrics.csv").touch()
        self.write(tmp_path / "metrics.csv", states_of(1))
        assert (tmp_path / "metrics.csv").read_text() == f"{self.HEADER}\n1,0.5,1,0.1,9,1\n"

    def test_steps_nobody_has_looked_at_wait(self, tmp_path):
        """Of a GPU, which runs behind."""
        log, states = MetricsLog(tmp_path / "metrics.csv"), states_of(1, 2, 3)
        states[0].seen = states[1].seen = False
        for state in states[:2]:
            log.write(state)
        assert not (tmp_path / "metrics.csv").exists()
        log.write(states[2])
        assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4
        log.close()

    @on_linux
    def test_no_line_is_lost_on_a_disk_that_is_full_for_a_while(self, tmp_path):
        import resource

        path = tmp_path / "metrics.csv"

        def writes():
            log, failed = MetricsLog(path), 0
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            for step in range(1, 1500):
                size = 200 if 300 < step < 1000 else resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
                try:
                    log.write(*states_of(step))
                except OSError:
                    failed += 1
            log.close()
            os._exit(0 if failed > 600 else 1)

        assert in_a_copy(writes) == 0
        assert np.loadtxt(path, delimiter=",", skiprows=1, usecols=0).tolist() == list(range(1, 1500))

    def test_a_flush_waits_for_all(self, tmp_path):
        """Before a checkpoint, so that no line is missing when the run goes on from it."""
        log, states = MetricsLog(tmp_path / "metrics.csv"), states_of(1, 2)
        states[0].seen = states[1].seen = False
        for state in states:
            log.write(state)
        log.flush()
        assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
        log.close()

    def test_what_could_not_be_written_is_tried_again(self, tmp_path):
        log = MetricsLog(tmp_path / "folder" / "metrics.csv")
        for state in states_of(1, 2):
            with pytest.raises(OSError):
                log.write(state)
        (tmp_path / "folder").mkdir()
        log.write(*states_of(3))
        log.close()
        assert len((tmp_path / "folder" / "metrics.csv").read_text().splitlines()) == 4
