"""Group norm with SiLU in few passes over memory: the twin of `normalise` in autograd/fused.py, which says what it is.

NumPy reads and writes the whole activation for each operation, so what counts is how many there are, and how fast each
is. Here gamma, rstd and mean are made one factor and one summand for each channel, pixels that lie side by side are
taken as one long row, sums over positions are matrix products, and SiLU is a tanh and no division.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..autograd.functional import column_sums
from ..backend import Array


def normalise(x: Array, gamma: Array, beta: Array, groups: int, eps: float, silu: bool) -> tuple[Array, Callable]:
    """The twin of `autograd.fused.normalise`; formulas and arguments are there."""
    N, C = x.shape[0], x.shape[-1]
    # L positions in an image, of which W stand side by side in a row of `rows`: for speed only, 1 would do
    shape, L, W = x.shape, x.size // (N * C), x.shape[-2] if x.ndim > 3 else 1

    def rows(x: Array) -> Array:
        return x.reshape(N, L // W, W * C)  # of W pixels: NumPy is fast where the last axis is long

    def each(values: Array) -> Array:
        """One value for each channel, (N, C) or (C,) -> (..., 1, W C), to go with `rows`."""
        return values[..., None, :].repeat(W, axis=-2).reshape(*values.shape[:-1], 1, W * C)

    def sums(x: Array) -> Array:
        """Sum of each channel over its L positions: (N, C)."""
        return column_sums(x.reshape(N, L, C))

    def dots(x: Array, y: Array) -> Array:
        """`sums` of x y."""
        return np.einsum("nlc,nlc->nc", x, y).reshape(N, W, C).sum(axis=1)

    def group_mean(sums: Array) -> Array:
        """The mean over the group of each channel: (N, C)."""
        return (sums.reshape(N, groups, -1).sum(axis=2) * (groups / (L * C))).repeat(C // groups, axis=1)

    def affine(a: Array, b: Array) -> Array:
        y = d * each(a)
        y += each(b)
        return y

    d = rows(x) - each(group_mean(sums(x)))  # xhat = rstd d
    rstd = 1 / np.sqrt(group_mean(dots(d, d)) + eps)
    half = 0.5 if silu else 1  # z sigma(z) = h + h tanh(h) where h = z / 2: one function to compute, and no division
    a, b = rstd * (half * gamma), half * beta
    y = affine(a, b)  # z, or h
    if silu:
        t = np.tanh(y)
        t += 1
        y *= t  # h (1 + tanh h)
    kept = y if silu else None

    def pull(g):
        if silu:  # dL/dh = g (1 + t + y (1 - t)), t = tanh h, computed again: cheaper than memory
            t = affine(a, b)
            np.tanh(t, out=t)
            dx = 1 - t
            dx *= kept
            dx += t
            dx += 1
            dx *= rows(g)
        else:
            dx = rows(g).copy()
        dbeta, dgamma = sums(dx), rstd * dots(dx, d)  # (N, C), of each image; with SiLU those for beta / 2, gamma / 2
        # as dxhat there: it loses its mean, and its projection on d, over each group
        dx *= each(a)
        dx -= affine(rstd * group_mean(dgamma * a), group_mean(dbeta * a))
        return dx.reshape(shape), half * dgamma.sum(axis=0), half * dbeta.sum(axis=0)

    return y.reshape(shape), pull
