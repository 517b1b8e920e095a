"""The benchmark, without timing anything that takes long."""

import contextlib
import importlib.util
import os
import pathlib
import subprocess
import sys
from unittest import mock

import cuda_on_cpu
import numpy as np
import pytest

from tinyddpm.autograd import functional, tensor
from tinyddpm.network import nn, unet
from tinyddpm.program import training_options

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "measure" / "benchmark.py"
TINY = {"channels": (8, 16), "blocks": 1, "attention": (False, True)}
TOLD = TINY | {"classes": 3, "label_dropout": 0.1}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def peers(bench):
    for name in ("torch", "diffusers"):
        pytest.importorskip(name)
    bench.import_peers(1)
    return bench


def run(*arguments, code=None, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    command = [sys.executable, *(("-c", code) if code else (SCRIPT,)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=clean | environment)


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{}, {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_L2_SIZE": "1024"}])
def test_profile_tells_where_the_time_goes_and_that_blas_was_changed(changed):
    result = run("--profile", "--quick", **changed)
    assert result.returncode == 0, result.stderr
    shares = {row.split(" | ")[0][2:]: row.split(" | ")[-1] for row in result.stdout.splitlines() if "%" in row}
    assert {"conv2d", "group_norm", "attention", "linear", "add"} <= shares.keys()
    assert sum(float(share.rstrip("% |")) for share in shares.values()) == pytest.approx(100, abs=1)
    assert ("OPENBLAS" in result.stdout) == bool(changed)
    for name, value in changed.items():
        assert f"WARNING: {name}={value}" in result.stdout and f"unset {name}" in result.stdout


def test_flops_of_a_network_small_enough_to_count_by_hand(bench):
    net, pixels = {"channels": (8,), "blocks": 1, "attention": (False,)}, 4 * 4
    convolutions = 9 * (1 * 8 + 2 * 3 * 64 + 2 * (128 + 64) + 8 * 1) + 2 * 128  # down, middle twice; up twice
    time_embedding = 8 * 32 + 32 * 32 + 5 * 32 * 8
    attention = pixels * 4 * 64 + 2 * pixels * pixels * 8
    work = bench.Work("", net, 4, 1)
    assert bench.flops(work) == 2 * (pixels * convolutions + time_embedding + attention)
    assert bench.flops(work._replace(batch=3, training=True)) == 9 * bench.flops(work)
    told = work._replace(net=net | {"classes": 3, "label_dropout": 0.1})
    assert bench.flops(told) == bench.flops(work) and bench.flops(told._replace(steps=5)) == 10 * bench.flops(work)
    assert bench.flops(work._replace(steps=5)) == 5 * bench.flops(work)


def test_every_op_is_as_before_afterwards(bench):
    modules = tensor, functional, nn, unet
    before, seen = [dict(vars(module)) for module in modules], set()

    def around(op, *xs, **settings):
        seen.add(op.__name__)
        return op(*xs, **settings)

    with pytest.raises(ZeroDivisionError), bench.every_op(around):
        bench.our_run(bench.Work("", TINY, 8, 1), 1, None)()
        _ = 1 / 0
    assert {"conv2d", "linear", "group_norm", "attention", "silu", "concat", "upsample", "add", "reshape"} <= seen
    assert [dict(vars(module)) for module in modules] == before


def test_the_networks_are_the_example_s_and_google_s(bench):
    class Zeros(np.random.Generator):  # at once, for so many take most of a second
        uniform = lambda self, low, high, size: np.broadcast_to(np.float32(0), size)

    assert "cifar" in bench.WORKS[-1].name
    assert unet.UNet(**bench.WORKS[-1].net, rng=Zeros(np.random.PCG64())).size == 35_746_307
    default = training_options(None).parse_args([])
    assert default.channels == list(bench.EXAMPLE["channels"]) and default.patch == 2
    assert bench.EXAMPLE["in_channels"] == bench.EXAMPLE["out_channels"] == 2 * 2
    assert all(p.data.all() and p.dtype == np.float32 for p in bench.network(TINY).parameters())  # none is 0


def test_memory_counts_what_a_child_uses(bench):
    if not os.path.exists("/proc/self/smaps_rollup") or not os.path.exists("/proc/thread-self/children"):
        pytest.skip("needs Linux's /proc")
    hold = "import sys; b = bytearray(b'x' * 2**26); print(flush=True); sys.stdin.read()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert 2**26 < bench.memory_in_use(process.pid) < 2**27
        process.stdin.close()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", ["eager", "channels-last"])
@pytest.mark.filterwarnings("ignore")
def test_pytorch_computes_the_same(bench, peers, variant, training):
    work = bench.Work("", TINY, 8, 3, training)
    run, output = bench.their_run(work, variant)
    with contextlib.ExitStack() as stack:
        expected = bench.our_run(work._replace(training=False), 1, stack)()
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.isfinite(np.asarray(run())).all()


@pytest.mark.filterwarnings("ignore")
def test_pytorch_is_told_the_same_labels(bench, peers):
    work = bench.Work("", TOLD, 8, 5, steps=2)
    assert bench.labels_of(work).tolist() == [0, 1, 2, -1, 0] and bench.labels_of(work._replace(net=TINY)) is None
    _, output = bench.their_run(work, "eager")
    with contextlib.ExitStack() as stack:
        expected = bench.our_run(work.forward, 1, stack)()
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_computes_the_same(bench, peers):
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name)
    work = bench.Work("", TINY, 8, 3)
    run, output = bench.onnx_run(work, 1)
    with contextlib.ExitStack() as stack:
        expected = bench.our_run(work, 1, stack)()
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(np.moveaxis(run(), 1, 3), output)


IN_THE_EMULATOR = """
import contextlib, sys
import cuda_on_cpu
cuda_on_cpu.install(numbers=True)
import numpy as np
from tinyddpm.speed import cuda
cuda.THREADS = 64  # of a block: each runs after another here
sys.modules["torch"] = None
import benchmark
from benchmark import Work

counts, net = cuda_on_cpu.counts, {"channels": (8, 8), "blocks": 1, "attention": (False, True)}
works = [Work("training", net, 8, 2, training=True), Work("forward", net, 8, 2), Work("sampling", net, 8, 2, steps=2)]
benchmark.WORKS[0], benchmark.GPU_QUICK, benchmark.COPIED, benchmark.MATRIX = works[0], works, 2**20, 64


with contextlib.ExitStack() as stack:
    benchmark.import_gpu("cuda:1")
    for work in [] if "--profile" in sys.argv else works:
        with benchmark.on_device("cuda:1"):
            calls, run = [], benchmark.our_run(work, 1, stack, "cuda:1")
            run()
            counts.reset()
            benchmark.interleaved({"": lambda: calls.append(run())}, 3, "cuda:1")
        assert len(calls) >= 5, calls
        waits = dict(counts.synchronisations)
        assert waits.pop("deviceSynchronize") == 5, waits  # two to see how long it takes, and three runs
        # what comes out of `sample` has been looked at, once for each call; no step of training waits
        assert waits == ({"streamSynchronize": len(calls)} if work.steps else {}), (work.name, waits)
    for precision, tolerance in (("float32", 1e-5), ("bf16", 0.1)):
        ours = [
            benchmark.to_numpy(benchmark.our_run(works[1], 1, stack, *where)())
            for where in (("cpu",), ("cuda", precision))
        ]
        assert np.abs(ours[0] - ours[1]).max() < tolerance * np.abs(ours[0]).max(), precision
sys.argv = ["benchmark.py", "--quick", "--device", sys.argv[1], *sys.argv[2:]]
benchmark.main()
"""


@pytest.mark.skipif(cuda_on_cpu.reason_why_not() is not None, reason=str(cuda_on_cpu.reason_why_not()))
class TestOnAnEmulatedGPU:
    """In a process of its own, which has CuPy for good."""

    path = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[2] / "tests"), os.environ.get("PYTHONPATH", "")])

    def test_our_times_alone(self):
        device = "cuda:1"
        result = run(device, code=IN_THE_EMULATOR, PYTHONPATH=self.path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("CUDA on CPU, 80 GiB, compute capability 9.0; ")
        for text in ("CuPy 14.2.0", "GB/s", "TFLOP/s", "in tf32", f"cannot be compared with on {device}: ", "MiB, all"):
            assert text in result.stdout
        assert "WARNING" not in result.stdout and "BLAS" not in result.stdout
        rows = [row.split(" | ") for row in result.stdout.splitlines() if row.startswith("| ")]
        assert [len(row) for row in rows] == [2] * 5 + [3] * 5
        for name in ("training", "forward", "sampling"):
            assert sum(row[0] == f"| {name}" for row in rows) == 2

    def test_profile(self):
        result = run("cuda", "--profile", code=IN_THE_EMULATOR, PYTHONPATH=self.path)
        assert result.returncode == 0, result.stderr
        rows = [row.strip("| ").split(" | ") for row in result.stdout.splitlines() if "%" in row]
        names = [row[0] for row in rows]
        assert {"conv2d", "group_norm", "attention", "linear", "to_device", "clip_norm", "adam_update"} <= set(names)
        calls = {row[0]: row[1] for row in rows}
        assert calls["adam_update"] == calls["to_device"] == "1" and int(calls["conv2d"]) > 10
        assert len(rows) == 2 * len(calls)  # in two precisions
        for precision in ("float32", "tf32"):
            part = result.stdout.partition(f"training, {precision}: ")[2]
            assert "Python takes" in part and "the GPU waits for Python" in part  # which an emulated one is right to


@pytest.mark.filterwarnings("ignore")
class TestPyTorchAsOnAGPU:
    """On a CPU, under another name or with those of CUDA's functions that are called made up."""

    def test_the_average_moves_and_no_step_looks_at_its_loss(self, peers, monkeypatch):
        averages, swa_utils = [], peers.torch.optim.swa_utils
        make = swa_utils.AveragedModel
        monkeypatch.setattr(swa_utils, "AveragedModel", lambda *x, **y: averages.append(make(*x, **y)) or averages[-1])
        step, _ = peers.their_run(peers.Work("", TINY, 8, 3, training=True), "eager", "cpu:0")
        losses, before = [step()], peers.their_model(peers.network(TINY), 8).parameters()
        moved = max(float((a - b).detach().abs().max()) for a, b in zip(averages[0].module.parameters(), before))
        assert moved == pytest.approx((1 - peers.EMA_DECAY) * peers.LR, rel=0.1)  # Adam's first step is lr, up or down
        assert all(peers.torch.is_tensor(loss) and loss.isfinite() for loss in [*losses, step(), step()])

    @pytest.mark.parametrize("variant", ["eager", "channels-last"])
    @pytest.mark.parametrize("net", [TINY, TOLD])
    def test_sampling_takes_the_same_steps(self, peers, monkeypatch, variant, net):
        seen = {"ours": [], "theirs": []}
        call, forward = unet.UNet.__call__, peers.diffusers.UNet2DModel.forward

        def ours(self, x, t, rng=None, labels=None):
            seen["ours"].append((int(t[0]), None if labels is None else (labels % 4).tolist()))
            return call(self, x, t, rng, labels)

        def theirs(self, x, t, labels=None):
            seen["theirs"].append((int(t.reshape(-1)[0]), None if labels is None else labels.tolist()))
            return forward(self, x, t, labels)

        work = peers.Work("", net, 8, 3, steps=4)
        with contextlib.ExitStack() as stack:
            our_run, (their_run, output) = peers.our_run(work, 1, stack), peers.their_run(work, variant)
            monkeypatch.setattr(unet.UNet, "__call__", ours)
            monkeypatch.setattr(peers.diffusers.UNet2DModel, "forward", theirs)
            images, theirs = our_run(), their_run().movedim(1, 3).numpy()
        labels = [3, 3, 3, 0, 1, 2] if net is TOLD else None
        assert seen["ours"] == seen["theirs"] == [(t, labels) for t in (999, 749, 499, 249)]
        for x in (images, theirs):
            assert x.shape == output.shape and np.abs(x).max() <= 1

    @pytest.mark.parametrize("quick", [True, False])
    def test_tables(self, peers, monkeypatch, capsys, quick):
        torch, flags, works = peers.torch, [], [peers.Work("a", TINY, 8, 2, training=True), peers.Work("b", TINY, 8, 2)]

        def interleaved(runs, repeats, device):
            flags.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
            assert all(run() is not None for run in runs.values())
            return {name: 2.0 if name in ("float32", "tf32") else 4.0 if name == "eager" else 3.0 for name in runs}

        for name, value in dict(
            GPU_WORKS=works, GPU_QUICK=works, GPU_COMPILED=works[1:], interleaved=interleaved,
            compiled_run=lambda work, device: ("failed", None), gpu_memory=lambda *_: "none",
            print_gpu_heading=lambda device, names: print(names),
        ).items():  # fmt: skip
            monkeypatch.setattr(peers, name, value)
        settings = (torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")
        before = [getattr(*setting) for setting in settings]
        try:
            peers.main_on_gpu("cpu", 1, quick)
        finally:
            for setting, value in zip(settings, before):
                setattr(*setting, value)
            torch.backends.cudnn.benchmark = False
        printed = capsys.readouterr().out
        assert "['numpy', 'torch', 'diffusers']" in printed
        assert flags == [(False, False)] * 2 + [(True, True)] * 2
        rows = [row.strip("|").split(" | ") for row in printed.splitlines() if row.startswith("| ")]
        for name, i in (("a", 2), ("b", 3)):
            for row, also in ((rows[i], []), (rows[i + 4], ["3.000 s"])):
                compiled = [] if quick else ["" if name == "a" else "failed"]
                assert [cell.strip() for cell in row[:-1]] == [
                    name, "2.000 s", *also, "4.000 s", "3.000 s", *compiled, "1.50", "2.00"
                ]  # fmt: skip
                assert float(row[-1]) < 1e-5

    def test_without_cuda_our_times_are_alone(self, peers):
        assert peers.why_no_peers(1, "cpu") is None
        if not peers.torch.cuda.is_available():
            assert "CUDA" in peers.why_no_peers(1, "cuda")

    def test_memory(self, peers, monkeypatch):
        class Pool:
            get_default_memory_pool = lambda self: self
            total_bytes = lambda self: 2**20

        calls = []
        for name, value in (("reset_peak_memory_stats", None), ("max_memory_allocated", 2**21)):
            noted = lambda device, value=value, name=name: calls.append(name) or value
            monkeypatch.setattr(peers.torch.cuda, name, noted)
        monkeypatch.setattr(peers.torch.cuda, "max_memory_reserved", lambda device: 3 * 2**20)
        monkeypatch.setattr(peers, "cupy", Pool(), raising=False)
        text = peers.gpu_memory(peers.Work("", TINY, 8, 2, training=True), "cpu", ["eager"])
        assert text == "ours 1 MiB, all that its pool took; PyTorch's 3 MiB likewise, of which at most 2 MiB in use"
        assert calls == ["reset_peak_memory_stats", "max_memory_allocated"]

    def test_out_of_memory_is_said_and_other_errors_are_raised(self, peers, monkeypatch):
        compare = lambda: peers.compare_on_gpu(peers.Work("big", TINY, 8, 2), "cpu", ["eager"], 1, 1, ["float32"])
        raising = lambda error: mock.Mock(side_effect=error("no"))
        monkeypatch.setattr(peers, "contest", raising(peers.torch.OutOfMemoryError))
        assert compare() == ["big", "out of memory"]
        monkeypatch.setattr(peers, "contest", raising(ValueError))
        with pytest.raises(ValueError, match="no"):
            compare()
