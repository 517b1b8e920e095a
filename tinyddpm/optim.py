"""Optimisation on one flat vector: Adam, gradient clipping, the learning rate, and the moving average to sample from.

`flatten` lays all parameters of a model out in one vector theta of which each parameter becomes a view. An update of
the whole model is then a few long vector operations that read like the papers' equations.
"""

from __future__ import annotations

import copy
import math

import numpy as np

from .backend import Array, array_module
from .tensor import Parameter


def flatten(parameters: list[Parameter], out: Array | None = None) -> Array:
    """Copy the parameters into one vector (P,), make each a view into it, and return it: a change to it changes them.

    The vector is `out` if given. A second call moves them to a new vector; the first is then a mere copy.
    """
    theta = array_module(parameters[0].data).concatenate([p.data.reshape(-1) for p in parameters], out=out)
    start = 0
    for p in parameters:
        p.data = theta[start : start + p.data.size].reshape(p.shape)
        start += p.data.size
    return theta


def flat_gradient(gradients: dict[Parameter, Array], parameters: list[Parameter], out: Array | None = None) -> Array:
    """Lay out what `backward` returned in the order of `parameters`, as one vector (P,); what is missing is 0.

    The vector is `out` if given.
    """
    xp = array_module(parameters[0].data)
    return xp.concatenate(
        [gradients[p].reshape(-1) if p in gradients else xp.zeros(p.data.size, p.dtype) for p in parameters], out=out
    )


def _parts(vector: Array) -> list[slice]:
    """Cut a vector into parts that stay in the cache from one operation to the next; on a GPU it is left whole."""
    size = 2**15 if isinstance(vector, np.ndarray) else vector.size
    return [slice(start, start + size) for start in range(0, vector.size, size)]


def clip_norm(gradient: Array, max_norm: float) -> Array:
    """Shorten `gradient` in place to Euclidean norm `max_norm`; return its norm before (Pascanu et al. 2013)."""
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected a number > 0, got {max_norm}")
    xp = array_module(gradient)
    norm = xp.sqrt(gradient @ gradient)
    gradient *= xp.minimum(1, max_norm / (norm + 1e-12))
    return norm


def learning_rate(lr: float, step: int, steps: int, warmup_steps: int, decay_steps: int) -> float:
    """The learning rate at `step` = 0 ... steps-1: it rises linearly to `lr` over the first `warmup_steps` and falls
    linearly towards 0 over the last `decay_steps`."""
    return lr * min(1.0, (step + 1) / max(1, warmup_steps), (steps - step) / max(1, decay_steps))


class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1), with decoupled weight decay (AdamW; Loshchilov & Hutter 2019) if asked.

        m <- b1 m + (1 - b1) g,         mhat = m / (1 - b1^n)
        v <- b2 v + (1 - b2) g^2,       vhat = v / (1 - b2^n)
        theta <- theta - lr (mhat / (sqrt(vhat) + eps) + weight_decay theta)

    Args: theta: the vector (P,) from `flatten`, updated in place. Raises ValueError for a setting out of range.
    """

    def __init__(
        self,
        theta: Array,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        if not (lr > 0 and eps > 0 and weight_decay >= 0):
            raise ValueError(f"lr, eps, weight_decay: expected > 0, > 0, >= 0, got {lr}, {eps}, {weight_decay}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
        self.theta, self.lr, self.betas, self.eps, self.weight_decay = theta, lr, betas, eps, weight_decay
        self.m, self.v = np.zeros_like(theta), np.zeros_like(theta)  # given a CuPy array, NumPy asks CuPy
        self.n = 0

    def step(self, gradient: Array, lr: float | None = None) -> None:
        """Take one step against `gradient` (P,), with learning rate `lr` if given."""
        if gradient.shape != self.theta.shape or gradient.dtype != self.theta.dtype:
            expected, got = (f"{a.dtype} of shape {a.shape}" for a in (self.theta, gradient))
            raise ValueError(f"gradient: expected {expected}, got {got}")
        lr = self.lr if lr is None else lr
        b1, b2 = self.betas
        self.n += 1
        for part in _parts(gradient):
            g, m, v, theta = gradient[part], self.m[part], self.v[part], self.theta[part]
            m += (1 - b1) * (g - m)
            v += (1 - b2) * (g * g - v)
            root_vhat = np.sqrt(v) / math.sqrt(1 - b2**self.n)  # given a CuPy array, NumPy asks CuPy
            if self.weight_decay:
                theta *= 1 - lr * self.weight_decay
            theta -= lr / (1 - b1**self.n) * m / (root_vhat + self.eps)


class EMA:
    """An exponential moving average of a model's parameters, kept in a copy of the model: `ema.model`.

        average <- d average + (1 - d) theta,   d = min(decay, (1 + n) / (10 + n)) after n updates

    so that early on the average follows fast. Ho et al. 2020 draw their samples from it.
    Raises ValueError unless 0 <= decay < 1.
    """

    def __init__(self, model, decay: float = 0.9999):
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
        self.model, self.decay, self.n = copy.deepcopy(model), decay, 0
        self.average = flatten(self.model.parameters())

    def update(self, theta: Array) -> None:
        """Move the average towards `theta` (P,), the flat parameters of the model it was copied from."""
        d = min(self.decay, (1 + self.n) / (10 + self.n))
        for part in _parts(theta):
            average = self.average[part]
            average += (1 - d) * (theta[part] - average)
        self.n += 1
