"""Data: the bundled digits, and the order in which training draws images.

The package carries 10,000 of MNIST's training digits (LeCun, Cortes & Burges; see digits/LICENSE.txt) as one picture,
so that everything runs offline.
"""

from __future__ import annotations

import functools
import pathlib

import numpy as np

DIGITS = pathlib.Path(__file__).parent / "digits" / "digits.png"
_SIZE, _ROWS, _COLUMNS = 28, 100, 100  # the picture's tiles; ten rows for each class


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the bundled digits: images (10000, 28, 28, 1), float32 in [-1, 1], and their labels (10000,)."""
    from PIL import Image

    with Image.open(DIGITS) as picture:
        pixels = np.asarray(picture.convert("L"))
    tiles = pixels.reshape(_ROWS, _SIZE, _COLUMNS, _SIZE).swapaxes(1, 2).reshape(-1, _SIZE, _SIZE, 1)
    labels = np.arange(_ROWS * _COLUMNS) // _COLUMNS // 10
    return tiles.astype(np.float32) / np.float32(127.5) - 1, labels


_PURPOSES = ("order", "noise", "flip")


def random_stream(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """An independent generator for each (seed, purpose, key): the same whoever asks, in whatever order."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_PURPOSES.index(purpose), *key)))


def batch_indices(n: int, step: int, batch: int, seed: int) -> np.ndarray:
    """Which of n images make up the batch of `step`: entries step*batch ... of an endless row of permutations of them.

    Every image comes once per epoch, and any step's batch can be had without the steps before it.
    """
    first, last = step * batch, (step + 1) * batch
    epochs = range(first // n, (last - 1) // n + 1)
    order = np.concatenate([_permutation(n, seed, epoch) for epoch in epochs])
    return order[first - epochs[0] * n : last - epochs[0] * n]


@functools.lru_cache(maxsize=2)  # for a million images it takes as long as a small training step
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return random_stream(seed, "order", epoch).permutation(n)
