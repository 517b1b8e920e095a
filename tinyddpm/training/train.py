"""`train`: algorithm 1 (loop.py), as a generator that yields its state after every step.

Logging, sampling and saving are up to whoever iterates. Here is what a user of the loop takes for granted: arguments
are checked, training goes on from a checkpoint as if it had never ended, and time is kept.

A GPU runs behind: what is asked of it is queued, and the loop goes on to the next step. It stops to wait only when
somebody wants to see a number, such as the loss.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..arguments import check_instance, integer, number, warn
from ..backend import Array, is_array, on_device
from ..diffusion.checks import checked_labels, note_scale, warn_of_scale
from ..diffusion.process import Diffusion
from ..files.checkpoint import a_hundred, differences, read_checkpoint, run_config, write_checkpoint
from ..files.folder import ImageFolder
from ..files.tensors import Path
from ..files.tensors import check_finite as check_weights
from ..network.checks import check_labels
from ..network.nn import Module
from ..network.unet import UNet
from ..speed.ranks import Ranks
from ..speed.shards import shard_size
from .batches import Batches
from .loop import batch_gradient, check_finite, descend, micro_batch_gradient
from .optim import EMA, Adam, flatten, learning_rate, new_vector

LOOK_EVERY = 50  # steps: so often training on a GPU waits, to see whether all that came out was finite


@dataclasses.dataclass
class TrainState:
    """Where the training stands after `step` steps."""

    step: int
    lr: float
    ema: EMA  # ema.model is what to sample from
    optimizer: Adam
    outcome: list[Array | float]  # loss and grad_norm; on a GPU, arrays until somebody looks
    last: bool  # whether this is the last step
    seconds: float  # of training since its very beginning, without what is done between the steps
    images_per_second: float  # over the last LOOK_EVERY steps
    run: Run = dataclasses.field(repr=False)

    @property
    def seen(self) -> bool:
        """Whether the loss is a number already, for which nobody has to wait."""
        return isinstance(self.outcome[0], float)

    def look(self) -> tuple[float, float]:
        """Return loss and grad_norm. On a GPU, this waits until the step is done, the first time."""
        if not self.seen:
            began = time.monotonic()
            self.outcome[:] = map(float, self.outcome)
            self.seconds, self.images_per_second = self.run.spend(time.monotonic() - began)
        return tuple(self.outcome)

    @property
    def loss(self) -> float:
        """Of this step's batch, before the update; see `look`."""
        return self.look()[0]

    @property
    def grad_norm(self) -> float:
        """Of the gradient before it was clipped; see `look`."""
        return self.look()[1]

    def metrics(self) -> dict[str, float]:
        """What to log of this step, for any tracker of experiments: plain numbers by name; see `look`."""
        loss, grad_norm = self.look()
        speed, seconds = round(self.images_per_second, 2), round(self.seconds, 3)
        names = ("step", "loss", "grad_norm", "lr", "images_per_second", "seconds")
        return dict(zip(names, (self.step, loss, grad_norm, self.lr, speed, seconds)))

    def save(self, path: Path) -> None:
        """Write a checkpoint to `path`, in one move, from which `train(..., resume=path)` goes on. The one before is
        kept too, as run.previous.safetensors for run.safetensors. `load_model` reads it: the averaged weights.

        Raises RuntimeError if the training has gone on since this state, FloatingPointError as `train` does, OSError if
        the file cannot be written; then what is there stays.
        """
        if self.optimizer.n != self.step:
            raise RuntimeError(
                f"save: the training is at step {self.optimizer.n}, and this state of {self.step} is gone"
            )
        self.look()
        self.raise_unless_finite()
        facts = self.metrics() | {"seconds": self.seconds, "config": self.run.config}
        write_checkpoint(path, self.ema.model, self.run.diffusion, _vectors(self.optimizer), facts)

    def raise_unless_finite(self) -> None:
        """Raise FloatingPointError unless all that the steps so far have computed is finite."""
        self.run.raise_unless_finite(self.step, average=self.ema.average, **_vectors(self.optimizer))


class Run:
    """What the states of a training have in common: what it was begun with, time, and whether all is well."""

    def __init__(self, model: Module, diffusion: Diffusion, config: dict, seconds: float):
        self.model, self.diffusion, self.last = model, diffusion, False
        self.config = config  # with which a checkpoint has to agree, for the run to go on from it
        self.seconds = seconds  # of training
        self.recent = collections.deque(maxlen=LOOK_EVERY)  # of which each of the last steps took so many
        self.unseen: list[tuple[int, list[Array]]] = []  # step and outcome, of those that nobody has looked at
        self.parameters = model.parameters()
        self.views = [p.data for p in self.parameters]  # of the one vector that the optimizer updates

    def spend(self, seconds: float) -> tuple[float, float]:
        """Add to the time that the last step took; return that of all steps, and images per second."""
        self.seconds += seconds
        self.recent[-1] += seconds
        return self.seconds, self.config["batch"] * len(self.recent) / sum(self.recent)

    def check(self, is_last: Callable[[int], bool], step: int, loss: Array, norm: Array) -> list[Array | float]:
        """Loss and norm, as numbers if the model is on a CPU or this is the last step; see `descend`."""
        self.unseen.append((step, outcome := [loss, norm]))
        self.last = is_last(step)
        if self.model.device == "cpu" or len(self.unseen) == LOOK_EVERY or self.last:
            self.raise_unless_finite()
        if self.moved():
            raise RuntimeError(f"step {step}: the model's parameters were moved or replaced while it trains")
        return outcome

    def raise_unless_finite(self, step: int = 0, **vectors: Array) -> None:
        """Look at all steps that nobody has looked at, and at `vectors` as `step` has left them."""
        try:
            for seen, outcome in self.unseen:
                outcome[:] = map(float, outcome)
                check_finite(seen, *outcome)
            with on_device(self.model.device):
                for name, vector in vectors.items():
                    if not np.isfinite(vector).all():
                        raise FloatingPointError(f"step {step}: it has left numbers in {name} that are not finite")
        except FloatingPointError as error:
            fp16 = ", or a precision other than fp16" if self.config["precision"] == "fp16" else ""
            advice = f"if all images are finite, try a lower lr than {self.config['lr']}{fp16}"
            raise FloatingPointError(f"{error}; {advice}") from None
        self.unseen.clear()

    def moved(self) -> bool:
        """Whether the parameters are no longer where the optimizer updates them."""
        return any(p.data is not view for p, view in zip(self.parameters, self.views))


def _vectors(optimizer: Adam) -> dict[str, Array]:
    return {"theta": optimizer.theta, "m": optimizer.m, "v": optimizer.v}


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
    flip: bool = False,
    resume: Path | None = None,
    stop: Callable[[], bool] | None = None,
    ranks: Ranks | None = None,
) -> Iterator[TrainState]:
    """Train `model` in place with Adam, yielding a `TrainState` after each of `steps` steps.

    Args:
        model: a Module (x_t, t) -> prediction; if it has dropout, of labels or otherwise, called with rng=..., too. It
            begins with the weights that it has: those of a trained one, see `load_model`, if it is to learn more.
        images: (M, H, W, C) floats in [-1, 1], of the model's dtype: an array, or what looks like one and is read when
            it is indexed, such as an `ImageFolder`, which is then done ahead of use.
        batch: images per step.
        micro_batch: images a worker takes at a time, with noise of their own; None for that of the run that goes on, or
            else for what `speed.shards.shard_size` says on a CPU, for all on a GPU, a part on each of several.
        lr: Adam's learning rate, to which it rises over the first `warmup_steps` and from which it falls towards 0 over
            the last `decay_steps`.
        max_norm: longest gradient, inf for any. ema_decay: of the moving average.
        workers: processes; None for one per CPU, which ranks on the same machine share. They are copies of this one,
            see `speed.workers.worker_processes`: images, model and diffusion must not change while it trains, but for
            the parameters, in place; and what a model notes down about itself stays in the copy, unless there is only
            one worker. On a GPU there are none: this process does it all.
        seed: of batches, timesteps, noise, dropout and flips.
        labels: (M,) integers, the class of each image, for a model that takes them: it is called with labels=..., too.
        flip: whether to mirror half of the images, left to right, anew each time.
        resume: a checkpoint that `TrainState.save` wrote, to go on from, to the bit as if there had been no end; if
            there is no such file, the training begins. The other arguments have to be the same, except for `workers`,
            `ranks` and, without `decay_steps`, `steps`. A run that had come to its end yields its last state again; to
            learn on from it is another run, of the model that `load_model` finds in its checkpoint.
        stop: asked in each step; when it says yes, that step is the last. With several ranks, one is enough.
        ranks: the processes of an MPI job that share the work, see `speed.ranks.Ranks`; all yield the same states, and
            each has images, model and all else. Rank 0 alone reads the checkpoint.

    Being a generator, it raises what follows when its first state is asked for: TypeError or ValueError if an argument
    is of the wrong type or out of range, or a checkpoint is damaged or of another run, FloatingPointError if the loss
    or the gradient is not finite, RuntimeError if the model's parameters are moved or replaced while it trains, or a
    worker is killed. A gradient that is not finite never touches the parameters; on a GPU it is noticed within
    `LOOK_EVERY` steps, unless the training is closed before. Warns of images that seem to be on another scale than
    [-1, 1], and where workers are threads because a process that has others cannot be copied.
    """
    steps, batch, seed = integer("steps", steps), integer("batch", batch), integer("seed", seed, 0)
    warmup_steps, decay_steps = integer("warmup_steps", warmup_steps, 0), integer("decay_steps", decay_steps, 0)
    lr, max_norm = number("lr", lr, "(0, inf)"), number("max_norm", max_norm, "(0, inf]")
    ema_decay = number("ema_decay", ema_decay, "[0, 1)")
    _check_kinds(model, diffusion, flip, resume, stop, ranks)
    labels, some = _checked_data(model, diffusion, images, labels)
    ranks = ranks or Ranks()
    workers = ranks.cpus if workers is None else integer("workers", workers)
    settings = {"batch": batch, "lr": lr, "warmup_steps": warmup_steps, "decay_steps": decay_steps, "seed": seed}
    settings |= {"max_norm": max_norm, "ema_decay": ema_decay, "flip": bool(flip)}
    if micro_batch is not None:
        settings["micro_batch"] = integer("micro_batch", micro_batch)
    if decay_steps:
        settings["steps"] = steps
    config = run_config(model, diffusion, images, labels, some, **settings)
    with _begun(model, diffusion, config, resume, ranks) as (optimizer, ema, run, facts):
        if optimizer.n >= steps:
            outcome, speed = [facts["loss"], facts["grad_norm"]], facts["images_per_second"]
            yield TrainState(optimizer.n, facts["lr"], ema, optimizer, outcome, True, run.seconds, speed, run)
            return
        micro_batch = run.config.setdefault("micro_batch", _default_micro_batch(model, images, batch, ranks))
        batches = Batches(images, labels, batch, micro_batch, seed, flip)
        _warn_of_idle(ranks, batches)
        differentiate, rest = micro_batch_gradient(model, diffusion, batches), range(optimizer.n, steps)
        with batch_gradient(model, differentiate, batches, rest, workers, ranks) as draw_and_differentiate:
            rate = lambda step: learning_rate(lr, step, steps, warmup_steps, decay_steps)
            is_last = lambda step: ranks.any(stop is not None and bool(stop())) or step == steps
            check = functools.partial(run.check, is_last)
            taken = descend(draw_and_differentiate, optimizer, ema, steps, rate, max_norm, check)
            while not run.last:
                began = time.monotonic()
                run.recent.append(0.0)
                # anew each step, so that the caller's code between the steps keeps its own device
                with on_device(model.device):
                    step, lr_now, outcome = next(taken)
                spent = run.spend(time.monotonic() - began)
                state = TrainState(step, lr_now, ema, optimizer, outcome, run.last, *spent, run)
                if run.last:  # no step is left that would notice
                    state.raise_unless_finite()
                yield state


def _check_kinds(model: Any, diffusion: Any, flip: Any, resume: Any, stop: Any, ranks: Any) -> None:
    """Raise TypeError unless they are what `train` says."""
    check_instance("model", model, Module, "a Module")
    if not hasattr(diffusion, "loss") or diffusion is Diffusion:
        raise TypeError(f"diffusion: expected a Diffusion, got {type(diffusion).__name__}")
    check_instance("resume", resume, str | os.PathLike | None, "a path")
    check_instance("flip", flip, bool | np.bool_, "True or False")
    check_instance("stop", stop, Callable | None, "a function without arguments")
    check_instance("ranks", ranks, Ranks | None, "Ranks")


def _checked_data(
    model: Module, diffusion: Any, images: Any, labels: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The labels, and a hundred images, if they are such as the model can be trained on, or TypeError or ValueError; a
    warning if the images seem to be on another scale. Of a folder of pictures, which are not, none is read."""
    in_memory = isinstance(images, np.ndarray)
    if not in_memory and (is_array(images) or not all(hasattr(images, name) for name in ("shape", "dtype"))):
        raise TypeError(f"images: expected a NumPy array, got {type(images)}, or what is indexed like one")
    if len(images.shape) != 4 or math.prod(images.shape) == 0 or images.dtype != model.dtype:
        levels = "; of 8-bit levels k, images are k / 127.5 - 1" if np.dtype(images.dtype).kind in "iu" else ""
        expected = f"images: expected {model.dtype} (M, H, W, C) with M >= 1"
        raise ValueError(f"{expected}, got {images.dtype} {images.shape}{levels}")
    labels = checked_labels(labels, len(images))
    if labels is None and getattr(model, "label_dropout", 0):
        raise ValueError("labels: this model is to learn with and without them, so give some; -1 is none")
    check_weights(model.state_dict())  # those of a file, say, or of a training that went wrong
    if isinstance(model, UNet):
        if images.shape[3] != model.config["in_channels"]:
            channels = model.config["in_channels"]
            raise ValueError(f"images: expected {channels} channels, as the network has, got shape {images.shape}")
        check_labels(model.config, labels, len(images))  # of all, now and not when their turn comes
    some = None if isinstance(images, ImageFolder) else a_hundred(images)
    told = some is not None and warn_of_scale("images", some)
    if isinstance(diffusion, Diffusion):  # so that no worker says it again
        note_scale(diffusion, told)
    return labels, some


def _default_micro_batch(model: Module, images: Any, batch: int, ranks: Ranks) -> int:
    return shard_size(batch, *images.shape[1:3]) if model.device == "cpu" else -(-batch // ranks.size)


def _warn_of_idle(ranks: Ranks, batches: Batches) -> None:
    count = len(batches.starts)
    if ranks.rank == 0 and ranks.size > count:
        warn(
            f"ranks: of {ranks.size}, {ranks.size - count} have nothing to do, since a batch of {batches.size} is "
            f"{count} micro-batches of {batches.micro_batch}"
        )


@contextlib.contextmanager
def _begun(
    model: Module, diffusion: Diffusion, config: dict, resume: Path | None, ranks: Ranks
) -> Iterator[tuple[Adam, EMA, Run, dict]]:
    """Within this block, the optimizer, of parameters that are views of one vector, the average, the run, and the facts
    of the checkpoint from which they are; on all ranks those of rank 0."""
    for rank, other in enumerate(ranks.gathered(config)):
        if differing := differences(config, other, where=(f"on rank {ranks.rank}", f"on rank {rank}")):
            raise ValueError(f"ranks: they have to do the same, but differ: {'; '.join(differing[:8])}")
    facts, parameters = {"step": 0, "seconds": 0.0, "config": config}, model.parameters()
    with on_device(model.device):
        ema, error = EMA(model, config["ema_decay"]), None
        optimizer = Adam(flatten(parameters, out=new_vector(parameters[0].data, model.size)), config["lr"])
        if resume is not None and ranks.rank == 0:
            try:
                facts = read_checkpoint(resume, ema.model, _vectors(optimizer), config) or facts
            except (ValueError, OSError) as refused:
                error = refused
        facts, error = ranks.gathered((facts, error))[0]  # so that no rank waits for one that has failed
        if error is not None:
            flatten(parameters)  # move them out of the memory that processes share
            raise error
        for vector in (ema.average, *_vectors(optimizer).values()):
            ranks.broadcast(vector)
    optimizer.n = ema.n = facts["step"]
    run = Run(model, diffusion, facts["config"], facts["seconds"])
    try:
        yield optimizer, ema, run, facts
    finally:
        if model.device == "cpu" and not run.moved():
            flatten(parameters)  # move them out of the memory that processes share
