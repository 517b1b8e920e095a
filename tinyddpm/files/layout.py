"""How a folder of pictures is laid out: which files and which classes are in it, and what of this may not be meant.

That is said at the start, when it can be mended, and in a line each.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Iterator

_HEIF = "pip install pillow-heif, and call pillow_heif.register_heif_opener() first"
_READ_BY = {".heic": _HEIF, ".heif": _HEIF, ".hif": _HEIF, ".avif": "pip install 'pillow>=11.3'"}
# plainly no pictures, but what often lies beside some: nothing is said of these
_BESIDE = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".html", ".log", ".ini", ".db"}
_PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "eval", "dev"}  # of a data set


def find(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """All files that are not hidden, by their paths from `folder`, sorted by the parts of these.

    Raises OSError if a folder cannot be listed.
    """
    above = (*above, os.path.realpath(folder))
    for name in _visible(folder):
        path = os.path.join(folder, name)
        if not os.path.isdir(path):
            yield name
        elif os.path.realpath(path) not in above:  # else a link back up, and so on for ever
            yield from (f"{name}/{file}" for file in find(path, above))


def _visible(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def suffix(file: str) -> str:
    """The suffix of its name in small letters, such as ".jpg", or ""."""
    return os.path.splitext(file)[1].lower()


def shortly(names: Iterable[str], between: str = ", ") -> str:
    """The first three of them."""
    names = list(names)
    return between.join([*names[:3], "..."] if len(names) > 3 else names)


def not_read(others: list[str]) -> Iterator[str]:
    """Which files have a suffix that Pillow does not know, unless it is plainly not a picture's, with a remedy."""
    kinds: dict[str, list[str]] = {}
    for file in others:
        if suffix(file) not in _BESIDE:
            kinds.setdefault(suffix(file), []).append(file)
    if kinds:
        most_first = sorted(kinds.items(), key=lambda item: -len(item[1]))
        counts = shortly(f"{len(files)} {kind or 'without one'} ({files[0]})" for kind, files in most_first)
        remedies = dict.fromkeys(_READ_BY[kind] for kind in kinds if kind in _READ_BY)  # each once
        yield (
            f"{sum(map(len, kinds.values()))} files are left out for their suffix, with which Pillow reads none: "
            f"{counts}; if they are pictures, {', or '.join([*remedies, 'convert them'])}"
        )


def misleading(folder: str, files: list[str], classes: tuple[str, ...]) -> Iterator[str]:
    """Why the folders in a folder may be other classes than is meant, or none, with a remedy."""
    inside: dict[str, set[str]] = {}  # each folder: the folders in it, and "" if pictures are
    for file in files:
        above, *below = file.split("/")
        if below:
            inside.setdefault(above, set()).add(below[0] if len(below) > 1 else "")
    if not classes:
        if inside:
            loose = [file for file in files if "/" not in file]
            yield (
                f"there are no classes, since {len(loose)} of {len(files)} pictures lie beside the folders "
                f"{shortly(inside)}: {shortly(loose)}; to have classes, move them away, or into a folder"
            )
        return
    if empty := [name for name in _visible(folder) if name not in inside and os.path.isdir(f"{folder}/{name}")]:
        yield f"no classes, for want of a picture that can be read: {shortly(empty)}"
    names = set().union(*inside.values())
    alike = len(inside) == 1 or sum(map(len, inside.values())) > len(names)
    if {name.lower() for name in classes} <= _PARTS or "" not in names and len(names) > 1 and alike:
        ((largest, _),) = collections.Counter(file.split("/")[0] for file in files).most_common(1)
        yield (
            f"the classes are the folders {shortly(classes)}; if these are parts of a data set, and the classes are "
            f"the folders in them, give {folder}/{largest}"
        )
