"""A folder of pictures as if it were an array of images: a picture is read when it is indexed, and not kept.

So a folder may be larger than memory. What cannot be read is left out or replaced, and reported, never silently: of a
million pictures some are always damaged, and they should cost a warning, not a night of training.
"""

from __future__ import annotations

import collections
import errno
import hashlib
import itertools
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from ..arguments import warn
from ..bar import progress_bar
from .decoding import has_more, opened, pixels, readable_suffixes, reason
from .layout import find, folders, how_many, misleading, not_read, shortly, suffix
from .quiet import without_warnings

# what a file system says for certain; its other faults, such as those of a network drive, may pass
_LASTING = {errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG}
_MOST_FAULTS = 10  # in a row: beyond them it is the folder that cannot be read
_WAITS = (1, 4, 15)  # seconds until it is tried again
_MOST_WARNINGS = 20  # of single pictures: beyond them nobody reads on


class _Away(OSError):
    """The folder, or all of a class, cannot be read now; that may pass."""


class ImageFolder:
    """The pictures below a folder as images (M, H, W, C), float32 in [-1, 1]; `images[indices]` reads those asked for.

    A picture is turned as its EXIF orientation says and shrunk or enlarged until it just fills H x W; what juts out on
    two sides is cut off. Of several frames the first is taken, and white is put behind what is transparent. Any number
    of threads may read at a time.

    If each picture lies in some folder of its own kind (`cats/1.jpg`, `dogs/a/2.jpg`), these folders, in sorted order,
    are classes 0, 1, ...; if any lies directly in `folder`, there are no classes.

    A picture that cannot be read when its turn comes is warned of, and another one of its class, drawn by lot, stands
    in for it, so that labels stay right: from then on if it is damaged, or this once if it cannot be had, for the fault
    of a drive or a network may pass. If ten in a row cannot be had, or none of a class, they are tried again after 1, 4
    and 15 seconds; then it is an error.

    Args:
        folder: it and the folders in it, linked ones too, are searched for files with the suffix of a format that
            Pillow reads; but not what is hidden, whose name begins with a dot, nor what systems put there (`__MACOSX`).
        size: (H, W), or one integer for both.
        channels: C: 1 for grey, 3 for RGB.
        progress: whether to show a bar while the files are looked at, if they are many.

    Attributes:
        files: each picture's path from `folder`, with "/" on all systems, in an order that is the same on all.
        classes: their names, or () if there are none.
        labels: which class each picture is of (M,), or None.
        skipped: {file: why it could not be read when last tried}; what is damaged from the start is not among `files`.
        fingerprint: the same for the same `files`, size and channels, wherever the folder is and whatever they show.

    Raises ValueError for bad arguments or if there is no picture, FileNotFoundError if there is no such folder,
    NotADirectoryError if it is a file, OSError if it or a folder in it cannot be listed or nothing in it be read. Warns
    of files that are left out: they are damaged, too large (`PIL.Image.MAX_IMAGE_PIXELS`), of a kind that would come
    out wrong, or with a suffix that may be a picture's but that Pillow does not read; of folders that may not be the
    classes that are meant; and when it waits for the folder.
    """

    ndim = 4
    dtype = np.dtype(np.float32)

    def __init__(
        self, folder: str | pathlib.Path, size: int | tuple[int, int], channels: int = 3, progress: bool = True
    ):
        height_width = size if isinstance(size, (tuple, list)) else (size, size)
        if len(height_width) != 2 or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in height_width):
            raise ValueError(f"size: expected a positive integer, or two: (height, width), got {size!r}")
        if channels not in (1, 3):
            raise ValueError(f"channels: expected 1 (grey) or 3 (RGB), got {channels!r}")
        if not os.path.exists(folder):
            raise FileNotFoundError(f"folder: there is no {folder}")
        if not os.path.isdir(folder):
            raise NotADirectoryError(f"folder: expected a folder of pictures, got the file {folder}")
        self._folder = os.path.abspath(folder)
        self._lock = threading.Lock()
        self._damaged: set[str] = set()  # of `skipped`, those that are not tried again
        self._warnings = 0
        self._is_away = False
        self.skipped: dict[str, str] = {}
        # strings, of 80 bytes or so: a million paths of pathlib would take half a gigabyte
        self.files: list[str] = []

        suffixes, found, others = readable_suffixes(), [], []
        for file in find(self._folder):
            (found if suffix(file) in suffixes else others).append(file)
        below = folders(self._folder, [*found, *others])
        remarks = [*self._patiently(self._look_at, found, progress), *not_read(others)]
        if not self.files:
            wrong = [f"none of {how_many(len(found))} can be read: {_whys(self.skipped)}" if found else "there is none"]
            raise ValueError(
                f"folder: expected pictures (.jpg, .png, ...) in {folder} or in folders in it, but "
                f"{'; '.join([*wrong, *not_read(others, beside=())])}"
            )

        self.shape = (len(self.files), *map(int, height_width), int(channels))
        self.fingerprint = _fingerprint(self.files, self.shape[1:])
        self.classes: tuple[str, ...] = ()
        self.labels: np.ndarray | None = None
        sizes = (len(self),)
        if all("/" in file for file in self.files):
            groups = itertools.groupby(self.files, lambda file: file.split("/")[0])
            self.classes, sizes = zip(*[(name, len(list(group))) for name, group in groups])
            self.labels = np.repeat(np.arange(len(sizes)), sizes)
        self._starts = np.cumsum([0, *sizes])  # of each class among the files, which are sorted by it
        self._numbers = np.arange(len(self))
        for remark in [*remarks, *misleading(str(folder), self.files, self.classes, below)]:
            warn(f"{folder}: {remark}")

    def _look_at(self, found: list[str], progress: bool) -> list[str]:
        """See by their headers which files are pictures, and return what is to be said about them."""
        left_out, later, more, in_a_row = {}, {}, [], 0
        self.files = []
        is_quick = len(found) < 1000
        with without_warnings():  # Pillow's own: what is the matter is said by us
            for file in progress_bar(found, "looking at files", unit="file", disable=is_quick or not progress):
                path = os.path.join(self._folder, file)
                try:
                    with opened(path) as picture:
                        more += [file] * has_more(picture)
                    in_a_row = 0
                except Exception as error:  # of a damaged file, Pillow raises nearly anything
                    why = reason(error)
                    if not _may_pass_at_first(error, path):
                        left_out[file], in_a_row = why, 0
                        continue
                    later[file] = why
                    in_a_row += 1
                    if in_a_row == _MOST_FAULTS:
                        raise self._gone(file, why) from error
                self.files.append(file)
        self.skipped = left_out | later
        remarks, of_all = [], f"of {how_many(len(found))}"
        if left_out:
            remarks += [f"{len(left_out)} {of_all} are left out: {_whys(left_out)}"]
        if later:
            remarks += [f"{len(later)} {of_all} cannot be read now, and are tried again later: {_whys(later)}"]
        if more:
            remarks += [f"of {how_many(len(more))} with several frames or pages, the first is taken: {shortly(more)}"]
        return remarks

    def __len__(self) -> int:
        return len(self.files)

    def __getstate__(self) -> dict:
        """All but the lock, so that it can be copied and pickled: each copy has its own."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def __getitem__(self, indices: int | slice | list[int] | np.ndarray) -> np.ndarray:
        """The images that NumPy would take: (n, H, W, C) for n indices or a slice, (H, W, C) for an integer.

        Raises IndexError for an index out of range, OSError if no picture of a class can be read.
        """
        numbers = self._numbers[indices]
        read = np.empty((*numbers.shape, *self.shape[1:]), np.uint8)
        for place in np.ndindex(numbers.shape):
            read[place] = self._patiently(self._read, numbers[place])
        return read.astype(np.float32) / np.float32(127.5) - 1

    def _read(self, number: int) -> np.ndarray:
        """The pixels of a picture, or of another one of its class that can be read. Raises _Away if that may pass."""
        k, failed, in_a_row = np.searchsorted(self._starts, number, side="right") - 1, {}, 0
        for other in _in_turn(number, *self._starts[k : k + 2]):
            file = self.files[other]
            if file in self._damaged:
                continue
            try:
                with opened(os.path.join(self._folder, file)) as picture:
                    read = pixels(picture, *self.shape[1:])
                break
            except Exception as error:
                failed[file] = why, may_pass = reason(error), _is_of_the_medium(error)
                in_a_row = in_a_row + 1 if may_pass else 0
                if in_a_row == _MOST_FAULTS:
                    raise self._gone(file, why) from error
        else:
            whose, file = f"class {self.classes[k]!r} of " if self.classes else "", self.files[number]
            why = failed[file][0] if file in failed else self.skipped[file]
            kind, when = (_Away, "now") if any(may for _, may in failed.values()) else (OSError, "any more")
            raise kind(f"no picture of {whose}{self._folder} can be read {when}; {file}: {why}")
        for file, (why, may_pass) in failed.items():
            self._replace(file, why, may_pass)
        return read

    def _replace(self, file: str, why: str, may_pass: bool) -> None:
        with self._lock:  # of all threads that stumble over a file, one warns
            is_known = file in (self.skipped if may_pass else self._damaged)
            self.skipped[file] = why
            if not may_pass:
                self._damaged.add(file)
            self._warnings += not is_known
            count = self._warnings
        if not is_known and count <= _MOST_WARNINGS:
            when = "this time" if may_pass else "from now on"
            last = "; further ones are in `skipped`, and not shown" if count == _MOST_WARNINGS else ""
            warn(f"{self._folder}: {file} is replaced by another picture {when}: {why}{last}")

    def _patiently(self, attempt: Callable, *args):
        """What attempt(*args) returns; it is called again after a wait, and another, if the folder is away."""
        for seconds in _WAITS:
            try:
                result = attempt(*args)
                self._is_away = False
                return result
            except _Away as away:
                with self._lock:  # of all threads that wait, one warns
                    is_known, self._is_away = self._is_away, True
                if not is_known:
                    warn(f"{away}; it is tried again for {sum(_WAITS)} seconds")
            time.sleep(seconds)
        return attempt(*args)

    def _gone(self, file: str, why: str) -> _Away:
        return _Away(f"{self._folder}: {_MOST_FAULTS} pictures in a row cannot be read, the last one {file}: {why}")


def _is_of_the_medium(error: Exception) -> bool:
    """Whether the system says that a file cannot be read, and not Pillow, of what is in it, that it makes no sense."""
    return getattr(error, "errno", None) not in (None, errno.EINVAL)  # to go to a place before the start of the file


def _may_pass_at_first(error: Exception, path: str) -> bool:
    """Whether a file that has just been listed may be read later. If it is not there, the folder is away."""
    is_gone = getattr(error, "errno", None) == errno.ENOENT and not os.path.islink(path)
    return is_gone or _is_of_the_medium(error) and error.errno not in _LASTING


def _in_turn(number: int, first: int, last: int) -> Iterator[int]:
    """A number, and then all of first ... last - 1 in an order that differs for each, so that no one of them stands in
    for many, but is the same each time."""
    yield number
    yield from first + np.random.default_rng(number).permutation(last - first)


def _whys(skipped: dict[str, str]) -> str:
    """Each reason once, the commonest first, with the first of its files."""
    first = {why: file for file, why in reversed(skipped.items())}
    counts = collections.Counter(skipped.values()).most_common()
    return shortly((f"{first[why]}{f' and {n - 1} more' * (n > 1)}: {why}" for why, n in counts), "; ", 8)


def _fingerprint(files: list[str], shape: tuple[int, ...]) -> str:
    """16 hexadecimal digits that differ for other files, in another order, or another shape of image."""
    digest = hashlib.sha256(repr(shape).encode())
    for file in files:
        digest.update(b"\0" + os.fsencode(file))  # no name contains a zero
    return digest.hexdigest()[:16]
