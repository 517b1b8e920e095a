"""examples/measure/pytorch_digits.py: what README's comparison of digits was drawn with."""

import numpy as np
import pytest

import tinyddpm.files.data

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def test_it_draws_what_evaluate_digits_reads(monkeypatch, tmp_path, example, script, digits):
    load = lambda full: [part.copy() for part in digits()]  # not from the network
    monkeypatch.setattr(tinyddpm.files.data, "load_mnist", load)
    settings = ["--minutes=0.0001", "--samples=103", "--threads=1", f"--out={tmp_path / 'digits.npz'}"]
    whole = diffusers.DDIMScheduler.set_timesteps  # two steps on the way back, not 50
    monkeypatch.setattr(diffusers.DDIMScheduler, "set_timesteps", lambda self, count: whole(self, count // 25))
    assert "trained  1 steps in 0.0001 minutes on 1 threads" in example("pytorch_digits", *settings).out
    images = script.loaded("evaluate_digits").read_images(tmp_path / "digits.npz", 103, 0)
    assert images.shape == (103, 28, 28, 1) and len(np.unique(images.reshape(103, -1), axis=0)) == 103
    assert [path.name for path in tmp_path.iterdir()] == ["digits.npz"]
