"""Workers: threads, and processes. The only file that knows of either.

Several workers each run forward and backward on a micro-batch of their own. That keeps every op plain single-threaded
NumPy, runs elementwise work in parallel too, and stays in cache; BLAS is held to one thread meanwhile. What a
micro-batch computes does not depend on who computes it, so neither does the result.

NumPy releases Python's lock inside its kernels, so threads do where the kernels are long, as in sampling. Training has
thousands of short ones, and two threads lose a fifth to a third of their time waiting for the lock; there the workers
are processes, each with a lock of its own, which find the parameters in shared memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import multiprocessing
import multiprocessing.connection
import numbers
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import numpy as np
from threadpoolctl import ThreadpoolController, threadpool_limits

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
PIXELS = 2**14  # pass through a network at a time: enough for the matrix products, few enough for the cache


def shard_size(count: int, height: int, width: int) -> int:
    """How many of `count` images of this size a worker takes at a time, whatever the number of workers: a quarter of
    them and at least 4, but no more than a power of two of at most `PIXELS` pixels."""
    return min(max(4, -(-count // 4)), 2 ** int(math.log2(max(1, PIXELS // (height * width)))))


def shards(shape: tuple[int, int, int, int], device: str) -> list[slice]:
    """Cut images (N, H, W, C) into what passes through a network at a time; on a GPU that is all of them."""
    N, H, W, _ = shape
    size = shard_size(N, H, W) if device == "cpu" else N
    return [slice(start, start + size) for start in range(0, N, size)]


def cpu_count() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def worker_threads(count: int | None = None, most: int | None = None) -> Iterator[Callable]:
    """Within this block, have `count` threads (None: one per CPU), but no more than `most`; yields `run(function,
    items)`, `map` on them.

    Results come in the order of the items, as they are asked for; an exception in a worker is raised where its result
    is taken. One thread is this one: a new one would be new to a GPU's libraries too, which takes them a while.
    Raises ValueError unless `count` is an integer >= 1.
    """
    count = _worker_count(count, most)
    blas = ThreadpoolController()
    with contextlib.nullcontext() if count == 1 else ThreadPoolExecutor(count) as pool:

        def run(function: Callable, items: Iterable) -> Iterator:
            with blas.limit(limits=1, user_api="blas"):  # a setting of the whole process, so only while we need it
                if pool:
                    yield from pool.map(function, items)
                else:
                    for item in items:
                        yield function(item)

        yield run


@contextlib.contextmanager
def worker_processes(function: Callable, count: int | None = None, most: int | None = None) -> Iterator[Callable]:
    """Within this block, have `count` processes (None: one per CPU), but no more than `most`, that are copies of this
    one as it is when `run` is first called; yields `run(items, *same)`, which has them compute function(item, *same)
    for each item.

    What goes to a process and what it returns is pickled; all else that the function changes stays with the process,
    except for arrays from `shared_array`. Results come in the order of the items; an exception in a worker is raised
    where its result is taken. A single worker is this thread. Those of a process that may not have any of its own
    (multiprocessing's daemons), and all on Windows and macOS, where copying a process is impossible or unsafe, are
    threads.
    Raises ValueError unless `count` is an integer >= 1.
    """
    count = _worker_count(count, most)
    if count == 1 or sys.platform != "linux" or multiprocessing.current_process().daemon:
        with worker_threads(count) as run:
            yield lambda items, *same: run(lambda item: function(item, *same), items)
        return
    with ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _become_worker, (function,)) as pool:
        yield lambda items, *same: pool.map(functools.partial(_work, same), items)


def shared_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that `worker_processes` started later share with this process: what one writes, all see."""
    size, dtype = math.prod(shape), np.dtype(dtype)
    return np.frombuffer(mmap.mmap(-1, size * dtype.itemsize), dtype).reshape(shape)


def _become_worker(function: Callable) -> None:
    """Make this process, just begun, one that calls `function`."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; what it means is for the first to say
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threadpool_limits(1, "blas")
    with contextlib.suppress(AttributeError, OSError):  # glibc: keep freed memory, in blocks of up to 32 MiB, for the
        malloc = ctypes.CDLL(None)  # next micro-batch. What is handed back to the system comes back page by page, each
        malloc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # with a page fault: 6 to 13 % of a step
        malloc.mallopt(M_MMAP_THRESHOLD, 2**25)


def _work(same: tuple, item):
    try:
        return _function(item, *same)
    except Exception as error:
        try:
            ForkingPickler.loads(ForkingPickler.dumps(error))
        except Exception:  # it cannot travel; what it says can
            raise RuntimeError("".join(traceback.format_exception(error))) from None
        raise


def _end_with_parent() -> None:
    """Do not outlive the process that this one is a copy of, should it be killed."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _worker_count(count: int | None, most: int | None) -> int:
    count = cpu_count() if count is None else count
    if not isinstance(count, numbers.Integral) or count < 1:
        raise ValueError(f"workers: expected an integer >= 1, got {count!r}")
    return min(count, most or math.inf)


def blas_name() -> str:
    """The BLAS behind NumPy and the kernels it chose, for instance "openblas 0.3.31 SkylakeX"."""
    found = ThreadpoolController().select(user_api="blas").info()
    return ", ".join(f"{i['internal_api']} {i['version']} {i.get('architecture') or ''}".strip() for i in found) or "?"
