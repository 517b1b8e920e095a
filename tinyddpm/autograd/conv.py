"""Convolution of images in NHWC layout, and nearest-neighbour upsampling.

A convolution is one matrix product. `im2col` lays the kh x kw x C pixels that each output sees side by side in a row
(Chellapilla et al. 2006), the filters are the columns of the other matrix. Its gradients are made of the same parts:
for the filters, im2col(x)^T times the gradient; for the image, with stride 1, a convolution of the gradient with the
filters turned by 180 degrees, input and output channels exchanged (Dumoulin & Visin 2016).

So `correlate` and its two gradients are all there is to it; where there is a faster way to the same numbers,
`convolve` has a twin. Next: fused.py.
"""

from __future__ import annotations

from collections.abc import Callable

from ..arguments import integer, is_integer
from ..backend import Array, array_module, paired
from .functional import check_precision, column_sums
from .tensor import op

Padding = tuple[tuple[int, int], tuple[int, int]]  # ((top, bottom), (left, right))


@op
def conv2d(x, w, b=None, *, stride: int = 1, padding: int | Padding = 0, precision: str = "float32"):
    """2-D convolution (cross-correlation, as in every deep-learning library).

        y[n, i, j, o] = b[o] + sum_{u, v, c} x[n, i*stride + u - top, j*stride + v - left, c] w[u, v, c, o]

    with x = 0 outside the image.

    Args:
        x: (N, H, W, C) images.
        w: (kh, kw, C, O) filters.
        b: (O,) bias, optional.
        stride: step between outputs, in pixels, >= 1.
        padding: rows and columns of zeros around x: an integer, or ((top, bottom), (left, right)).
        precision: of the products on a GPU; see `functional.product`.

    Returns (N, OH, OW, O) with OH = (H + top + bottom - kh) // stride + 1, OW likewise. Raises ValueError where the
    shapes do not fit each other.
    """
    pad = _padding(padding)
    _check(x, w, b, stride, pad)
    check_precision(precision)
    return convolve(x, w, b, stride, pad, precision)


@paired
def convolve(x: Array, w: Array, b: Array | None, stride: int, pad: Padding, precision: str) -> tuple[Array, Callable]:
    """`conv2d` of arguments that fit: y, and its `pull`."""
    y = correlate(x, w, stride, pad)
    if b is not None:
        y += b

    def pull(g):
        return (
            lambda: correlate_grad_x(g, w, stride, pad, x.shape),
            lambda: correlate_grad_w(x, g, w.shape, stride, pad),
            lambda: column_sums(g.reshape(-1, w.shape[3])),
        )

    return y, pull


def correlate(x: Array, w: Array, stride: int, pad: Padding) -> Array:
    """The convolution of `conv2d`, without bias, on arrays."""
    kh, kw, C, O = w.shape
    cols, (N, OH, OW) = im2col(x, kh, kw, stride, pad)
    return (cols @ w.reshape(kh * kw * C, O)).reshape(N, OH, OW, O)


def correlate_grad_w(x: Array, g: Array, shape: tuple[int, ...], stride: int, pad: Padding) -> Array:
    """Gradient of `correlate` for w, from dL/dy = g:

    dw[u, v, c, o] = sum_{n, i, j} x[n, i*stride + u - top, j*stride + v - left, c] g[n, i, j, o]
    """
    cols, _ = im2col(x, shape[0], shape[1], stride, pad)  # made again: kept, it would be kh kw times as large as x
    return (cols.T @ g.reshape(-1, shape[3])).reshape(shape)


def correlate_grad_x(g: Array, w: Array, stride: int, pad: Padding, shape: tuple[int, ...]) -> Array:
    """Gradient of `correlate` for x, from dL/dy = g. Pixel (p, q) meets w[u, v] in the output (i, j) for which
    p = i*stride + u - top and q = j*stride + v - left, so that with stride 1

    dx[n, p, q, c] = sum_{u, v, o} g[n, p + top - u, q + left - v, o] w[u, v, c, o]

    which is g convolved with w turned around. In general it is what each output owes to the pixels under its filter,
    g w^T, added up where they lie.
    """
    kh, kw, C, O = w.shape
    (N, H, W, _), ((top, bottom), (left, right)) = shape, pad
    if stride == 1 and max(top, bottom) < kh and max(left, right) < kw:  # else the padding below would be negative
        around = ((kh - 1 - top, kh - 1 - bottom), (kw - 1 - left, kw - 1 - right))
        return correlate(g, w[::-1, ::-1].swapaxes(2, 3), 1, around)
    _, OH, OW, _ = g.shape
    dcols = (g.reshape(-1, O) @ w.reshape(-1, O).T).reshape(N, OH, OW, kh, kw, C)
    padded = array_module(g).zeros((N, H + top + bottom, W + left + right, C), g.dtype)
    for u in range(kh):  # col2im: each pixel sums what the columns that copied it send back
        for v in range(kw):
            padded[:, u : u + stride * OH : stride, v : v + stride * OW : stride] += dcols[:, :, :, u, v]
    return padded[:, top : top + H, left : left + W]


def im2col(x: Array, kh: int, kw: int, stride: int, pad: Padding) -> tuple[Array, tuple[int, int, int]]:
    """(N, H, W, C) -> the matrix (N*OH*OW, kh*kw*C) with a row for each output pixel, and (N, OH, OW)."""
    N, H, W, C = x.shape
    (top, bottom), (left, right), xp = *pad, array_module(x)
    if any((top, bottom, left, right)):
        padded = xp.zeros((N, H + top + bottom, W + left + right, C), x.dtype)
        padded[:, top : top + H, left : left + W] = x
        x = padded
    if kh == kw == stride == 1:  # each output sees one pixel: they lie as they should
        return x.reshape(-1, C), x.shape[:3]
    OH, OW = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    n, h, w, c = x.strides
    windows = xp.lib.stride_tricks.as_strided(x, (N, OH, OW, kh, kw, C), (n, h * stride, w * stride, h, w, c))
    return windows.reshape(N * OH * OW, kh * kw * C), (N, OH, OW)  # the reshape copies


def _padding(padding: int | Padding) -> Padding:
    """Bring `padding` into the form ((top, bottom), (left, right)) and check it."""
    if is_integer(padding):
        padding = ((padding, padding), (padding, padding))
    try:
        (top, bottom), (left, right) = padding
        good = all(is_integer(p) and p >= 0 for p in (top, bottom, left, right))
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"padding: expected an integer >= 0 or ((top, bottom), (left, right)), got {padding!r}")
    return (top, bottom), (left, right)


def _check(x: Array, w: Array, b: Array | None, stride: int, pad: Padding) -> None:
    if x.ndim != 4 or x.size == 0:
        raise ValueError(f"x: expected images (N, H, W, C), none of them 0, got shape {x.shape}")
    if w.ndim != 4 or w.shape[2] != x.shape[3] or w.size == 0:
        raise ValueError(
            f"w: expected filters (kh, kw, {x.shape[3]}, O), none of them 0, for x of shape {x.shape}, got {w.shape}"
        )
    if b is not None and b.shape != w.shape[3:]:
        raise ValueError(f"b: expected shape {w.shape[3:]} for w of shape {w.shape}, got {b.shape}")
    integer("stride", stride)
    for size, k, p, axis in zip(x.shape[1:3], w.shape[:2], pad, ("height", "width")):
        if size + sum(p) < k:
            raise ValueError(f"x: {axis} {size} with padding {p} is less than the kernel's {k}")


@op
def upsample(x):
    """Nearest-neighbour upsampling by 2: (N, H, W, C) -> (N, 2H, 2W, C), y[n, i, j, c] = x[n, i // 2, j // 2, c]."""
    if x.ndim != 4:
        raise ValueError(f"x: expected images (N, H, W, C), got shape {x.shape}")
    N, H, W, C = x.shape
    y = array_module(x).empty((N, H, 2, W, 2, C), x.dtype)
    y[...] = x[:, :, None, :, None]
    return y.reshape(N, 2 * H, 2 * W, C), lambda g: g.reshape(N, H, 2, W, 2, C).sum(axis=(2, 4))
