"""What a GPU does in its own way: the twins of `backend.paired` functions for CuPy arrays, and models on a GPU.

What they compute, the functions of the same names say; read those first. A GPU runs thousands of threads side by
side, reads its memory slowly compared with how fast they compute, and takes as long to begin a kernel as to pass over a
small array. So what counts is few kernels, each of which does much with what it reads. CuPy's operators start a kernel
for each + and each sum; the functions here start one or two.

The kernels are in kernels/*.cu, in CUDA C++. There `REAL` is the type of the numbers, `SUM` that of sums of products.
`THREADS` threads make a block; blockIdx.x is its number, threadIdx.x that of a thread within it. Threads of one block
can share memory and wait for each other (__syncthreads).

Matrix products are cuBLAS's. It is called by hand since CuPy's `@` copies transposed matrices, cannot add to what is
there already, and knows no bf16.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable

import cupy
import cupy.cublas
import numpy as np
from cupy_backends.cuda.libs import cublas
from cupyx.scipy.special import erfc

from ..autograd.functional import check_precision
from ..backend import Array
from .micro_batches import batch_gradient
from .shards import in_parts

THREADS = 256  # of a block
PIXELS = 16  # of a block of `gather`
COLUMNS = 2**25  # numbers in `columns` at a time, 128 MiB of float32; a larger batch is convolved in parts
REALS = {"f": "float", "d": "double", "h": "short", "H": "short"}  # in C, by NumPy's dtype.char


@functools.cache
def kernel(file: str, name: str, dtype: np.dtype) -> Callable:
    """The kernel called `name` in kernels/`file`.cu, for numbers of `dtype`; compiled at its first call.

    It is called as kernel(...)((blocks,), (threads,), arguments), of which integers are long long and floats double,
    and returns before it has run.
    """
    source = (pathlib.Path(__file__).parent / "kernels" / f"{file}.cu").read_text()
    real = REALS[dtype.char]
    macros = {"REAL": real, "SUM": "double" if real == "double" else "float", "THREADS": THREADS, "PIXELS": PIXELS}
    return cupy.RawKernel("".join(f"#define {key} {value}\n" for key, value in macros.items()) + source, name)


# ----------------------------------------------------------------------------------------------------- matrix products

TYPES = {"f": 0, "d": 1, "h": 2, "H": 14}  # what cuBLAS calls them; h is fp16 and H is bf16, see `rounded`
COMPUTE_32F, COMPUTE_64F, COMPUTE_32F_FAST_TF32 = 68, 70, 77

to_bf16 = cupy.ElementwiseKernel(  # which NumPy does not have: the upper half of a float32
    "float32 x",
    "uint16 y",
    """unsigned int bits = __float_as_uint(x);  // rounded to nearest, and halfway to even
       y = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16""",
    "to_bf16",
)


def rounded(x: Array, precision: str) -> Array:
    """x as a factor in a product of this precision: bf16 as uint16, fp16 as int16. What is rounded already, or float64,
    stays as it is."""
    check_precision(precision)
    if precision not in ("bf16", "fp16") or x.dtype.char != "f":
        return x
    return to_bf16(x) if precision == "bf16" else x.astype(np.float16, order="C").view(np.int16)


def contiguous(*arrays: Array) -> tuple[Array, ...]:
    """The arrays contiguous, as kernels take them, which are told but an address. TypeError unless float32 or
    float64."""
    for x in arrays:
        if x.dtype.char not in "fd":
            raise TypeError(f"dtype: a GPU computes in float32 or float64, got {x.dtype}; see precision in Module.to")
    return tuple(map(cupy.ascontiguousarray, arrays))


def product(
    a: Array,
    b: Array,
    precision: str = "float32",
    scale: float = 1.0,
    out: Array | None = None,
    accumulate: bool = False,
) -> Array:
    """scale a @ b; written, or added if `accumulate`, to `out`, which is contiguous, if there is one. Factors may be
    `rounded` already."""
    if a.size == 0 or b.size == 0 or a.shape[-1] != b.shape[-2]:
        return a @ b  # which raises if they do not fit
    if a.shape[:-2] != b.shape[:-2]:
        lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a, b = (cupy.broadcast_to(x, lead + x.shape[-2:]) for x in (a, b))
    (n, k), m = a.shape[-2:], b.shape[-1]
    real = "d" if a.dtype.char == "d" else "f"
    y = cupy.empty((*a.shape[:-1], m), real) if out is None else out
    if not {a.dtype.char, b.dtype.char} <= TYPES.keys():
        contiguous(a, b)  # raises
    (a, a_turned), (b, b_turned) = _stored(a, precision), _stored(b, precision)
    compute = COMPUTE_64F if real == "d" else COMPUTE_32F_FAST_TF32 if precision == "tf32" else COMPUTE_32F
    alpha, beta = _number(scale, real), _number(float(accumulate), real)
    # cuBLAS reads matrices column by column, so that it takes each of ours for its transpose: y^T = b^T a^T. Of each it
    # wants address, type and the distance from one row of ours to the next, and of a batch that between matrices.
    A, B = ((x.data.ptr, TYPES[x.dtype.char], max(x.strides[1] // x.itemsize, x.shape[2])) for x in (a, b))
    Y = y.data.ptr, TYPES[real], m
    task = cupy.cuda.device.get_cublas_handle(), int(b_turned), int(a_turned), m, n, k, alpha.ctypes.data
    if len(a) == 1:
        cublas.gemmEx(*task, *B, *A, beta.ctypes.data, *Y, compute, cublas.CUBLAS_GEMM_DEFAULT)
    else:
        A, B = ((*X, x.strides[0] // x.itemsize) for X, x in ((A, a), (B, b)))
        Y = *Y, n * m, len(a)
        cublas.gemmStridedBatchedEx(*task, *B, *A, beta.ctypes.data, *Y, compute, cublas.CUBLAS_GEMM_DEFAULT)
    return y


@functools.lru_cache(maxsize=64)
def _number(value: float, dtype: str) -> np.ndarray:
    """A number whose address can be given away."""
    return np.array(value, dtype)


def _stored(x: Array, precision: str) -> tuple[Array, bool]:
    """The matrices x (..., rows, columns) as they lie in memory, row by row, (count, ., .), rounded; and whether these
    are theirs transposed. They are copied only if they lie in neither way."""
    x = x.reshape(-1, *x.shape[-2:])
    for turned, y in ((False, x), (True, x.swapaxes(1, 2))):
        (_, rows, columns), (_, down, across) = y.shape, y.strides
        if (across == y.itemsize or columns == 1) and (down >= columns * y.itemsize or rows == 1):
            return rounded(y, precision), turned
    return rounded(cupy.ascontiguousarray(x), precision), False


@functools.lru_cache(maxsize=64)
def _ones(count: int, dtype: np.dtype, device: int) -> Array:
    return cupy.ones((1, count), dtype)


def column_sums(x: Array) -> Array:
    """As a product with a row of ones."""
    ones = _ones(x.shape[-2], x.dtype, x.device.id)
    y = product(cupy.broadcast_to(ones, (*x.shape[:-2], *ones.shape)), x)
    return y.reshape(*x.shape[:-2], x.shape[-1])


# --------------------------------------------------------------------------------------------------------- convolution


def convolve(x: Array, w: Array, b: Array | None, stride: int, pad: tuple, precision: str) -> tuple[Array, Callable]:
    """The plain way, im2col, of a part of the batch at a time so that the columns stay few: two kernels for y, two each
    for the gradients of x and w, one for that of b."""
    (N, H, W, C), (kh, kw, _, O), ((top, bottom), (left, right)) = x.shape, w.shape, pad
    OH, OW, K = (H + top + bottom - kh) // stride + 1, (W + left + right - kw) // stride + 1, kh * kw * C
    pointwise = (kh, kw, stride, pad) == (1, 1, 1, ((0, 0), (0, 0)))  # the columns are x itself
    dtype, images = x.dtype, N if pointwise else max(1, COLUMNS // max(OH * OW * K, H * W * C))
    parts = [slice(start, min(start + images, N)) for start in range(0, N, images)]
    (x, w), (b,) = contiguous(x, w), (None,) if b is None else contiguous(b)
    x, filters = rounded(x, precision), rounded(w.reshape(K, O), precision)

    def rows(y: Array, part: slice) -> Array:
        return y[part].reshape(-1, y.shape[3])

    def columns(part: slice, y: Array | None = None) -> Array:
        """The columns of these images. On the way it sets y, the rows of their outputs, to the bias, to be added to."""
        if pointwise:
            return rows(x, part)
        pixels = len(x[part]) * OH * OW
        cols = cupy.empty((pixels, K), x.dtype)
        arrays = x[part], cols, *((cols, cols) if y is None else (b, y))
        numbers = pixels, H, W, C, OH, OW, kw, K, 0 if y is None else O, stride, top, left
        threads = 32 * -(-K // (32 * -(-K // THREADS)))  # of which few are idle when they come to the last of the K
        kernel("convolution", "gather", x.dtype)((-(-pixels // PIXELS),), (threads,), (*arrays, *numbers))
        return cols

    y = cupy.empty((N, OH, OW, O), dtype)
    on_bias = b is not None and not pointwise
    for part in parts:
        out = rows(y, part)
        product(columns(part, out if on_bias else None), filters, precision, out=out, accumulate=on_bias)
    if b is not None and not on_bias:
        y += b

    def pull(g):
        (g,) = contiguous(g)
        factor = rounded(g, precision)

        def dx():
            dx = cupy.empty((N, H, W, C), dtype)
            if pointwise:
                product(rows(factor, parts[0]), filters.T, precision, out=rows(dx, parts[0]))
                return dx
            for part in parts:
                owed, size = product(rows(factor, part), filters.T, precision), dx[part].size
                numbers = (size, H, W, C, OH, OW, kh, kw, stride, top, left)
                kernel("convolution", "add_up", dtype)((-(-size // THREADS),), (THREADS,), (owed, dx[part], *numbers))
            return dx

        def dw():
            dw = cupy.empty((K, O), dtype)
            for part in parts:
                product(columns(part).T, rows(factor, part), precision, out=dw, accumulate=part is not parts[0])
            return dw.reshape(kh, kw, C, O)

        return dx, dw, lambda: column_sums(g.reshape(-1, O))

    return y, pull


# ---------------------------------------------------------------------------------------------------- group norm, SiLU


def normalise(x: Array, gamma: Array, beta: Array, groups: int, eps: float, silu: bool) -> tuple[Array, Callable]:
    """One kernel forward, and two back: the second adds up the gradients of gamma and beta over the images."""
    N, C = x.shape[0], x.shape[-1]
    (x, gamma, beta), y, L = contiguous(x, gamma, beta), cupy.empty(x.shape, x.dtype), x.size // (N * C)
    means, rstds = cupy.empty((2, N * groups), x.dtype)
    blocks, arrays = ((N * groups,), (THREADS,)), (x, gamma, beta, y, means, rstds)
    kernel("group_norm", "normalise", x.dtype)(*blocks, (*arrays, L, C, groups, float(eps), int(silu)))

    def pull(g):
        dx, of_images = cupy.empty(x.shape, x.dtype), cupy.empty((2, N, C), x.dtype)
        arrays = x, *contiguous(g), gamma, beta, means, rstds, dx, *of_images
        kernel("group_norm", "normalise_grad", x.dtype)(*blocks, (*arrays, L, C, groups, int(silu)))
        dgamma, dbeta = of_images.sum(axis=1)
        return dx, dgamma, dbeta

    return y, pull


# ------------------------------------------------------------------------------------------------------------- softmax


def softmax_rows(x: Array, out: Array | None = None) -> Array:
    """One kernel. `out` is contiguous."""
    y = cupy.empty(x.shape, x.dtype) if out is None else out
    _in_warps("softmax_rows", *contiguous(x), y)
    return y


def softmax_rows_grad(y: Array, g: Array, out: Array | None = None) -> Array:
    """One kernel. `out` is contiguous."""
    dx = cupy.empty(y.shape, y.dtype) if out is None else out
    _in_warps("softmax_rows_grad", *contiguous(y, g), dx)
    return dx


def _in_warps(name: str, *arrays: Array) -> None:
    """Run a kernel that gives a warp, 32 threads, to each row of the arrays."""
    x, size = arrays[0], arrays[0].shape[-1]
    if x.size == 0:
        raise ValueError(f"x: expected rows of numbers, got shape {x.shape}")
    rows = x.size // size
    kernel("softmax", name, x.dtype)((-(-32 * rows // THREADS),), (THREADS,), (*arrays, rows, size))


# --------------------------------------------------------------------------------------------------- element by element

_joined = cupy.ElementwiseKernel(
    "raw T a, raw T b, int64 A, int64 B",
    "T y",
    "ptrdiff_t row = i / (A + B), c = i % (A + B); y = c < A ? a[row * A + c] : b[row * B + c - A]",
    "joined",
)
_silu = cupy.ElementwiseKernel("T x", "T y", "y = x / (1 + exp(-x))", "silu")
_silu_grad = cupy.ElementwiseKernel(
    "T x, T g", "T dx", "T s = 1 / (1 + exp(-x)); dx = g * s * (1 + x * (1 - s))", "silu_grad"
)
_shortening = cupy.ElementwiseKernel(
    "T square, T max_norm",
    "T y",
    "T norm = sqrt(square); y = min((T)1, max_norm / (norm + (T)1e-12)) + 0 * norm",
    "shortening",
)
_adam_update = cupy.ElementwiseKernel(
    "raw T gradient, T c1, T c2, T rate, T root, T eps, T keep",
    "T theta, T m, T v",
    """if (!isnan(gradient[0])) {
           T g = gradient[i];
           m += c1 * (g - m);
           v += c2 * (g * g - v);
           theta = keep * theta - rate * m / (sqrt(v) / root + eps);
       }""",
    "adam_update",
)

_ema_update = cupy.ElementwiseKernel("T theta, T c", "T average", "average += c * (theta - average)", "ema_update")


def joined(*xs: Array, axis: int) -> Array:
    """One kernel for what a U-Net joins, two arrays along the last axis."""
    a, b = xs[0], xs[-1]
    if len(xs) != 2 or axis not in (-1, a.ndim - 1) or a.shape[:-1] != b.shape[:-1]:
        return cupy.concatenate(xs, axis=axis)
    A, B = a.shape[-1], b.shape[-1]
    return _joined(a, b, A, B, cupy.empty((*a.shape[:-1], A + B), a.dtype))


def silu(x: Array) -> tuple[Array, Callable]:
    """One kernel, and one back."""
    return _silu(x), lambda g: _silu_grad(x, g)


def squared_norm(vector: Array) -> Array:
    """cuBLAS's dot. CuPy's own leaves all of it to a single block of threads."""
    (vector,) = contiguous(vector)
    return cupy.cublas.dot(vector, vector)


def shortening(square: Array, max_norm: float) -> Array:
    """One kernel."""
    return _shortening(square, max_norm)


def adam_update(
    theta: Array, gradient: Array, m: Array, v: Array, lr: float, b1: float, b2: float, eps: float, decay: float, n: int
) -> None:
    """One kernel."""
    rate, root = lr / (1 - b1**n), math.sqrt(1 - b2**n)
    _adam_update(gradient, 1 - b1, 1 - b2, rate, root, eps, 1 - lr * decay, theta, m, v)


def ema_update(average: Array, theta: Array, d: float) -> None:
    """One kernel."""
    _ema_update(theta, 1 - d, average)


TWINS = {
    "adam_update": adam_update,
    "batch_gradient": batch_gradient,
    "column_sums": column_sums,
    "convolve": convolve,
    "ema_update": ema_update,
    "erfc": erfc,
    "in_parts": in_parts,
    "joined": joined,
    "normalise": normalise,
    "product": product,
    "shortening": shortening,
    "silu": silu,
    "softmax_rows": softmax_rows,
    "softmax_rows_grad": softmax_rows_grad,
    "squared_norm": squared_norm,
}
