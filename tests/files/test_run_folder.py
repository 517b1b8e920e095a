"""What a training leaves in its folder (record.py); test_example.py looks at it as a user does."""

import json

import numpy as np
import pytest

from tinyddpm import Diffusion, UNet, load_model, make_schedule, train
from tinyddpm.files.checkpoint import differences
from tinyddpm.files.run_folder import begin_folder, recorded

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
    (tmp_path / "options.json").unlink()
    assert begin_folder(tmp_path, options, resume=True) is None and names(tmp_path) == before | {"notes.txt"}
    others = ["step_*.png", "samples.png"]
    assert begin_folder(tmp_path, options | {"lr": 0.3}, others=others) == tmp_path / "earlier-1"
    assert names(tmp_path / "earlier-1") == before
    assert names(tmp_path) == {"options.json", "earlier-1", "notes.txt"}  # nothing half-written
    assert json.loads((tmp_path / "earlier-1" / "options.json").read_text()) == options
    assert json.loads((tmp_path / "options.json").read_text())["lr"] == 0.3
