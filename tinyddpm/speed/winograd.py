"""3x3 convolution with a quarter of the multiplications (Winograd 1980; Lavin & Gray 2016, "Fast algorithms for
convolutional neural networks"). What is computed, autograd/conv.py says; this is for speed alone.

Four neighbouring outputs of a filter with three taps, y_i = sum_k w_k x_{i+k}, take 12 multiplications. With three
constant matrices they take 6:

    u = G w,   v = B^T x,   m = u * v elementwise,   y = A^T m          w: 3 taps, x: 6 inputs, y: 4 outputs

(Those by the constants do not count: v is made once for each input channel and serves all output channels, and u and y
likewise.) Where they come from (Toom 1963, Cook 1966): a polynomial is known by its values. Let E_n take the n
coefficients of one to its values at six points, infinity among them (its value there is its last coefficient). The
values of a product are the products of the values, so the product of two that have four and three coefficients, a and
w, is E_6^-1 ((E_4 a) * (E_3 w)). A correlation is that product transposed, so that G = E_3, A = E_4 and B^T is the
inverse of E_6, transposed. In two dimensions each is applied down and across, Lavin & Gray's F(4x4, 3x3): 36
multiplications in place of 144 for a tile of 4x4 outputs, from 6x6 inputs, neighbours of which overlap by two. At each
of the 36 pairs of points the sum over channels remains, a matrix product.

A row of tiles is transformed at once, by a matrix D that holds B^T once for each tile, and back by S, which holds A^T.
They are mostly zeros, but leave out what lies outside of the image, add up the overlaps when transposed, and BLAS is
fast at it. So all is matrix products, D and S down the images and D' and S' across them, and the gradients follow by
transposing; v u multiplies channels, at each of the 36 points:

    forward     v = D x D'^T,       m = v u,         y = S m S'^T
    backward    dm = S^T dy S',     dv = dm u^T,     dx = D^T dv D',     du = v^T dm,     dw = G^T du G

The values at the points are larger than what A^T leaves of them, so float32 results are less exact than direct sums: on
random images and filters up to 20 times, but within 1e-5 of the largest value. An inf or a nan spreads over all of the
16x16 outputs that are computed together with what it reaches. float64, in which gradients are checked, is left to
direct sums.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ..autograd.functional import column_sums
from ..backend import Array

POINTS = (0, 1, -1, 1 / 2, -2)  # and infinity; of the small fractions, these lose the fewest digits
BAND = 4  # tiles that one matrix transforms: with more, there are more zeros to multiply by


def _matrices() -> tuple[Array, Array, Array]:
    """B^T (6, 6), G (6, 3) and A^T (4, 6), with the rows of B^T brought to length 1 and those of G made up for it."""
    E_3, E_4, E_6 = (np.array([[p**k for k in range(n)] for p in POINTS] + [[0] * (n - 1) + [1]]) for n in (3, 4, 6))
    B_T = np.linalg.inv(E_6).T
    length = np.linalg.norm(B_T, axis=1, keepdims=True)
    return B_T / length, E_3 * length, E_4.T


B_T, G, A_T = _matrices()


class Band(NamedTuple):
    """Up to `BAND` tiles, which compute `outputs`, rows or columns of the result, from `inputs`, those of the image."""

    outputs: slice
    inputs: slice
    D: Array  # (6 tiles, inputs): row p * tiles + i takes the inputs to the value of tile i at point p
    S: Array  # (outputs, 6 tiles)
    D_T: Array  # and their transposes
    S_T: Array


@functools.cache
def bands(size: int) -> list[Band]:
    """Cut `size` rows or columns into bands."""
    found = []
    for start in range(0, size, 4 * BAND):
        stop = min(start + 4 * BAND, size)
        first, last = max(start - 1, 0), min(stop + 1, size)
        D, S = (np.zeros((6, -(-(stop - start) // 4), n)) for n in (last - first, stop - start))
        for tile, top in enumerate(range(start, stop, 4)):
            for i, row in enumerate(range(top - 1, top + 5)):
                if first <= row < last:
                    D[:, tile, row - first] = B_T[:, i]
            for i, row in enumerate(range(top, min(top + 4, stop))):
                S[:, tile, row - start] = A_T[i]
        D, S = D.reshape(-1, last - first), S.reshape(-1, stop - start).T
        matrices = (matrix.astype(np.float32, order="C") for matrix in (D, S, D.T, S.T))
        found.append(Band(slice(start, stop), slice(first, last), *matrices))
    return found


def fits(x: Array, w: Array, stride: int, pad: tuple) -> bool:
    """Whether `conv3x3` can convolve x with w, and is faster: not with few channels, or few pixels for them."""
    same = w.shape[:2] == (3, 3) and stride == 1 and pad == ((1, 1), (1, 1))
    pixels = x.size // x.shape[3]
    return same and x.dtype == np.float32 and min(w.shape[2:]) >= 8 and pixels >= max(128, *w.shape[2:])


def filters(w: Array) -> Array:
    """u = G w G^T: (3, 3, C, O) -> (36, C, O)."""
    g, (_, _, C, O) = G.astype(np.float32), w.shape
    return (g @ (g @ w.reshape(3, -1)).reshape(6, 3, C * O)).reshape(36, C, O)


def transposed_filters(w: Array) -> Array:
    """u with C and O exchanged, and laid out so in memory, where BLAS reads it fast: (3, 3, C, O) -> (36, O, C)."""
    return filters(np.ascontiguousarray(w.swapaxes(2, 3)))


def filters_grad(du: Array) -> Array:
    """Gradient of `filters`, dw = G^T du G: (36, C, O) -> (3, 3, C, O)."""
    g, (_, C, O) = G.T.astype(np.float32), du.shape
    return (g @ (g @ du.reshape(6, 6, C * O)).reshape(6, -1)).reshape(3, 3, C, O)


def conv3x3(x: Array, w: Array, b: Array | None) -> tuple[Array, Callable]:
    """The op: y (N, H, W, O), of images x (N, H, W, C) with a pixel of zeros around, filters w (3, 3, C, O) and b (O,);
    and its `pull`."""
    N, H, W, _ = x.shape
    areas = [(down, across) for down in bands(H) for across in bands(W)]
    u = _constant(filters, w)
    y = np.empty((N, H, W, w.shape[3]), np.float32)
    for down, across in areas:
        m = _to_points(down.D, across.D, x[:, down.inputs, across.inputs]) @ u
        if b is not None:
            m[7] += b  # 7 = 6 * 1 + 1: what stands at the points (1, 1), POINTS[1] twice, enters each output once
        _from_points(down.S, across.S, m, out=y[:, down.outputs, across.outputs])

    def pull(dy):
        u_T, du = _constant(transposed_filters, w), None
        dx = (np.empty if len(areas) == 1 else np.zeros)(x.shape, np.float32)
        for down, across in areas:
            inside = slice(None), down.inputs, across.inputs
            dm = _to_points(down.S_T, across.S_T, dy[:, down.outputs, across.outputs])
            part = _to_points(down.D, across.D, x[inside]).swapaxes(1, 2) @ dm
            du = part if du is None else np.add(du, part, out=du)
            dv = dm @ u_T
            if len(areas) == 1:
                _from_points(down.D_T, across.D_T, dv, out=dx)
            else:  # inputs of neighbours overlap
                dx[inside] += _from_points(down.D_T, across.D_T, dv, out=np.empty(dx[inside].shape, np.float32))
        return dx, filters_grad(du), lambda: column_sums(dy.reshape(-1, w.shape[3]))

    return y, pull


def _to_points(down: Array, across: Array, x: Array) -> Array:
    """down x across^T for images x (n, h, w, C): (36, R, C), with R = tiles across * tiles down * n."""
    n, h, w, C = x.shape
    T, K = len(down) // 6, len(across) // 6
    half = (down @ x.reshape(n, h, w * C)).reshape(n, 6, T, w, C)
    v = np.empty((6, 6 * K, T, n, C), np.float32)
    np.matmul(across, half.transpose(1, 2, 0, 3, 4), out=v.transpose(0, 2, 3, 1, 4))
    return v.reshape(36, K * T * n, C)


def _from_points(down: Array, across: Array, m: Array, out: Array) -> Array:
    """down m across^T, of m (36, R, C) as above, written to `out` (n, h, w, C)."""
    n, h, w, C = out.shape
    T, K = down.shape[1] // 6, across.shape[1] // 6
    half = np.empty((n, 6, T, w, C), np.float32)
    np.matmul(across, m.reshape(6, 6 * K, T, n, C).transpose(0, 2, 3, 1, 4), out=half.transpose(1, 2, 0, 3, 4))
    np.matmul(down, half.reshape(n, 6 * T, w * C), out=out.reshape(n, h, w * C))
    return out


class ConstantFilters:
    """Keeps the transforms of the filters among a model's parameters, for all threads, since a sampler calls one model
    again and again; no filter may change meanwhile.

    A model without `parameters()` may compute its filters anew each time, so nothing is kept of it.
    """

    def __init__(self, model: Callable):
        # the arrays are held as well, so that no other gets the id of one
        self._kept = {id(p.data): (p.data, {}) for p in getattr(model, "parameters", list)()}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Within this block, in this thread, what is kept is used."""
        before, _in_force.filters = _in_force.filters, self
        try:
            yield
        finally:
            _in_force.filters = before

    def get(self, transform: Callable, w: Array) -> Array:
        """transform(w), kept from the first time on if w is one of the model's."""
        if id(w) not in self._kept:
            return transform(w)
        _, results = self._kept[id(w)]
        with self._lock:
            if transform not in results:
                results[transform] = transform(w)
            return results[transform]


class _InForce(threading.local):
    filters: ConstantFilters | None = None


_in_force = _InForce()


def _constant(transform: Callable, w: Array) -> Array:
    return _in_force.filters.get(transform, w) if _in_force.filters else transform(w)
