"""Workers: threads, processes, and the ranks of an MPI job. Nothing about diffusion: skip it at first.

Several workers each run forward and backward on a micro-batch of their own. That keeps every op plain single-threaded
NumPy, runs elementwise work in parallel too, and stays in cache; BLAS is held to one thread meanwhile. What a
micro-batch computes does not depend on who computes it, so neither does the result.

NumPy releases Python's global interpreter lock inside its kernels, so threads do where these are long, as in sampling.
Training has thousands of short ones, and two threads lose a fifth to a third of their time waiting for the lock; there
the workers are processes, each with a lock of its own, which find the parameters in shared memory. Across machines they
are ranks, which share nothing and add their gradients up.
"""

from __future__ import annotations

import collections
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController, threadpool_limits

from .backend import Array, device_of, to_device, to_numpy

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
def ahead(function: Callable, items: Iterable, depth: int) -> Iterator[Iterator]:
    """Within this block, yields an iterator over function(item) for each item, in order, which a thread per CPU is up
    to `depth` items ahead with; an exception is raised where its result is asked for. Nothing begins before the first
    is asked for."""
    with ThreadPoolExecutor(cpu_count()) as pool:
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
def worker_processes(function: Callable, count: int | None = None, most: int | None = None) -> Iterator[Callable]:
    """Within this block, have `count` processes (None: one per CPU), but no more than `most`, that are copies of this
    one as it is when the block begins; yields `run(items, *same)`, which has them compute function(item, *same) for
    each item.

    What goes to a process and what it returns is pickled; all else that the function changes stays with the process,
    except for arrays from `shared_array`. Results come in the order of the items; an exception in a worker is raised
    where its result is taken. A single worker is this thread. Where processes cannot be copied, or not safely (Windows,
    macOS, a daemon of multiprocessing, a rank of MPI), the workers are threads.
    Raises ValueError unless `count` is an integer >= 1; `run` raises RuntimeError if a worker is killed.
    """
    count = _worker_count(count, most)
    alone = multiprocessing.current_process().daemon or "mpi4py.MPI" in sys.modules
    if count == 1 or sys.platform != "linux" or alone:
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


def shared_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that `worker_processes` started later share with this process: what one writes, all see."""
    size, dtype = math.prod(shape), np.dtype(dtype)
    return np.frombuffer(mmap.mmap(-1, size * dtype.itemsize), dtype).reshape(shape)


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
        try:
            ForkingPickler.loads(ForkingPickler.dumps(error))
        except Exception:  # it cannot travel; what it says can
            raise RuntimeError("".join(traceback.format_exception(error))) from None
        raise


def _end_with_parent() -> None:
    """Do not outlive the process that this one is a copy of, should it be killed."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _end_when_told_by_parent() -> None:
    """SIGTERM is how a pool that is broken ends its workers."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(1)


class Ranks:
    """The processes that `mpiexec -n N` started, each of which takes a part of every batch; without `mpi`, this one.

        ranks = Ranks(mpi=True)
        with ranks.abort_on_error():
            for state in train(..., ranks=ranks):
                if ranks.rank == 0:
                    print(state.loss)

    All have to do the same number of steps, so none may leave the loop alone. `rank` is the number of this one of
    `size`, and `local_rank` that of the `local_size` on this machine. Raises RuntimeError if mpi4py or an MPI is
    missing, or mpiexec is that of another MPI.
    """

    def __init__(self, mpi: bool = False):
        self.rank, self.size, self.local_rank, self.local_size = 0, 1, 0, 1
        if not mpi:
            return
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise RuntimeError(f"mpi: {error}; pip install 'tinyddpm[mpi]' brings mpi4py and an MPI") from error
        self.mpi, self.world = MPI, MPI.COMM_WORLD
        self.rank, self.size = self.world.rank, self.world.size
        machine = self.world.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = machine.rank, machine.size
        if self.size < (started := ranks_started()):
            raise RuntimeError(
                f"mpi: mpiexec started {started} processes, but they see {self.size}: it is that of another MPI than "
                "mpi4py's; the right one lies beside this python"
            )

    @property
    def cpus(self) -> int:
        """How many of this machine's CPUs are for this rank."""
        return max(1, cpu_count() // self.local_size)

    def share(self, items: Sequence) -> Sequence:
        """Those of `items` that are for this rank: about as many as for any other, in order."""
        first, last = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return items[first:last]

    def allreduce(self, vector: Array) -> None:
        """Have each rank's `vector` replaced by their sum.

        MPICH and Open MPI sum in an order that depends on N, the length and which ranks share a machine, so that the
        result is the same to the bit on every rank and in every run. What is on a GPU passes through the host's memory.
        """
        self._in_host_memory(vector, lambda host: self.world.Allreduce(self.mpi.IN_PLACE, host))

    def broadcast(self, vector: Array) -> None:
        """Have each rank's `vector` replaced by that of rank 0."""
        self._in_host_memory(vector, lambda host: self.world.Bcast(host))

    def _in_host_memory(self, vector: Array, communicate: Callable) -> None:
        if self.size > 1:
            host = to_numpy(vector)
            communicate(host)
            if host is not vector:
                vector[...] = to_device(host, device_of(vector))

    def gathered(self, value: Any) -> list:
        """What each rank has for `value`, a Python object, by rank."""
        return self.world.allgather(value) if self.size > 1 else [value]

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Within this block is first rank 0, then one on each other machine, then all others: to download something
        once, say."""
        turn = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        self._wait(turn)
        yield
        self._wait(2 - turn)

    def _wait(self, times: int) -> None:
        for _ in range(times if self.size > 1 else 0):
            self.world.Barrier()

    @contextlib.contextmanager
    def abort_on_error(self) -> Iterator[None]:
        """Within this block, an exception in one rank ends them all: the others would wait for it for ever. It is
        printed with its traceback, unless it is `sys.exit("message")`."""
        try:
            yield
        except BaseException as error:
            if self.size > 1:
                text = str(error) if isinstance(error, SystemExit) else traceback.format_exc()
                print(
                    f"rank {self.rank} of {self.size} failed, which ends the job: {text}", file=sys.stderr, flush=True
                )
                self.world.Abort(1)
            raise


def ranks_started() -> int:
    """How many processes mpiexec says it started, whether this one knows of MPI or not."""
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 1)


def _worker_count(count: int | None, most: int | None) -> int:
    count = cpu_count() if count is None else count
    if not isinstance(count, numbers.Integral) or count < 1:
        raise ValueError(f"workers: expected an integer >= 1, got {count!r}")
    return min(count, most or math.inf)


def blas_name() -> str:
    """The BLAS behind NumPy and the kernels it chose, for instance "openblas 0.3.31 SkylakeX"."""
    found = ThreadpoolController().select(user_api="blas").info()
    return ", ".join(f"{i['internal_api']} {i['version']} {i.get('architecture') or ''}".strip() for i in found) or "?"
