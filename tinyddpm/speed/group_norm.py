"""Group norm with SiLU in few passes over memory: the twin of `normalise` in autograd/fused.py, which says what it is.

NumPy reads and writes the whole activation for each operation, so what counts is how many there are, and how fast each
is. Here gamma, rstd and mean are made one factor and one summand for each channel, pixels that lie side by side are
taken as one long row, and sums over positions are matrix products. The exponential takes about as much time as
everything else together, so it is computed once: what comes of it is kept for the way back.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..backend import Array


def normalise(x: Array, gamma: Array, beta: Array, groups: int, eps: float, silu: bool) -> tuple[Array, Callable]:
    """The twin of `autograd.fused.normalise`; formulas and arguments are there."""
    N, C = x.shape[0], x.shape[-1]
    # L positions in an image, of which W stand side by side in a row of `rows`: for speed only, 1 would do
    shape, L, W = x.shape, x.size // (N * C), x.shape[-2] if x.ndim > 3 else 1
    of_positions, of_channels = np.ones(L, x.dtype), np.ones(C // groups, x.dtype)

    def rows(x: Array) -> Array:
        return x.reshape(N, L // W, W * C)  # of W pixels: NumPy is fast where the last axis is long

    def each(values: Array) -> Array:
        """One value for each channel, (N, C) or (1, C) -> (..., 1, W C), to go with `rows`."""
        return values[:, None].repeat(W, axis=1).reshape(-1, 1, W * C)

    def sums(x: Array) -> Array:
        """Sum of each channel over its L positions: (N, C)."""
        return of_positions @ x.reshape(N, L, C)

    def group_mean(sums: Array) -> Array:
        """The mean over the group of each channel: (N, C)."""
        means = sums.reshape(N * groups, -1) @ of_channels
        means *= groups / (L * C)
        return means.repeat(C // groups).reshape(N, C)

    def affine(a: Array, b: Array) -> Array:
        y = d * each(a)
        y += each(b)
        return y

    d = rows(x) - each(group_mean(sums(x)))  # xhat = rstd d
    rstd = 1 / np.sqrt(group_mean(sums(d * d)) + eps)
    a, b = rstd * gamma, beta[None]
    if silu:  # of z = a d + b, y = z / (1 + e^-z); here with -z, and -(1 + e^-z)
        y = affine(-a, -b)
        with np.errstate(over="ignore"):  # where e^-z overflows to infinity the result is 0, as it should be
            bottom = np.exp(y)
        np.subtract(-1, bottom, out=bottom)
        y /= bottom
    else:
        y = affine(a, b)

    def pull(g):
        dz = rows(g)
        if silu:  # dz = g (sigma + y (1 - sigma)), where sigma is -1 / bottom
            minus_sigma = 1 / bottom
            slope = minus_sigma + 1
            slope *= y
            slope -= minus_sigma
            slope *= dz
            dz = slope
        dbeta, dgamma = sums(dz), rstd * sums(dz * d)  # (N, C), of each image
        dx = affine(rstd * -group_mean(dgamma * a), -group_mean(dbeta * a))
        # dxhat = gamma dz, which loses its mean, and its projection on xhat, over each group
        dx += np.multiply(dz, each(a), out=dz if silu else None)
        return dx.reshape(shape), dgamma.sum(axis=0), dbeta.sum(axis=0)

    return y.reshape(shape), pull
