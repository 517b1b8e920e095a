"""The array module: NumPy on a CPU, CuPy on an NVIDIA GPU. The only file that imports CuPy.

NumPy and CuPy share one interface, so the rest of the package never asks what device an array is on. NumPy's ufuncs
(np.exp, np.sqrt, ...) run CuPy's when they are given a CuPy array; whatever makes new arrays or is no ufunc is taken
from the array's own module, `xp = array_module(x)`.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray


def is_array(x: Any) -> bool:
    """Whether `x` is a NumPy or CuPy array."""
    cupy = sys.modules.get("cupy")  # a CuPy array can only exist once somebody has imported CuPy
    return isinstance(x, np.ndarray) or (cupy is not None and isinstance(x, cupy.ndarray))


def array_module(x: Array):
    """Return the module, `numpy` or `cupy`, whose functions take the array `x`.

    Raises TypeError for anything that is not an array.
    """
    if isinstance(x, np.ndarray):
        return np
    if is_array(x):
        return sys.modules["cupy"]
    raise TypeError(f"expected a NumPy or CuPy array, got {type(x).__name__}")


def to_numpy(x: Array) -> np.ndarray:
    """Return `x` as a NumPy array: itself if it is one, else a copy fetched from the GPU."""
    return x if array_module(x) is np else x.get()


def to_device(x: Array, device: str) -> Array:
    """Return `x` on `device`: "cpu", "cuda" or "cuda:N". No copy is made if it is there already.

    Raises ValueError for any other name, RuntimeError where CuPy or the GPU is missing.
    """
    if device == "cpu":
        return to_numpy(x)
    kind, _, index = device.partition(":")
    if kind != "cuda" or (device != "cuda" and not index.isdecimal()):
        raise ValueError(f"device: {device!r} is unknown; use 'cpu', 'cuda' or 'cuda:N' with N = 0, 1, ...")
    try:
        import cupy
    except ImportError:
        raise RuntimeError(
            f"device: {device!r} needs CuPy, which is not installed; pip install 'tinyddpm[cuda12]' or "
            "'tinyddpm[cuda13]', whichever CUDA the driver supports (nvidia-smi shows it)"
        ) from None
    try:
        with cupy.cuda.Device(int(index or 0)):
            return cupy.asarray(x)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"device: {device!r} cannot be used; CUDA says: {error}") from error


def device_of(x: Array) -> str:
    """Return the name of the device that holds `x`: "cpu" or "cuda:N"."""
    return "cpu" if array_module(x) is np else f"cuda:{x.device.id}"


def like(values: np.ndarray, x: Array) -> Array:
    """Return the NumPy array `values` with the dtype of `x`, on the device of `x`."""
    return to_device(values.astype(x.dtype, copy=False), device_of(x))


def erfc(x: Array) -> Array:
    """The complementary error function of an array, which NumPy does not have: Python's, one number at a time."""
    if isinstance(x, (np.ndarray, np.generic)):
        return np.vectorize(math.erfc, otypes=[x.dtype])(x)
    from cupyx.scipy.special import erfc

    return erfc(x)
