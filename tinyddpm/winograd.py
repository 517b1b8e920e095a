"""3x3 convolution with half the multiplications (Winograd 1980; Lavin & Gray 2016, "Fast algorithms for convolutional
neural networks").

Four neighbouring outputs of a filter with three taps take 12 multiplications. With constant matrices A, B, G they take
6:

    y = A^T ((G w) * (B^T x))       x: 6 inputs, w: 3 taps, y: 4 outputs, * elementwise

That is Lavin & Gray's F(4, 3). It is applied along the height, to tiles of six rows that overlap by two. Along the
width and over the channels the product remains a sum, and so a matrix product: six of them, one for each row of B^T x,
in place of twelve. The gradient for the filters follows by transposing, dw = G^T ((A dy) * (B^T x)), summed over all
tiles.

Nothing is copied side by side for these products. Rows of pixels lie one after the other with a zero pixel between, the
right padding of one and the left padding of the next, so that the three pixels under a filter are 3 C numbers in a row;
and as every third such window begins where another ends, three matrices hold them all.

Since A and B have entries up to 8, float32 results are less exact than direct sums: within 1e-5 of the largest value
instead of 1e-6. conv.py leaves float64, in which gradients are checked, to direct sums.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .backend import Array

B_T = np.float32(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
G = np.float32([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
A_T = np.float32([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])

PIXELS = 3200  # of a chunk of images: few enough to stay near the CPU, enough for Python to cost little


def filters(w: Array) -> Array:
    """G w along the height: (3, 3, C, O) -> (6, 3 C, O)."""
    _, _, C, O = w.shape
    return (G @ w.reshape(3, -1)).reshape(6, 3 * C, O)


def correlate(x: Array, u: Array) -> Array:
    """Convolve x (N, H, W, C) with u = `filters`(w), stride 1, one pixel of zeros around: -> (N, H, W, O)."""
    N, H, W, _ = x.shape
    O, T = u.shape[2], -(-H // 4)  # T tiles of 4 rows of y
    y = np.empty((N, H, W, O), np.float32)
    for chunk in _chunks(N, T, W):
        pixels, windows = _windows(x[chunk])
        m = np.empty((6, pixels, O), np.float32)
        for r in range(3):
            np.matmul(windows[r], u, out=m[:, r::3])
        y[chunk] = (A_T @ _tiles(m, T, W)).reshape(-1, 4 * T, W, O)[:, :H]
    return y


def correlate_grad_w(x: Array, g: Array) -> Array:
    """Gradient of `correlate` for w, from dL/dy = g (N, H, W, O): -> (3, 3, C, O)."""
    N, H, W, C = x.shape
    O, T = g.shape[3], -(-H // 4)
    du = np.zeros((6, 3 * C, O), np.float32)
    for chunk in _chunks(N, T, W):
        pixels, windows = _windows(x[chunk])
        rows = np.zeros((len(x[chunk]), 4 * T, W * O), np.float32)
        rows[:, :H] = g[chunk].reshape(-1, H, W * O)
        d = np.zeros((6, pixels, O), np.float32)
        np.matmul(A_T.T, rows.reshape(-1, T, 4, W * O), out=_tiles(d, T, W))
        for r in range(3):
            du += windows[r].swapaxes(1, 2) @ d[:, r::3]
    return (G.T @ du.reshape(6, -1)).reshape(3, 3, C, O)


def _chunks(N: int, T: int, W: int) -> list[slice]:
    """Cut N images of T tiles into pieces of about `PIXELS`."""
    n = max(1, PIXELS // (4 * T * (W + 1)))
    return [slice(i, i + n) for i in range(0, N, n)]


def _windows(x: Array) -> tuple[int, list[Array]]:
    """B^T x for images x (n, H, W, C): the number P = n T (W + 1) of its pixels, zeros between the rows included, and
    its windows of three pixels, (6, P/3, 3 C): those around the pixels 0, 3, 6 ..., around 1, 4, 7 ... and 2, 5, 8 ...
    """
    n, H, W, C = x.shape
    T = -(-H // 4)
    rows = np.zeros((n, 4 * T + 2, W * C), np.float32)
    rows[:, 1 : H + 1] = x.reshape(n, H, W * C)
    image, row, number = rows.strides
    overlapping = as_strided(rows, (n, T, 6, W * C), (image, 4 * row, row, number))
    P = n * T * (W + 1)
    v = np.zeros((6, 1 + P + 1, C), np.float32)  # a zero before and one after
    np.matmul(B_T, overlapping, out=_tiles(v[:, 1 : 1 + P], T, W))
    plane, pixel, number = v.strides
    return P, [as_strided(v[:, r:], (6, -(-(P - r) // 3), 3 * C), (plane, 3 * pixel, number)) for r in range(3)]


def _tiles(v: Array, T: int, W: int) -> Array:
    """View v (6, n T (W + 1), C) as (n, T, 6, W C): each tile's six rows, without the zeros between."""
    C = v.shape[2]
    return v.reshape(6, -1, T, (W + 1) * C)[..., : W * C].transpose(1, 2, 0, 3)
