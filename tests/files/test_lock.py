"""One program at a time in a folder; of one that is killed, nothing stays locked."""

import contextlib
import errno
import multiprocessing
import os
import signal
import socket
import time

import pytest
from tiny_training import files_of_at_most, in_a_copy, on_linux

from tinyddpm.files import lock
from tinyddpm.files.lock import LOCK, alone_in


def refused(folder):
    """What a copy of this process is told that wants to be alone in the folder; "" if it may."""
    reader, writer = multiprocessing.Pipe(duplex=False)

    def tries():
        try:
            with alone_in(folder):
                writer.send("")
        except BlockingIOError as error:
            writer.send(str(error))

    in_a_copy(tries)
    return reader.recv()


@on_linux
def test_the_second_is_told_who_the_first_is(tmp_path):
    for _ in range(2):
        with alone_in(tmp_path):
            says = refused(tmp_path)
            assert [path.name for path in tmp_path.iterdir()] == ["running.lock"]
            assert says.startswith(f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()} since 20")
            assert says == refused(tmp_path)  # who is refused leaves all as it was
            assert in_a_copy(lambda: os._exit(0)) == 0 and refused(tmp_path)
        assert not list(tmp_path.iterdir()) and refused(tmp_path) == ""


@on_linux
def test_it_is_free_as_soon_as_its_process_is_killed(tmp_path):
    """Though workers, copies of it, may live for a moment. What it leaves behind does no harm."""
    reader, writer = multiprocessing.Pipe(duplex=False)

    def holds():
        with alone_in(tmp_path):
            if os.fork() == 0:
                writer.send(os.getpid())
            time.sleep(60)
            os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=holds)
    process.start()
    worker = reader.recv()
    assert refused(tmp_path)
    process.kill()
    process.join()
    assert (tmp_path / LOCK).exists() and refused(tmp_path) == "" and not (tmp_path / LOCK).exists()
    os.kill(worker, signal.SIGKILL)


def test_it_holds_within_a_process_too_and_may_be_waited_for(tmp_path, monkeypatch):
    assert str(lock._in_use(tmp_path / LOCK)).startswith(f"{tmp_path} is in use by another process; wait for its end")
    (tmp_path / "other").mkdir()
    with contextlib.ExitStack() as first, alone_in(tmp_path / "other"):
        first.enter_context(alone_in(tmp_path))
        with pytest.raises(BlockingIOError, match=f"is in use by process {os.getpid()}"), alone_in(tmp_path):
            pass
        monkeypatch.setattr(lock.time, "sleep", lambda seconds: first.close())
        with alone_in(tmp_path, wait=60):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_a_file_system_has_no_locks_all_goes_on(tmp_path, monkeypatch, number):
    def none(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock, "_lock", none)
    with alone_in(tmp_path), alone_in(tmp_path), alone_in(tmp_path / "nowhere"):
        pass


@on_linux
def test_a_file_that_its_owner_has_just_removed_is_not_the_lock(tmp_path, monkeypatch):
    taken, real = [], lock._lock

    def just_removed(file):
        real(file)
        taken.append(file)
        if len(taken) == 1:
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr(lock, "_lock", just_removed)
    with alone_in(tmp_path):
        monkeypatch.undo()
        assert len(taken) == 2 and refused(tmp_path)


def test_an_error_within_goes_on_to_the_caller(tmp_path):
    with pytest.raises(ZeroDivisionError), alone_in(tmp_path):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@on_linux
def test_on_a_full_disk_it_is_held_though_it_cannot_say_by_whom(tmp_path):
    with files_of_at_most(0), alone_in(tmp_path):
        assert "is in use by another process" in refused(tmp_path)
    assert not list(tmp_path.iterdir())
