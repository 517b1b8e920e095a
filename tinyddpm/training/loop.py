"""Algorithm 1 of Ho, Jain & Abbeel 2020, training:

    repeat
        x_0 ~ q(x_0),  t ~ Uniform({1 ... T}),  eps ~ N(0, I)                     (in the code t counts from 0)
        take a gradient step on  grad_theta ||eps - eps_theta(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t)||^2
    until converged

`descend` is the loop. What it draws and differentiates is below it: `micro_batch_gradient` for some images,
`batch_gradient` for a batch. What a user calls is `train` in train.py: it runs this loop, and can go on with it after
an interruption.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from ..autograd.backward import backward
from ..backend import Array, paired, to_device
from .batches import Batches
from .optim import EMA, Adam, clip_norm, flat_gradient


def check_finite(step: int, loss: Array, norm: Array) -> tuple[float, float]:
    """The loss and the gradient's norm as numbers, or FloatingPointError: then the step is not to be taken."""
    loss, norm = float(loss), float(norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"step {step}: the loss is {loss}, the gradient's norm {norm}")
    return loss, norm


def descend(
    draw_and_differentiate: Callable[[int], tuple[Array, Array]],
    optimizer: Adam,
    ema: EMA,
    steps: int,
    rate: Callable[[int], float],
    max_norm: float = 1.0,
    check: Callable[[int, Array, Array], Any] = check_finite,
) -> Iterator[tuple[int, float, Any]]:
    """Take the steps that are left of `steps`, and yield after each how many have been taken, the learning rate, and
    what `check` returns of the loss and the gradient's norm.

    draw_and_differentiate(step): the loss of a batch, x_0, t and eps, that is drawn for this step, and its gradient for
    all parameters (P,); see `batch_gradient`. rate(step): the learning rate.
    """
    for step in range(optimizer.n, steps):  # n: taken before an interruption, or 0
        loss, gradient = draw_and_differentiate(step)  # x_0, t, eps, and the loss: see `micro_batch_gradient`
        norm = clip_norm(gradient, max_norm)  # in place; the norm is that of before
        outcome, lr = check(step + 1, loss, norm), rate(step)
        optimizer.step(gradient, lr)
        ema.update(optimizer.theta)
        yield step + 1, lr, outcome


def micro_batch_gradient(model: Callable, diffusion: Any, batches: Batches) -> Callable:
    """Return a function of (step, start) that draws a micro-batch and differentiates: its loss, and the gradient for
    all parameters in one vector (P,), both weighted so that those of all micro-batches add up to the batch's mean.

    It also takes x0, the images if they have been read, `scale`, a factor for both, and `out`, for the gradient.
    """
    parameters = model.parameters()
    drops = getattr(model, "dropout", 0) or getattr(model, "label_dropout", 0)

    def differentiate(step: int, start: int, x0: Array | None = None, scale: float = 1.0, out: Array | None = None):
        x0, labels, rng = batches.draw(step, start, x0)  # in place of x_0 ~ q(x_0), the next in a random order
        settings = ({"rng": rng} if drops else {}) | ({} if labels is None else {"labels": labels})
        net = functools.partial(model, **settings) if settings else model
        loss = diffusion.loss(net, to_device(x0, model.device), rng)  # draws t ~ Uniform and eps ~ N(0, I)
        loss = loss * (scale * len(x0) / batches.size)  # a mean, which counts by its share of the batch
        return loss.data, flat_gradient(backward(loss, copy=False), parameters, out)

    return differentiate


@paired
@contextlib.contextmanager
def batch_gradient(
    model: Callable, differentiate: Callable, batches: Batches, steps: range, workers: int = 1, ranks: Any = None
) -> Iterator[Callable]:
    """Within this block, what comes of it is called for each of `steps`, in order: it draws and differentiates a batch,
    one micro-batch after the other, by `differentiate`, and returns the sum of the losses and that of the gradients.

    A faster twin may have several `workers` do so side by side, and add up what `ranks` on other machines have.
    """

    def draw_and_differentiate(step: int) -> tuple[Array, Array]:
        loss = gradient = 0
        for start in batches.starts:
            part_loss, part_gradient = differentiate(step, start)
            loss, gradient = loss + part_loss, gradient + part_gradient
        return loss, gradient

    yield draw_and_differentiate
