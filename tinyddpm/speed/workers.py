"""Workers: threads and processes. Nothing about diffusion.

Several workers each run forward and backward on a micro-batch of their own. That keeps every op plain single-threaded
NumPy, runs elementwise work in parallel too, and stays in cache; BLAS is held to one thread meanwhile. What a
micro-batch computes does not depend on who computes it, so neither does the result.

NumPy releases Python's global interpreter lock inside its kernels, so threads do where these are long, as in sampling.
Training has thousands of short ones, and two threads lose a fifth to a third of their time waiting for the lock; there
the workers are processes, each with a lock of its own, which find the parameters in shared memory.

What makes them is imported when it is first needed, so that `import tinyddpm` is quick.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import math
import mmap
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import threadpoolctl
from threadpoolctl import ThreadpoolController, threadpool_limits

from ..arguments import integer, warn

AHEAD = "tinyddpm reads ahead"  # so the names of its threads begin
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h


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
    from concurrent.futures import ThreadPoolExecutor

    count, blas = _worker_count(count, most), ThreadpoolController()
    with contextlib.nullcontext() if count == 1 else ThreadPoolExecutor(count) as pool:

        def run(function: Callable, items: Iterable) -> Iterator:
            with one_blas_thread(blas):  # a setting of the whole process, so only while we need it
                if pool:
                    yield from pool.map(function, items)
                else:
                    for item in items:
                        yield function(item)

        yield run


_blas_lock, _blas_users, _blas_before = threading.Lock(), 0, None


@contextlib.contextmanager
def one_blas_thread(blas: ThreadpoolController) -> Iterator[None]:
    """Within this block, BLAS computes with one thread, in all of the process; so of the threads that are within, the
    first sees to that, and the last to leave has it as the first found it."""
    global _blas_users, _blas_before
    with _blas_lock:
        if _blas_users == 0:
            _let_any_thread_set_blas()
            _blas_before = blas.limit(limits=1, user_api="blas")
        _blas_users += 1
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if _blas_users == 0:
                _let_any_thread_set_blas()
                _blas_before.restore_original_limits()
                _let_any_thread_set_blas()


def _let_any_thread_set_blas() -> None:
    """Since threadpoolctl 3.8, the first thread that set OpenBLAS's limit is the only one that may, while it lives."""
    openblas = getattr(threadpoolctl, "OpenBLASController", None)
    if clear := getattr(openblas, "clear_controlling_thread", None):
        clear(force=True)


@contextlib.contextmanager
def ahead(function: Callable, items: Iterable, depth: int) -> Iterator[Iterator]:
    """Within this block, yields an iterator over function(item) for each item, in order, which a thread per CPU is up
    to `depth` items ahead with; an exception is raised where its result is asked for. Nothing begins before the first
    is asked for."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(cpu_count(), AHEAD) as pool:
        waiting = collections.deque()

        def results() -> Iterator:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield results()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def worker_processes(
    function: Callable, count: int | None = None, most: int | None = None, threads: bool = False
) -> Iterator[Callable]:
    """Within this block, have `count` processes (None: one per CPU), but no more than `most`, that are copies of this
    one as it is when the block begins; yields `run(items, *same)`, which has them compute function(item, *same) for
    each item.

    What goes to a process and what it returns is pickled; all else that the function changes stays with the process,
    except for arrays from `shared_array`. Results come in the order of the items; an exception in a worker is raised
    where its result is taken. A single worker is this thread. Where processes cannot be copied, or not safely (Windows,
    macOS, a daemon of multiprocessing, a rank of MPI), or if `threads`, the workers are threads; and so they are while
    other threads of this process may compute, for a copy that is made in the midst of a matrix product of theirs never
    ends: then a warning says so.
    Raises ValueError unless `count` is an integer >= 1; `run` raises RuntimeError if a worker is killed.
    """
    import multiprocessing
    from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

    count = _worker_count(count, most)
    threads = threads or multiprocessing.current_process().daemon or "mpi4py.MPI" in sys.modules
    threads = threads or sys.platform != "linux" or count == 1
    if not threads and (others := _busy_threads()):
        warn(
            f"workers: they are threads, which are slower here than processes, for other threads of this program are "
            f"alive ({', '.join(others)}), and a process cannot be copied while one of them is in a matrix product; "
            "begin before they do, or take workers=1"
        )
        threads = True
    if threads:
        with worker_threads(count) as run:
            yield lambda items, *same: run(lambda item: function(item, *same), items)
        return
    with ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _become_worker, (function,)) as pool:

        def run(items: Iterable, *same: Any) -> Iterator:
            try:
                yield from pool.map(functools.partial(_work, same), items)
            except BrokenProcessPool as error:
                raise RuntimeError(
                    "a worker was killed; if it was for want of memory, fewer workers or a smaller batch need less"
                ) from error

        pool.submit(int).result()  # the copies are made now, while this process has no threads of ours
        yield run


# whose threads wait for others and compute nothing: progress bars, notebooks, debuggers, our pools of processes
_IDLE = (
    "tqdm.", "ipykernel.", "IPython.", "zmq.", "debugpy.", "pydevd", "_pydevd", "multiprocessing.queues",
    "multiprocessing.pool.Pool.", "concurrent.futures.process",
)  # fmt: skip


def _busy_threads() -> list[str]:
    """The names of this process's other threads that may compute, as far as Python knows of them."""
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    return [thread.name for thread in others if not (thread.name.startswith(AHEAD) or _code(thread).startswith(_IDLE))]


def _code(thread: threading.Thread) -> str:
    """Where what a thread runs is written, such as "multiprocessing.pool.Pool._handle_tasks"."""
    code = getattr(thread, "_target", None) or type(thread)
    return f"{code.__module__}.{getattr(code, '__qualname__', '')}"


def shared_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that `worker_processes` started later share with this process: what one writes, all see."""
    return np.ndarray(shape, dtype, buffer=mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize))


def is_shared(x: np.ndarray) -> bool:
    """Whether an array is of memory from `shared_array`."""
    while isinstance(x, np.ndarray):
        x = x.base
    return isinstance(x, (mmap.mmap, memoryview))


def _become_worker(function: Callable) -> None:
    """Make this process, just begun, one that calls `function`."""
    global _function
    _function = function
    # Ctrl-C and SIGTERM may reach every process; what they mean is for the first to say
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    for end in (_end_with_parent, _end_when_told_by_parent):
        threading.Thread(target=end, daemon=True).start()
    threadpool_limits(1, "blas")
    with contextlib.suppress(AttributeError, OSError):  # glibc: keep freed memory, in blocks of up to 32 MiB, for the
        malloc = ctypes.CDLL(None)  # next micro-batch. What is handed back to the system comes back page by page, each
        malloc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # with a page fault: 6 to 13 % of a step
        malloc.mallopt(M_MMAP_THRESHOLD, 2**25)


def _work(same: tuple, item):
    try:
        return _function(item, *same)
    except Exception as error:
        from multiprocessing.reduction import ForkingPickler

        try:
            ForkingPickler.loads(ForkingPickler.dumps(error))
        except Exception:  # it cannot travel; what it says can
            raise RuntimeError("".join(traceback.format_exception(error))) from None
        raise


def _end_with_parent() -> None:
    """Do not outlive the process that this one is a copy of, should it be killed."""
    import multiprocessing.connection

    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _end_when_told_by_parent() -> None:
    """SIGTERM is how a pool that is broken ends its workers."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(1)


def _worker_count(count: int | None, most: int | None) -> int:
    count = cpu_count() if count is None else integer("workers", count)
    return min(count, most or math.inf)


def blas_name() -> str:
    """The BLAS behind NumPy and the kernels it chose, for instance "openblas 0.3.31 SkylakeX"."""
    found = ThreadpoolController().select(user_api="blas").info()
    return ", ".join(f"{i['internal_api']} {i['version']} {i.get('architecture') or ''}".strip() for i in found) or "?"
