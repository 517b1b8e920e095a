"""How a folder of pictures is laid out: which files and which classes are in it, and what of this may not be meant.

That is said at the start, when it can be mended, and in a line each.
"""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Collection, Iterable, Iterator

_HEIF = "pip install pillow-heif, and call pillow_heif.register_heif_opener() first"
READ_BY = {".heic": _HEIF, ".heif": _HEIF, ".hif": _HEIF, ".avif": "pip install 'pillow>=11.3'"}
# plainly no pictures, but what often lies beside some: nothing is said of these
_BESIDE = set(
    ".txt .json .jsonl .csv .tsv .xml .yaml .yml .toml .cfg .ini .md .rst .html .log .db .py .ipynb .sh .pdf .zip .tar "
    ".gz .npy .npz .h5 .pt .pth .safetensors .parquet .mp4 .mov .avi license licence readme copying makefile".split()
)
# what systems put beside pictures, some of it copies of these
_OF_SYSTEMS = {"__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}
# names of the parts of a data set: "train", "val2017", "validation_set", "seg_test"
_PART = re.compile(r"(?i)(?:.*[_ -])?(train|test|e?val|dev)(?:ing|id|idation)?(?:[_ -]?(?:set|data|images?))?[_ -]?\d*")


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
    return sorted(name for name in os.listdir(folder) if not name.startswith(".") and name not in _OF_SYSTEMS)


def folders(folder: str, files: list[str]) -> dict[str, bool]:
    """The folders in it, and whether they may be meant as classes: not if all `files` in one are plainly none."""
    names = [name for name in _visible(folder) if os.path.isdir(os.path.join(folder, name))]
    filled, meant = ({file.split("/")[0] for file in files if _kind(file) not in but} for but in ((), _BESIDE))
    return {name: name not in filled or name in meant for name in names}


def suffix(file: str) -> str:
    """The suffix of its name in small letters, such as ".jpg", or ""."""
    return os.path.splitext(file)[1].lower()


def how_many(count: int) -> str:
    """Such as "2 files"."""
    return f"{count} file{'s' * (count != 1)}"


def shortly(names: Iterable[str], between: str = ", ", most: int = 3) -> str:
    """The first of them."""
    names = list(names)
    return between.join([*names[:most], "..."] if len(names) > most else names)


def _kind(file: str) -> str:
    """Its suffix, or its whole name if it has none."""
    return suffix(file) or file.split("/")[-1].lower()


def not_read(others: list[str], beside: Collection[str] = _BESIDE) -> Iterator[str]:
    """Which files have a suffix that Pillow does not know, unless it is plainly not a picture's, with a remedy."""
    kinds: dict[str, list[str]] = {}
    for file in others:
        if _kind(file) not in beside:
            kinds.setdefault(suffix(file), []).append(file)
    if kinds:
        # those that are pictures for certain first, then the most
        in_order = sorted(kinds.items(), key=lambda item: (item[0] not in READ_BY, -len(item[1])))
        counts = shortly((f"{len(files)} {kind or 'without one'} ({files[0]})" for kind, files in in_order), most=8)
        remedies = dict.fromkeys(READ_BY[kind] for kind in kinds if kind in READ_BY)  # each once
        yield (
            f"{how_many(sum(map(len, kinds.values())))} left out for the suffix, with which Pillow reads none: "
            f"{counts}; if they are pictures, {', or '.join([*remedies, 'convert them'])}"
        )


def misleading(folder: str, files: list[str], classes: tuple[str, ...], below: dict[str, bool]) -> Iterator[str]:
    """Why the folders in a folder, `below`, may be other classes than is meant, or none, with a remedy."""
    inside = _inside(files)
    if not classes:
        if inside:
            loose = [file for file in files if "/" not in file]
            yield (
                f"there are no classes, since {len(loose)} of {len(files)} pictures lie beside the folders "
                f"{shortly(inside)}: {shortly(loose)}; to have classes, move them away, or into a folder"
            )
        return
    if empty := [name for name, is_wanted in below.items() if is_wanted and name not in inside]:
        yield f"no classes, for want of a picture that can be read: {shortly(empty)}"
    if meant := _meant(files):
        yield (
            f"the classes are the folders {shortly(classes)}; if these are parts of a data set, and the classes are "
            f"the folders in them, give {folder}/{meant}"
        )


def _inside(files: Iterable[str]) -> dict[str, collections.Counter]:
    """Each folder, and of how many files are in each folder in it, and in "" those that lie in none."""
    inside: dict[str, collections.Counter] = {}
    for file in files:
        above, *below = file.split("/")
        if below:
            inside.setdefault(above, collections.Counter())[below[0] if len(below) > 1 else ""] += 1
    return inside


def _meant(files: list[str], alike: bool = True) -> str:
    """The path of the folder whose folders are rather the classes, or "" if those are that the files lie in: below a
    folder that is alone, in a part of a data set, or (`alike`) in one of several folders in which are the same ones."""
    inside = _inside(files)
    names = set().union(*inside.values())
    parts = {name: match[1].lower() for name in inside if (match := _PART.fullmatch(name))}
    are_parts = len(set(parts.values())) > 1 or any(set(inside[name]) - {""} for name in parts)
    alike = alike and len(names) > 1 and sum(map(len, inside.values())) > len(names)
    is_alone = len(inside) == 1
    if not are_parts and ("" in names or not (is_alone or alike)):
        return ""
    best = max(inside, key=lambda name: (are_parts and parts.get(name) == "train", inside[name].total()))
    below = _meant([file.removeprefix(f"{best}/") for file in files if file.startswith(f"{best}/")], alike=False)
    if is_alone and not are_parts and not below and len(names) == 1:
        return ""  # of a single class
    return f"{best}/{below}" if below else best
