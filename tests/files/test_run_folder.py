"""What a training leaves in its folder: checkpoints, pictures, the log; tests/examples look at it as a user does."""

import json
import types

import numpy as np
import pytest
import tiny_training
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import SMALL, assert_same_weights, files_of_at_most, names, on_linux

from tinyddpm import UNet, load_model
from tinyddpm.files import run_folder
from tinyddpm.files.run_folder import MetricsLog, begin_folder, ended, model_in, recorded, write_options


def training(path=None, **settings):
    """The states of seven steps."""
    return tiny_training.training(path, 7, unet=UNet(**SMALL), workers=1, **settings)[1]


def steps_in(log):
    return np.loadtxt(log, delimiter=",", skiprows=1, usecols=0, ndmin=1).tolist()


@pytest.fixture(autouse=True)
def curves(monkeypatch):
    """The loss curves that would be drawn, as (name, losses, steps); how, see test_data_and_pictures.py."""
    drawn = []
    draw = lambda path, losses, steps: drawn.append((path.name, losses.tolist(), steps.tolist()))
    monkeypatch.setattr(run_folder, "save_loss_curve", draw)
    return drawn


@pytest.fixture
def said(capsys):
    """said() is what has been printed since it was last asked."""
    return lambda: "".join(capsys.readouterr())


def test_what_is_written_and_when(tmp_path, said, curves):
    drawn, seen, losses = [], [], []
    draw = lambda state: drawn.append(state.step)
    for state in recorded(training(), tmp_path, 7, save_every=3, draw_every=2, draw=draw, options={"steps": 7}):
        seen.append(names(tmp_path))
        losses.append(state.loss)
    assert drawn == [2, 4, 6]  # step 7 is the last, of which the caller makes what it likes
    assert curves == [("loss.png", losses[:n], [*range(1, n + 1)]) for n in (2, 4, 6, 7)]
    log, new = {"metrics.csv", "options.json"}, {"metrics.csv", "options.json", "checkpoint.safetensors"}
    both = new | {"checkpoint.previous.safetensors"}
    assert seen == [log, log, new, new, new, both, both]
    assert steps_in(tmp_path / "metrics.csv") == [1, 2, 3, 4, 5, 6, 7] and ended(tmp_path)
    *_, alone = training()
    for model in (state.ema.model, load_model(tmp_path / "checkpoint.safetensors")[0]):  # nothing is changed by looking
        assert_same_weights(model, alone.ema.model)
    text = said()
    assert all(words in text for words in ("training: ", "7/7", "step", f"{state.images_per_second:.0f} images/s"))


def test_a_run_that_goes_on_and_one_that_has_ended(tmp_path, said):
    """The bar begins where it is, and the log has each line once."""
    begin_folder(tmp_path, {"steps": 7})
    has_ended = f"ended    this run has had its 7 steps; --start {tmp_path} with a new --out learns on from it"
    for stop, steps, says in (
        (lambda: True, [1], ""),
        (None, [2, 3, 4, 5, 6, 7], "resumed  at step 2 of 7"),
        (None, [7], has_ended),
    ):
        states = training(tmp_path / "checkpoint.safetensors", stop=stop)
        assert [state.step for state in recorded(states, tmp_path, 7)] == steps
        text = said()
        assert ended(tmp_path) == (steps[-1] == 7) and ("7/7" in text) == (steps[-1] == 7)
        assert says in text and text.count("resumed") + text.count("ended  ") == bool(says)
        assert steps_in(tmp_path / "metrics.csv") == [*range(1, steps[-1] + 1)]
    (tmp_path / "options.json").write_text("[]")
    assert not ended(tmp_path) and not ended(tmp_path / "nowhere")


def test_what_a_run_has_learned_so_far(tmp_path):
    assert model_in(tmp_path) == tmp_path and model_in(str(tmp_path / "nowhere")) == tmp_path / "nowhere"
    for name in ("model.safetensors", "checkpoint.safetensors"):  # of which the model may be of before the run went on
        (tmp_path / name).touch()
        assert model_in(tmp_path) == model_in(tmp_path / name) == tmp_path / name


def test_what_cannot_be_written_is_told_the_first_time_and_the_last(tmp_path, said):
    def full(state):
        raise OSError("no space")

    (tmp_path / "metrics.csv").mkdir()
    *_, state = recorded(training(), tmp_path, 7, save_every=3, draw_every=2, draw=full)
    assert state.step == 7 and (tmp_path / "checkpoint.safetensors").exists()
    text = said()
    assert text.count("no grid after") == text.count("no grid after 2 steps: no space") == 1
    assert text.count("no loss curve after 2 steps: ") == text.count("no line in metrics.csv after 1 steps: ") == 1
    assert text.count("no line in metrics.csv after 7 steps: ") >= 1 == text.count("after 1 steps")


def test_an_error_goes_on_to_the_caller_who_is_told_what_is_kept(tmp_path, said):
    def broken(at, path=None):
        for state in training(path):
            if state.step == at:
                raise ArithmeticError(str(at))
            yield state

    kept = "the checkpoint after 4 steps is kept: --resume goes on from it"
    (tmp_path / "other").mkdir()
    (tmp_path / "unwritable" / "checkpoint.safetensors").mkdir(parents=True)
    for states, folder, save_every, error, told in [
        (broken(5), tmp_path, 2, "5", kept),
        (broken(6, tmp_path / "checkpoint.safetensors"), tmp_path, 100, "6", kept),  # kept before it went on
        (broken(5), tmp_path / "other", 100, "5", ""),
        (broken(5), tmp_path / "unwritable", 2, "5", "no checkpoint after 2 steps: "),
    ]:
        with pytest.raises(ArithmeticError, match=error):
            list(recorded(states, folder, 7, save_every))
        text = said()
        assert told in text and ("is kept" in text) == (told == kept)


def test_begin_folder(tmp_path):
    tmp_path = tmp_path / "runs" / "first"
    read = lambda folder: json.loads((folder / "options.json").read_text())
    options = {"lr": 0.1, "channels": [8, 16], "steps": 5, "labels": None}
    assert begin_folder(tmp_path, options) is None and read(tmp_path) == options
    assert begin_folder(tmp_path, options | {"lr": 0.2}) is None and not (tmp_path / "earlier-1").exists()
    list(recorded(training(), tmp_path, 7))
    for name in ("step_2.png", "loss.png", "model.safetensors"):
        (tmp_path / name).touch()
    before = names(tmp_path)
    (tmp_path / "notes.txt").touch()  # the user's own
    assert begin_folder(tmp_path, options, resume=True) is None and names(tmp_path) == before | {"notes.txt"}
    assert read(tmp_path)["lr"] == 0.2  # for it may be refused yet
    (tmp_path / "options.json").unlink()  # and if it is not there, it is not made, for the same reason
    assert begin_folder(tmp_path, options, resume=True) is None and not (tmp_path / "options.json").exists()
    write_options(tmp_path, options)
    others = ["step_*.png", "samples.png"]
    assert begin_folder(tmp_path, options | {"lr": 0.3}, others=others) == tmp_path / "earlier-1"
    assert names(tmp_path / "earlier-1") == before
    assert names(tmp_path) == {"options.json", "earlier-1", "notes.txt"}  # nothing half-written
    assert read(tmp_path / "earlier-1") == options and read(tmp_path)["lr"] == 0.3
    (tmp_path / "checkpoint.safetensors").touch()
    assert begin_folder(tmp_path, options) == tmp_path / "earlier-2" and names(tmp_path / "earlier-1") == before


HEADER = "step,loss,grad_norm,lr,images_per_second,seconds\n"
FIRST, SECOND = "1,0.5,1,0.1,9,1\n", "2,0.25,1,0.1,9,2\n"


def states_of(*steps, seen=True):
    """What the log needs to know of some states."""
    numbers = lambda step: dict(zip(HEADER.strip().split(","), (step, 0.5 / step, 1, 0.1, 9, step)))
    return [types.SimpleNamespace(seen=seen, metrics=lambda step=step: numbers(step)) for step in steps]


def write(path, states):
    log = MetricsLog(path)
    for state in states:
        log.write(state)
    log.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


class TestLog:
    def test_it_has_the_numbers_of_each_step(self, path):
        states = list(training())
        write(path, states)
        lines = [",".join(map(str, state.metrics().values())) for state in states]
        assert [",".join(states[0].metrics()), *lines] == [HEADER.strip(), *lines] == path.read_text().splitlines()
        assert states[-1].seconds > states[0].seconds > 0

    def test_a_line_is_there_as_soon_as_somebody_has_looked_at_the_step(self, path):
        """A GPU runs behind. Before a checkpoint all are waited for, so that none is missing when the run goes on."""
        log = MetricsLog(path)
        for state in states_of(1, 2, seen=False):
            log.write(state)
        assert not path.exists()
        for state in states_of(3, 4):
            log.write(state)
            assert steps_in(path) == [*range(1, state.metrics()["step"] + 1)]
        losses, steps = log.losses()
        assert steps.tolist() == [1, 2, 3, 4] and losses.tolist() == [0.5, 0.25, 0.5 / 3, 0.125]
        log.write(*states_of(5, seen=False))
        assert len(steps_in(path)) == 4
        log.flush()
        assert len(steps_in(path)) == 5
        log.close()

    @given(kept=st.integers(0, 6), cut=st.integers(0, 30))
    def test_a_run_that_goes_on_leaves_no_line_out_and_none_twice(self, tmp_path_factory, kept, cut):
        """It was killed later than the checkpoint, perhaps in the middle of a line."""
        path = tmp_path_factory.mktemp("log") / "metrics.csv"
        write(path, states_of(*range(1, 7)))
        whole = path.read_text()
        path.write_text(whole + "7,0.1,1,0.1,9,7\n"[: cut % 16])
        write(path, states_of(*range(kept + 1, 9)))
        assert steps_in(path) == [*range(1, 9)] and path.read_text().startswith(whole)
        assert names(path.parent) == {"metrics.csv"}

    @pytest.mark.parametrize("old", [b"a,b\n1,2\n", b"\xff\x00\n1,", b"step,loss\n1,2\n", b"\n"])
    def test_a_file_of_another_kind_is_left_alone(self, path, old):
        path.write_bytes(old)
        with pytest.raises(FileExistsError, match="path: .*metrics.csv is another file, it begins with '"):
            MetricsLog(path).write(*states_of(2))
        assert path.read_bytes() == old

    @pytest.mark.parametrize("odd", [
        "1,a,1,1,1,1\n", "1,1,1\n", "1,1,1,1,1,1,1\n", f"{'9' * 5000},1,1,1,1,1\n", "\0\0\n", "1,1,1,1,1,1", None,
    ])  # fmt: skip
    def test_lines_that_are_none_go(self, path, odd):
        path.write_text("" if odd is None else HEADER + FIRST + odd)
        write(path, states_of(2))
        assert path.read_text() == HEADER + (FIRST if odd else "") + SECOND

    @on_linux
    def test_no_line_is_lost_on_a_disk_that_is_full_for_a_while(self, path):
        log, failed = MetricsLog(path), 0
        for step in range(1, 400):
            with files_of_at_most(200 if 30 < step < 350 else 2**30):
                try:
                    log.write(*states_of(step))
                except OSError:
                    failed += 1
        log.close()
        assert failed > 300 and steps_in(path) == [*range(1, 400)]
