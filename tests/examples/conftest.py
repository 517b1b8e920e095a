"""The tests of the examples run them in this process, since a new one takes a second. They read the digits that come
along once, not at each of eighty calls, and do not wait for the disk at each of a thousand files."""

import collections
import functools
import os
import pathlib
import runpy
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_training import DIFFUSION as TRAINED
from tiny_training import assert_same_weights, training

import tinyddpm
from tinyddpm import Diffusion, UNet, make_schedule, program, save_diffusers, save_model
from tinyddpm.exchange.names import laid_out, original_layout
from tinyddpm.files import data

Ended = collections.namedtuple("Ended", "code out err")


@functools.cache
def load_digits(train=True, load=tinyddpm.load_digits):
    images, labels = load(train)
    images.flags.writeable = labels.flags.writeable = False  # they are the same for all
    return images, labels


@pytest.fixture(scope="session")
def digits():
    """digits() are the bundled digits for training, digits(train=False) those held out."""
    return load_digits


@pytest.fixture(scope="module", autouse=True)
def sooner():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        for module in (tinyddpm, program, data):
            patch.setattr(module, "load_digits", load_digits)
        yield


@pytest.fixture(scope="session")
def script():
    """script(name) is the path of an example; script.loaded(name) is a module that has what the example defines."""

    def path(name):
        return next((pathlib.Path(__file__).parents[2] / "examples").rglob(f"{name}.py"))

    def loaded(name):
        module = types.ModuleType(name)
        vars(module).update(runpy.run_path(str(path(name))))
        return module

    path.loaded = loaded
    return path


@pytest.fixture
def example(ended, script, monkeypatch):
    """example(name, *arguments, code=0) runs an example, or the script at a path, as a user does. It has to end with
    this code, unless that is None; returned are its code and what it says on stdout and on stderr. An error that nobody
    catches leaves it as such, not as an exit."""

    def run(name, *arguments, code=0):
        path = str(name if isinstance(name, pathlib.Path) else script(name))
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        result = Ended(*ended(runpy.run_path, path, None, "__main__"))
        assert code in (None, result.code), result
        return result

    return run


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures of two classes, larger than they are asked for."""
    rng = np.random.default_rng(0)
    for i in range(6):
        (folder := tmp_path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 18 + i, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def assert_same():
    """assert_same(one, other, *more) compares what two trainings left in their folders: model, checkpoints, samples,
    options, log but for the times in it, and whatever else is named."""

    def compare(one, other, *more):
        for name in ("model.safetensors", "samples.png", "options.json", *more):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
        for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
            assert (one / name).exists() == (other / name).exists()
            assert_same_weights(*(load_file(f / name) if (f / name).exists() else {} for f in (one, other)))
        logs = (np.loadtxt(f / "metrics.csv", delimiter=",", skiprows=1, usecols=(0, 1, 2, 3)) for f in (one, other))
        np.testing.assert_array_equal(*logs)

    return compare


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with a model of each kind, and what is to be found there. Of a checkpoint it is the averaged one."""

    def network(**settings):
        """None of its weights is zero, so that the images depend on all of them."""
        unet = UNet(**dict(channels=(8, 8), blocks=1, attention=(False, True), image_size=8) | settings)
        for p in unet.parameters():
            p.data = p.data + np.float32(0.05) * np.cos(np.arange(p.data.size, dtype=np.float32)).reshape(p.shape)
        return unet

    folder = tmp_path_factory.mktemp("models")
    diffusion = Diffusion(make_schedule("linear", 60, beta_end=0.3), clip=0.9, spacing="leading")
    plain, told, rgb = network(), network(classes=3), network(in_channels=3, out_channels=3, image_size=(8, 12))
    save_model(folder / "plain.safetensors", plain, diffusion)
    save_model(folder / "classes.safetensors", told, diffusion)
    save_diffusers(folder / "diffusers", told, diffusion)
    save_diffusers(folder / "rgb", rgb, diffusion)
    original = network(channels=(32, 32), groups=32, image_size=None)
    tensors = laid_out(original.state_dict(), lambda name, ndim: original_layout(name, ndim, 2))
    save_file({name: np.ascontiguousarray(w) for name, w in tensors.items()}, folder / "original.safetensors")
    for name in ("run", "plain"):  # folders of trainings
        (folder / name).mkdir()
        save_model(folder / name / "model.safetensors", plain, diffusion)
    for state in training(None, 5)[1]:
        state.save(folder / "checkpoint.safetensors")
    shutil.copy(folder / "checkpoint.safetensors", folder / "run")  # it has gone on since: this is to be taken
    (folder / "damaged.safetensors").write_bytes(b"nothing of the kind")
    process = Diffusion(make_schedule("linear", 1000), variance="large")
    found = {
        "plain.safetensors": (plain, diffusion), "plain": (plain, diffusion), "classes.safetensors": (told, diffusion),
        "diffusers": (told, diffusion), "rgb": (rgb, diffusion), "original.safetensors": (original, process),
        "checkpoint.safetensors": (state.ema.model, TRAINED), "run": (state.ema.model, TRAINED),
    }  # fmt: skip
    return folder, found
