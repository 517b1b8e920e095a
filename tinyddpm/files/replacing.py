"""A file appears whole or not at all: it is written beside its place, and moved there when it is complete."""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Iterator, Sequence

_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"


@contextlib.contextmanager
def replacing(*paths: pathlib.Path, keep: bool = False) -> Iterator[list[pathlib.Path]]:
    """Yield a path beside each of `paths`, that nobody else writes to; at the end, when all are complete and on the
    disk, they are moved to `paths`. An error before that leaves everything as it was.

    Of several writers of a file the last one wins. What one that was killed has left is removed by the next. With
    `keep`, what was at a path stays as its `previous` one. Raises OSError if a file cannot be written.
    """
    unfinished = [path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{secrets.token_hex(2)}.part") for path in paths]
    if folders := [str(path) for path in paths if path.is_dir()]:
        raise IsADirectoryError(f"path: cannot write {', '.join(folders)}, which is a folder")
    _remove_abandoned(paths)
    try:
        yield unfinished
        for part in unfinished:
            with part.open("rb+") as file:
                os.fsync(file)  # or a name could outlive a power cut that its content does not
        for part, path in zip(unfinished, paths):
            if keep and path.exists():
                _give_second_name(path, previous(path))
            os.replace(part, path)
        for folder in {path.parent for path in paths}:
            _sync_folder(folder)
    except OSError as error:
        raise OSError(error.errno, f"path: cannot write {paths[0]}: {error.strerror or error}") from error
    finally:
        for part in unfinished:
            part.unlink(missing_ok=True)


def _remove_abandoned(paths: Sequence[pathlib.Path]) -> None:
    """Remove what was written for `paths` by a process that is no more; if it was on another machine, by one that has
    not written for an hour."""
    for path in paths:
        for part in path.parent.glob(f".{glob.escape(path.name)}.{8 * '[0-9a-f]'}-*-????.part"):
            with contextlib.suppress(OSError, ValueError):
                host, pid, _ = part.name[len(path.name) + 2 :].split("-")
                if time.time() - part.stat().st_mtime > 3600 or host == _HOST and not _is_alive(int(pid)):
                    part.unlink()


def _is_alive(pid: int) -> bool:
    """Whether there is such a process, or that is not known."""
    try:
        if os.name == "posix":  # on Windows, the signal would be one
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return True


def _give_second_name(path: pathlib.Path, name: pathlib.Path) -> None:
    """And leave it its first, so that there is a file of either name at any moment."""
    with replacing(name) as (unfinished,):
        try:
            os.link(path, unfinished)
        except OSError:  # not every file system has links
            shutil.copyfile(path, unfinished)


def _sync_folder(folder: pathlib.Path) -> None:
    """Have the new names in it survive a power cut, where a folder can be opened for that."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def previous(path: pathlib.Path) -> pathlib.Path:
    """Where `replacing` keeps what was at `path`: run.safetensors becomes run.previous.safetensors."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")
