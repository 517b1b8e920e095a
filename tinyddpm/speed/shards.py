"""A network evaluated in shards of the batch, on threads: sampling and the variational bound spend their time there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

from ..autograd.tensor import no_grad
from ..backend import Array, array_module
from .winograd import ConstantFilters
from .workers import worker_threads

PIXELS = 2**15  # pass through a network at a time: enough for the matrix products, few enough for the cache


@contextlib.contextmanager
def in_parts(model: Callable, shape: tuple[int, int, int, int], workers: int | None = None) -> Iterator[Callable]:
    """The twin of `diffusion.evaluation.in_parts`: in shards, each on one of `workers` threads (None: one per CPU), and
    with the transforms of the model's filters kept. A GPU takes all at once."""
    cut, filters = shards(shape, getattr(model, "device", "cpu")), ConstantFilters(model)
    with worker_threads(workers, most=len(cut)) as threads:

        def run(function: Callable, *batches: Array | None) -> Array:
            def of_shard(shard: slice) -> Array:
                with no_grad(), filters.in_force():
                    return function(*(None if batch is None else batch[shard] for batch in batches))

            parts = list(threads(of_shard, cut))
            return array_module(parts[0]).concatenate(parts)

        yield run


def shard_size(count: int, height: int, width: int) -> int:
    """How many of `count` images of this size a worker takes at a time, whatever the number of workers: a quarter of
    them and at least 4, but no more than a power of two of at most `PIXELS` pixels."""
    return min(max(4, -(-count // 4)), 2 ** int(math.log2(max(1, PIXELS // (height * width)))))


def shards(shape: tuple[int, int, int, int], device: str) -> list[slice]:
    """Cut images (N, H, W, C) into what passes through a network at a time; on a GPU that is all of them."""
    N, H, W, _ = shape
    size = shard_size(N, H, W) if device == "cpu" else N
    return [slice(start, start + size) for start in range(0, N, size)]
