"""examples/measure/pytorch_digits.py: what README's comparison of digits was drawn with."""

import pathlib
import runpy
import sys

import numpy as np
import pytest

import tinyddpm.files.data
from tinyddpm import load_digits

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
EXAMPLES = pathlib.Path(__file__).parents[2] / "examples" / "measure"


def test_it_draws_what_evaluate_digits_reads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tinyddpm.files.data, "load_mnist", lambda full: load_digits())  # not from the network
    settings = ["--minutes=0.0001", "--samples=103", "--threads=1", f"--out={tmp_path / 'digits.npz'}"]
    monkeypatch.setattr(sys, "argv", ["pytorch_digits.py", *settings])
    whole = diffusers.DDIMScheduler.set_timesteps  # two steps on the way back, not 50
    monkeypatch.setattr(diffusers.DDIMScheduler, "set_timesteps", lambda self, count: whole(self, count // 25))
    runpy.run_path(str(EXAMPLES / "pytorch_digits.py"), run_name="__main__")
    assert "trained  1 steps in 0.0001 minutes on 1 threads" in capsys.readouterr().out
    images = runpy.run_path(str(EXAMPLES / "evaluate_digits.py"))["read_images"](tmp_path / "digits.npz", 103, 0)
    assert images.shape == (103, 28, 28, 1) and len(np.unique(images.reshape(103, -1), axis=0)) == 103
    assert [path.name for path in tmp_path.iterdir()] == ["digits.npz"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--samples=0", "--samples must be 1 or greater, got 0"),
        ("--threads=0", "--threads must be 1 or greater, got 0"),
        ("--seed=-1", "--seed must be 0 or greater, got -1"),
        ("--minutes=0", "--minutes must be a number greater than 0, got 0.0"),
        ("--lr=nan", "--lr must be a number greater than 0, got nan"),
    ],
)
def test_bad_input_is_refused_in_a_line(refusal, option, message):
    assert message in refusal(EXAMPLES / "pytorch_digits.py", option)
