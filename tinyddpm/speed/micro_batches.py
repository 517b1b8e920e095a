"""A batch's gradient, shared out: micro-batches among workers on this machine, and among the ranks of an MPI job.

A batch is cut into micro-batches of fixed size, which workers differentiate side by side; gradients are added up in a
fixed order and each micro-batch has random numbers of its own, so the result is the same to the bit for any number of
workers. Ranks share the micro-batches out, and add up what each has added up.

A GPU takes all of its share at once, and runs behind: what is asked of it is queued, and nobody waits for it here.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..backend import Array, array_module, on_device
from .ranks import Ranks
from .workers import ahead, is_shared, shared_array, worker_processes

GROUPS = 16  # of micro-batches, at most: each has a gradient in memory, and there is work for as many workers
READ_AHEAD = 4  # steps: so many batches of a folder's pictures are in memory


@contextlib.contextmanager
def batch_gradient(
    model: Any, differentiate: Callable, batches: Any, steps: range, workers: int = 1, ranks: Ranks | None = None
) -> Iterator[Callable]:
    """The twin of `training.loop.batch_gradient`: with `workers` processes on a CPU, see `worker_processes`, and
    `ranks`. Processes would not see how parameters change that lie elsewhere than in `new_vector`'s memory, so then the
    workers are threads. Images that are not in memory, such as a folder's, are read up to `READ_AHEAD` steps ahead.

    Products in "fp16" (see `Module.to`) lose gradients below 6e-8, and a mean over many pixels makes them small. So the
    loss is then multiplied by about the number of pixels before it is differentiated, and the gradient divided
    (Micikevicius et al. 2018).
    """
    ranks = ranks or Ranks()
    on_cpu, starts = model.device == "cpu", ranks.share(batches.starts)
    groups = np.array_split(starts, min(GROUPS, len(starts)) or 1) if on_cpu else [starts]
    pixels = batches.size * math.prod(batches.images.shape[1:])
    scale = 2.0 ** round(math.log2(pixels)) if model.precision == "fp16" else 1.0
    with on_device(model.device):
        # one number more than parameters: the loss rides along when ranks add up
        p, shape = model.parameters()[0].data, (len(groups), model.size + 1)
        rows = shared_array(shape, p.dtype) if on_cpu else array_module(p).empty(shape, p.dtype)
    gradients = rows[:, :-1]

    def read(step: int) -> list[list[np.ndarray]]:
        """The images of each micro-batch in each group."""
        return [[batches.read(step, start) for start in group] for group in groups]

    def of_group(item: tuple[int, list[np.ndarray] | None], step: int) -> Array:
        """Loss of a group of micro-batches, of images that are given or in memory; the gradient goes to its row."""
        (group, given), total = item, 0.0
        if not len(groups[group]):  # there are more ranks than micro-batches
            gradients[group] = 0
        for i, start in enumerate(groups[group]):
            x0, out = given[i] if given else None, gradients[group] if i == 0 else None
            loss, gradient = differentiate(step, start, x0, scale, out)
            total += loss.astype(np.float64)
            if i > 0:
                gradients[group] += gradient
        return total

    def draw_and_differentiate(step: int) -> tuple[Array, Array]:
        loss = sum(work(list(enumerate(next(images_of_steps))), step))
        gradient = gradients[0]  # and its memory: it is good until the next step
        for other in gradients[1:]:
            gradient += other
        if ranks.size > 1:
            rows[0, -1] = loss
            ranks.allreduce(rows[0])
            loss = rows[0, -1].copy()  # on a GPU, the next step would change what is no copy
        if scale != 1:
            loss = loss / scale
            gradient *= 1 / scale
        return loss, gradient

    with contextlib.ExitStack() as stack:
        threads = on_cpu and not all(is_shared(p.data) for p in model.parameters())
        work = stack.enter_context(worker_processes(of_group, workers, len(groups) if on_cpu else 1, threads))
        images_of_steps = itertools.repeat([None] * len(groups))
        if not isinstance(batches.images, np.ndarray):
            images_of_steps = stack.enter_context(ahead(read, steps, READ_AHEAD))
        yield draw_and_differentiate
