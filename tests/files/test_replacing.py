"""A file appears whole or not at all, whoever else writes it meanwhile, and whatever the disk does."""

import errno
import os
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tiny_training import DIFFUSION, SMALL, files_in, files_of_at_most, names

from tinyddpm import UNet, save_model
from tinyddpm.files import replacing as replacing_module
from tinyddpm.files.checkpoint import write_checkpoint
from tinyddpm.files.pictures import save_gif, save_loss_curve, save_picture
from tinyddpm.files.replacing import replacing
from tinyddpm.files.run_folder import write_options


def test_of_two_writers_at_a_time_none_spoils_what_the_other_writes(tmp_path):
    path = tmp_path / "model"
    with replacing(path) as (one,):
        one.write_text("one")
        with replacing(path) as (other,):
            other.write_text("other, and longer")
        assert path.read_text() == "other, and longer" and one.read_text() == "one"
    assert path.read_text() == "one" and names(tmp_path) == {"model"}


HERE, THERE = replacing_module._HOST, "0123abcd"


@pytest.mark.parametrize(("host", "alive", "minutes", "stays"), [
    (HERE, True, 0, True), (HERE, False, 0, os.name != "posix"), (THERE, False, 0, True), (THERE, True, 59, True),
    (THERE, False, 61, False),
])  # fmt: skip
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path, host, alive, minutes, stays):
    """Of another machine it is not known whether it lives, only that it has not written for an hour. What is another's,
    or the user's, is left alone."""
    pid = os.getpid() if alive else 2**22 + 1  # more than a system gives
    left = f".[model].{host}-{pid}-0ab1.part"
    others = {f".model.{host}-{pid}-0ab1.part", ".[model].part", ".[model].old-1-none.part", "[model].part"}
    for name in (left, *others):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, 2 * (time.time() - 60 * minutes,))
    with replacing(tmp_path / "[model]") as (unfinished,):
        unfinished.touch()
    assert names(tmp_path) == {"[model]", *others} | ({left} if stays else set())


FRAMES = Image.new("L", (40, 40)), Image.new("L", (40, 40), 255)
UNETS = UNet(**SMALL, rng=0), UNet(**SMALL, rng=1)
VECTORS = dict.fromkeys(("theta", "m", "v"), np.zeros(3))


@pytest.mark.parametrize(("name", "write"), [
    ("m.safetensors", lambda path, i: save_model(path, UNETS[i], DIFFUSION)),
    ("16 bits.safetensors", lambda path, i: save_model(path, UNETS[i], DIFFUSION, "float16")),
    ("run.safetensors", lambda path, i: write_checkpoint(path, UNETS[i], DIFFUSION, VECTORS, {"step": i})),
    ("options.json", lambda path, i: write_options(path.parent, {"lr": i})),
    ("a.png", lambda path, i: save_picture(path, FRAMES[i])),
    ("a.gif", lambda path, i: save_gif(path, [FRAMES[i], FRAMES[0]])),
    ("loss_curve.png", lambda path, i: save_loss_curve(path, [1, 2 + i])),
])  # fmt: skip
def test_on_a_full_disk_what_is_there_stays(name, write, tmp_path, monkeypatch):
    if name == "loss_curve.png":
        pytest.importorskip("matplotlib")
    path = tmp_path / name

    def refused(reason):
        with pytest.raises(OSError, match=f"^.*path: cannot write {path}: {reason}"):
            write(path, 1)
        assert files_in(tmp_path) == before

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    write(path, 0)
    before = files_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused("No space left on device")
    if sys.platform == "linux":
        for size in (0, len(before[path]) - 1):
            with files_of_at_most(size):
                refused("File too large")
    write(path, 1)  # there is space again
    assert files_in(tmp_path)[path] != before[path]
