"""Automatic differentiation in reverse mode (survey: Baydin et al. 2018): what is recorded on the way forward.

A `Tensor` is an array that remembers how it was made. An op is a function on plain arrays that returns its value
together with `pull` (its vector-Jacobian product), which takes g = dL/d(value), an array of the shape of the value, and
returns dL/d(each input), of the shape of each input:

    @op
    def mul(a, b):
        return a * b, lambda g: (g * b, g * a)

    w = Parameter(np.array(3.0))
    backward(w * w + 2 * w)[w]  # 8.0, for d/dw (w^2 + 2 w) = 2 w + 2

What backward needs is whatever `pull` closes over; nothing else is kept. `backward(loss)` walks the graph from
the loss to the parameters, calls every `pull` once and returns {parameter: gradient}. Nothing is written to the
parameters, so several threads can differentiate through the same ones at once. Next: backward.py.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arguments import is_integer, number
from ..backend import Array, address, array_module, device_of, is_array

# ---------------------------------------------------------------------------------------------------------- tensors


class Node:
    """An op that was run: `pull`, and where its gradients go. It knows shape and dtype of its value, not the value."""

    __slots__ = ("op", "parents", "pull", "shape", "dtype", "__weakref__")

    def __init__(self, op: str, parents: tuple[Node | Parameter | None, ...], pull: Callable, value: Array):
        self.op, self.parents, self.shape, self.dtype = op, parents, value.shape, value.dtype
        self.pull: Callable | None = pull  # None once `backward` has been here


class Tensor:
    """A float array, and the node that computed it (None if no parameter was involved).

    Raises TypeError for anything but a NumPy or CuPy array of floats.
    """

    __slots__ = ("data", "node")
    __array_ufunc__ = None  # array * tensor is handed to Tensor.__rmul__, not looped over

    def __init__(self, data: Array):
        data = no_scalar(data)
        if not is_array(data) or data.dtype.kind != "f":
            what = f"an array of {data.dtype}" if is_array(data) else type(data).__name__
            raise TypeError(f"data: expected a NumPy or CuPy array of floats, got {what}")
        self.data = data
        self.node: Node | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    def item(self) -> float:
        """Return the only element as a Python float (on a GPU this waits for the result)."""
        return self.data.item()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"

    def __add__(self, other):
        return add(self, other)

    def __radd__(self, other):
        return add(other, self)

    def __sub__(self, other):
        return sub(self, other)

    def __rsub__(self, other):
        return sub(other, self)

    def __mul__(self, other):
        return mul(self, other)

    def __rmul__(self, other):
        return mul(other, self)

    def __truediv__(self, other):
        return div(self, other)

    def __rtruediv__(self, other):
        return div(other, self)

    def __pow__(self, exponent):
        return power(self, exponent=exponent)

    def __neg__(self):
        return neg(self)

    def __matmul__(self, other):
        return matmul(self, other)

    def __rmatmul__(self, other):
        return matmul(other, self)

    def __getitem__(self, index):
        return getitem(self, index=index)

    def exp(self) -> Tensor:
        return exp(self)

    def log(self) -> Tensor:
        return log(self)

    def sqrt(self) -> Tensor:
        return sqrt(self)

    def tanh(self) -> Tensor:
        return tanh(self)

    def sum(self, axis=None, keepdims=False) -> Tensor:
        return reduce_sum(self, axis=axis, keepdims=keepdims)

    def mean(self, axis=None, keepdims=False) -> Tensor:
        return reduce_mean(self, axis=axis, keepdims=keepdims)

    def reshape(self, *shape: int | tuple[int, ...]) -> Tensor:
        return reshape(self, shape=shape[0] if shape and isinstance(shape[0], tuple) else shape)

    def transpose(self, *axes: int | tuple[int, ...]) -> Tensor:
        return transpose(self, axes=axes[0] if axes and isinstance(axes[0], tuple) else axes)


class Parameter(Tensor):
    """A leaf that is learned: the only kind of tensor for which `backward` returns a gradient. In the graph it stands
    for itself, beside the nodes, and like these it is told from others by identity."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: int):
        """Copied or pickled with all of the vector of which it is a view, if `training.optim.flatten` made it one: it
        is a view of that one's copy then, too."""
        vector, whole = self.data.base, self.data.flags.c_contiguous
        if type(self) is Parameter and whole and is_array(vector) and (vector.ndim, vector.dtype) == (1, self.dtype):
            start = (address(self.data) - address(vector)) // self.dtype.itemsize
            return _view, (vector, start, self.shape)
        return super().__reduce_ex__(protocol)


def _view(vector: Array, start: int, shape: tuple[int, ...]) -> Parameter:
    return Parameter(vector[start : start + math.prod(shape)].reshape(shape))


def no_scalar(x):
    """Turn a NumPy scalar, which NumPy makes of every result without axes, back into an array; leave all else alone."""
    return np.asarray(x) if isinstance(x, np.generic) else x


def as_array(x: Tensor | Array) -> Array:
    """Return the array of a tensor; an array is returned as it is."""
    return x.data if isinstance(x, Tensor) else x


# -------------------------------------------------------------------------------------------------------------- ops


class _Mode(threading.local):
    recording = True


_mode = _Mode()


@contextlib.contextmanager
def no_grad():
    """Within this block, in this thread, ops compute values only and remember nothing for `backward`."""
    before, _mode.recording = _mode.recording, False
    try:
        yield
    finally:
        _mode.recording = before


def op(function: Callable) -> Callable:
    """Make a differentiable op of `function(*arrays, **settings) -> (value, pull)`.

    The function's positional parameters are its differentiable inputs: tensors, arrays, Python numbers or, where an
    input is optional, None. Its keyword-only parameters are settings. `pull(g)` takes dL/d(value) and returns one
    gradient, or a tuple with one for each input; None means zero, and a gradient that costs something may be given as a
    function without arguments, called only if someone wants it. Where an input was broadcast, its gradient is summed
    down centrally.

    An op reads its inputs and `g` and writes only to arrays that it made itself. The dtype of its inputs is kept:
    mixing float32 with float64, or a value of another dtype, raises TypeError. The undecorated function is `op.raw`.
    """
    name = function.__name__
    signature = inspect.signature(function)
    inputs_expected = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in signature.parameters.values())

    @functools.wraps(function)
    def apply(*inputs: Any, **settings: Any) -> Tensor:
        if len(inputs) < inputs_expected:  # some are given by name, or left out
            bound = signature.bind(*inputs, **settings)
            bound.apply_defaults()
            inputs, settings = bound.args, bound.kwargs
        arrays = [as_array(x) for x in inputs]
        dtype = _common_dtype(name, arrays)
        value, pull = apply.raw(*arrays, **settings)  # as an attribute, so that tests can put another in its place
        y = Tensor(value)
        if y.dtype != dtype:
            raise TypeError(f"{name}: {dtype} became {y.dtype}; convert the input that is not a float array")
        if _mode.recording:
            parents = tuple(
                x if isinstance(x, Parameter) else x.node if isinstance(x, Tensor) else None for x in inputs
            )
            if any(parent is not None for parent in parents):
                y.node = Node(name, parents, pull, y.data)
        return y

    apply.raw = function
    return apply


def _common_dtype(name: str, arrays: list) -> np.dtype:
    """Return the one float dtype among `arrays`, which must be on one device; NumPy scalars count, Python numbers take
    any dtype."""
    found = {a.dtype for a in arrays if hasattr(a, "dtype") and a.dtype.kind == "f"}
    if len(found) != 1:
        names = ", ".join(sorted(map(str, found))) or "no float array"
        raise TypeError(f"{name}: inputs must share one float dtype, got {names}; convert with .astype or float()")
    devices = {device_of(a) for a in arrays if is_array(a)}
    if len(devices) > 1:
        names = ", ".join(sorted(devices))
        raise ValueError(f"{name}: inputs must be on one device, got {names}; move arrays by to_device, models by .to")
    return found.pop()


# ------------------------------------------------------------------------------------------- elementwise operations


# What costs something is given as a function without arguments, called only if the input wants its gradient.


@op
def add(a, b):
    return a + b, lambda g: (g, g)


@op
def sub(a, b):
    return a - b, lambda g: (g, lambda: -g)


@op
def mul(a, b):
    return a * b, lambda g: (lambda: g * b, lambda: g * a)


@op
def div(a, b):
    return a / b, lambda g: (lambda: g / b, lambda: -g * a / (b * b))


@op
def neg(x):
    return -x, lambda g: -g


@op
def power(x, *, exponent: float):
    """x ** exponent for a number `exponent`."""
    exponent = number("exponent", exponent)
    return x**exponent, lambda g: g * (exponent * x ** (exponent - 1) if exponent else 0.0)


@op
def exp(x):
    y = np.exp(x)  # a NumPy ufunc given a CuPy array runs CuPy's
    return y, lambda g: g * y


@op
def log(x):
    return np.log(x), lambda g: g / x


@op
def sqrt(x):
    y = np.sqrt(x)
    return y, lambda g: g / (2 * y)


@op
def tanh(x):
    y = np.tanh(x)
    return y, lambda g: g * (1 - y * y)


# ---------------------------------------------------------------------------------- products, reductions and shapes


@op
def matmul(a, b):
    """Matrix product over the last two axes, a (..., n, k) @ b (..., k, m) -> (..., n, m); leading axes broadcast."""
    if np.ndim(a) < 2 or np.ndim(b) < 2:
        raise ValueError(f"matmul: both inputs need two axes or more, got {np.ndim(a)} and {np.ndim(b)}")
    return a @ b, lambda g: (lambda: g @ b.swapaxes(-1, -2), lambda: a.swapaxes(-1, -2) @ g)


def _unreduce(g: Array, shape: tuple[int, ...], axis, keepdims: bool) -> Array:
    """Spread the gradient of a sum over `axis` back over `shape`."""
    if not keepdims and axis is not None:
        g = np.expand_dims(g, axis)
    return np.broadcast_to(g, shape)


@op
def reduce_sum(x, *, axis=None, keepdims=False):
    shape = x.shape  # so that `pull` does not keep x
    return x.sum(axis=axis, keepdims=keepdims), lambda g: _unreduce(g, shape, axis, keepdims)


@op
def reduce_mean(x, *, axis=None, keepdims=False):
    if x.size == 0:
        raise ValueError(f"x: an empty array has no mean, got shape {x.shape}")
    shape, y = x.shape, x.mean(axis=axis, keepdims=keepdims)
    count = x.size // y.size
    return y, lambda g: _unreduce(g, shape, axis, keepdims) / count


@op
def reshape(x, *, shape: tuple[int, ...]):
    before = x.shape
    return x.reshape(shape), lambda g: g.reshape(before)


@op
def transpose(x, *, axes: tuple[int, ...]):
    """Permute the axes; with none given, reverse them."""
    y = x.transpose(axes or None)
    inverse = sorted(range(y.ndim), key=lambda i: axes[i] % y.ndim) if axes else None
    return y, lambda g: g.transpose(inverse)


@op
def getitem(x, *, index):
    """x[index] for integers, slices, None and Ellipsis (which name each element at most once)."""
    for i in index if isinstance(index, tuple) else (index,):
        if not (i is None or i is Ellipsis or isinstance(i, slice) or is_integer(i)):
            raise TypeError(f"index: expected integers, slices, None or Ellipsis, got {type(i).__name__}")

    shape = x.shape  # so that `pull` does not keep x

    def pull(g):
        dx = array_module(g).zeros(shape, g.dtype)
        dx[index] = g
        return dx

    return x[index], pull
