"""Group normalisation (with SiLU) and attention, each one op with its backward by hand.

Fused: what could be composed of a dozen small ops, each reading and writing the whole activation, is one. So composed
it stands in tests/reference.py, and gradients are checked against finite differences. Next: network/nn.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..arguments import is_integer, number
from ..backend import Array, paired
from .functional import logistic, product, softmax_rows, softmax_rows_grad
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
    if not is_integer(groups) or groups < 1 or C % groups:
        raise ValueError(f"groups: {groups} does not divide the {C} channels of x; use a divisor of {C}")
    eps = number("eps", eps, "(0, inf)")
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

    (Mean and variance depend on x too, so dxhat loses its mean, and its projection on xhat.)
    """

    def grouped(x: Array) -> Array:  # (N, ..., C) -> (N, positions, groups, channels of a group)
        return x.reshape(len(x), -1, groups, x.shape[-1] // groups)

    def mean(x: Array) -> Array:  # over each group of each image
        return x.mean(axis=(1, 3), keepdims=True)

    d = grouped(x) - mean(grouped(x))
    rstd = 1 / np.sqrt(mean(d * d) + eps)
    xhat = (rstd * d).reshape(x.shape)
    z = gamma * xhat + beta
    s = logistic(z) if silu else None

    def pull(g):
        dz = g * (s + z * s * (1 - s)) if silu else g
        everywhere = tuple(range(x.ndim - 1))  # all axes but that of the channels
        dxhat, h = grouped(gamma * dz), grouped(xhat)
        dx = rstd * (dxhat - mean(dxhat) - h * mean(dxhat * h))
        return dx.reshape(x.shape), (dz * xhat).sum(axis=everywhere), dz.sum(axis=everywhere)

    return z * s if silu else z, pull


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
    _check_attention(q, k, v, heads)
    C = q.shape[2]
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


def _check_attention(q: Array, k: Array, v: Array, heads: int) -> None:
    """Raise ValueError unless the arguments of `attention` fit each other."""
    if q.ndim != 3 or k.shape != v.shape or k.ndim != 3 or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise ValueError(f"q, k, v: expected (N, L, C), (N, S, C), (N, S, C), got {q.shape}, {k.shape}, {v.shape}")
    if q.size == 0 or k.size == 0:
        raise ValueError(f"q, k, v: expected none of them empty, got {q.shape}, {k.shape}, {v.shape}")
    C = q.shape[2]
    if not is_integer(heads) or heads < 1 or C % heads:
        raise ValueError(f"heads: {heads} does not divide the {C} channels of q; use a divisor of {C}")
