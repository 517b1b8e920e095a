"""A folder of pictures as if it were an array of images: a picture is read when it is indexed, and not kept.

So a folder may be larger than memory. What cannot be read is left out or replaced, and reported, never silently: of a
million pictures some are always damaged, and they should cost a warning, not a night of training.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import pathlib
import stat
import threading
import warnings
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

# what Pillow recognises, but cannot show without help: Ghostscript, Windows, or a handler that somebody has to write
_NEED_HELP = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}


class ImageFolder:
    """The pictures below a folder as images (M, H, W, C), float32 in [-1, 1]; `images[indices]` reads those asked for.

    A picture is turned as its EXIF orientation says and shrunk or enlarged until it just fills H x W; what juts out on
    two sides is cut off. Of several frames the first is taken, and white is put behind what is transparent. Any number
    of threads may read at a time.

    If each picture lies in some folder of its own kind (`cats/1.jpg`, `dogs/a/2.jpg`), these folders, in sorted order,
    are classes 0, 1, ...; if any lies directly in `folder`, there are no classes.

    A picture that turns out to be damaged or gone when it is read is warned of once, and the next one of its class that
    can be read stands in for it from then on, so that labels stay right.

    Args:
        folder: it and the folders in it, linked ones too, are searched for files with the suffix of a format that
            Pillow reads; but not what is hidden, whose name begins with a dot.
        size: (H, W), or one integer for both.
        channels: C: 1 for grey, 3 for RGB.
        progress: whether to show a bar while the files are looked at, if they are many.

    Attributes:
        files: each picture's path from `folder`, with "/" on all systems, in an order that is the same on all.
        classes: their names, or () if there are none.
        labels: which class each picture is of (M,), or None.
        skipped: {file: why it cannot be read}; those found at first are not among `files`, those found later are.
        fingerprint: the same for the same `files`, size and channels, wherever the folder is and whatever they show.

    Raises ValueError for bad arguments or if there is no picture, FileNotFoundError if there is no such folder,
    NotADirectoryError if it is a file, PermissionError if it or a folder in it must not be listed. Warns of files that
    are no picture or too large (`PIL.Image.MAX_IMAGE_PIXELS`).
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
        self._formats, suffixes = _readable_formats()
        self._lock = threading.Lock()
        self.skipped: dict[str, str] = {}
        # strings, of 80 bytes or so: a million paths of pathlib would take half a gigabyte
        self.files: list[str] = []

        found = list(_find(self._folder, suffixes))
        bar = tqdm(
            found, "looking at files", unit="file", dynamic_ncols=True, disable=not progress or len(found) < 1000
        )
        with warnings.catch_warnings():  # Pillow's own, in all threads: what is the matter is said below
            warnings.simplefilter("ignore")
            for file in bar:
                try:
                    with self._opened(file):
                        self.files.append(file)
                except Exception as error:  # of a damaged file, Pillow raises nearly anything
                    self.skipped[file] = _reason(error)
        some = "; ".join(f"{file}: {why}" for file, why in itertools.islice(self.skipped.items(), 3))
        if not self.files:
            wrong = f"none of {len(found)} files can be read: {some}" if found else "there is none"
            raise ValueError(
                f"folder: expected pictures (.jpg, .png, ...) in {folder} or in folders in it, but {wrong}"
            )
        if self.skipped:
            more = "; ..." if len(self.skipped) > 3 else ""
            warnings.warn(
                f"{folder}: {len(self.skipped)} of {len(found)} files are left out: {some}{more}", stacklevel=2
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

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: int | slice | list[int] | np.ndarray) -> np.ndarray:
        """The images that NumPy would take: (n, H, W, C) for n indices or a slice, (H, W, C) for an integer.

        Raises IndexError for an index out of range, OSError if no picture of a class can be read any more.
        """
        numbers = self._numbers[indices]
        pixels = np.empty((*numbers.shape, *self.shape[1:]), np.uint8)
        for place in np.ndindex(numbers.shape):
            pixels[place] = self._read(numbers[place])
        return pixels.astype(np.float32) / np.float32(127.5) - 1

    def _read(self, number: int) -> np.ndarray:
        """The pixels of a picture, or of the next in its class that can be read, the first one following the last."""
        k = np.searchsorted(self._starts, number, side="right") - 1
        first, last = self._starts[k : k + 2]
        for other in itertools.chain(range(number, last), range(first, number)):
            file = self.files[other]
            if file in self.skipped:
                continue
            try:
                with self._opened(file) as picture:
                    return _pixels(picture, *self.shape[1:])
            except Exception as error:
                self._skip(file, _reason(error))
        whose = f"class {self.classes[k]!r} of {self._folder}" if self.classes else self._folder
        raise OSError(
            f"no picture of {whose} can be read any more; {self.files[number]}: {self.skipped[self.files[number]]}"
        )

    def _skip(self, file: str, why: str) -> None:
        with self._lock:  # of all threads that stumble over a file, one warns
            if file in self.skipped:
                return
            self.skipped[file] = why
        warnings.warn(f"{self._folder}: {file} is replaced by the next picture: {why}", stacklevel=4)

    @contextlib.contextmanager
    def _opened(self, file: str) -> Iterator:
        """A picture whose header alone is read as yet. Raises whatever Pillow does, ValueError if it is refused."""
        from PIL import Image

        path = os.path.join(self._folder, file)
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")  # opening a pipe would wait for ever
        if status.st_size == 0:
            raise ValueError("empty")
        # given the file, and not its path, Pillow leaves it to us to close it, and maps none into memory, which would
        # end the process if the file were cut short meanwhile
        with open(path, "rb") as stream, Image.open(stream, formats=self._formats) as picture:
            count, limit = picture.width * picture.height, Image.MAX_IMAGE_PIXELS
            if limit is not None and count > limit:  # up to twice as many, Pillow itself merely warns
                raise ValueError(f"{count} pixels, more than the {limit} of PIL.Image.MAX_IMAGE_PIXELS")
            if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):
                raise ValueError("32 bits a pixel, and it is not known which of them are white")
            yield picture


def _readable_formats() -> tuple[list[str], set[str]]:
    """The formats that Pillow reads by itself, and their suffixes."""
    from PIL import Image

    Image.init()
    formats = [name for name in Image.ID if name not in _NEED_HELP]
    return formats, {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


def _find(folder: str, suffixes: set[str], above: tuple[str, ...] = ()) -> Iterator[str]:
    """Files with one of the suffixes, by their paths from `folder`, sorted by the parts of these."""
    above = (*above, os.path.realpath(folder))
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name.startswith("."):
            continue
        if os.path.isdir(path):
            if os.path.realpath(path) not in above:  # else a link back up, and so on for ever
                yield from (f"{name}/{file}" for file in _find(path, suffixes, above))
        elif os.path.splitext(name)[1].lower() in suffixes:
            yield name


def _fingerprint(files: list[str], shape: tuple[int, ...]) -> str:
    """16 hexadecimal digits that differ for other files, in another order, or another shape of image."""
    digest = hashlib.sha256(repr(shape).encode())
    for file in files:
        digest.update(b"\0" + os.fsencode(file))  # no name contains a zero
    return digest.hexdigest()[:16]


def _reason(error: Exception) -> str:
    """What is wrong with a file. Raises the error again if it is no fault of the file's: too many are open, or there is
    no memory left."""
    from PIL import UnidentifiedImageError

    if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error
    if isinstance(error, UnidentifiedImageError):
        return "in no format that Pillow reads"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _pixels(picture, height: int, width: int, channels: int) -> np.ndarray:
    """The centre of an open picture, bytes (height, width, channels), as large as fits: that of PIL.ImageOps.fit.

    Bicubic, over all the pixels that fall on one: sharper than their mean, and with less of a halo along edges than
    Lanczos, for a model would learn to draw halos; see Parmar, Zhang & Zhu 2022, "On aliased resizing".
    """
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    # a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size in a fraction of the time; twice what is needed, so that
    # the better filter has the last word. What it then shows of the whole may end within a pixel, hence its own size.
    side = 2 * max(height, width)
    draft = picture.draft(mode, (side, side))
    picture.load()
    full_width, full_height = draft[1][2:] if draft else picture.size

    # the picture is shrunk before it is turned, which is less work
    orientation = _orientation(picture)
    if orientation >= 5:
        height, width = width, height
    scale = min(full_width / width, full_height / height)
    left, top = max(0, full_width - scale * width) / 2, max(0, full_height - scale * height) / 2
    box = (left, top, full_width - left, full_height - top)
    picture = _flat(picture, mode).resize((width, height), Image.Resampling.BICUBIC, box)
    if orientation > 1:
        picture = picture.transpose(Image.Transpose[_TURNS[orientation]])
    return np.asarray(picture).reshape(*picture.size[::-1], channels)


# what undoes each EXIF orientation, among PIL.Image.Transpose
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip


def _orientation(picture) -> int:
    """The EXIF orientation of a loaded picture, 1 ... 8; 1, as it stands, if there is none or none that makes sense."""
    if picture.format == "TIFF":  # Pillow has turned it, and depending on its version says so or not
        return 1
    try:
        orientation = picture.getexif().get(0x0112, 1)
    except Exception:  # a picture is not lost with what is said about it
        return 1
    return orientation if orientation in _TURNS else 1


def _flat(picture, mode: str):
    """A loaded picture as bytes of grey ("L") or "RGB", over white where it is transparent."""
    from PIL import Image

    if picture.mode.startswith("I"):
        # 16 bits, called I;16 or I by different versions of Pillow, which would clip them to 255
        pixels = np.clip(np.asarray(picture).astype(np.int32), 0, 65535)
        picture = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    elif picture.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert(mode)
