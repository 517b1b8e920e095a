"""Data: the bundled digits, MNIST and Fashion-MNIST as published.

The package carries 10,000 of MNIST's training digits (LeCun, Cortes & Burges; see digits/LICENSE.txt) as one picture,
and 2,000 of its test digits as another, so that everything runs offline. The others are fetched when they are first
asked for: MNIST, and in the same format Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747).
"""

from __future__ import annotations

import math
import pathlib

import numpy as np

Path = str | pathlib.Path

# where each data set is, in the order in which they are asked
MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion-mnist": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    ),
}
# Of the unpacked files. Those of Fashion-MNIST are not published by its authors, who give the MD5 of the packed files,
# but several projects that derived them from these agree on them.
SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
COUNTS = {"train": 60_000, "t10k": 10_000}

# pictures of tiles, a hundred to a row, as many rows for each class
DIGITS = pathlib.Path(__file__).parent / "digits" / "digits.png"
HELD_OUT = DIGITS.with_name("held_out.png")
_SIZE, _COLUMNS = 28, 100


def load_digits(train: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return bundled digits: images (N, 28, 28, 1), float32 in [-1, 1], and their labels (N,), in the order 0 to 9.

    They are 10,000 of MNIST's digits for training, the first of each class, or, with train=False, 2,000 of those for
    testing, evenly spread over all of the class, since the second half of these is easier to read than the first.
    """
    from PIL import Image

    with Image.open(DIGITS if train else HELD_OUT) as picture:
        pixels = np.asarray(picture.convert("L"))
    tiles = pixels.reshape(-1, _SIZE, _COLUMNS, _SIZE).swapaxes(1, 2).reshape(-1, _SIZE, _SIZE, 1)
    return _scaled(tiles), np.arange(len(tiles)) * 10 // len(tiles)


def load_mnist(full: bool = False, train: bool = True, cache: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return digits of MNIST: images (N, 28, 28, 1), float32 in [-1, 1], and their labels (N,).

    Args:
        full: all of MNIST, fetched from the network when it is first asked for, 11 MB; or the bundled digits
        train: its 60,000 digits for training, or the 10,000 for testing; of the bundled ones, 10,000 and 2,000
        cache: where the files are kept, in a folder "mnist" of this one [the user's cache, such as ~/.cache/tinyddpm]
    Raises:
        OSError: if they cannot be had from the network, or the cache cannot be read or written to
    """
    return _load("mnist", train, cache) if full else load_digits(train)


def load_fashion_mnist(train: bool = True, cache: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures of clothes and shoes: images (N, 28, 28, 1), float32 in [-1, 1], and their labels (N,), 0 to 9.

    Args:
        train: the 60,000 for training, or the 10,000 for testing
        cache: where the files, 31 MB, are kept, in a folder "fashion-mnist" of this one [as that of load_mnist]
    Raises:
        OSError: if they cannot be had from the network, or the cache cannot be read or written to
    """
    return _load("fashion-mnist", train, cache)


def _load(dataset, train, cache):
    import platformdirs

    from .download import fetch  # with all that HTTP takes, which most programs never need

    cache = pathlib.Path(platformdirs.user_cache_dir("tinyddpm") if cache is None else cache) / dataset
    kind = "train" if train else "t10k"
    arrays = []
    for what, shape in (("images-idx3", (COUNTS[kind], 28, 28)), ("labels-idx1", (COUNTS[kind],))):
        name, size = f"{kind}-{what}-ubyte", 4 + 4 * len(shape) + math.prod(shape)
        try:
            content = fetch(f"{name}.gz", MIRRORS[dataset], cache, SHA256[dataset][name], size)
        except ConnectionError as error:
            raise ConnectionError(
                f"{error}. Both {kind}-images-idx3-ubyte.gz and {kind}-labels-idx1-ubyte.gz are needed. Without a "
                "network there are the bundled 10,000 digits, load_digits() or the example without --data, and images "
                "of your own, --data FOLDER"
            ) from error
        arrays.append(read_idx(content, shape))
    pixels, labels = arrays
    return _scaled(pixels[..., None]), labels.astype(int)


def read_idx(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array of bytes in an IDX file: 0, 0, 8 (for bytes), the number of axes, their lengths in four bytes
    each, the highest first, and the array.

    Raises ValueError if it is not such a file or not of this shape.
    """
    magic, header = bytes([0, 0, 8, len(shape)]), 4 + 4 * len(shape)
    if content[:4] != magic:
        raise ValueError(
            f"content: expected an IDX file, which begins with {magic.hex(' ')}, got {content[:4].hex(' ')}"
        )
    if len(content) < header:
        raise ValueError(f"content: expected an IDX header of {header} bytes, got {len(content)}")
    lengths = tuple(np.frombuffer(content[4:header], ">u4").tolist())
    if lengths != shape:
        raise ValueError(f"content: expected an array of shape {shape}, got {lengths}")
    if len(content) != header + math.prod(shape):
        raise ValueError(f"content: expected {header + math.prod(shape)} bytes for {shape}, got {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _scaled(pixels):
    """0 ... 255 -> [-1, 1]."""
    return pixels.astype(np.float32) / np.float32(127.5) - 1
