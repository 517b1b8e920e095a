"""The benchmark, without timing anything that takes long."""

import contextlib
import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tinyddpm import functional, nn, tensor, unet

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "benchmark.py"
TINY = {"channels": (8, 16), "blocks": 1, "attention": (False, True)}


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments, code=None, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    command = [sys.executable, *(("-c", code) if code else (SCRIPT,)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=clean | environment)


def test_profile_tells_where_the_time_goes():
    result = run("--profile", "--quick")
    assert result.returncode == 0, result.stderr
    shares = {row.split(" | ")[0][2:]: row.split(" | ")[-1] for row in result.stdout.splitlines() if "%" in row}
    assert {"conv2d", "group_norm", "attention", "linear", "add"} <= shares.keys()
    assert sum(float(share.rstrip("% |")) for share in shares.values()) == pytest.approx(100, abs=1)
    assert "OPENBLAS" not in result.stdout


def test_a_changed_blas_is_warned_about():
    changed = {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_L2_SIZE": "1024"}
    result = run("--profile", "--quick", **changed)
    assert result.returncode == 0, result.stderr
    for name, value in changed.items():
        assert f"WARNING: {name}={value}" in result.stdout and f"unset {name}" in result.stdout


@pytest.mark.parametrize("missing", ["torch", "diffusers"])
def test_it_says_what_is_missing(missing):
    code = f"import sys, runpy; sys.modules[{missing!r}] = None; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    result = run(code=code)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert missing in result.stderr and "pip install -e '.[peers]'" in result.stderr


def test_threads_must_be_positive():
    result = run("--threads=0")
    assert result.returncode == 2 and "--threads must be 1 or greater" in result.stderr


def test_flops(benchmark):
    work = benchmark.WORKS[2]._replace(batch=1)
    assert benchmark.flops(work) == pytest.approx(0.816e9, rel=0.01)
    assert benchmark.flops(work._replace(batch=3, training=True)) == 9 * benchmark.flops(work)


def test_flops_of_a_network_small_enough_to_count_by_hand(benchmark):
    net = {"channels": (8,), "blocks": 1, "attention": (False,)}
    pixels, convolutions = (
        4 * 4,
        9 * (1 * 8 + 2 * 3 * 64 + 2 * (128 + 64) + 8 * 1) + 2 * 128,
    )  # down, middle twice; up twice
    time_embedding = 8 * 32 + 32 * 32 + 5 * 32 * 8
    attention = pixels * 4 * 64 + 2 * pixels * pixels * 8
    expected = 2 * (pixels * convolutions + time_embedding + attention)
    assert benchmark.flops(benchmark.Work("", net, 4, 1)) == expected


def test_every_op_is_as_before_afterwards(benchmark):
    modules = tensor, functional, nn, unet
    before, seen = [dict(vars(module)) for module in modules], set()

    def around(op, *xs, **settings):
        seen.add(op.__name__)
        return op(*xs, **settings)

    with pytest.raises(ZeroDivisionError), benchmark.every_op(around):
        benchmark.our_run(benchmark.Work("", TINY, 8, 1), 1, None)()
        _ = 1 / 0
    assert {"conv2d", "linear", "group_norm", "attention", "silu", "concat", "upsample", "add", "reshape"} <= seen
    assert [dict(vars(module)) for module in modules] == before


def test_the_networks_are_the_example_s_and_google_s(benchmark):
    sizes = {work.name: benchmark.network(work.net).size for work in benchmark.WORKS}
    assert next(size for name, size in sizes.items() if "cifar" in name) == 35_746_307
    example = (SCRIPT.parent / "mnist_ddpm.py").read_text()
    assert f"default={list(benchmark.EXAMPLE['channels'])}" in example


def test_no_weight_is_zero(benchmark):
    assert all(p.data.all() and p.dtype == np.float32 for p in benchmark.network(TINY).parameters())


def test_memory_counts_what_a_child_uses(benchmark):
    if not os.path.exists("/proc/self/smaps_rollup") or not os.path.exists("/proc/thread-self/children"):
        pytest.skip("needs Linux's /proc")
    hold = "import sys; b = bytearray(b'x' * 2**26); print(flush=True); sys.stdin.read()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert 2**26 < benchmark.memory_in_use(process.pid) < 2**27
        process.stdin.close()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", ["eager", "channels-last"])
@pytest.mark.filterwarnings("ignore")
def test_pytorch_computes_the_same(benchmark, variant, training):
    for name in ("torch", "diffusers"):
        pytest.importorskip(name)
    benchmark.import_peers(1)
    work = benchmark.Work("", TINY, 8, 3, training)
    run, output = benchmark.their_run(work, variant)
    with contextlib.ExitStack() as stack:
        expected = benchmark.our_run(work._replace(training=False), 1, stack)()
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.isfinite(np.asarray(run())).all()
