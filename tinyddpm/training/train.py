"""The training loop (Ho et al. 2020, algorithm 1), as a generator: it yields its state after every step. Each is

    loss = diffusion.loss(model, x0, rng)                  which draws t and eps
    gradient = backward(loss), clipped                     here `differentiate`
    theta <- Adam(theta, gradient)                         and `update`
    average <- d average + (1 - d) theta                   from which to sample: the moving average, EMA

All else shares the work out, or goes on with it after an interruption.

Logging, sampling and saving are up to whoever iterates. A batch is cut into micro-batches of fixed size, which workers
differentiate side by side; gradients are added up in a fixed order and each micro-batch has a random stream of its own,
so the result is the same to the bit for any number of workers. Ranks on several machines share the micro-batches out,
and add up what each has added up.

A GPU runs behind: what is asked of it is queued, and the loop goes on to the next step. It stops to wait only when
somebody wants to see a number, such as the loss.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import numbers
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np

from .backend import Array, array_module, is_array, on_device, to_device
from .data import batch_indices, random_stream
from .diffusion import Diffusion, checked_labels, warn_if_out_of_range
from .nn import Module
from .optim import EMA, Adam, clip_norm, flat_gradient, flatten, learning_rate
from .parallel import Ranks, ahead, shard_size, shared_array, worker_processes
from .run import Path, differences, read_checkpoint, run_config, write_checkpoint
from .tensor import backward

GROUPS = 16  # of micro-batches, at most, since each has a gradient in memory; there is work for as many workers
READ_AHEAD = 4  # steps: so many batches of a folder's pictures are in memory
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
        self.run.raise_unless_finite()
        facts = self.metrics() | {"seconds": self.seconds, "config": self.run.config}
        write_checkpoint(path, self.ema.model, self.run.diffusion, _vectors(self.optimizer), facts)


@dataclasses.dataclass
class Run:
    """What the states of a training have in common."""

    config: dict  # with which a checkpoint has to agree, for the run to go on from it
    diffusion: Diffusion
    seconds: float  # of training
    recent: collections.deque[float]  # of which each of the last steps took so many
    unseen: list[tuple[int, list[Array]]]  # step and outcome, of those that nobody has looked at

    def spend(self, seconds: float) -> tuple[float, float]:
        """Add to the time that the last step took; return that of all steps, and images per second."""
        self.seconds += seconds
        self.recent[-1] += seconds
        return self.seconds, self.config["batch"] * len(self.recent) / sum(self.recent)

    def raise_unless_finite(self) -> None:
        """Look at all steps that nobody has looked at."""
        for step, outcome in self.unseen:
            outcome[:] = loss, norm = [float(number) for number in outcome]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                fp16 = ", or a precision other than fp16" if self.config["precision"] == "fp16" else ""
                raise FloatingPointError(
                    f"step {step}: the loss is {loss}, the gradient's norm {norm}; if all images are finite, try a "
                    f"lower lr than {self.config['lr']}{fp16}"
                )
        self.unseen.clear()


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
        model: a Module (x_t, t) -> prediction; if it has dropout, of labels or otherwise, called with rng=..., too.
        images: (M, H, W, C) floats in [-1, 1], of the model's dtype: an array, or what looks like one and is read when
            it is indexed, such as an `ImageFolder`, which is then done ahead of use.
        batch: images per step.
        micro_batch: images a worker takes at a time, with noise of their own; None for that of the run that goes on, or
            else for what `parallel.shard_size` says on a CPU, the whole batch on a GPU, its part on each of several.
        lr: Adam's learning rate, to which it rises over the first `warmup_steps` and from which it falls towards 0 over
            the last `decay_steps`.
        max_norm: longest gradient. ema_decay: of the moving average.
        workers: processes; None for one per CPU, which ranks on the same machine share. They are copies of this one,
            see `parallel.worker_processes`: images, model and diffusion must not change while it trains, but for the
            parameters, in place; and what a model notes down about itself stays in the copy, unless there is only one
            worker. On a GPU there are none: this process does it all.
        seed: of batches, timesteps, noise, dropout and flips.
        labels: (M,) integers, the class of each image, for a model that takes them: it is called with labels=..., too.
        flip: whether to mirror half of the images, left to right, anew each time.
        resume: a checkpoint that `TrainState.save` wrote, to go on from, to the bit as if there had been no end; if
            there is no such file, the training begins. The other arguments have to be the same, except for `workers`,
            `ranks` and, without `decay_steps`, `steps`. A run that had come to its end yields its last state again.
        stop: asked in each step; when it says yes, that step is the last. With several ranks, one is enough.
        ranks: the processes of an MPI job that share the work, see `parallel.Ranks`; all yield the same states, and
            each has images, model and all else. Rank 0 alone reads the checkpoint.

    Being a generator, it raises what follows when its first state is asked for: TypeError or ValueError if an argument
    is of the wrong type or out of range, or a checkpoint is damaged or of another run, FloatingPointError if the loss
    or the gradient is not finite, RuntimeError if the model's parameters are moved or replaced while it trains, or a
    worker is killed. A gradient that is not finite never touches the parameters; on a GPU it is noticed within
    `LOOK_EVERY` steps, unless the training is closed before. Images far outside of [-1, 1] are warned about.

    Products in "fp16" (see `Module.to`) lose gradients below 6e-8, and a mean over many pixels makes them small. So the
    loss is then multiplied by about the number of pixels before it is differentiated, and the gradient divided
    (Micikevicius et al. 2018).
    """
    steps, batch = _integers(1, steps=steps, batch=batch)
    warmup_steps, decay_steps, seed = _integers(0, warmup_steps=warmup_steps, decay_steps=decay_steps, seed=seed)
    lr, max_norm, ema_decay = _floats(lr=lr, max_norm=max_norm, ema_decay=ema_decay)
    in_memory = isinstance(images, np.ndarray)
    if not in_memory and (is_array(images) or not all(hasattr(images, name) for name in ("shape", "dtype"))):
        raise TypeError(f"images: expected a NumPy array, got {type(images)}, or what is indexed like one")
    if len(images.shape) != 4 or math.prod(images.shape) == 0 or images.dtype != model.dtype:
        raise ValueError(f"images: expected {model.dtype} (M, H, W, C) with M >= 1, got {images.dtype} {images.shape}")
    labels = checked_labels(labels, len(images))
    if labels is None and getattr(model, "label_dropout", 0):
        raise ValueError("labels: this model is to learn with and without them, so give some; -1 is none")
    device, on_cpu, ranks = model.device, model.device == "cpu", ranks or Ranks()
    if not on_cpu and in_memory:  # there `loss` does not look, for it would have to wait for the device
        warn_if_out_of_range("images", images)
    workers = ranks.cpus if workers is None else workers

    settings = {"batch": batch, "lr": lr, "warmup_steps": warmup_steps, "decay_steps": decay_steps, "seed": seed}
    settings |= {"max_norm": max_norm, "ema_decay": ema_decay, "flip": bool(flip)}
    if micro_batch is not None:
        (settings["micro_batch"],) = _integers(1, micro_batch=micro_batch)
    if decay_steps:
        settings["steps"] = steps
    config = run_config(model, diffusion, images, labels, **settings)
    optimizer, ema, facts = _begin(model, lr, ema_decay, resume, config, ranks)
    first, config = facts["step"], facts["config"]
    theta, parameters = optimizer.theta, model.parameters()

    # whose share of the batch is what: micro-batches, in groups of which each has a gradient in memory
    most = shard_size(batch, *images.shape[1:3]) if on_cpu else -(-batch // ranks.size)
    micro_batch = config.setdefault("micro_batch", most)
    all_starts = range(0, batch, micro_batch)
    if ranks.rank == 0 and ranks.size > len(all_starts):
        warnings.warn(
            f"ranks: of {ranks.size}, {ranks.size - len(all_starts)} have nothing to do, since a batch of {batch} is "
            f"{len(all_starts)} micro-batches of {micro_batch}",
            stacklevel=2,
        )
    starts = ranks.share(all_starts)
    groups = np.array_split(starts, min(GROUPS, len(starts)) or 1) if on_cpu else [starts]
    scale = 2.0 ** round(math.log2(batch * math.prod(images.shape[1:]))) if model.precision == "fp16" else 1.0
    with on_device(device):
        rows = _empty(model, (len(groups), model.size + 2))  # two more, for what else ranks add up
    gradients, views = rows[:, :-2], [p.data for p in parameters]
    run = Run(config, diffusion, facts["seconds"], collections.deque(maxlen=LOOK_EVERY), [])

    def read(step: int) -> list[list[np.ndarray]]:
        """The images of each micro-batch in each group."""
        indices = batch_indices(len(images), step, batch, seed)
        return [[images[indices[start : start + micro_batch]] for start in group] for group in groups]

    def differentiate(item: tuple[int, list[np.ndarray] | None], step: int) -> Array:
        """Loss of a group of micro-batches, of images that are given or in memory; the gradient goes to its row of
        `gradients`. Both are weighted so that the groups add up to the batch's mean."""
        (group, given), total = item, 0.0
        indices = batch_indices(len(images), step, batch, seed)
        if not len(groups[group]):  # there are more ranks than micro-batches
            gradients[group] = 0
        for i, start in enumerate(groups[group]):
            chosen = indices[start : start + micro_batch]
            x0 = given[i] if given else images[chosen]
            if flip:
                mirrored = random_stream(seed, "flip", step, start).random(len(chosen)) < 0.5
                x0 = np.where(mirrored[:, None, None, None], x0[:, :, ::-1], x0)
            rng = random_stream(seed, "noise", step, start)
            drops = getattr(model, "dropout", 0) or getattr(model, "label_dropout", 0)
            settings = ({"rng": rng} if drops else {}) | ({} if labels is None else {"labels": labels[chosen]})
            net = functools.partial(model, **settings) if settings else model
            loss = diffusion.loss(net, to_device(x0, device), rng) * (scale * len(chosen) / batch)
            gradient = backward(loss, copy=False)
            total += loss.data.astype(np.float64)
            if i == 0:
                flat_gradient(gradient, parameters, out=gradients[group])
            else:
                gradients[group] += flat_gradient(gradient, parameters)
        return total

    def update(step: int, loss: Array, last: bool) -> TrainState:
        """Step against the sum of all gradients and move the average; `last`: whether this rank wants to stop."""
        gradient = gradients[0]
        for other in gradients[1:]:
            gradient += other
        if ranks.size > 1:
            rows[0, -2], rows[0, -1] = loss, last
            ranks.allreduce(rows[0])
            loss, last = rows[0, -2].copy(), bool(rows[0, -1])  # on a GPU, the next step would change what is no copy
        if scale != 1:
            loss = loss / scale
            gradient *= 1 / scale
        rate = learning_rate(lr, step, steps, warmup_steps, decay_steps)
        outcome, last = [loss, clip_norm(gradient, max_norm)], last or step + 1 == steps
        run.unseen.append((step + 1, outcome))
        if on_cpu or len(run.unseen) == LOOK_EVERY or last:
            run.raise_unless_finite()
        if moved():
            raise RuntimeError(f"step {step + 1}: the model's parameters were moved or replaced while it trains")
        optimizer.step(gradient, rate)
        ema.update(theta)
        return TrainState(step + 1, rate, ema, optimizer, outcome, last, 0.0, 0.0, run)

    def moved() -> bool:
        return any(p.data is not view for p, view in zip(parameters, views))

    try:
        if first >= steps:
            outcome = [facts["loss"], facts["grad_norm"]]
            yield TrainState(
                first, facts["lr"], ema, optimizer, outcome, True, facts["seconds"], facts["images_per_second"], run
            )
            return
        with contextlib.ExitStack() as stack:
            work = stack.enter_context(worker_processes(differentiate, workers, len(groups) if on_cpu else 1))
            batches = itertools.repeat([None] * len(groups))
            if not in_memory:
                batches = stack.enter_context(ahead(read, range(first, steps), READ_AHEAD))
            for step in range(first, steps):
                began = time.monotonic()
                run.recent.append(0.0)
                with on_device(device):
                    loss = sum(work(list(enumerate(next(batches))), step))
                    state = update(step, loss, stop is not None and bool(stop()))
                state.seconds, state.images_per_second = run.spend(time.monotonic() - began)
                yield state
                if state.last:
                    break
    finally:
        if on_cpu and not moved():
            flatten(parameters)  # out of the memory that processes share


def _integers(least: int, **values: int) -> list[int]:
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    return list(map(int, values.values()))


def _floats(**values: float) -> list[float]:
    for name, value in values.items():
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: expected a number, got {value!r}")
    return list(map(float, values.values()))  # a number of NumPy would decide about the precision of what it meets


def _empty(model: Module, shape: tuple[int, ...]) -> Array:
    """Memory where the model is; on a CPU, such as processes share."""
    p = model.parameters()[0].data
    return shared_array(shape, p.dtype) if model.device == "cpu" else array_module(p).empty(shape, p.dtype)


def _begin(
    model: Module, lr: float, ema_decay: float, resume: Path | None, config: dict, ranks: Ranks
) -> tuple[Adam, EMA, dict]:
    """The optimiser, of parameters that are views of one vector now, the average, and the facts of the checkpoint from
    which they are; on all ranks those of rank 0."""
    for rank, other in enumerate(ranks.gathered(config)):
        if differing := differences(config, other, where=(f"on rank {ranks.rank}", f"on rank {rank}")):
            raise ValueError(f"ranks: they have to do the same, but differ: {'; '.join(differing[:8])}")
    facts = {"step": 0, "seconds": 0.0, "config": config}
    with on_device(model.device):
        ema, error = EMA(model, ema_decay), None
        optimizer = Adam(flatten(model.parameters(), out=_empty(model, (model.size,))), lr)
        if resume is not None and ranks.rank == 0:
            try:
                facts = read_checkpoint(resume, ema.model, _vectors(optimizer), config) or facts
            except (ValueError, OSError) as refused:
                error = refused
        facts, error = ranks.gathered((facts, error))[0]  # so that no rank waits for one that has failed
        if error is not None:
            flatten(model.parameters())  # out of the memory that processes share
            raise error
        for vector in (ema.average, *_vectors(optimizer).values()):
            ranks.broadcast(vector)
    optimizer.n = ema.n = facts["step"]
    return optimizer, ema, facts
