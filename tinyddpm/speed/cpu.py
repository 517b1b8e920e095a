"""The twins of `backend.paired` functions for what is on a CPU: NumPy arrays, and models that are there.

What they compute, the functions of the same names say; read those first. Those of more than a few lines have files of
their own: winograd.py, group_norm.py, shards.py and micro_batches.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..autograd import conv
from ..backend import Array
from . import winograd
from .group_norm import normalise
from .micro_batches import batch_gradient
from .shards import in_parts
from .workers import shared_array

PART = 2**15  # numbers, 128 KiB of float32, which stay in the cache from one operation to the next


def column_sums(x: Array) -> Array:
    """As a product with a row of ones it is many times faster than `x.sum`."""
    return np.ones(x.shape[-2], x.dtype) @ x


def convolve(x: Array, w: Array, b: Array | None, stride: int, pad: tuple, precision: str) -> tuple[Array, Callable]:
    """Most convolutions of a U-Net are 3x3 with stride 1: these in Winograd's way."""
    if winograd.fits(x, w, stride, pad):
        return winograd.conv3x3(x, w, b)
    return conv.convolve.plain(x, w, b, stride, pad, precision)


def adam_update(
    theta: Array, gradient: Array, m: Array, v: Array, lr: float, b1: float, b2: float, eps: float, decay: float, n: int
) -> None:
    """Part after part, each of which stays in the cache until it is done."""
    if np.isnan(gradient[0]):
        return
    for part in _parts(gradient):
        g, m_, v_, theta_ = gradient[part], m[part], v[part], theta[part]
        m_ += (1 - b1) * (g - m_)
        v_ += (1 - b2) * (g * g - v_)
        root_vhat = np.sqrt(v_) / math.sqrt(1 - b2**n)
        if decay:
            theta_ *= 1 - lr * decay
        theta_ -= lr / (1 - b1**n) * m_ / (root_vhat + eps)


def ema_update(average: Array, theta: Array, d: float) -> None:
    """Part after part, as `adam_update`."""
    for part in _parts(theta):
        a = average[part]
        a += (1 - d) * (theta[part] - a)


def _parts(vector: Array) -> list[slice]:
    return [slice(start, start + PART) for start in range(0, vector.size, PART)]


def new_vector(p: Array, size: int) -> Array:
    """In memory that processes started later share with this one."""
    return shared_array((size,), p.dtype)


TWINS = {
    "adam_update": adam_update,
    "batch_gradient": batch_gradient,
    "column_sums": column_sums,
    "convolve": convolve,
    "ema_update": ema_update,
    "in_parts": in_parts,
    "new_vector": new_vector,
    "normalise": normalise,
}
