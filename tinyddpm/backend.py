"""The array module: NumPy on a CPU, CuPy on an NVIDIA GPU; and whatever is faster than the plain way.

NumPy and CuPy share one interface, so the rest of the package never asks what device an array is on. NumPy's ufuncs
(np.exp, np.sqrt, ...) run CuPy's when they are given a CuPy array; whatever makes new arrays or is no ufunc is taken
from the array's own module, `xp = array_module(x)`.

What there is to learn is written down in the plain way: in autograd, network, diffusion and training. Where the same
can be had faster, the plain function is `paired` with a twin of its name in speed/cpu.py or speed/cuda.py, and this
file alone decides which of them runs. Within `plain()` none does, and all works as it is written down. Of CuPy, only
this file and speed/cuda.py know.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray


def is_array(x: Any) -> bool:
    """Whether `x` is a NumPy or CuPy array."""
    if isinstance(x, np.ndarray):
        return True
    cupy = sys.modules.get("cupy")  # a CuPy array can only exist once somebody has imported CuPy
    return cupy is not None and isinstance(x, cupy.ndarray)


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

    A copy to a GPU does not wait for what the GPU is doing. Raises ValueError for any other name, RuntimeError where
    CuPy, the driver, the GPU or a library of CUDA is missing.
    """
    if device == "cpu":
        return to_numpy(x)
    with on_device(device):
        return sys.modules["cupy"].asarray(x)


def on_device(device: str) -> contextlib.AbstractContextManager:
    """Within this block, in this thread, new arrays of CuPy are made on `device`, and its kernels run there.

    CuPy has a current device, "cuda:0" at first, and its functions want their arrays there. `train`, `sample` and
    `bits_per_dim` see to that themselves. For "cpu" this does nothing. Raises as `to_device` does.
    """
    if not isinstance(device, str) or not re.fullmatch("cpu|cuda(:[0-9]+)?", device):
        raise ValueError(f"device: {device!r} is unknown; use 'cpu', 'cuda' or 'cuda:N' with N = 0, 1, ...")
    return contextlib.nullcontext() if device == "cpu" else _gpu(device)


@functools.cache
def _gpu(device: str):
    """CuPy's `Device`, once it has been seen to work; RuntimeError says what is missing, and how to get it."""
    index, device = int(device.partition(":")[2] or 0), f"device: {device!r}"
    choose = "'tinyddpm[cuda12]' or 'tinyddpm[cuda13]' (not both), for the version of CUDA that nvidia-smi shows"
    try:
        import cupy
    except ImportError as error:
        if error.name == "cupy":
            raise RuntimeError(f"{device} needs CuPy, which is not installed; pip install {choose}") from None
        raise RuntimeError(f"{device} needs CuPy, which is installed but cannot be imported: {error}") from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(
            f"{device} needs an NVIDIA GPU and a recent driver; CUDA says: {error}. If nvidia-smi shows no GPU, "
            f"install NVIDIA's driver; if it does, is it hidden by CUDA_VISIBLE_DEVICES? Else pip install {choose}"
        ) from error
    if index >= count:
        raise RuntimeError(f"{device} is not there; this machine has {', '.join(f'cuda:{i}' for i in range(count))}")
    gpu = cupy.cuda.Device(index)
    try:
        with gpu:
            one = cupy.ones((1, 1), np.float32) + 1  # compiled here and now by NVRTC
            one @ one  # by cuBLAS
    except Exception as error:  # what exactly is raised depends on the library that is missing
        raise RuntimeError(
            f"{device} is there, but cannot compute, as a rule because a library of the CUDA toolkit is missing: pip "
            f"install {choose}. CuPy says: {error}"
        ) from error
    return gpu


def device_of(x: Array) -> str:
    """Return the name of the device that holds `x`: "cpu" or "cuda:N"."""
    return "cpu" if array_module(x) is np else f"cuda:{x.device.id}"


def address(x: Array) -> int:
    """Where the numbers of `x` begin in memory."""
    return x.__array_interface__["data"][0] if array_module(x) is np else x.data.ptr


def like(values: np.ndarray, x: Array) -> Array:
    """Return the NumPy array `values` with the dtype of `x`, on the device of `x`."""
    return to_device(values.astype(x.dtype, copy=False), device_of(x))


class _Mode(threading.local):
    plain = False


_mode = _Mode()


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within this block, in this thread, no function has a twin: all is computed in the plain way, without workers.

    It is slower, and the same up to rounding. For who wants to follow a computation in a debugger, or doubts a twin.
    On a GPU it takes float32 or float64, for the narrower products of `Module.to` are twins.
    """
    before, _mode.plain = _mode.plain, True
    try:
        yield
    finally:
        _mode.plain = before


def paired(function: Callable) -> Callable:
    """Have a faster function of the same name, its twin, run in place of `function` if there is one: from speed/cpu.py
    or speed/cuda.py, by where the first argument, an array or a model, is. `function.plain` is the function itself.

    A twin takes the same arguments at least, and computes the same, up to rounding. Here alone they are chosen.
    """

    @functools.wraps(function)
    def chosen(x: Any, *args: Any, **settings: Any) -> Any:
        if _mode.plain:
            return function(x, *args, **settings)
        return _twins(_kind(x)).get(function.__name__, function)(x, *args, **settings)

    chosen.plain = function
    return chosen


def _kind(x: Any) -> str:
    """Which twins there may be for an array, or for a model, by its `device`, if it has one: "cpu" or "cuda"."""
    if isinstance(x, (np.ndarray, np.generic)):
        return "cpu"
    if callable(x):
        return "cpu" if getattr(x, "device", "cpu") == "cpu" else "cuda"
    return "cpu" if array_module(x) is np else "cuda"


@functools.cache
def _twins(kind: str) -> dict[str, Callable]:
    # at first use, since it imports the very modules that have paired functions
    return importlib.import_module(f"{__package__}.speed.{kind}").TWINS
