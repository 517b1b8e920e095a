"""Workers: threads and processes, and what becomes of them when something goes wrong."""

import contextlib
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits
from tqdm import tqdm

from tinyddpm.speed.workers import ahead, blas_name, cpu_count, shared_array, worker_processes, worker_threads

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the workers are threads")


def blas_threads():
    return {i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"}


def test_names_and_counts():
    assert blas_name()
    if hasattr(os, "sched_getaffinity"):
        assert cpu_count() == len(os.sched_getaffinity(0))
    for workers in (worker_threads, lambda count: worker_processes(abs, count)):
        for count in (0, -1, 1.5, "2"):
            with pytest.raises(ValueError, match=f"workers: expected an integer >= 1, got {count!r}"), workers(count):
                pass


class TestThreads:
    def test_results_come_in_order_from_as_many_threads(self):
        barrier = threading.Barrier(3, timeout=10)

        def work(i):
            barrier.wait()  # passes only if three threads are at it
            return i, threading.get_ident()

        with worker_threads(3) as run:
            results = list(run(work, range(9)))
        assert [i for i, _ in results] == list(range(9)) and len({thread for _, thread in results}) == 3

    def test_blas_is_held_to_one_thread_meanwhile(self):
        before = blas_threads()
        with worker_threads(2) as run:
            assert all(seen <= {1} for seen in run(lambda _: blas_threads(), range(4)))
            assert blas_threads() == before  # the setting is the whole process's: it is taken back between calls
            with pytest.raises(ZeroDivisionError):
                list(run(lambda i: 1 / i, [0]))
            assert blas_threads() == before

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first in, first out", "first in, last out"])
    def test_who_leaves_last_gives_blas_its_threads_back(self, order):
        """Of several threads that compute at a time, in whichever order they end, one of them with an error; whoever
        had set it before, and to who sets it after."""
        threads = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]
        with threads[0], threads[1], threadpool_limits(2, "blas"), worker_threads(2) as run, worker_threads(1) as other:
            at_work = run(lambda i: 1 / (2 - i), range(3)), other(lambda i: 1 / (2 - i), range(3))
            for thread, results in zip(threads, at_work):
                assert thread.submit(next, results).result() == 0.5 and blas_threads() == {1}
            for i, left in zip(order, ({1}, {2})):
                with pytest.raises(ZeroDivisionError):
                    threads[i].submit(list, at_work[i]).result()
                assert blas_threads() == left
            for thread in threads:
                assert thread.submit(self.with_one_thread).result() == {1} and blas_threads() == {2}

    @staticmethod
    def with_one_thread():
        with threadpool_limits(1, "blas"):
            return blas_threads()

    def test_an_exception_surfaces_and_the_threads_end(self):
        before = threading.active_count()
        with pytest.raises(ZeroDivisionError), worker_threads(2) as run:
            list(run(lambda i: 1 / i, [1, 0, 2]))
        assert threading.active_count() == before


class TestAhead:
    def test_results_come_in_order_and_no_further_ahead_than_asked_for(self):
        begun, most = [], []

        def work(i):
            begun.append(i)
            return 10 * i

        with ahead(work, range(9), 3) as results:
            time.sleep(0.02)
            assert begun == []  # nothing before the first is asked for
            for i in range(9):
                assert next(results) == 10 * i
                most.append(len(begun))
            assert next(results, None) is None
        assert all(n <= i + 1 + 3 for i, n in enumerate(most)) and sorted(begun) == list(range(9))

    def test_they_are_computed_while_nobody_waits(self):
        done = threading.Event()
        with ahead(lambda i: done.set() if i == 2 else None, range(9), 2) as results:
            next(results)
            assert done.wait(10)

    def test_an_exception_surfaces_at_its_place_and_the_threads_end(self):
        before = threading.active_count()
        with pytest.raises(ZeroDivisionError), ahead(lambda i: 1 / (2 - i), range(9), 3) as results:
            assert [next(results), next(results)] == [0.5, 1.0]
            next(results)
        assert threading.active_count() == before

    def test_who_stops_early_does_not_wait_for_the_rest(self):
        begun = []

        def work(i):
            begun.append(i)
            time.sleep(0.02)

        with ahead(work, range(10**9), 5) as results:
            next(results)
        assert len(begun) < 20


@on_linux
class TestProcesses:
    def test_results_come_in_order_from_as_many_processes(self):
        barrier = multiprocessing.get_context("fork").Barrier(3, timeout=10)

        def work(i, plus):
            barrier.wait()  # passes only if three processes are at it
            return i + plus, os.getpid()

        with worker_processes(work, 3) as run:
            results = list(run(range(9), 10))
            results += run(range(9), 20)
        assert [i for i, _ in results] == [*range(10, 19), *range(20, 29)]
        assert len({pid for _, pid in results}) == 3 and os.getpid() not in {pid for _, pid in results}
        assert not multiprocessing.active_children()

    def test_they_share_arrays_made_for_it_and_nothing_else(self):
        shared, own = shared_array((2, 3), "float32"), np.zeros(3)
        assert shared.shape == (2, 3) and shared.dtype == np.float32 and not shared.any()

        def work(i):
            own[i] = shared[1, i] = 10 * i + shared[0, i]

        with worker_processes(work, 2) as run:
            for k in (1, 2):
                shared[0] = k  # what is written here later, they see
                list(run(range(3)))
                assert shared[1].tolist() == [k, 10 + k, 20 + k]
        assert not own.any()

    def test_they_are_copies_of_this_process_as_it_is_when_the_block_begins(self):
        seen = [1]
        with worker_processes(lambda _: list(seen), 2) as run:
            seen.append(2)
            assert list(run(range(2))) == [[1], [1]]

    def test_blas_is_held_to_one_thread_in_them_only(self):
        before = blas_threads()
        with worker_processes(lambda _: blas_threads(), 2) as run:
            assert all(seen <= {1} for seen in run(range(4)))
            assert blas_threads() == before

    def test_an_exception_surfaces_with_its_traceback_and_they_end(self):
        def fails_here(i):
            return 1 / i

        with pytest.raises(ZeroDivisionError) as raised, worker_processes(fails_here, 2) as run:
            list(run([1, 0, 2]))
        assert "in fails_here" in str(raised.value.__cause__)
        assert not multiprocessing.active_children()

    def test_an_exception_that_cannot_be_pickled_tells_what_it_was(self):
        class Odd(Exception):
            def __init__(self, a, b):
                super().__init__(f"{a} and {b}")

        def fails(i):
            raise Odd("this", "that")

        with pytest.raises(RuntimeError, match="Odd: this and that"), worker_processes(fails, 2) as run:
            list(run(range(2)))

    def test_no_more_than_there_is_work_for(self):
        with worker_processes(lambda i: multiprocessing.current_process().name, 5, most=2) as run:
            assert len(set(run(range(20)))) <= 2
        with worker_processes(lambda i: os.getpid(), 5, most=1) as run:
            assert list(run(range(2))) == [os.getpid()] * 2

    def test_in_a_process_that_may_have_none_they_are_threads(self):
        def trains(queue):
            with worker_processes(lambda i: os.getpid(), 2) as run:
                queue.put((os.getpid(), *run(range(2))))

        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        daemon = context.Process(target=trains, args=(queue,), daemon=True)
        daemon.start()
        assert len(set(queue.get(timeout=30))) == 1
        daemon.join()

    def test_a_worker_that_dies_is_an_error_and_no_waiting(self):
        with (
            pytest.raises(RuntimeError, match="a worker was killed; if it was for want of memory, fewer workers"),
            worker_processes(lambda i: os.kill(os.getpid(), signal.SIGKILL), 2) as run,
        ):
            list(run(range(2)))
        assert not multiprocessing.active_children()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_ctrl_c_and_sigterm_are_for_the_first_process(self, number):
        def work(i):
            os.kill(os.getpid(), number)
            time.sleep(0.02)
            return i

        with worker_processes(work, 2) as run:
            assert list(run(range(4))) == [0, 1, 2, 3]

    def test_they_do_not_outlive_a_killed_parent(self, tmp_path):
        script = """
            import os, time
            from tinyddpm.speed.workers import worker_processes

            def work(i):
                os.write(1, f"{os.getpid()}\\n".encode())  # at once, not in pieces as print does
                time.sleep(60)

            with worker_processes(work, 2) as run:
                list(run(range(2)))
        """
        parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
        parent.wait()

        def running(pid):
            try:
                return "State:\tZ" not in open(f"/proc/{pid}/status").read()
            except FileNotFoundError:
                return False

        deadline = time.monotonic() + 30
        while any(map(running, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(running, workers))
        parent.stdout.close()

    def test_a_single_worker_is_this_process(self):
        seen = []
        with worker_processes(lambda i, j: seen.append((i, j, os.getpid())), 1) as run:
            list(run(range(2), 5))
        assert seen == [(0, 5, os.getpid()), (1, 5, os.getpid())]


def test_where_a_process_cannot_be_copied_they_are_threads(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    barrier = threading.Barrier(2, timeout=10)

    def work(i, plus):
        barrier.wait()
        return i + plus, os.getpid()

    with worker_processes(work, 2) as run:
        assert list(run(range(4), 1)) == [(i + 1, os.getpid()) for i in range(4)]


IDLE = "tqdm", "ipykernel", "IPython", "zmq", "debugpy", "pydevd", "_pydevd_bundle", "multiprocessing.queues"


@contextlib.contextmanager
def notebook(module, name="wait"):
    """Has a thread that runs what is written in such a module."""
    end = threading.Event()
    wait = lambda: end.wait()
    wait.__module__, wait.__qualname__ = module, name
    threading.Thread(target=wait, daemon=True).start()
    yield
    end.set()


@contextlib.contextmanager
def reading():
    with ahead(lambda i: i, range(9), 2) as results:
        yield next(results)


@on_linux
class TestInAProcessThatHasThreads:
    """A copy made while one of them is in a matrix product would never end, nor the making of it."""

    def test_the_workers_are_threads_and_it_is_said(self):
        end, a = threading.Event(), np.ones((700, 700), np.float32)

        def multiply():
            while not end.is_set():
                a @ a

        other = threading.Thread(target=multiply, name="another")
        other.start()
        try:
            with pytest.warns(UserWarning, match=r"workers: they are threads, .* \(another\)"):
                with worker_processes(lambda i: os.getpid(), 2) as run:
                    assert list(run(range(4))) == [os.getpid()] * 4
        finally:
            end.set()
            other.join()

    @pytest.mark.parametrize(
        "idle",
        [
            lambda: tqdm(range(3), leave=False), lambda: worker_processes(abs, 2), reading,
            lambda: multiprocessing.get_context("fork").Pool(1),
            *[functools.partial(notebook, f"{module}.some") for module in IDLE],
        ],
    )  # fmt: skip
    def test_those_that_compute_nothing_do_not_count(self, idle):
        with idle(), worker_processes(lambda i: os.getpid(), 2) as run:
            assert threading.active_count() > 1 and os.getpid() not in list(run(range(2)))

    @pytest.mark.parametrize(
        "module", ["__main__", "ipykernelish", "concurrent.futures.thread", "multiprocessing.pool"]
    )
    def test_others_do(self, module):
        with (
            notebook(module),
            pytest.warns(UserWarning, match="workers: they are threads"),
        ):
            with worker_processes(lambda i: os.getpid(), 2) as run:
                assert set(run(range(2))) == {os.getpid()}


@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_that_runs_out_of_something_does_not_end_the_work(count):
    """StopIteration, which would end a plain `map` in silence."""
    with worker_threads(count) as run, pytest.raises(RuntimeError, match="StopIteration"):
        list(run(lambda i: next(iter(())) if i else i, range(3)))


def test_one_worker_is_this_thread():
    with worker_threads(1) as run:
        assert set(run(lambda _: threading.get_ident(), range(3))) == {threading.get_ident()}
    with worker_threads(2) as run:
        assert threading.get_ident() not in set(run(lambda _: threading.get_ident(), range(3)))
    with worker_threads(5, most=1) as run:
        assert set(run(lambda _: threading.get_ident(), range(3))) == {threading.get_ident()}
