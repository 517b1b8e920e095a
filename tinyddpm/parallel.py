"""Worker threads. The only file that knows of them.

NumPy releases Python's lock inside its kernels, so several threads can each run forward and backward on a micro-batch
of their own. That keeps every op plain single-threaded NumPy, runs elementwise work in parallel too, and stays in
cache; BLAS is held to one thread meanwhile. What a micro-batch computes does not depend on who computes it, so neither
does the result.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from threadpoolctl import threadpool_info, threadpool_limits


def cpu_count() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def worker_threads(count: int | None = None) -> Iterator[Callable]:
    """Within this block, have `count` threads (None: one per CPU); yields `run(function, items)`, `map` on them.

    Results come in the order of the items; an exception in a worker is raised where its result is taken.
    Raises ValueError if `count` is below 1.
    """
    count = cpu_count() if count is None else count
    if count < 1:
        raise ValueError(f"workers: expected at least 1, got {count}")
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(count) as pool:
        yield pool.map


def blas_name() -> str:
    """The BLAS behind NumPy and the kernels it chose, for instance "openblas 0.3.31 SkylakeX"."""
    found = [info for info in threadpool_info() if info["user_api"] == "blas"]
    return (
        ", ".join(f"{i['internal_api']} {i['version']} {i.get('architecture') or ''}".strip() for i in found)
        or "unknown"
    )
