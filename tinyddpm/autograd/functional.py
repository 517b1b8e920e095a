"""Functions that own no parameters: SiLU, softmax, linear maps, joining, the squared error, dropout, the normal curve.

What stands under `@op` can be differentiated (see tensor.py); the rest computes on plain arrays for that. What stands
under `@paired` is the plain way, for which there may be a faster one (see backend.py). `at_least` and `normal_cdf` are
for the variational bound alone, `precision` for a GPU alone. Next: conv.py.
"""

from __future__ import annotations

import math

import numpy as np

from ..arguments import check_instance, number, one_of
from ..backend import Array, array_module, device_of, is_array, paired, to_device, to_numpy
from .tensor import Tensor, as_array, mul, op

PRECISIONS = ("float32", "tf32", "bf16", "fp16")


def check_precision(precision: str) -> None:
    """Raise ValueError unless `precision` is one of PRECISIONS."""
    one_of("precision", precision, PRECISIONS)


def logistic(x: Array) -> Array:
    """The logistic function 1 / (1 + e^-x) of an array."""
    with np.errstate(over="ignore"):  # where e^-x overflows to infinity the result is 0, as it should be
        s = np.exp(-x)
    s += 1
    return 1 / s


@paired
def column_sums(x: Array) -> Array:
    """Sum x (..., L, C) over L -> (..., C)."""
    return x.sum(axis=-2)


@paired
def product(a: Array, b: Array, precision: str = "float32", scale: float = 1.0) -> Array:
    """scale times the matrix product a @ b of float32 or float64 arrays, (..., n, k) and (..., k, m) -> (..., n, m).

    `precision` is what a GPU rounds the factors to, if they are float32, before it multiplies them, for speed: "tf32"
    (10 bits of mantissa), "bf16" (7) or "fp16" (10, and a small range: 6e-8 is the smallest number, 65504 the largest).
    Sums stay float32, and a CPU rounds nothing. Raises ValueError for an unknown one.
    """
    check_precision(precision)
    y = a @ b
    if scale != 1:
        y *= scale
    return y


@paired
def softmax_rows(x: Array, out: Array | None = None) -> Array:
    """e^x_i / sum_j e^x_j along the last axis, written to `out` if given, which may be x."""
    # the same for x - c, whatever c; with the largest x for c nothing overflows
    y = np.subtract(x, x.max(axis=-1, keepdims=True), out=out)
    np.exp(y, out=y)
    y /= y.sum(axis=-1, keepdims=True)
    return y


@paired
def softmax_rows_grad(y: Array, g: Array, out: Array | None = None) -> Array:
    """Gradient of `softmax_rows` for x, from its result y and dL/dy = g: y (g - sum_j g_j y_j), since dy_i/dx_j =
    y_i ([i = j] - y_j); `out` may be g."""
    dx = np.multiply(g, y, out=out)
    dx -= y * dx.sum(axis=-1, keepdims=True)
    return dx


@op
def sigmoid(x):
    """sigma(x) = 1 / (1 + e^-x)."""
    s = logistic(x)
    return s, lambda g: g * (s * (1 - s))


@op
@paired
def silu(x):
    """SiLU (swish): x sigma(x). Hendrycks & Gimpel 2016; Ramachandran et al. 2017."""
    s = logistic(x)
    y = x * s
    return y, lambda g: g * (s + y * (1 - s))  # s' = s (1 - s)


@op
def softmax(x, *, axis: int = -1):
    """e^x_i / sum_j e^x_j along `axis`."""
    y = softmax_rows(x.swapaxes(axis, -1))
    return y.swapaxes(axis, -1), lambda g: softmax_rows_grad(y, g.swapaxes(axis, -1)).swapaxes(axis, -1)


@op
def concat(*xs, axis: int = -1):
    """Join arrays along `axis`; their other axes must agree, or ValueError. The gradient is cut at the joints."""
    y, xp = joined(*xs, axis=axis), array_module(xs[0])
    cuts = np.cumsum([x.shape[axis] for x in xs])[:-1].tolist()
    return y, lambda g: tuple(xp.split(g, cuts, axis=axis))


@paired
def joined(*xs: Array, axis: int) -> Array:
    """`concat` of arrays."""
    return array_module(xs[0]).concatenate(xs, axis=axis)


@op
def linear(x, w, b=None, *, precision: str = "float32"):
    """x w + b over the last axis: x (..., C), w (C, O), b (O,) or None -> (..., O). ValueError if they do not fit.

    precision: of the products, see `product`.
    """
    if w.ndim != 2:
        raise ValueError(f"w: expected shape (C, O), got {w.shape}")
    if x.ndim == 0 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"x: last axis must be {w.shape[0]} to fit w of shape {w.shape}, got x of shape {x.shape}")
    if b is not None and b.shape != w.shape[1:]:
        raise ValueError(f"b: expected shape {w.shape[1:]} to fit w of shape {w.shape}, got {b.shape}")
    rows = x.reshape(-1, w.shape[0])
    y = product(rows, w, precision)
    if b is not None:
        y += b

    def pull(g):
        g = g.reshape(-1, w.shape[1])
        return (
            lambda: product(g, w.T, precision).reshape(x.shape),
            lambda: product(rows.T, g, precision),
            lambda: column_sums(g),
        )

    return y.reshape(*x.shape[:-1], w.shape[1]), pull


@op
def embedding(w, *, index: np.ndarray):
    """Rows of a table: w (K, C) and integers index (N,), of which each must be in 0 ... K-1, -> w[index] (N, C)."""

    index = np.asarray(index)
    if index.dtype.kind not in "iu" or (index.size and not (0 <= index.min() and index.max() < len(w))):
        raise ValueError(f"index: expected integers in 0 ... {len(w) - 1}, got {index}")

    def pull(g):  # the gradient of a row is the sum over its uses
        uses = index == np.arange(len(w))[:, None]  # (K, N): one row for each of the table, for one product
        return product(to_device(uses, device_of(g)).astype(g.dtype), g)

    return w[to_device(index, device_of(w))], pull


@op
def at_least(x, *, least: float):
    """max(x, least), x clamped from below; the gradient passes where x is greater."""
    return np.maximum(x, least), lambda g: g * (x > least)


@paired
def erfc(x: Array) -> Array:
    """The complementary error function of an array, which NumPy does not have: Python's, one number at a time."""
    x = x if is_array(x) else np.asarray(x)  # what NumPy computes of an array without axes is none
    return to_device(np.vectorize(math.erfc, otypes=[x.dtype])(to_numpy(x)), device_of(x))


@op
def normal_cdf(x):
    """Phi(x) = (2 pi)^(-1/2) times the integral of e^(-u^2/2) from -infinity to x: the standard normal's distribution.

    Through the complementary error function, Phi(x) = erfc(-x / sqrt 2) / 2, it is precise far out on the left as well.
    """
    return 0.5 * erfc(-x * math.sqrt(0.5)), lambda g: g * (np.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi)))


@op
def mse(a, b):
    """Mean squared error mean((a - b)^2) over all elements of two arrays of one shape (else ValueError)."""
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"mse: expected the same shape twice, and not an empty one, got {a.shape} and {b.shape}")
    d = a - b

    def pull(g):
        da = (g * (2 / d.size)) * d
        return da, lambda: -da

    return (d * d).mean(), pull


def dropout(x: Tensor | Array, p: float, rng: np.random.Generator | None = None) -> Tensor:
    """Zero each element with probability `p` and scale the rest by 1 / (1 - p); without a generator, leave all as is.

    There is no training flag: whoever trains hands over a generator. Srivastava et al. 2014.
    """
    p = number("p", p, "[0, 1)")
    check_instance("rng", rng, np.random.Generator | None, "a generator from numpy.random.default_rng, or None")
    if rng is None or p == 0:
        return x if isinstance(x, Tensor) else Tensor(x)
    keep = np.asarray(rng.random(x.shape, dtype=np.float32) >= p)  # an array even where x has no axes
    return mul(x, to_device(keep, device_of(as_array(x))).astype(x.dtype) / (1 - p))
