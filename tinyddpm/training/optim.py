"""Optimisation on one flat vector: Adam, gradient clipping, the learning rate, and the moving average to sample from.

`flatten` lays all parameters of a model out in one vector theta of which each parameter becomes a view. An update of
the whole model is then a few long vector operations that read like the papers' equations.
"""

from __future__ import annotations

import copy

import numpy as np

from ..arguments import check_vector, number
from ..autograd.tensor import Parameter
from ..backend import Array, address, array_module, paired


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


@paired
def new_vector(p: Array, size: int) -> Array:
    """A vector (size,) of the dtype of an array p and on its device, with anything in it."""
    return array_module(p).empty(size, p.dtype)


def clip_norm(gradient: Array, max_norm: float) -> Array:
    """Shorten `gradient` in place to Euclidean norm `max_norm`; return its norm before, an array without axes (Pascanu
    et al. 2013), which may be inf. If that before is not finite, all of the gradient becomes nan."""
    check_vector("gradient", gradient)
    max_norm = number("max_norm", max_norm, "(0, inf]")
    square = squared_norm(gradient)
    gradient *= shortening(square, max_norm)
    return array_module(gradient).sqrt(square)


@paired
def squared_norm(vector: Array) -> Array:
    """The sum of the squares of a vector, without axes."""
    return vector @ vector


@paired
def shortening(square: Array, max_norm: float) -> Array:
    """What a vector is multiplied with to have norm `max_norm` at most, from its squared norm; nan if not finite."""
    norm = np.sqrt(square)
    return np.minimum(1, max_norm / (norm + 1e-12)) + 0 * norm  # 0 inf and 0 nan are nan


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
        check_vector("theta", theta)
        if np.shape(betas) != (2,):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
        self.theta, self.betas = theta, tuple(number("betas", beta, "[0, 1)") for beta in betas)
        self.lr, self.eps = number("lr", lr, "(0, inf)"), number("eps", eps, "(0, inf)")
        self.weight_decay = number("weight_decay", weight_decay, "[0, inf)")
        self.m, self.v = np.zeros_like(theta), np.zeros_like(theta)  # given a CuPy array, NumPy asks CuPy
        self.n = 0

    def step(self, gradient: Array, lr: float | None = None) -> None:
        """Take one step against `gradient` (P,), with learning rate `lr` if given.

        theta, m and v stay as they are if the first number of the gradient is nan: `clip_norm` makes that of a gradient
        that is not finite, and a GPU, which runs behind, is not asked before each step whether it is finite.
        """
        check_vector("gradient", gradient, self.theta)
        lr = self.lr if lr is None else number("lr", lr, "[0, inf)")
        self.n += 1
        adam_update(self.theta, gradient, self.m, self.v, lr, *self.betas, self.eps, self.weight_decay, self.n)


@paired
def adam_update(
    theta: Array, gradient: Array, m: Array, v: Array, lr: float, b1: float, b2: float, eps: float, decay: float, n: int
) -> None:
    """Step n = 1, 2, ... of `Adam`, in place."""
    if np.isnan(gradient[0]):
        return
    m += (1 - b1) * (gradient - m)
    v += (1 - b2) * (gradient * gradient - v)
    mhat, vhat = m / (1 - b1**n), v / (1 - b2**n)
    theta -= lr * (mhat / (np.sqrt(vhat) + eps) + decay * theta)


class EMA:
    """An exponential moving average of a model's parameters, kept in a copy of the model: `ema.model`.

        average <- d average + (1 - d) theta,   d = min(decay, (1 + n) / (10 + n)) after n updates

    so that early on the average follows fast. Ho et al. 2020 draw their samples from it.
    Raises ValueError unless 0 <= decay < 1. `update` raises RuntimeError once `model` has been moved, by `to` for
    example: then take a new average of it.
    """

    def __init__(self, model, decay: float = 0.9999):
        if not hasattr(model, "parameters") or isinstance(model, type):
            raise TypeError(f"model: expected a Module, got {type(model).__name__}")
        self.decay, self.n = number("decay", decay, "[0, 1)"), 0
        self.model = copy.deepcopy(model)
        self.average, self.first = flatten(self.model.parameters()), self.model.parameters()[0]

    def update(self, theta: Array) -> None:
        """Move the average towards `theta` (P,), the flat parameters of the model it was copied from."""
        check_vector("theta", theta, self.average)
        if address(self.first.data) != address(self.average):
            raise RuntimeError("model: its parameters were moved or replaced, so the average is no longer theirs")
        d = min(self.decay, (1 + self.n) / (10 + self.n))
        ema_update(self.average, theta, d)
        self.n += 1


@paired
def ema_update(average: Array, theta: Array, d: float) -> None:
    """average <- d average + (1 - d) theta, in place."""
    average += (1 - d) * (theta - average)
