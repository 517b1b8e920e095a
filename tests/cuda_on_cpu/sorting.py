"""NumPy in place of Thrust, which `cupy.sort` and its like call as compiled code for a GPU."""

import ctypes
import math

import numpy as np

from .counting import counts


def at(address: int, dtype, shape) -> np.ndarray:
    """Return the array of that shape at an address."""
    dtype = np.dtype(dtype)
    buffer = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return np.frombuffer(buffer, dtype).reshape(shape)


def replace(numbers: bool) -> None:
    """Replace `cupy.cuda.thrust`'s functions; each counts as one launch, though Thrust takes several."""
    from cupy.cuda import thrust

    def sort(dtype, data, keys, shape):
        counts.kernel_launches["thrust::sort"] += 1
        if numbers:
            at(data, dtype, shape).sort(axis=-1)

    def argsort(dtype, indices, data, keys, shape):
        counts.kernel_launches["thrust::argsort"] += 1
        if numbers:
            at(indices, np.intp, shape)[...] = at(data, dtype, shape).argsort(axis=-1, kind="stable")

    def lexsort(dtype, indices, keys, count, length):
        counts.kernel_launches["thrust::lexsort"] += 1
        if numbers:
            at(indices, np.intp, (length,))[...] = np.lexsort(at(keys, dtype, (count, length)))

    thrust.sort = sort
    thrust.argsort = argsort
    thrust.lexsort = lexsort
