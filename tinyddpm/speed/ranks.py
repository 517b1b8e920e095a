"""Ranks: the processes of an MPI job, on one machine or many. They share nothing, and add their gradients up."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..backend import Array, device_of, to_device, to_numpy
from .workers import cpu_count


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

    def any(self, flag: bool) -> bool:
        """Whether any rank's `flag` is true."""
        if self.size == 1:
            return flag
        count = np.array([flag], np.int32)
        self.allreduce(count)
        return bool(count[0])

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
                time.sleep(0.2)  # for mpiexec to pass it on: what it has not read by the end of the job is lost
                self.world.Abort(1)
            raise


def ranks_started() -> int:
    """How many processes mpiexec says it started, whether this one knows of MPI or not."""
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 1)
