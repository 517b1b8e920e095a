"""3x3 convolution with a quarter of the multiplications (Winograd 1980; Lavin & Gray 2016, "Fast algorithms for
convolutional neural networks"). To be skipped at a first reading: conv.py says what is computed.

Four neighbouring outputs of a filter with three taps, y_i = sum_k w_k x_{i+k}, take 12 multiplications. With three
constant matrices they take 6:

    u = G w,   v = B^T x,   m = u * v elementwise,   y = A^T m          w: 3 taps, x: 6 inputs, y: 4 outputs

Where they come from (Toom 1963, Cook 1966): a polynomial is known by its values, so the product of one of degree 3 and
one of degree 2 is E^-1 ((E a) * (E w)), where E takes the six coefficients of a polynomial to its values at six points,
infinity among them (its value there is the last coefficient). A correlation is that product transposed: G and A are the
first three and four columns of E, and B^T is the inverse, transposed. In two dimensions each is applied down and
across, Lavin & Gray's F(4x4, 3x3): 36 multiplications in place of 144 for a tile of 4x4 outputs, from 6x6 inputs,
neighbours of which overlap by two. At each of the 36 pairs of points the sum over channels remains, a matrix product.

A row of tiles is transformed at once, by one matrix that holds B^T, or A^T, once for each tile. It is mostly zeros, but
it leaves out what lies outside of the image, it adds up the overlaps when it is transposed, and BLAS is fast at it.
All that is left are matrix products: with V = D X D'^T, U and M, Y for whole images,

    forward     v = D x D'^T,     m = v u,        y = A m A'^T
    backward    dm = A^T dy A',   dv = dm u^T,    dx = D^T dv D',    du = v^T dm,    dw = G^T du G

The values at the points are larger than what A^T leaves of them, so float32 results are less exact than direct sums: on
random images and filters up to 15 times, but within 1e-5 of the largest value. An inf or a nan reaches all outputs of
its band. float64, in which gradients are checked, is left to direct sums.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from .backend import Array
from .functional import column_sums

POINTS = (0, 1, -1, 1 / 2, -2)  # and infinity; of the small fractions, these lose the fewest digits
BAND = 4  # tiles that one matrix transforms


def _matrices(points: tuple[float, ...]) -> tuple[Array, ...]:
    """B^T (6, 6), G (6, 3) and A^T (4, 6) as derived above, with the rows of B^T brought to length 1."""
    E = np.array([[p**k for k in range(6)] for p in points] + [[0, 0, 0, 0, 0, 1]])
    B_T = np.linalg.inv(E).T
    length = np.linalg.norm(B_T, axis=1, keepdims=True)
    return B_T / length, (E[:, :3] * length).astype(np.float32), E[:, :4].T


B_T, G, A_T = _matrices(POINTS)


class Band(NamedTuple):
    """The tiles that give `outputs`, some rows (or columns) of the result, from `inputs`, those of the image."""

    outputs: slice
    inputs: slice
    D: Array  # (6 tiles, inputs): B^T of each tile
    A: Array  # (outputs, 6 tiles): A^T of each tile
    D_T: Array  # and both transposed
    A_T: Array


@functools.cache
def bands(size: int) -> list[Band]:
    """Cut `size` rows or columns into bands of up to `BAND` tiles. Points come first: row p T + t is point p of tile t."""
    found = []
    for start in range(0, size, 4 * BAND):
        stop = min(start + 4 * BAND, size)
        first, last = max(start - 1, 0), min(stop + 1, size)
        T = -(-(stop - start) // 4)
        D, A = np.zeros((6, T, last - first)), np.zeros((stop - start, 6, T))
        for t in range(T):
            for i, row in enumerate(range(start + 4 * t - 1, start + 4 * t + 5)):
                if first <= row < last:
                    D[:, t, row - first] = B_T[:, i]
            for i, row in enumerate(range(4 * t, min(4 * t + 4, stop - start))):
                A[row, :, t] = A_T[i]
        D, A = D.reshape(6 * T, -1), A.reshape(-1, 6 * T)
        matrices = (a.astype(np.float32, order="C") for a in (D, A, D.T, A.T))
        found.append(Band(slice(start, stop), slice(first, last), *matrices))
    return found


def filters(w: Array) -> Array:
    """u = G w G^T: (3, 3, C, O) -> (36, C, O)."""
    _, _, C, O = w.shape
    return (G @ (G @ w.reshape(3, -1)).reshape(6, 3, C * O)).reshape(36, C, O)


def transposed_filters(w: Array) -> Array:
    """`filters`(w) with C and O exchanged: (3, 3, C, O) -> (36, O, C), laid out so in memory, where BLAS reads it fast."""
    return filters(np.ascontiguousarray(w.swapaxes(2, 3)))


class ConstantFilters:
    """Keeps the transforms of a model's filters, for all threads, for as long as the filters do not change."""

    def __init__(self):
        self.lock, self.version, self.kept = threading.Lock(), None, {}

    @contextlib.contextmanager
    def of(self, version: object) -> Iterator[None]:
        """Within this block, in this thread, filters are transformed once for all blocks of the same `version`."""
        with self.lock:
            if version != self.version:
                self.version, self.kept = version, {}
        before, _in_force.filters = _in_force.filters, self
        try:
            yield
        finally:
            _in_force.filters = before

    def get(self, transform: Callable, w: Array) -> Array:
        """transform(w), computed if it is not there yet."""
        key = transform, id(w)
        with self.lock:
            if key not in self.kept:
                self.kept[key] = transform(w), w  # with w itself, so that no other array gets its id
            return self.kept[key][0]


class _InForce(threading.local):
    filters: ConstantFilters | None = None


_in_force = _InForce()


def _once(transform: Callable, w: Array) -> Array:
    return _in_force.filters.get(transform, w) if _in_force.filters else transform(w)


def conv3x3(x: Array, w: Array, b: Array | None) -> tuple[Array, Callable]:
    """x (N, H, W, C) convolved with w (3, 3, C, O), one pixel of zeros around, plus b (O,): y (N, H, W, O), and pull."""
    N, H, W, C = x.shape
    areas = [(down, across) for down in bands(H) for across in bands(W)]
    u = _once(filters, w)
    y = np.empty((N, H, W, w.shape[3]), np.float32)
    for down, across in areas:
        m = _product(_to_points(down.D, across.D, x[:, down.inputs, across.inputs]), u)
        if b is not None:
            m[7] += b  # what stands at the points (1, 1) enters each of the 16 outputs once
        _from_points(down.A, across.A, m, out=y[:, down.outputs, across.outputs])

    def pull(dy):
        u_T = _once(transposed_filters, w)
        dx, du = np.empty_like(x) if len(areas) == 1 else np.zeros_like(x), None
        for down, across in areas:
            inputs = slice(None), down.inputs, across.inputs
            dm = _to_points(down.A_T, across.A_T, dy[:, down.outputs, across.outputs])
            du_part = _product(_to_points(down.D, across.D, x[inputs]).swapaxes(1, 2), dm)
            du = du_part if du is None else np.add(du, du_part, out=du)
            part = dx if len(areas) == 1 else np.empty(dx[inputs].shape, np.float32)
            _from_points(down.D_T, across.D_T, _product(dm, u_T), out=part)
            if part is not dx:  # areas overlap by two pixels
                dx[inputs] += part
        dw = (G.T @ (G.T @ du.reshape(6, 6, -1)).reshape(6, -1)).reshape(w.shape)
        return dx, dw, lambda: column_sums(dy.reshape(-1, w.shape[3]))

    return y, pull


def _to_points(down: Array, across: Array, x: Array) -> Array:
    """down X across^T for images x (n, h, w, C): (36, R, C), with R = tiles down x tiles across x n."""
    n, h, w, C = x.shape
    T, K = len(down) // 6, len(across) // 6
    half = (down @ x.reshape(n, h, w * C)).reshape(n, 6, T, w, C)
    v = np.empty((6, 6 * K, T, n, C), np.float32)
    np.matmul(across, half.transpose(1, 2, 0, 3, 4), out=v.transpose(0, 2, 3, 1, 4))
    return v.reshape(36, K * T * n, C)


def _from_points(down: Array, across: Array, m: Array, out: Array) -> None:
    """Write down M across^T, for m (36, R, C) as above, to out (n, h, w, C)."""
    n, h, w, C = out.shape
    T, K = down.shape[1] // 6, across.shape[1] // 6
    half = np.empty((n, 6, T, w, C), np.float32)
    np.matmul(across, m.reshape(6, 6 * K, T, n, C).transpose(0, 2, 3, 1, 4), out=half.transpose(1, 2, 0, 3, 4))
    np.matmul(down, half.reshape(n, 6 * T, w * C), out=out.reshape(n, h, w * C))


def _product(a: Array, b: Array) -> Array:
    """a @ b, in parts of up to a million multiplications where rows can be cut so: those OpenBLAS does at once, without
    copying its operands into its own order first, which takes a third off."""
    P, M, K = a.shape
    N, rows = b.shape[2], M
    while rows % 2 == 0 and rows > 32 and rows * K * N > 1e6:
        rows //= 2
    if rows * K * N > 1e6:
        rows = M
    return (a.reshape(P, M // rows, rows, K) @ b[:, None]).reshape(P, M, N)
