"""The training loop (Ho et al. 2020, algorithm 1), as a generator: it yields its state after every step.

Logging, sampling, saving and stopping are up to whoever iterates. A batch is cut into micro-batches of fixed size,
which worker threads differentiate side by side; gradients are added up in micro-batch order and each micro-batch has a
random stream of its own, so the result is the same to the bit for any number of workers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np

from .backend import to_device
from .data import batch_indices, random_stream
from .diffusion import Diffusion
from .nn import Module
from .optim import EMA, Adam, clip_norm, flat_gradient, flatten, warmup
from .parallel import worker_threads
from .tensor import backward


@dataclasses.dataclass
class TrainState:
    """Where the training stands after `step` steps."""

    step: int
    loss: float  # of this step's batch, before the update
    grad_norm: float  # before clipping
    lr: float
    ema: EMA  # ema.model is what to sample from
    optimizer: Adam


def train(
    model: Module,
    diffusion: Diffusion,
    images: np.ndarray,
    steps: int,
    batch: int = 64,
    micro_batch: int = 16,
    lr: float = 1e-3,
    warmup_steps: int = 100,
    max_norm: float = 1.0,
    ema_decay: float = 0.995,
    workers: int | None = None,
    seed: int = 0,
) -> Iterator[TrainState]:
    """Train `model` in place with Adam, yielding a `TrainState` after each of `steps` steps.

    Args:
        model: a Module (x_t, t) -> prediction; if it has dropout, called as model(x_t, t, rng=...).
        images: (M, H, W, C) floats in [-1, 1], of the model's dtype.
        batch: images per step. micro_batch: images a worker takes at a time.
        lr, warmup_steps: Adam's learning rate, and the steps over which it rises to it.
        max_norm: longest gradient. ema_decay: of the moving average.
        workers: threads; None for one per CPU. seed: of batches, timesteps and noise.

    Raises ValueError if an argument is out of range, FloatingPointError if the loss or a gradient stops being finite:
    the parameters are then those of the last good step.
    """
    for name, value in dict(steps=steps, batch=batch, micro_batch=micro_batch).items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
    if images.ndim != 4 or len(images) == 0 or images.dtype != model.dtype:
        raise ValueError(f"images: expected {model.dtype} (M, H, W, C) with M >= 1, got {images.dtype} {images.shape}")
    parameters = model.parameters()
    theta = flatten(parameters)
    optimizer = Adam(theta, lr)
    ema = EMA(model, ema_decay)

    def differentiate(step: int, indices: np.ndarray, start: int) -> tuple[float, np.ndarray]:
        """Loss and flat gradient of one micro-batch, weighted so that the micro-batches add up to the batch's mean."""
        chosen = indices[start : start + micro_batch]
        rng = random_stream(seed, "noise", step, start)
        net = functools.partial(model, rng=rng) if getattr(model, "dropout", 0) else model
        loss = diffusion.loss(net, to_device(images[chosen], model.device), rng) * (len(chosen) / batch)
        return loss.item(), flat_gradient(backward(loss), parameters)

    with worker_threads(workers) as run:
        for step in range(steps):
            work = functools.partial(differentiate, step, batch_indices(len(images), step, batch, seed))
            loss, gradient = 0.0, None
            for part, g in run(work, range(0, batch, micro_batch)):
                loss += part
                gradient = g if gradient is None else np.add(gradient, g, out=gradient)
            norm = float(clip_norm(gradient, max_norm))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(
                    f"step {step + 1}: the loss is {loss}, the gradient's norm {norm}; try a lower lr than {lr}"
                )
            rate = warmup(lr, step, warmup_steps)
            optimizer.step(gradient, rate)
            ema.update(theta)
            yield TrainState(step + 1, loss, norm, rate, ema, optimizer)
