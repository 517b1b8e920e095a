"""What a caller hands over, taken as what it is meant to be, or refused: "lr: expected a number > 0, got nan".

Left to themselves, nan passes `x <= 0` unseen, True is an integer, a number of NumPy decides about the precision of all
that it meets, and what Python or NumPy say of a wrong one names no argument. So whatever is a number, a name out of
several, or a source of randomness is asked for here, at the entrance of a public function.
"""

from __future__ import annotations

import functools
import math
import numbers
import sys
import warnings
from collections.abc import Sequence

import numpy as np

from .backend import Array, is_array


def is_integer(value: object) -> bool:
    """Whether it is one, of Python or NumPy."""
    return isinstance(value, (int, numbers.Integral))  # int alone is asked for first since that is ten times as fast


def integer(name: str, value: object, least: int = 1, most: float = math.inf) -> int:
    """`value` as an int, if it is an integer from `least` to `most`, or ValueError."""
    value = _plain(value)
    if isinstance(value, bool) or not is_integer(value) or not least <= value <= min(most, 2**63 - 1):
        which = f">= {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name}: expected an integer {which}, got {value!r}")
    return int(value)


def number(name: str, value: object, within: str = "(-inf, inf)") -> float:
    """`value` as a float, if it is a number in an interval such as "(0, 1]", or ValueError; nan is in none."""
    low, high, ends = _interval(within)
    real = isinstance(plain := _plain(value), numbers.Real) and not isinstance(plain, bool)
    try:
        result = float(plain) if real else math.nan
    except OverflowError:  # of an integer that is beyond all floats
        result = math.nan
    if not (low < result < high or result in ends):
        above = "a finite number" if low == -math.inf else f"a number {'>=' if low in ends else '>'} {low:g}"
        raise ValueError(f"{name}: expected {above if high == math.inf else f'a number in {within}'}, got {value!r}")
    return result


def _plain(value: object) -> object:
    """A number of NumPy, or an array that is one, as Python's."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value


@functools.cache
def _interval(within: str) -> tuple[float, float, list[float]]:
    """Its lower and its upper end, and those that belong to it."""
    low, high = map(float, within[1:-1].split(","))
    return low, high, [end for end, bracket in ((low, within[0]), (high, within[-1])) if bracket in "[]"]


def array_of_numbers(name: str, value: object) -> np.ndarray:
    """A new array of float64 of the numbers that `value` consists of, or ValueError."""
    try:
        return np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected numbers, got {value!r}") from None


def one_of(name: str, value: object, known: Sequence[str]) -> str:
    """`value`, if it is one of the names `known`, or ValueError."""
    if not (isinstance(value, str) and value in known):
        raise ValueError(f"{name}: unknown {value!r}; known: {', '.join(known)}")
    return value


def check_instance(name: str, value: object, kind: type, what: str) -> None:
    """Raise TypeError, which says `what` was expected, unless `value` is of this kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}")


def check_floats(name: str, x: object, what: str = "an array of floats") -> None:
    """Raise TypeError, which says `what` was expected, unless `x` is an array of floats, NumPy's or CuPy's."""
    if not is_array(x) or x.dtype.kind != "f":
        raise TypeError(f"{name}: expected {what}, got {x.dtype if is_array(x) else type(x).__name__}")


def check_vector(name: str, x: object, like: Array | None = None) -> None:
    """Raise TypeError or ValueError unless `x` is a vector of floats, of the dtype and shape of `like`, if given."""
    check_floats(name, x, "a vector of floats")
    if x.ndim != 1 or (like is not None and (x.dtype, x.shape) != (like.dtype, like.shape)):
        expected = "a vector" if like is None else f"{like.dtype} of shape {like.shape}"
        raise ValueError(f"{name}: expected {expected}, got {x.dtype} of shape {x.shape}")


def generator(rng: object) -> np.random.Generator:
    """The generator that `rng` is, or that of this seed, an integer or several; None: another one every time.
    ValueError for anything else."""
    if isinstance(rng, np.random.Generator | np.random.BitGenerator | np.random.SeedSequence | None):
        return np.random.default_rng(rng)
    for seed in rng if isinstance(rng, (list, tuple)) and rng else [_plain(rng)]:
        if isinstance(seed, bool) or not is_integer(seed) or seed < 0:
            raise ValueError(f"rng: expected a seed >= 0 or a numpy.random.Generator, got {rng!r}")
    return np.random.default_rng(rng)


def warn(message: str) -> None:
    """Warn at the line that called the package, whatever is in between."""
    level, frame = 1, sys._getframe()
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in (__package__, "contextlib", "tqdm"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
