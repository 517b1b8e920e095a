"""3x3 convolution with half the multiplications (Winograd 1980; Lavin & Gray 2016, "Fast algorithms for convolutional
neural networks"). To be skipped at a first reading: conv.py says what is computed.

Four neighbouring outputs of a filter with three taps, y_i = sum_k w_k x_{i+k}, take 12 multiplications. With three
constant matrices they take 6:

    u = G w,   v = B^T x,   m = u * v elementwise,   y = A^T m          w: 3 taps, x: 6 inputs, y: 4 outputs

This is Lavin & Gray's F(4, 3). The sums are coefficients of a product of two polynomials, and a polynomial is known by
its values: each row of G evaluates w at one of the points p = 0, 1, -1, 2, -2 and infinity (1, p, p^2, times a
constant), each column of A^T holds 1, p, p^2, p^3 for the same point, and B^T is what then makes it true. It is applied
along the height, to tiles of six rows that overlap by two. Along the width and over the channels the product remains a
sum, and so a matrix product: six of them, one for each row of v, in place of twelve. The gradient for the filters
follows by transposing, dw = G^T ((A dy) * v), summed over all tiles.

Nothing is copied side by side for these products. Rows of pixels lie one after the other with a zero pixel between, the
right padding of one and the left padding of the next, so that the three pixels under a filter are 3 C numbers in a row;
and as every third such window begins where another ends, three matrices hold them all.

The products are larger than what A^T leaves of them, so float32 results are less exact than direct sums: on random
images and filters up to 15 times, but within 1e-5 of the largest value. An inf or a nan reaches all four outputs of its
tile. float64, in which gradients are checked, is left to direct sums.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .backend import Array

B_T = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float32,
)
G = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float32) / 24
A_T = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float32)


def filters(w: Array) -> Array:
    """u = G w along the height: (3, 3, C, O) -> (6, 3 C, O)."""
    _, _, C, O = w.shape
    return (G @ w.reshape(3, -1)).reshape(6, 3 * C, O)


def correlate(x: Array, u: Array) -> Array:
    """Convolve x (N, H, W, C) with u = `filters`(w), stride 1, one pixel of zeros around: -> (N, H, W, O)."""
    N, H, W, _ = x.shape
    O, T = u.shape[2], _tile_count(H)
    m = np.empty((6, N * T * (W + 1), O), np.float32)
    for r, windows in enumerate(_windows(x)):
        np.matmul(windows, u, out=m[:, r::3])
    y = A_T @ _tiles(m, T, W)  # what m holds between the rows is of no use, and left out
    return y.reshape(N, 4 * T, W, O)[:, :H]


def correlate_grad_w(x: Array, dy: Array) -> Array:
    """Gradient of `correlate` for w, from dL/dy (N, H, W, O): -> (3, 3, C, O)."""
    N, H, W, C = x.shape
    O, T = dy.shape[3], _tile_count(H)
    rows = np.zeros((N, 4 * T, W, O), np.float32)
    rows[:, :H] = dy
    dm = np.zeros((6, N * T * (W + 1), O), np.float32)  # zeros, for between the rows there is no output
    np.matmul(A_T.T, rows.reshape(N, T, 4, W * O), out=_tiles(dm, T, W))
    du = sum(windows.swapaxes(1, 2) @ dm[:, r::3] for r, windows in enumerate(_windows(x)))
    return (G.T @ du.reshape(6, -1)).reshape(3, 3, C, O)


def _tile_count(H: int) -> int:
    """How many tiles give H rows of outputs, four each."""
    return -(-H // 4)


def _windows(x: Array) -> list[Array]:
    """v = B^T x for images x (N, H, W, C), as windows of three pixels, (6, P/3, 3 C) each: those around the pixels 0,
    3, 6 ..., around 1, 4, 7 ... and around 2, 5, 8 ... of all P = N T (W + 1), the zeros between the rows included."""
    N, H, W, C = x.shape
    T = _tile_count(H)
    P = N * T * (W + 1)
    rows = np.zeros((N, 4 * T + 2, W, C), np.float32)
    rows[:, 1 : H + 1] = x
    overlapping = sliding_window_view(rows.reshape(N, -1, W * C), 6, axis=1)[:, ::4].swapaxes(2, 3)
    v = np.zeros((6, 1 + P + 1, C), np.float32)  # a zero before and one after
    np.matmul(B_T, overlapping, out=_tiles(v[:, 1 : 1 + P], T, W))
    counts = [len(range(r, P, 3)) for r in range(3)]
    return [v[:, r : r + 3 * k].reshape(6, k, 3 * C) for r, k in enumerate(counts)]


def _tiles(v: Array, T: int, W: int) -> Array:
    """View v (6, N T (W + 1), C) as (N, T, 6, W C): each tile's six rows, without the pixels between."""
    C = v.shape[2]
    return v.reshape(6, -1, T, (W + 1) * C)[..., : W * C].transpose(1, 2, 0, 3)
