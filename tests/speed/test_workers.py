"""Workers: threads and processes, and what becomes of them when something goes wrong."""

import contextlib
import functools
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits
from tiny_training import on_linux
from tqdm import tqdm

from tinyddpm.speed.workers import ahead, blas_name, cpu_count, shared_array, worker_processes, worker_threads

FORK = multiprocessing.get_context("fork") if sys.platform == "linux" else multiprocessing
in_threads = functools.partial(worker_processes, threads=True)
ways = pytest.mark.parametrize("workers", [in_threads, pytest.param(worker_processes, marks=on_linux)])


def blas_threads(_=None):
    return {i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"}


def here(*_):
    return os.getpid(), threading.get_ident()


def none_is_left(before):
    return threading.active_count() == before and not multiprocessing.active_children()


def test_what_there_is():
    assert blas_name()
    if hasattr(os, "sched_getaffinity"):
        assert cpu_count() == len(os.sched_getaffinity(0))


@ways
class TestThreadsAndProcesses:
    @pytest.mark.parametrize("platform", ["as it is", "darwin"])
    def test_results_come_in_order_from_as_many_workers(self, workers, platform, monkeypatch):
        if platform == "darwin":  # where a process cannot be copied they are threads
            monkeypatch.setattr(sys, "platform", platform)
        barrier, before = FORK.Barrier(3, timeout=10), threading.active_count()

        def work(i, plus):
            barrier.wait()  # passes only if three workers are at it
            return i + plus, here()

        with workers(work, 3) as run:
            results = [*run(range(9), 10), *run(range(9), 20)]
        assert [i for i, _ in results] == [*range(10, 19), *range(20, 29)]
        seen, processes = {who for _, who in results}, workers is worker_processes and platform != "darwin"
        assert len(seen) == 3 and here() not in seen and processes == (os.getpid() not in {pid for pid, _ in seen})
        assert none_is_left(before)

    def test_blas_is_held_to_one_thread_meanwhile(self, workers):
        with threadpool_limits(2, "blas"), workers(lambda i: blas_threads() if i else 1 / i, 2) as run:
            before = blas_threads()
            assert all(seen <= {1} for seen in run(range(1, 5)))
            assert blas_threads() == before  # of threads the setting is the whole process's: it is taken back
            with pytest.raises(ZeroDivisionError):
                list(run([0]))
            assert blas_threads() == before

    def test_an_exception_surfaces_with_its_traceback_and_they_end(self, workers):
        before = threading.active_count()

        def fails_here(i):
            return 1 / i

        with pytest.raises(ZeroDivisionError) as raised, workers(fails_here, 2) as run:
            list(run([1, 0, 2]))
        assert "in fails_here" in "".join(traceback.format_exception(raised.value)) and none_is_left(before)

    @pytest.mark.parametrize("count", [1, 2])
    def test_a_worker_that_runs_out_of_something_does_not_end_the_work(self, workers, count):
        """StopIteration, which would end a plain `map` in silence."""
        with workers(lambda i: next(iter([i][i:])), count) as run:
            with pytest.raises(RuntimeError, match="StopIteration"):
                list(run(range(3)))

    @pytest.mark.parametrize("settings", [(1,), (5, 1)], ids=["count", "most"])
    def test_a_single_worker_is_this_thread_and_there_are_no_more_than_there_is_work_for(self, workers, settings):
        with workers(here, *settings) as run:
            assert set(run(range(3), "same")) == {here()}
        with workers(here, 5, 2) as run:
            assert len(set(run(range(20)))) <= 2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first in, first out", "first in, last out"])
def test_who_leaves_last_gives_blas_its_threads_back(order):
    """Of several threads that compute at a time, in whichever order they end, one of them with an error; whoever had
    set it before, and to who sets it after."""
    threads, one_thread = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)], threadpool_limits.wrap(1, user_api="blas")
    with threads[0], threads[1], threadpool_limits(2, "blas"), worker_threads(2) as run, worker_threads(1) as other:
        at_work = run(lambda i: 1 / (2 - i), range(3)), other(lambda i: 1 / (2 - i), range(3))
        for thread, results in zip(threads, at_work):
            assert thread.submit(next, results).result() == 0.5 and blas_threads() == {1}
        for i, left in zip(order, ({1}, {2})):
            with pytest.raises(ZeroDivisionError):
                threads[i].submit(list, at_work[i]).result()
            assert blas_threads() == left
        for thread in threads:
            assert thread.submit(one_thread(blas_threads)).result() == {1}
            assert blas_threads() == {2}


class TestAhead:
    def test_results_come_in_order_and_so_far_ahead_as_asked_for_while_nobody_waits(self):
        asked, done = [], threading.Event()
        items = (asked.append(i) or i for i in range(9))
        with ahead(lambda i: done.set() if i == 3 else 10 * i, items, 3) as results:
            assert asked == []  # nothing before the first is asked for
            assert next(results) == 0 and done.wait(10)
            for i in range(1, 9):
                assert next(results) == (10 * i if i != 3 else None) and len(asked) == min(9, i + 1 + 3)
            assert next(results, "the end") == "the end"

    def test_who_stops_early_does_not_wait_for_the_rest(self, monkeypatch):
        monkeypatch.setattr("tinyddpm.speed.workers.cpu_count", lambda: 1)
        begun = []
        with ahead(lambda i: begun.append(i) or time.sleep(0.01), range(10**9), 5) as results:
            next(results)
        assert len(begun) < 5


class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


@on_linux
class TestProcesses:
    def test_they_are_copies_of_this_process_when_the_block_begins_but_for_arrays_that_are_shared(self):
        shared, own, seen = shared_array((2, 3), "float32"), np.zeros(3), [1]
        assert shared.shape == (2, 3) and shared.dtype == np.float32 and not shared.any()

        def work(i):
            own[i] = shared[1, i] = 10 * i + shared[0, i]
            return list(seen)

        with worker_processes(work, 2) as run:
            seen.append(2)
            for k in (1, 2):
                shared[0] = k  # what is written here later, they see
                assert list(run(range(3))) == 3 * [[1]] and shared[1].tolist() == [k, 10 + k, 20 + k]
        assert not own.any()

    @pytest.mark.parametrize("kind", [Odd, type("Odd", (Odd,), {})], ids=["cannot be unpickled", "cannot be pickled"])
    def test_an_exception_that_cannot_travel_tells_what_it_was(self, kind):
        def fails(i):
            raise kind("this", "that")

        with pytest.raises(RuntimeError, match="Odd: this and that"), worker_processes(fails, 2) as run:
            list(run(range(2)))

    def test_in_a_process_that_may_have_none_they_are_threads(self):
        def trains():
            with worker_processes(here, 2) as run:
                assert {pid for pid, _ in run(range(2))} == {os.getpid()}

        daemon = FORK.Process(target=trains, daemon=True)
        daemon.start()
        daemon.join(30)
        assert daemon.exitcode == 0

    def test_a_worker_that_dies_is_an_error_and_no_waiting(self):
        before, killed = threading.active_count(), "a worker was killed; if it was for want of memory, fewer workers"
        dies = lambda i: os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(RuntimeError, match=killed), worker_processes(dies, 2) as run:
            list(run(range(2)))
        assert none_is_left(before)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_ctrl_c_and_sigterm_are_for_the_first_process(self, number):
        with worker_processes(lambda i: os.kill(os.getpid(), number) or time.sleep(0.02) or i, 2) as run:
            assert list(run(range(4))) == [0, 1, 2, 3]

    def test_they_do_not_outlive_a_killed_parent(self):
        read, write = os.pipe()
        works = lambda i: os.write(write, b"!") and time.sleep(60) or os._exit(1)

        def trains():
            with worker_processes(works, 2) as run:
                list(run(range(2)))

        parent = FORK.Process(target=trains)
        parent.start()
        os.close(write)
        assert [os.read(read, 1), os.read(read, 1)] == [b"!", b"!"]
        parent.kill()
        parent.join()
        assert select.select([read], [], [], 30)[0] and os.read(read, 1) == b"", "some hold their end of the pipe"
        os.close(read)


@contextlib.contextmanager
def notebook(module):
    """Has a thread that runs what is written in such a module."""
    end = threading.Event()
    wait = lambda: end.wait()
    wait.__module__, wait.__qualname__ = module, "wait"
    (thread := threading.Thread(target=wait, daemon=True, name="another")).start()
    yield
    end.set(), thread.join()


@contextlib.contextmanager
def reading():
    with ahead(lambda i: i, range(9), 2) as results:
        yield next(results)


IDLE = "tqdm", "ipykernel", "IPython", "zmq", "debugpy", "pydevd", "_pydevd_bundle", "multiprocessing.queues"
BUSY = "__main__", "ipykernelish", "concurrent.futures.thread", "multiprocessing.pool"


@on_linux
@pytest.mark.parametrize(
    "idle",
    [lambda: tqdm(range(3), leave=False), lambda: worker_processes(abs, 2), reading, lambda: FORK.Pool(1)]
    + [functools.partial(notebook, f"{module}.some") for module in IDLE],
)
def test_threads_that_compute_nothing_keep_nobody_from_being_copied(idle):
    with idle(), worker_processes(here, 2) as run:
        assert threading.active_count() > 1 and os.getpid() not in dict(run(range(2)))


@on_linux
@pytest.mark.parametrize("module", BUSY)
def test_where_other_threads_may_compute_the_workers_are_threads_and_it_is_said(module):
    """A copy made while one of them is in a matrix product would never end, nor the making of it."""
    with notebook(module), pytest.warns(UserWarning, match=r"workers: they are threads, .* \(another\)"):
        with worker_processes(here, 2) as run:
            assert {pid for pid, _ in run(range(2))} == {os.getpid()}
