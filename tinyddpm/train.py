"""The training loop (Ho et al. 2020, algorithm 1), as a generator: it yields its state after every step.

Logging, sampling, saving and stopping are up to whoever iterates. A batch is cut into micro-batches of fixed size,
which workers differentiate side by side; gradients are added up in a fixed order and each micro-batch has a random
stream of its own, so the result is the same to the bit for any number of workers.

A GPU runs behind: what is asked of it is queued, and the loop goes on to the next step. It stops to wait only when
somebody wants to see a number, such as the loss.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Iterator

import numpy as np

from .backend import Array, array_module, on_device, to_device
from .data import batch_indices, random_stream
from .diffusion import Diffusion, checked_labels, warn_if_out_of_range
from .nn import Module
from .optim import EMA, Adam, clip_norm, flat_gradient, flatten, learning_rate
from .parallel import shard_size, shared_array, worker_processes
from .tensor import backward

GROUPS = 16  # of micro-batches, at most, since each has a gradient in memory; there is work for as many workers
LOOK_EVERY = 100  # steps: so often training on a GPU waits, to see whether all that came out was finite


@dataclasses.dataclass
class TrainState:
    """Where the training stands after `step` steps."""

    step: int
    lr: float
    ema: EMA  # ema.model is what to sample from
    optimizer: Adam
    outcome: tuple[Array | float, Array | float]  # loss and grad_norm; on a GPU, arrays until somebody looks

    def look(self) -> tuple[float, float]:
        """Return loss and grad_norm. On a GPU, this waits until the step is done, the first time."""
        self.outcome = loss, grad_norm = tuple(map(float, self.outcome))
        return loss, grad_norm

    @property
    def loss(self) -> float:
        """Of this step's batch, before the update; see `look`."""
        return self.look()[0]

    @property
    def grad_norm(self) -> float:
        """Of the gradient before it was clipped; see `look`."""
        return self.look()[1]


def train(
    model: Module,
    diffusion: Diffusion,
    images: np.ndarray,
    steps: int,
    batch: int = 64,
    micro_batch: int | None = None,
    lr: float = 1e-3,
    warmup_steps: int = 100,
    decay_steps: int = 0,
    max_norm: float = 1.0,
    ema_decay: float = 0.995,
    workers: int | None = None,
    seed: int = 0,
    labels: np.ndarray | None = None,
) -> Iterator[TrainState]:
    """Train `model` in place with Adam, yielding a `TrainState` after each of `steps` steps.

    Args:
        model: a Module (x_t, t) -> prediction; if it has dropout, of labels or otherwise, called with rng=..., too.
        images: (M, H, W, C) floats in [-1, 1], of the model's dtype.
        batch: images per step.
        micro_batch: images a worker takes at a time; None for what `parallel.shard_size` says on a CPU, the whole batch
            on a GPU.
        lr: Adam's learning rate, to which it rises over the first `warmup_steps` and from which it falls towards 0 over
            the last `decay_steps`.
        max_norm: longest gradient. ema_decay: of the moving average.
        workers: processes; None for one per CPU. They are copies of this one, see `parallel.worker_processes`: images,
            model and diffusion must not change while it trains, but for the parameters, in place; and what a model
            notes down about itself stays in the copy, unless there is only one worker. On a GPU there are none: this
            process does it all.
        seed: of batches, timesteps, noise and dropout.
        labels: (M,) integers, the class of each image, for a model that takes them: it is called with labels=..., too.

    Being a generator, it raises what follows when its first state is asked for: TypeError or ValueError if an argument
    is of the wrong type or out of range, FloatingPointError if the loss or the gradient is not finite, RuntimeError if
    the model's parameters are moved or replaced while it trains. A gradient that is not finite never touches the
    parameters; on a GPU it is noticed within `LOOK_EVERY` steps, unless the training is closed before. Images far
    outside of [-1, 1] are warned about.

    Products in "fp16" (see `Module.to`) lose gradients below 6e-8, and a mean over many pixels makes them small. So the
    loss is then multiplied by about the number of pixels before it is differentiated, and the gradient divided
    (Micikevicius et al. 2018).
    """
    device, on_cpu = model.device, model.device == "cpu"
    at_least_one = {"steps": steps, "batch": batch, "micro_batch": 1 if micro_batch is None else micro_batch}
    for name, value in (
        at_least_one | {"warmup_steps": warmup_steps, "decay_steps": decay_steps, "seed": seed}
    ).items():
        least = 1 if name in at_least_one else 0
        if not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    if not isinstance(images, np.ndarray):
        raise TypeError(f"images: expected a NumPy array, got {type(images)}")
    if images.ndim != 4 or images.size == 0 or images.dtype != model.dtype:
        raise ValueError(f"images: expected {model.dtype} (M, H, W, C) with M >= 1, got {images.dtype} {images.shape}")
    labels = checked_labels(labels, len(images))
    if labels is None and getattr(model, "label_dropout", 0):
        raise ValueError("labels: this model is to learn with and without them, so give some; -1 is none")
    if not on_cpu:  # there `loss` does not look, for it would have to wait for the device
        warn_if_out_of_range("images", images)
    if micro_batch is None:
        micro_batch = shard_size(batch, *images.shape[1:3]) if on_cpu else batch
    parameters = model.parameters()
    starts = range(0, batch, micro_batch)
    groups = np.array_split(starts, min(GROUPS, len(starts)) if on_cpu else 1)
    scale = 2.0 ** round(math.log2(batch * images[0].size)) if model.precision == "fp16" else 1.0
    with on_device(device):
        empty = shared_array if on_cpu else array_module(parameters[0].data).empty
        theta = flatten(parameters, out=empty((model.size,), model.dtype))
        gradients = empty((len(groups), model.size), model.dtype)
        optimizer = Adam(theta, lr)
        ema = EMA(model, ema_decay)
    views = [p.data for p in parameters]

    def differentiate(group: int, step: int, indices: np.ndarray) -> Array:
        """Loss of a group of micro-batches; the gradient goes to its row of `gradients`. Both are weighted so that the
        groups add up to the batch's mean."""
        total = 0.0
        for start in groups[group]:
            chosen = indices[start : start + micro_batch]
            rng = random_stream(seed, "noise", step, start)
            drops = getattr(model, "dropout", 0) or getattr(model, "label_dropout", 0)
            settings = ({"rng": rng} if drops else {}) | ({} if labels is None else {"labels": labels[chosen]})
            net = functools.partial(model, **settings) if settings else model
            loss = diffusion.loss(net, to_device(images[chosen], device), rng) * (scale * len(chosen) / batch)
            gradient = backward(loss, copy=False)
            total += loss.data.astype(np.float64)
            if start == groups[group][0]:
                flat_gradient(gradient, parameters, out=gradients[group])
            else:
                gradients[group] += flat_gradient(gradient, parameters)
        return total

    def update(step: int, loss: Array) -> TrainState:
        """Step against the sum of all gradients and move the average."""
        gradient = gradients[0]
        for other in gradients[1:]:
            gradient += other
        if scale != 1:
            loss = loss / scale
            gradient *= 1 / scale
        rate = learning_rate(lr, step, steps, warmup_steps, decay_steps)
        state = TrainState(step + 1, rate, ema, optimizer, (loss, clip_norm(gradient, max_norm)))
        unseen.append(state)
        if on_cpu or len(unseen) == LOOK_EVERY or step + 1 == steps:
            look()
        if moved():
            raise RuntimeError(f"step {step + 1}: the model's parameters were moved or replaced while it trains")
        optimizer.step(gradient, rate)
        ema.update(theta)
        return state

    def look() -> None:
        """Raise if a step that nobody has looked at came out not finite."""
        for state in unseen:
            loss, norm = state.look()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(
                    f"step {state.step}: the loss is {loss}, the gradient's norm {norm}; if all images are finite, try "
                    f"a lower lr than {lr}" + (", or a precision other than fp16" if scale != 1 else "")
                )
        unseen.clear()

    def moved() -> bool:
        return any(p.data is not view for p, view in zip(parameters, views))

    unseen = []
    try:
        with worker_processes(differentiate, workers, most=len(groups) if on_cpu else 1) as run:
            for step in range(steps):
                indices = batch_indices(len(images), step, batch, seed)
                with on_device(device):
                    state = update(step, sum(run(range(len(groups)), step, indices)))
                yield state
    finally:
        if on_cpu and not moved():
            flatten(parameters)  # out of the memory that processes share
