"""A file appears whole or not at all: it is written beside its place, and moved there when it is complete."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(*paths: pathlib.Path, keep: bool = False) -> Iterator[list[pathlib.Path]]:
    """Yield a path beside each of `paths`, with ".part" appended, to write to; at the end, when all are complete and on
    the disk, they are moved to `paths`. An error before that leaves everything as it was. One writer at a time.

    With `keep`, what was at a path stays as its `previous` one. Raises OSError if a file cannot be written.
    """
    unfinished = [path.with_name(path.name + ".part") for path in paths]
    if folders := [str(path) for path in paths if path.is_dir()]:
        raise IsADirectoryError(f"path: cannot write {', '.join(folders)}, which is a folder")
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


def _give_second_name(path: pathlib.Path, name: pathlib.Path) -> None:
    """And leave it its first, so that there is a file of that name at any moment."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:  # not every file system has links
        shutil.copyfile(path, name)


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
