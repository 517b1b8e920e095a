"""A file appears whole or not at all, whoever else writes it meanwhile."""

import os
import subprocess
import sys
import time

import pytest

from tinyddpm.files import replacing as replacing_module
from tinyddpm.files.replacing import replacing


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_of_two_writers_at_a_time_none_spoils_what_the_other_writes(tmp_path):
    path = tmp_path / "model"
    with replacing(path) as (one,):
        one.write_text("one")
        with replacing(path) as (other,):
            other.write_text("other, and longer")
        assert path.read_text() == "other, and longer" and one.read_text() == "one"
    assert path.read_text() == "one" and names(tmp_path) == {"model"}


@pytest.mark.parametrize(
    ("host", "alive", "minutes", "stays"),
    [(replacing_module._HOST, True, 0, True), (replacing_module._HOST, False, 0, os.name != "posix"),
     ("0123abcd", False, 0, True), ("0123abcd", True, 59, True), ("0123abcd", False, 61, False)],
)  # fmt: skip
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path, host, alive, minutes, stays):
    """Of another machine it is not known whether it lives, only that it has not written for an hour. What is another's,
    or the user's, is left alone."""
    pid = os.getpid() if alive else subprocess.Popen([sys.executable, "-c", ""]).pid
    if not alive:
        os.waitpid(pid, 0)
    left = f".[model].{host}-{pid}-0ab1.part"
    others = {f".model.{host}-{pid}-0ab1.part", ".[model].part", ".[model].old-1-none.part", "[model].part"}
    for name in (left, *others):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, 2 * (time.time() - 60 * minutes,))
    with replacing(tmp_path / "[model]") as (unfinished,):
        unfinished.touch()
    assert names(tmp_path) == {"[model]", *others} | ({left} if stays else set())
