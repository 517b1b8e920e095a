"""Training on several ranks of MPI: the same as on one, to rounding, and what becomes of the others if one fails.

It needs mpi4py and the mpiexec of its MPI: `pip install -e '.[mpi]'`. An mpiexec takes a second or two to start, so one
runs this file as a program, `job`, in which the ranks go through all that is marked `on`, and see themselves whether it
holds. Those that end badly have one of their own.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_training import IMAGES, TINY, Lazy, UNet, training

from tinyddpm.speed.ranks import Ranks

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "mnist_ddpm.py"
MPIEXEC = pathlib.Path(sys.executable).with_name("mpiexec")
OPTIONS = ["--steps=4", "--batch=6", "--channels", "8", "16", "--timesteps=10", "--samples=2", "--sample-every=2"]
PARTS = {}  # of the job: function and number of ranks, by name


def on(*numbers):
    """A part of the job, on so many of its ranks."""
    return lambda function: PARTS.update({f"{function.__name__}[{n}]": (function, n) for n in numbers})


def some_of(everyone, n):
    """The first n of the ranks, or the others."""
    ranks = Ranks()
    ranks.mpi, ranks.world, ranks.local_size = everyone.mpi, everyone.world.Split(everyone.rank < n), 4
    ranks.rank, ranks.size = ranks.world.rank, ranks.world.size
    return ranks


def wait(ranks):
    """For all of them, asleep: an MPI that waits takes all of a CPU."""
    through = ranks.world.Ibarrier()
    while not through.Test():
        time.sleep(0.002)


def job(everyone, folder):
    """Go through the parts, and print the name of each that holds."""
    with everyone.abort_on_error():
        for name, (function, n) in PARTS.items():
            ranks = some_of(everyone, n)
            if everyone.rank < n:
                function(ranks, folder)
            wait(everyone)
            if everyone.rank == 0:
                print(name, flush=True)


class Elsewhere(os.PathLike):
    """A file that is on the machine of rank 0 alone."""

    def __fspath__(self):
        raise AssertionError("rank 0 alone reads the checkpoint")


def states_of(ranks, path=None, steps=4, dtype="float64", images=IMAGES, **changes):
    """Others than rank 0 begin with other weights."""
    unet, path = UNet(**TINY, rng=ranks.rank).to(dtype=dtype), Elsewhere() if ranks.rank else path
    images = images.astype(dtype) if isinstance(images, np.ndarray) else images
    return training(path, steps, unet=unet, images=images, **{"ranks": ranks, "decay_steps": 0} | changes)[1]


def trained(*arguments, **settings):
    """What this rank sees of each step, in rows, and the parameters in the end."""
    states = list(states_of(*arguments, **settings))
    return np.array([(state.step, state.loss, state.grad_norm) for state in states]), states[-1].optimizer.theta.copy()


@on(1, 2, 3, 4)
def any_number_of_ranks_gives_the_same_to_rounding(ranks, folder):
    """Of the three micro-batches of 4, 4 and 3 images, one of two ranks takes two, and one of four takes none."""
    rows, theta = trained(ranks)
    assert len(set(ranks.gathered((rows.tobytes(), theta.tobytes())))) == 1  # all see the same states
    if ranks.rank == 0:
        np.savez(folder / f"{ranks.size}.npz", rows=rows, theta=theta)
        with np.load(folder / "1.npz") as one:
            np.testing.assert_allclose(rows, one["rows"], rtol=1e-12)
            np.testing.assert_allclose(theta, one["theta"], rtol=1e-9, atol=1e-12)


@on(3)
def it_goes_on_at_another_number_of_ranks_and_rank_0_alone_reads_the_checkpoint(ranks, folder):
    for n, steps in ((2, 2), (3, 4), (1, 6)):
        some = some_of(ranks, n)
        if ranks.rank < n:
            *_, state = states = list(states_of(some, folder / "run", steps))
            assert [state.step for state in states] == [steps - 1, steps]
            if ranks.rank == 0:
                state.save(folder / "run")
        wait(ranks)
    if ranks.rank == 0:
        np.testing.assert_allclose(state.optimizer.theta, trained(some, steps=6)[1], rtol=1e-9, atol=1e-12)


@on(2)
def a_checkpoint_that_is_refused_is_refused_on_all(ranks, folder):
    """Or the others would wait for rank 0, which alone reads it."""
    with pytest.raises(ValueError, match="run is of another run: seed: 3 there, 4 here"):
        next(states_of(ranks, folder / "run", seed=4))


@on(3)
def if_one_wants_to_stop_all_do_after_the_same_step(ranks, folder):
    steps = []
    for state in states_of(ranks, steps=100, stop=lambda: ranks.rank == 1 and len(steps) == 2):
        steps.append(state.step)
    assert steps == [1, 2, 3] and state.last


@on(2)
def they_have_to_do_the_same(ranks, folder):
    mine, other = ("0.01", "0.02")[:: 1 - 2 * ranks.rank]
    differ = f"lr: {mine} on rank {ranks.rank}, {other} on rank {1 - ranks.rank}"
    with pytest.raises(ValueError, match=f"ranks: they have to do the same, but differ: {differ}$"):
        next(states_of(ranks, lr=float(mine)))


@on(2)
def each_rank_reads_its_own_images_only(ranks, folder):
    seen = []
    list(states_of(ranks, None, 3, "float32", Lazy(IMAGES, lambda indices: seen.append(len(indices))), batch=16))
    assert seen == [100, 4, 4, 4, 4, 4, 4]


@on(4)
def each_of_them_is_first_alone(ranks, folder):
    """Rank 0, then those that are the first on their machine, then the others."""
    ranks.local_rank = ranks.rank % 2  # as if two were on each machine
    order = os.open(folder / "order", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with ranks.first_alone():
        os.write(order, f"{ranks.rank}\n".encode())
        time.sleep(0.05)
        os.write(order, f"{ranks.rank}\n".encode())
    wait(ranks)
    lines = (folder / "order").read_text().split()
    assert lines[:4] == ["0", "0", "2", "2"] and sorted(lines[4:]) == ["1", "1", "3", "3"]


@on(4)
def the_mpiexec_of_another_mpi_is_noticed(ranks, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMPI_COMM_WORLD_SIZE", "9")
        message = "mpi: mpiexec started 9 processes, but they see 4: it is that of another"
        with pytest.raises(RuntimeError, match=message):
            Ranks(True)


def killed(ranks, folder):
    """As many ranks give the same bits in every run, in the job's as in this."""
    for state in states_of(ranks, None, 10**6):
        if state.step == 4:
            np.testing.assert_array_equal(state.optimizer.theta, np.load(folder / "3.npz")["theta"])
        if state.step == 6 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def raises(ranks, folder):
    with ranks.abort_on_error():
        for state in states_of(ranks, None, 10**6, "float32"):
            if state.step == 3 and ranks.rank == 1:
                raise LookupError("what was wrong")


def process(n, *what):
    """What `subprocess` has to know of a function of this file, or of the example, on n ranks."""
    pytest.importorskip("mpi4py")
    if not MPIEXEC.exists():
        pytest.skip("there is no mpiexec beside this python")
    settings = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    settings["env"] = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return dict(args=list(map(str, [MPIEXEC, "-n", n, sys.executable, *what])), **settings)


def mpiexec(n, *what, timeout=120):
    """Run so many such ranks, and return status, stdout and stderr."""
    result = subprocess.run(**process(n, *what), timeout=timeout)
    return result.returncode, result.stdout, result.stderr


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of the job, the names of its parts that held, and what it said."""
    folder = tmp_path_factory.mktemp("job")
    _, stdout, stderr = mpiexec(4, __file__, "job", folder)
    return folder, stdout.splitlines(), stderr


@pytest.mark.parametrize("part", PARTS)
def test_on_ranks(done, part):
    assert part in done[1], done[2]


def test_a_rank_that_is_killed_ends_the_job_which_until_then_gave_the_same_bits(done):
    status, *said = mpiexec(3, __file__, "killed", done[0], timeout=60)
    assert status != 0 and re.search("TERMINATION.*signal:? 9", "".join(said), re.DOTALL | re.IGNORECASE)


def test_an_exception_in_one_rank_ends_the_job_and_says_which(tmp_path):
    status, _, stderr = mpiexec(2, __file__, "raises", tmp_path)
    assert status != 0 and "rank 1 of 2 failed, which ends the job: Traceback" in stderr
    assert "LookupError: what was wrong" in stderr and "rank 0 of 2" not in stderr


class TestWithoutMPI:
    @given(count=st.integers(0, 40), size=st.integers(1, 12))
    def test_each_rank_has_a_share_of_about_the_same_size(self, count, size):
        ranks, shares = Ranks(), []
        ranks.size = size
        for ranks.rank in range(size):
            shares.append(list(ranks.share(range(count))))
        assert sum(shares, []) == list(range(count)) and max(map(len, shares)) - min(map(len, shares)) <= 1

    def test_there_is_one_rank(self):
        ranks, vector = Ranks(), np.arange(3.0)
        assert (ranks.rank, ranks.size, ranks.local_rank, ranks.local_size) == (0, 1, 0, 1)
        ranks.allreduce(vector), ranks.broadcast(vector)
        assert vector.tolist() == [0, 1, 2] and ranks.gathered("something") == ["something"]
        with pytest.raises(ZeroDivisionError), ranks.abort_on_error(), ranks.first_alone():
            raise ZeroDivisionError

    def test_what_is_missing_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "mpi4py", None)
        message = r"mpi: .*mpi4py.*; pip install 'tinyddpm\[mpi\]' brings mpi4py and an MPI"
        with pytest.raises(RuntimeError, match=message):
            Ranks(True)


def alone(*options):
    """What the example says without MPI."""
    result = subprocess.run([sys.executable, EXAMPLE, *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


class TestExample:
    def test_it_trains_on_two_ranks_and_one_of_them_writes(self, tmp_path):
        folders = one, two = tmp_path / "one", tmp_path / "two"
        alone(*OPTIONS, "--workers=1", f"--out={one}")
        status, stdout, stderr = mpiexec(2, EXAMPLE, *OPTIONS, "--mpi", f"--out={two}")
        assert status == 0 and "2 ranks of 1 worker, BLAS" in stdout and stdout.count("parameters") == 1, stderr
        # one bar begins; how often it says that it is through depends on the time
        assert stdout.count("done in") == 1 and stderr.count("| 0/10 [") == 1
        assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
        losses = (np.loadtxt(f / "metrics.csv", delimiter=",", skiprows=1, usecols=(0, 1, 2, 3)) for f in folders)
        np.testing.assert_allclose(*losses, rtol=1e-5)
        pictures = [np.asarray(Image.open(f / "samples.png"), int) for f in folders]
        assert np.abs(pictures[0] - pictures[1]).max() <= 3

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_ctrl_c_ends_it_politely_and_it_goes_on_at_another_number_of_ranks(self, tmp_path, number):
        options = [*OPTIONS, "--steps=40", "--sample-every=1000", "--samples=1", "--mpi", f"--out={tmp_path}"]
        with subprocess.Popen(**process(2, EXAMPLE, *options)) as job:
            while not (tmp_path / "metrics.csv").exists() and job.poll() is None:  # until the first step is done
                time.sleep(0.02)
            job.send_signal(number)
            stdout, stderr = job.communicate(timeout=60)
        assert "what was trained is saved and sampled in a moment" in stderr
        (steps,) = re.findall(r"trained  (\d+) steps", stdout)
        assert job.returncode == 0 and "done in" in stdout and 1 <= int(steps) < 40, stderr
        assert (tmp_path / "checkpoint.safetensors").exists() and (tmp_path / "samples.png").exists()
        if number == signal.SIGINT:
            assert "trained  40 steps" in alone("--resume", f"--out={tmp_path}")
            assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 41

    def test_the_ranks_agree_on_the_steps_that_take_so_long(self, tmp_path):
        """Or they would wait for each other for ever."""
        options = [*OPTIONS[1:], "--sample-every=100000", "--minutes=0.02", "--mpi", f"--out={tmp_path}"]
        status, stdout, stderr = mpiexec(2, EXAMPLE, *options)
        assert status == 0, stderr
        (steps,) = re.findall(r"training ([\d,]+) steps, about 0.02 minutes", stdout)
        assert f"trained  {steps} steps" in stdout

    @pytest.mark.parametrize(("options", "message"), [
        ([], "--mpi is missing: mpiexec started 2 processes, which would all do the same"),
        (["--lr=1e9", "--steps=200", "--sample-every=999", "--mpi"],
         r"which ends the job: mnist_ddpm.py: step \d+: (the loss is|it has left numbers in)"),
    ])  # fmt: skip
    def test_what_is_wrong_ends_all_and_is_said(self, tmp_path, options, message):
        status, _, stderr = mpiexec(2, EXAMPLE, *OPTIONS, *options, f"--out={tmp_path}")
        assert status != 0 and re.search(message, stderr) and "Traceback" not in stderr
        assert options or not list(tmp_path.iterdir())


if __name__ == "__main__":
    globals()[sys.argv[1]](Ranks(True), pathlib.Path(sys.argv[2]))
