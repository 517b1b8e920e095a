"""Settings of hypothesis, and what `--cuda` does.

`pytest --cuda real` sends the arrays of every op to a GPU and back, whatever the test; `--cuda emulated`, to real CuPy
on a GPU imitated on the CPU (see cuda_on_cpu). So the tests of ops, layers and networks hold for CuPy as they stand.

Tests marked `gpu` are about a GPU itself, and use it as users do: `pytest -m gpu` on a machine that has one, `pytest -m
gpu --cuda emulated` on any. With `--cuda null` the imitated GPU computes nothing and counts: test_cuda_counts.py.
"""

import contextlib
import functools
import gc
import inspect
import os
import sys

import numpy as np
import pytest
from hypothesis import Phase, settings

# the same examples in every run, and no deadline, since machines differ
settings.register_profile("tinyddpm", deadline=None, derandomize=True, max_examples=20, print_blob=True)
settings.load_profile("tinyddpm")
# for mutation testing, which asks whether a test fails and not for its smallest example
settings.register_profile("no_shrinking", settings.get_profile("tinyddpm"), phases=(Phase.explicit, Phase.generate))


def pytest_addoption(parser):
    parser.addoption("--cuda", choices=["real", "emulated", "null"], help="run ops on this kind of GPU")


def pytest_configure(config):
    kind = config.getoption("--cuda")
    if kind == "real" and (reason := why_no_gpu(None)):
        pytest.exit(f"--cuda real: {reason}", returncode=4)
    if kind in ("emulated", "null"):
        import cuda_on_cpu

        if reason := cuda_on_cpu.reason_why_not():
            pytest.exit(f"--cuda {kind}: {reason}", returncode=4)
        cuda_on_cpu.install(numbers=kind == "emulated")
        if config.option.markexpr != "gpu":
            from tinyddpm.speed import cuda

            cuda.THREADS = 64  # of a block: each runs after another here, and for small arrays most have nothing to do


def pytest_collection_finish():
    """Thousands of tests and their tables stay: the collector of garbage need not go through them again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config, items):
    kind = config.getoption("--cuda")
    for item in items:
        if item.get_closest_marker("gpu"):
            reason = why_no_gpu(kind)
            if kind == "null" and item.path.name != "test_cuda_counts.py":
                reason = "on the null device nothing is computed"
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr == "gpu" and (reason := why_no_gpu(config.getoption("--cuda"))):
        terminalreporter.write_line(f"NOT TESTED ON A GPU: {reason}")


@functools.cache
def why_no_gpu(kind):
    """Why tests marked `gpu` cannot run, or None."""
    if kind is None:
        from tinyddpm.backend import on_device

        try:
            on_device("cuda")
        except RuntimeError as error:
            return f"{error}; with --cuda emulated it runs on a CPU"
    return None


def pytest_runtest_setup(item):
    """Have every op of the package compute on CuPy arrays, though it gets NumPy's and returns them."""
    if item.config.getoption("--cuda") in ("real", "emulated"):
        from tinyddpm.autograd import conv, functional, fused, tensor

        for module in (tensor, functional, conv, fused):
            for f in vars(module).values():
                if hasattr(f, "raw"):
                    f.on_cpu = getattr(f, "on_cpu", f.raw)
                    f.on_cuda = getattr(f, "on_cuda", None) or through_cupy(f.raw)
                    f.raw = f.on_cpu if item.get_closest_marker("gpu") else f.on_cuda


def through_cupy(raw):
    import cupy

    to_cupy = lambda x: cupy.asarray(x) if isinstance(x, (np.ndarray, np.generic)) else x
    to_numpy = lambda x: x.get() if isinstance(x, cupy.ndarray) else x

    @functools.wraps(raw)
    def on_cuda(*inputs, **settings):
        sent = [to_cupy(x) for x in inputs]
        y, pull = raw(*sent, **settings)
        assert isinstance(y, cupy.ndarray)

        def pull_through(g):
            sent_g = to_cupy(g)
            gradients = pull(sent_g)
            several = isinstance(gradients, tuple)
            gradients = [grad() if callable(grad) else grad for grad in (gradients if several else [gradients])]
            for before, after in zip((*inputs, g), (*sent, sent_g)):  # CuPy has no read-only arrays
                np.testing.assert_array_equal(to_numpy(after), before)
            return tuple(map(to_numpy, gradients)) if several else to_numpy(gradients[0])

        return to_numpy(y), pull_through

    return on_cuda


@pytest.fixture
def on_second_gpu(monkeypatch):
    """on_second_gpu(file) returns a model that says it is on cuda:1; a list of the devices to which a file of
    tinyddpm/diffusion then moves arrays, or where it computes, which are none; and one of the shapes that the model is
    given."""
    from tinyddpm import backend
    from tinyddpm.speed.shards import in_parts

    def arrange(file):
        went, shapes, own = [], [], backend._twins
        moved = lambda x, device: went.append(device) or x
        monkeypatch.setattr(f"tinyddpm.diffusion.{file}.to_device", moved)
        there = lambda device: went.append(device) or contextlib.nullcontext()
        monkeypatch.setattr(f"tinyddpm.diffusion.{file}.on_device", there)
        # a GPU's twins need CuPy, but for this one
        monkeypatch.setattr(backend, "_twins", lambda kind: {"in_parts": in_parts} if kind == "cuda" else own(kind))
        model = lambda x, t: shapes.append(x.shape) or 0 * x
        model.device = "cuda:1"
        return model, went, shapes

    return arrange


@pytest.fixture
def ended(capsys):
    """ended(program, *arguments) is how a program ends: its exit status, and what it says on stdout and on stderr."""

    def run(program, *arguments):
        code = 0
        try:
            program(*arguments)
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return (1, out, err + code) if isinstance(code, str) else (code, out, err)

    return run


@pytest.fixture
def recorded(monkeypatch):
    """recorded(module, name) is a list of the calls of that function from now on: the arguments by name, and what it
    returned."""

    def record(module, name):
        calls, function = [], getattr(module, name)

        def wrapper(*args, **settings):
            bound = inspect.signature(function).bind(*args, **settings)
            bound.apply_defaults()
            calls.append((bound.arguments, function(*args, **settings)))
            return calls[-1][1]

        monkeypatch.setattr(module, name, wrapper)
        return calls

    return record


@pytest.fixture(scope="module")
def without_matplotlib(tmp_path_factory):
    """There is none, neither here nor in processes that are started: its import and a curve take most of a training."""
    folder = tmp_path_factory.mktemp("instead")
    (folder / "matplotlib.py").write_text("raise ImportError")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


@pytest.fixture
def said(capsys):
    """said(parser, *arguments) is the line in which the parser refuses them."""

    def run(parser, *arguments):
        with pytest.raises(SystemExit) as error:
            parser.parse_args(arguments)
        assert error.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run
