"""3x3 convolution with as few as 5/12 of the multiplications (Winograd 1980; Lavin & Gray 2016, "Fast algorithms for
convolutional neural networks"). What is computed, autograd/conv.py says; this is for speed alone.

r neighbouring outputs of a filter with three taps, y_i = sum_k w_k x_{i+k}, take 3 r multiplications. With three
constant matrices they take r + 2:

    u = G w,   v = B^T x,   m = u * v elementwise,   y = A^T m          w: 3 taps, x: r + 2 inputs, y: r outputs

(Those by the constants do not count: v is made once for each input channel and serves all output channels, and u and y
likewise.) Where they come from (Toom 1963, Cook 1966): a polynomial is known by its values. Let E_n take the n
coefficients of one to its values at r + 2 points, infinity among them (its value there is its last coefficient). The
values of a product are the products of the values, so the product of two that have r and three coefficients, a and w,
is E_{r+2}^-1 ((E_r a) * (E_3 w)). A correlation is that product transposed, so that G = E_3, A = E_r and B^T is the
inverse of E_{r+2}, transposed.

Here this is done down the columns of an image, in tiles of up to r = 8 rows. At each of the r + 2 points there remains
a convolution across, with three taps, which is a matrix product: three neighbours side by side, times 3 C x O numbers
of u. With r = 8 that makes 30 multiplications in place of 72; with r = 7, into which 28, 14 and 7 rows are cut, 27 in
place of 63. (Lavin & Gray do the same across. That takes fewer still, but costs two more transforms, and float32 is not
exact enough for it unless tiles are small: F(4x4, 3x3) took 1.6 times as long with 32 channels, 1.4 with 64, as long
with 128, and a tenth less with 256.)

Two tiles are transformed at once, by a matrix D that holds B^T once for each, and back by S, which holds A^T. They
leave out what lies outside of the image, and add up the overlaps when transposed. So all is matrix products, and the
gradients follow by transposing; u' is of the filters turned around, and `windows` lays three neighbours side by side:

    forward     v = D x,       m = windows(v) u,        y = S m
    backward    dm = S^T dy,   dv = windows(dm) u',     dx = D^T dv,     du' = v^T windows(dm),     dw' = G^T du'

The values at the points are larger than what A^T leaves of them, so float32 results are less exact than direct sums:
on random images and filters they are within 1e-5 of the largest value. An inf or a nan spreads over all rows of each
pair of tiles that it reaches. float64, in which gradients are checked, is left to direct sums.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ..autograd.functional import column_sums
from ..backend import Array

TILE = 8  # rows of outputs, at most: with more, float32 loses too many digits
BAND = 2  # tiles that one matrix transforms: with more, there are more zeros to multiply by
ROWS = 256  # of the matrix at each point, or those of one image: enough for a product, few enough for the cache

# the finite points for tiles of up to so many rows: few digits are lost by what is spread evenly about 1 and -1
POINTS = {
    4: (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2),
    6: (0, 1, -1, 1 / 2, -1 / 2, 2, -2),
    7: (0, 1 / 2, -1 / 2, 7 / 8, -7 / 8, 4 / 3, -4 / 3, 3),
    8: (0, 0.45, -0.45, 0.85, -0.85, 1.2, -1.2, 2.2, -2.2),
}


@functools.cache
def matrices(r: int) -> tuple[Array, Array, Array]:
    """B^T (r+2, r+2), G (r+2, 3) and A^T (r, r+2). The rows of B^T have length 1, and those of G make up for it."""
    points = next(points for most, points in POINTS.items() if r <= most)[: r + 1]

    def E(n: int) -> Array:
        return np.array([[p**k for k in range(n)] for p in points] + [[0] * (n - 1) + [1]])

    B_T = np.linalg.inv(E(r + 2)).T
    length = np.linalg.norm(B_T, axis=1, keepdims=True)
    return B_T / length, E(3) * length, E(r).T


def tile_rows(height: int) -> int:
    """r for images of this height: they are cut into as few tiles as can be, as equal as can be."""
    return math.ceil(height / math.ceil(height / TILE))


class Band(NamedTuple):
    """Up to `BAND` tiles, which compute `outputs`, rows of the result, from `inputs`, those of the image."""

    outputs: slice
    inputs: slice
    D: Array  # (points * tiles, inputs): row p * tiles + i takes the inputs to the value of tile i at point p
    S: Array  # (outputs, points * tiles)
    D_T: Array  # and their transposes
    S_T: Array


@functools.cache
def bands(height: int) -> list[Band]:
    """Cut images of this height into bands."""
    r, found = tile_rows(height), []
    B_T, _, A_T = matrices(r)
    for start in range(0, height, r * BAND):
        stop = min(start + r * BAND, height)
        first, last = max(start - 1, 0), min(stop + 1, height)
        D, S = (np.zeros((r + 2, math.ceil((stop - start) / r), n)) for n in (last - first, stop - start))
        for tile, top in enumerate(range(start, stop, r)):
            for i, row in enumerate(range(top - 1, top + r + 1)):
                if first <= row < last:
                    D[:, tile, row - first] = B_T[:, i]
            for i, row in enumerate(range(top, min(top + r, stop))):
                S[:, tile, row - start] = A_T[i]
        D, S = D.reshape(-1, last - first), S.reshape(-1, stop - start).T
        transforms = (matrix.astype(np.float32, order="C") for matrix in (D, S, D.T, S.T))
        found.append(Band(slice(start, stop), slice(first, last), *transforms))
    return found


def areas(N: int, H: int, W: int) -> list[tuple[slice, Band]]:
    """Cut N images of H x W into what is computed at a time: some of the images, of which a band."""
    tiles = min(BAND, math.ceil(H / tile_rows(H)))
    n = math.ceil(N / math.ceil(N / max(1, ROWS // (tiles * W))))  # equally many images each time
    return [(slice(i, i + n), band) for i in range(0, N, n) for band in bands(H)]


def fits(x: Array, w: Array, stride: int, pad: tuple) -> bool:
    """Whether `conv3x3` can convolve x with w, and is faster: not with few rows, or few pixels for the channels."""
    same = w.shape[:2] == (3, 3) and stride == 1 and pad == ((1, 1), (1, 1)) and x.shape[1] >= 4
    return same and x.dtype == np.float32 and x.size // x.shape[3] >= max(128, *w.shape[2:])


def filters(w: Array, r: int) -> Array:
    """u = G w, down: (3, 3, C, O) -> (r + 2, 3 C, O)."""
    _, _, C, O = w.shape
    return (matrices(r)[1].astype(np.float32) @ w.reshape(3, -1)).reshape(r + 2, 3 * C, O)


def turned_filters(w: Array, r: int) -> Array:
    """u': u of the filters turned around across, C and O exchanged: (3, 3, C, O) -> (r + 2, 3 O, C)."""
    return filters(np.ascontiguousarray(w[:, ::-1].swapaxes(2, 3)), r)


def filters_grad(du: Array, r: int) -> Array:
    """dw from du' (r + 2, C, 3 O): (3, 3, C, O)."""
    _, C, O = du.shape
    dw = (matrices(r)[1].T.astype(np.float32) @ du.reshape(r + 2, -1)).reshape(3, C, 3, O // 3)
    return np.ascontiguousarray(dw.swapaxes(1, 2)[:, ::-1])


def conv3x3(x: Array, w: Array, b: Array | None) -> tuple[Array, Callable]:
    """The op: y (N, H, W, O), of images x (N, H, W, C) with a pixel of zeros around, filters w (3, 3, C, O) and b (O,);
    and its `pull`."""
    N, H, W, C = x.shape
    r, parts, O = tile_rows(H), areas(N, H, W), w.shape[3]
    u, y = _constant(filters, w, r), np.empty((N, H, W, O), np.float32)
    for images, band in parts:
        v = to_points(band.D, x[images, band.inputs], around=1)
        y_part = from_points(band.S, windows(v, r) @ u, out=y[images, band.outputs])
        if b is not None:
            y_part += b

    def pull(dy):
        u_turned, du = _constant(turned_filters, w, r), None
        dx = (np.empty if len(bands(H)) == 1 else np.zeros)(x.shape, np.float32)
        for images, band in parts:
            dm = windows(to_points(band.S_T, dy[images, band.outputs], around=1), r)
            v = to_points(band.D, x[images, band.inputs]).reshape(r + 2, -1, C)
            part = v.swapaxes(1, 2) @ dm
            du = part if du is None else np.add(du, part, out=du)
            dx_part, dv = dx[images, band.inputs], dm @ u_turned
            if len(bands(H)) == 1:
                from_points(band.D_T, dv, out=dx_part)
            else:  # inputs of neighbours overlap
                dx_part += from_points(band.D_T, dv, out=np.empty(dx_part.shape, np.float32))
        return dx, filters_grad(du, r), lambda: column_sums(dy.reshape(-1, O))

    return y, pull


def to_points(down: Array, x: Array, around: int = 0) -> Array:
    """D x, or S^T x, for images x (n, h, W, C): (R, n, W + 2 around, C), R = points * tiles, with zeros around."""
    n, h, W, C = x.shape
    v = np.empty((len(down), n, W + 2 * around, C), np.float32)
    if around:
        v[:, :, 0] = v[:, :, -1] = 0
    inside = v.reshape(len(down), n, -1)[:, :, around * C : (W + around) * C]
    np.matmul(down, x.reshape(n, h, W * C), out=inside.swapaxes(0, 1))
    return v


def windows(v: Array, r: int) -> Array:
    """Three neighbours side by side: (R, n, W + 2, C) -> (points, rows, 3 C), a row for each tile, image and column."""
    R, n, W, C = v.shape
    views = np.ndarray((R, n, W - 2, 3 * C), v.dtype, v, strides=v.strides)
    return views.reshape(r + 2, -1, 3 * C)  # copies


def from_points(back: Array, m: Array, out: Array) -> Array:
    """S m, or D^T m, of m (points, rows, C) in the order of `windows`, written to `out` (n, h, W, C)."""
    n, h, W, C = out.shape
    m = m.reshape(back.shape[1], n, W * C).swapaxes(0, 1)
    np.matmul(back, m, out=out.reshape(n, h, W * C))
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

    def get(self, transform: Callable, w: Array, r: int) -> Array:
        """transform(w, r), kept from the first time on if w is one of the model's."""
        if id(w) not in self._kept:
            return transform(w, r)
        _, results = self._kept[id(w)]
        with self._lock:
            if (transform, r) not in results:
                results[transform, r] = transform(w, r)
            return results[transform, r]


class _InForce(threading.local):
    filters: ConstantFilters | None = None


_in_force = _InForce()


def _constant(transform: Callable, w: Array, r: int) -> Array:
    return _in_force.filters.get(transform, w, r) if _in_force.filters else transform(w, r)
