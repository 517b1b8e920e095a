"""Training on several ranks of MPI: the same as on one, to rounding, and what becomes of the others if one fails.

It needs mpi4py and the mpiexec of its MPI: `pip install -e '.[mpi]'`.
"""

import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinyddpm import load_model
from tinyddpm.speed.ranks import Ranks, ranks_started

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "mnist_ddpm.py"
MPIEXEC = pathlib.Path(sys.executable).with_name("mpiexec")
TINY = ["--steps=5", "--batch=6", "--channels", "8", "16", "--timesteps=25", "--samples=6", "--sample-every=2"]

# what every script of the tests below begins with
PRELUDE = textwrap.dedent("""
    import os, signal, sys, time
    import numpy as np
    from tinyddpm import Diffusion, UNet, make_schedule, train
    from tinyddpm.speed.ranks import Ranks

    ranks = Ranks(True)
    images = np.random.default_rng(0).uniform(-1, 1, (23, 4, 4, 1)).astype(sys.argv[2])
    unet = UNet(channels=(4, 8), blocks=1, attention=(False, True), groups=2, rng=ranks.rank).to(dtype=sys.argv[2])
    diffusion = Diffusion(make_schedule("linear", 20, beta_end=0.6))
    settings = dict(batch=11, micro_batch=4, lr=0.01, warmup_steps=3, seed=3, ranks=ranks, resume=sys.argv[1])
""")
TRAINS = """
    steps = int(sys.argv[3])
    for state in train(unet, diffusion, images, steps, **settings):
        os.write(1, f"{state.step} {state.loss!r} {state.grad_norm!r}\\n".encode())  # at once, or they get mixed up
    if ranks.rank == 0:
        state.save(sys.argv[1])
    np.save(f"{sys.argv[1]}.{ranks.rank}.npy", state.optimizer.theta)
"""


@pytest.fixture(autouse=True)
def needs_mpi(request):
    if "mpiexec" in request.fixturenames:
        pytest.importorskip("mpi4py")
        if not MPIEXEC.exists():
            pytest.skip("there is no mpiexec beside this python")


@pytest.fixture
def mpiexec():
    """Run a script, which PRELUDE begins, or the example, on n ranks."""

    def start(n, script, *arguments):
        what = [script] if script is EXAMPLE else ["-c", PRELUDE + textwrap.dedent(script)]
        command = list(map(str, [MPIEXEC, "-n", n, sys.executable, *what, *arguments]))
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(n, script, *arguments, timeout=120):
        with start(n, script, *arguments) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    run.start = start
    return run


def trained(mpiexec, n, path, dtype="float64", steps=4):
    """Train on n ranks; return the parameters of each rank in the end, and what they printed of each step."""
    result = mpiexec(n, TRAINS, path, dtype, steps)
    assert result.returncode == 0, result.stderr
    lines = sorted(result.stdout.splitlines(), key=lambda line: int(line.split()[0]))
    return [np.load(f"{path}.{rank}.npy") for rank in range(n)], lines


@given(count=st.integers(0, 40), size=st.integers(1, 12))
def test_each_rank_has_a_share_of_about_the_same_size(count, size):
    ranks, shares = Ranks(), []
    ranks.size = size
    for ranks.rank in range(size):
        shares.append(list(ranks.share(range(count))))
    assert sum(shares, []) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_without_mpi_there_is_one():
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.local_rank, ranks.local_size) == (0, 1, 0, 1)
    vector = np.arange(3.0)
    ranks.allreduce(vector), ranks.broadcast(vector)
    assert vector.tolist() == [0, 1, 2] and ranks.gathered("something") == ["something"]
    with pytest.raises(ZeroDivisionError), ranks.abort_on_error(), ranks.first_alone():
        raise ZeroDivisionError


def test_a_missing_mpi_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RuntimeError, match=r"mpi: .*mpi4py.*; pip install 'tinyddpm\[mpi\]' brings mpi4py and an MPI"):
        Ranks(True)


class TestTraining:
    def test_any_number_of_ranks_gives_the_same_to_rounding(self, mpiexec, tmp_path):
        """Of the three micro-batches of 4, 4 and 3 images, one of two ranks takes two, and one of four takes none."""
        (one,), log = trained(mpiexec, 1, tmp_path / "one")
        for n in (2, 3, 4):  # the last of which has nothing to do, and rank 0 says so
            thetas, lines = trained(mpiexec, n, tmp_path / str(n))
            for theta in thetas:
                np.testing.assert_array_equal(theta, thetas[0])
                np.testing.assert_allclose(theta, one, rtol=1e-9, atol=1e-12)
            numbers = np.array([list(map(float, line.split())) for line in lines])
            np.testing.assert_allclose(numbers[::n], [list(map(float, line.split())) for line in log], rtol=1e-12)
            assert all(len(set(lines[i : i + n])) == 1 for i in range(0, len(lines), n))  # all see the same states

    def test_the_same_number_of_ranks_gives_the_same_bits_in_every_run(self, mpiexec, tmp_path):
        runs = [trained(mpiexec, 2, tmp_path / name, "float32") for name in "abc"]
        for thetas, lines in runs:
            assert lines == runs[0][1]
            for theta in thetas:
                np.testing.assert_array_equal(theta, runs[0][0][0])

    def test_it_goes_on_at_another_number_of_ranks(self, mpiexec, tmp_path):
        (whole,), _ = trained(mpiexec, 1, tmp_path / "whole", steps=6)
        for n, steps in ((2, 2), (3, 4), (1, 6)):
            thetas, lines = trained(mpiexec, n, tmp_path / "parts", steps=steps)
            assert len(lines) == 2 * n and lines[-1].startswith(f"{steps} ")
        np.testing.assert_allclose(thetas[0], whole, rtol=1e-9, atol=1e-12)

    def test_rank_0_alone_reads_the_checkpoint(self, mpiexec, tmp_path):
        """The others may be on machines that do not have the file."""
        trained(mpiexec, 1, tmp_path / "run", steps=2)
        result = mpiexec(
            2,
            "if ranks.rank: settings['resume'] = '/nowhere'\n" + textwrap.dedent(TRAINS),
            tmp_path / "run",
            "float64",
            4,
        )
        assert result.returncode == 0, result.stderr
        assert {line.split()[0] for line in result.stdout.splitlines()} == {"3", "4"}

    def test_if_one_wants_to_stop_all_do_after_the_same_step(self, mpiexec, tmp_path):
        script = """
    steps = []
    stop = lambda: ranks.rank == 1 and len(steps) == 2
    for state in train(unet, diffusion, images, 100, stop=stop, **settings):
        steps.append(state.step)
    os.write(1, f"{steps} {state.last}\\n".encode())
    """
        result = mpiexec(3, script, tmp_path / "run", "float32")
        assert result.stdout.splitlines() == ["[1, 2, 3] True"] * 3, result.stderr

    def test_they_have_to_do_the_same(self, mpiexec, tmp_path):
        script = """
    settings["lr"] *= 1 + ranks.rank
    try:
        next(train(unet, diffusion, images, 4, **settings))
    except ValueError as error:
        os.write(1, f"{error}\\n".encode())
    """
        result = mpiexec(2, script, tmp_path / "run", "float32")
        expected = "ranks: they have to do the same, but differ: lr: "
        lines = [expected + "0.01 on rank 0, 0.02 on rank 1", expected + "0.02 on rank 1, 0.01 on rank 0"]
        assert sorted(result.stdout.splitlines()) == lines, result.stderr

    def test_a_checkpoint_that_is_refused_is_refused_on_all(self, mpiexec, tmp_path):
        """Or the others would wait for rank 0, which alone reads it."""
        trained(mpiexec, 1, tmp_path / "run", steps=2)
        script = """
    settings["seed"] = 4
    try:
        next(train(unet, diffusion, images, 4, **settings))
    except ValueError as error:
        os.write(1, f"{error}\\n".encode())
    """
        result = mpiexec(2, script, tmp_path / "run", "float64")
        assert result.stdout.count("run is of another run: seed: 3 there, 4 here") == 2, result.stderr

    def test_each_of_them_is_first_alone(self, mpiexec, tmp_path):
        """Rank 0, then those that are the first on their machine, then the others."""
        script = """
    ranks.local_rank = ranks.rank % 2  # as if two were on each machine
    order = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)  # mpiexec may mix up what they print
    with ranks.first_alone():
        os.write(order, f"{ranks.rank}\\n".encode())
        time.sleep(0.3)
        os.write(order, f"{ranks.rank}\\n".encode())
    """
        (tmp_path / "run").touch()
        assert mpiexec(4, script, tmp_path / "run", "float32").returncode == 0
        lines = (tmp_path / "run").read_text().split()
        assert lines[:4] == ["0", "0", "2", "2"] and sorted(lines[4:]) == ["1", "1", "3", "3"]

    def test_each_rank_reads_its_own_images_only(self, mpiexec, tmp_path):
        script = """
    class Folder:
        shape, dtype, seen = images.shape, images.dtype, []
        def __len__(self): return len(images)
        def __getitem__(self, indices):
            self.seen.append(len(indices))
            return images[indices]

    settings["batch"] = 16
    *_, state = train(unet, diffusion, Folder(), 3, **settings)
    os.write(1, f"{Folder.seen} {state.step}\\n".encode())
    """
        result = mpiexec(2, script, tmp_path / "run", "float32")
        assert result.stdout.splitlines() == ["[100, 4, 4, 4, 4, 4, 4] 3"] * 2, result.stderr


class TestFailure:
    def test_a_rank_that_is_killed_ends_the_job(self, mpiexec, tmp_path):
        script = """
    for state in train(unet, diffusion, images, 10**6, **settings):
        if state.step == 3 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    """
        began = time.monotonic()
        result = mpiexec(2, script, tmp_path / "run", "float32")
        assert result.returncode != 0 and time.monotonic() - began < 60
        assert re.search("TERMINATION.*signal:? 9", result.stdout + result.stderr, re.DOTALL | re.IGNORECASE)

    def test_an_exception_in_one_rank_ends_the_job_and_says_which(self, mpiexec, tmp_path):
        script = """
    with ranks.abort_on_error():
        for state in train(unet, diffusion, images, 10**6, **settings):
            if state.step == 3 and ranks.rank == 1:
                raise LookupError("what was wrong")
    """
        result = mpiexec(2, script, tmp_path / "run", "float32")
        assert result.returncode != 0
        assert "rank 1 of 2 failed, which ends the job: Traceback" in result.stderr
        assert "LookupError: what was wrong" in result.stderr and "rank 0 of 2" not in result.stderr

    def test_the_mpiexec_of_another_mpi_is_noticed(self, mpiexec, monkeypatch):
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
        assert ranks_started() == 3
        with pytest.raises(
            RuntimeError, match="mpi: mpiexec started 3 processes, but they see 1: it is that of another"
        ):
            in_another_process("Ranks(True)")


def in_another_process(expression):
    """Evaluate it where MPI may be begun, and raise the RuntimeError that comes of it."""
    code = f"from tinyddpm.speed.ranks import Ranks\ntry: {expression}\nexcept RuntimeError as error: print(error)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    raise RuntimeError(result.stdout + result.stderr)


class TestExample:
    def test_it_trains_on_two_ranks_and_one_of_them_writes(self, mpiexec, tmp_path):
        result = mpiexec(2, EXAMPLE, *TINY, "--mpi", f"--out={tmp_path / 'two'}")
        assert result.returncode == 0, result.stderr
        assert "2 ranks of 1 worker, BLAS" in result.stdout and result.stdout.count("parameters") == 1
        # one bar begins; how often it says that it is through depends on the time
        assert result.stdout.count("done in") == 1 and result.stderr.count("| 0/25 [") == 1
        alone = subprocess.run(
            [sys.executable, EXAMPLE, *TINY, "--workers=1", f"--out={tmp_path / 'one'}"], capture_output=True, text=True
        )
        assert alone.returncode == 0, alone.stderr
        assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}
        losses = [
            np.loadtxt(tmp_path / name / "metrics.csv", delimiter=",", skiprows=1, usecols=(0, 1, 2, 3))
            for name in ("one", "two")
        ]
        np.testing.assert_allclose(*losses, rtol=1e-5)
        one, two = (load_model(tmp_path / name / "model.safetensors")[0].state_dict() for name in ("one", "two"))
        for name, w in one.items():
            np.testing.assert_allclose(two[name], w, atol=2e-5, err_msg=name)
        pictures = [np.asarray(Image.open(tmp_path / name / "samples.png"), int) for name in ("one", "two")]
        assert np.abs(pictures[0] - pictures[1]).max() <= 3

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_ctrl_c_ends_it_politely(self, mpiexec, tmp_path, number):
        arguments = [*TINY, "--steps=1000000", "--sample-every=1000000", "--mpi", f"--out={tmp_path}"]
        with mpiexec.start(2, EXAMPLE, *arguments) as process:
            while not (tmp_path / "metrics.csv").exists() and process.poll() is None:  # until the first step is done
                time.sleep(0.05)
            time.sleep(0.5)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)
        assert "what was trained is saved and sampled in a moment" in stderr
        assert process.returncode == 0 and "done in" in stdout, stderr
        assert (tmp_path / "checkpoint.safetensors").exists() and (tmp_path / "samples.png").exists()

    def test_it_goes_on_at_another_number_of_ranks(self, mpiexec, tmp_path):
        arguments = [*TINY, "--steps=60", "--sample-every=1000", "--samples=1", "--mpi", f"--out={tmp_path}"]
        with mpiexec.start(2, EXAMPLE, *arguments) as process:
            while not (tmp_path / "metrics.csv").exists() and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=60)
        (trained,) = re.findall(r"trained  (\d+) steps", stdout)
        assert process.returncode == 0 and 1 <= int(trained) < 60, stderr
        alone = [sys.executable, EXAMPLE, "--resume", f"--out={tmp_path}"]
        result = subprocess.run(alone, capture_output=True, text=True)
        assert result.returncode == 0 and "trained  60 steps" in result.stdout, result.stderr
        assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 61

    def test_the_ranks_agree_on_the_steps_that_take_so_long(self, mpiexec, tmp_path):
        """Or they would wait for each other for ever."""
        result = mpiexec(2, EXAMPLE, *TINY[1:], "--sample-every=100000", "--minutes=0.05", "--mpi", f"--out={tmp_path}")
        assert result.returncode == 0, result.stderr
        (steps,) = re.findall(r"training ([\d,]+) steps, about 0.05 minutes", result.stdout)
        assert f"trained  {steps} steps" in result.stdout

    def test_without_the_option_it_is_refused(self, mpiexec, tmp_path):
        result = mpiexec(2, EXAMPLE, *TINY, f"--out={tmp_path}")
        assert result.returncode != 0 and not list(tmp_path.iterdir())
        assert "--mpi is missing: mpiexec started 2 processes, which would all do the same" in result.stderr

    def test_what_is_not_finite_ends_all(self, mpiexec, tmp_path):
        result = mpiexec(
            2, EXAMPLE, *TINY, "--lr=1e9", "--steps=200", "--sample-every=999", "--mpi", f"--out={tmp_path}"
        )
        assert result.returncode != 0
        assert re.search(
            r"which ends the job: mnist_ddpm.py: step \d+: (the loss is|it has left numbers in)", result.stderr
        )
        assert "Traceback" not in result.stderr
