"""One program at a time in a folder, by a lock of the operating system: it is gone with its process, however that ends.

A file that only says who is at work would outlive a process that is killed. Here it is the lock on it that counts; what
stands in it is for those who are refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import BinaryIO

from .tensors import Path

LOCK = "running.lock"
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # as systems call it


@contextlib.contextmanager
def alone_in(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Within this block, no other process is in such a block for the same folder; the file `LOCK` is there meanwhile.

    Copies that this process makes of itself do not hold the lock. Where a file system has none, there is nothing to
    stop the others. Raises BlockingIOError, which says who is there, if somebody is, and still is after `wait` seconds.
    """
    path, deadline = pathlib.Path(folder, LOCK), time.monotonic() + wait
    here = os.getpid(), os.path.realpath(path)
    while True:
        try:
            if here in _held:  # the system lets a process lock a file twice, and then unlocks it at the first end
                raise _in_use(path)
            file = _locked(path)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)
    if file:
        _held.add(here)
    try:
        yield
    finally:
        _held.discard(here)
        if file:
            with contextlib.suppress(OSError):  # Windows keeps what is open
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # and not another's, after it was removed
                    path.unlink()
            file.close()


_held: set[tuple[int, str]] = set()  # by processes, of which some may be copies that inherited it


def _locked(path: pathlib.Path) -> BinaryIO | None:
    """The file, which holds the lock as long as it is open, and says whose it is; None if that cannot be had."""
    for _ in range(9):
        try:
            file = path.open("ab+", buffering=0)  # or what a full disk does not take would be tried again at its end
        except OSError:
            return None
        try:
            _lock(file)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except FileNotFoundError:  # whose it was has just removed it
            pass
        except OSError as error:
            file.close()
            if error.errno not in _TAKEN:
                return None
            raise _in_use(path) from None
        file.close()
    else:  # such files are never the same, on this file system
        return None
    with contextlib.suppress(OSError):  # of a full disk
        path.chmod(0o666)  # so that other users, too, can ask for it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %X')}\n".encode())
    return file


def _in_use(path: pathlib.Path) -> BlockingIOError:
    try:
        who = path.read_text("utf-8", "replace").strip()
    except OSError:  # it has ended since
        who = ""
    return BlockingIOError(
        f"{path.parent} is in use by {who or 'another process'}; wait for its end or take another folder"
    )


def _lock(file: BinaryIO) -> None:
    """Raises OSError, with one of `_TAKEN` if another process has it."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        file.seek(1 << 30)  # what is locked cannot be read there, so it is a byte behind all that stands in it
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which copies of the process would hold too
