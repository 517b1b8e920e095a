"""Group normalisation (with SiLU) and attention, each one op with its backward by hand.

Fused: what could be composed of a dozen small ops, each reading and writing the whole activation, is one. The plain
definitions stand in tests/reference.py, and gradients are checked against finite differences. Next: nn.py (cuda.py, the
same for a GPU, can wait).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import numpy as np

from .backend import Array, paired
from .functional import column_sums, product, softmax_rows, softmax_rows_grad
from .tensor import op


@op
def group_norm(x, gamma, beta, *, groups: int, eps: float = 1e-6, silu: bool = False):
    """Group normalisation (Wu & He 2018), followed by SiLU if `silu`.

        xhat = (x - mean) / sqrt(var + eps),    z = gamma xhat + beta,    y = z  or  z sigma(z)

    Mean and variance are over all positions and the C / groups channels of one group of one image.

    Args:
        x: (N, ..., C), any number of axes between.
        gamma, beta: (C,).
        groups: how many groups; must divide C.

    Returns y of the shape of x. Raises ValueError where the shapes do not fit each other.
    """
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"x: expected (N, ..., C), no axis of them empty, got shape {x.shape}")
    C = x.shape[-1]
    if not isinstance(groups, numbers.Integral) or groups < 1 or C % groups:
        raise ValueError(f"groups: {groups} does not divide the {C} channels of x; use a divisor of {C}")
    if gamma.shape != (C,) or beta.shape != (C,):
        raise ValueError(
            f"gamma, beta: expected shape ({C},) for x of shape {x.shape}, got {gamma.shape}, {beta.shape}"
        )
    return normalise(x, gamma, beta, groups, eps, silu)


@paired
def normalise(x: Array, gamma: Array, beta: Array, groups: int, eps: float, silu: bool) -> tuple[Array, Callable]:
    """`group_norm` of arguments that fit: y, and its `pull`. Back, with rstd = 1 / sqrt(var + eps), dz = dL/dz and
    means over the group:

        dbeta = sum dz,   dgamma = sum dz xhat
        dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)),   dxhat = gamma dz
    """
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
        # dx as above: mean and variance depend on x too, so it loses its mean, and its projection on d, over each group
        dx *= each(a)
        dx -= affine(rstd * group_mean(dgamma * a), group_mean(dbeta * a))
        return dx.reshape(shape), half * dgamma.sum(axis=0), half * dbeta.sum(axis=0)

    return y.reshape(shape), pull


@op
def attention(q, k, v, *, heads: int = 1, precision: str = "float32"):
    """Scaled dot-product attention (Vaswani et al. 2017): softmax(q k^T / sqrt(d)) v in each head, d = C / heads.

    Args:
        q: (N, L, C) queries. k, v: (N, S, C) keys and values.
        heads: how many; each takes its own C / heads channels.
        precision: of the products on a GPU; see `functional.product`.

    Back, with y = p v, p = softmax(s), s = q k^T / sqrt(d) and g = dL/dy:

        dv = p^T g,   dp = g v^T,   ds = p (dp - sum p dp),   dq = ds k / sqrt(d),   dk = ds^T q / sqrt(d)

    Returns (N, L, C). Raises ValueError where the shapes do not fit each other.
    """
    if q.ndim != 3 or k.shape != v.shape or k.ndim != 3 or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise ValueError(f"q, k, v: expected (N, L, C), (N, S, C), (N, S, C), got {q.shape}, {k.shape}, {v.shape}")
    if q.size == 0 or k.size == 0:
        raise ValueError(f"q, k, v: expected none of them empty, got {q.shape}, {k.shape}, {v.shape}")
    C = q.shape[2]
    if not isinstance(heads, numbers.Integral) or heads < 1 or C % heads:
        raise ValueError(f"heads: {heads} does not divide the {C} channels of q; use a divisor of {C}")
    scale = 1 / math.sqrt(C // heads)

    def split(x: Array) -> Array:  # (N, L, C) -> (N, heads, L, d)
        return x.reshape(x.shape[0], x.shape[1], heads, -1).swapaxes(1, 2)

    def merge(x: Array) -> Array:  # and back
        return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], C)

    q, k, v = split(q), split(k), split(v)
    p = product(q, k.swapaxes(2, 3), precision, scale)  # (N, heads, L, S): what each query gives each key
    softmax_rows(p, out=p)

    def pull(g):
        g = split(g)
        dp = product(g, v.swapaxes(2, 3), precision)
        ds = softmax_rows_grad(p, dp, out=dp)
        return (
            merge(product(ds, k, precision, scale)),
            merge(product(ds.swapaxes(2, 3), q, precision, scale)),
            merge(product(p.swapaxes(2, 3), g, precision)),
        )

    return merge(product(p, v, precision)), pull
