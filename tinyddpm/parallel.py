"""Worker threads. The only file that knows of them.

NumPy releases Python's lock inside its kernels, so several threads can each run forward and backward on a micro-batch
of their own. That keeps every op plain single-threaded NumPy, runs elementwise work in parallel too, and stays in
cache; BLAS is held to one thread meanwhile. What a micro-batch computes does not depend on who computes it, so neither
does the result.
"""

from __future__ import annotations

import contextlib
import numbers
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from threadpoolctl import ThreadpoolController

SHARD = 8  # images for one forward pass of a worker: enough for the matrix products, few enough for the cache


def shards(count: int, device: str) -> list[slice]:
    """Cut `count` images into what passes through a network at a time: `SHARD` on a CPU, all of them on a GPU."""
    size = SHARD if device == "cpu" else count
    return [slice(start, start + size) for start in range(0, count, size)]


def cpu_count() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def worker_threads(count: int | None = None) -> Iterator[Callable]:
    """Within this block, have `count` threads (None: one per CPU); yields `run(function, items)`, `map` on them.

    Results come in the order of the items, as they are asked for; an exception in a worker is raised where its result
    is taken. Raises ValueError unless `count` is an integer >= 1.
    """
    count = cpu_count() if count is None else count
    if not isinstance(count, numbers.Integral) or count < 1:
        raise ValueError(f"workers: expected an integer >= 1, got {count!r}")
    blas = ThreadpoolController()
    with ThreadPoolExecutor(count) as pool:

        def run(function: Callable, items: Iterable) -> Iterator:
            with blas.limit(limits=1, user_api="blas"):  # a setting of the whole process, so only while we need it
                yield from pool.map(function, items)

        yield run


def blas_name() -> str:
    """The BLAS behind NumPy and the kernels it chose, for instance "openblas 0.3.31 SkylakeX"."""
    found = ThreadpoolController().select(user_api="blas").info()
    return ", ".join(f"{i['internal_api']} {i['version']} {i.get('architecture') or ''}".strip() for i in found) or "?"
