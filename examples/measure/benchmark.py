"""How long tinyddpm takes on this machine, beside PyTorch: `python examples/measure/benchmark.py`.

PyTorch's model is diffusers' UNet2DModel with our very weights: eager, with channels last, and compiled. Outputs are
shown to agree; then one run of each is timed in turn, on equally many threads, and medians are printed as Markdown. It
needs `pip install -e '.[peers]'`, a C++ compiler for torch.compile, and a machine with nothing else to do meanwhile.
If onnx and onnxruntime are installed too, forward passes are compared with that engine, which does nothing else.
With --profile it tells which of our own ops take the time, and needs nothing.

With --device cuda both compute on the GPU, in float32 and in TF32. A GPU runs behind what Python asks of it, so every
run is timed until the GPU is done with it, but no step of one waits for the one before.
"""

import argparse
import collections
import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import math
import os
import pathlib
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
import warnings
from typing import NamedTuple
from unittest import mock

import numpy as np
from threadpoolctl import threadpool_limits

from tinyddpm import Diffusion, UNet, backward, cli, make_schedule, no_grad, sample, train
from tinyddpm.autograd import backward as chain_rule
from tinyddpm.autograd.tensor import as_array
from tinyddpm.backend import on_device, to_device, to_numpy
from tinyddpm.exchange.diffusers_config import unet_config
from tinyddpm.exchange.names import diffusers_layout, laid_out
from tinyddpm.speed.shards import shards
from tinyddpm.speed.winograd import ConstantFilters
from tinyddpm.speed.workers import blas_name, cpu_count, worker_threads

LR, EMA_DECAY, MAX_NORM, T, GUIDANCE = 1e-3, 0.995, 1.0, 1000, 2.0
COMPILE_LIMIT = 300  # seconds
COPIED, MATRIX = 2**28, 4096  # bytes, and rows, of what a GPU is measured with


class Work(NamedTuple):
    """One batch through a network: a training step (forward, backward, clip, Adam, EMA), or forward alone; or images
    sampled by DDPM in so many steps, with guidance if the network has classes."""

    name: str
    net: dict  # arguments of UNet
    size: int  # of the square images
    batch: int
    training: bool = False
    steps: int = 0

    @property
    def forward(self):
        return self._replace(training=False, steps=0)


MNIST = {"channels": (32, 64, 128), "blocks": 2, "attention": (False, False, True)}
# mnist_ddpm.py's network, within: its 28x28 pixels are 14x14 patches of 4 (diffusers' U-Nets have no patches)
EXAMPLE = {"channels": (32, 64), "blocks": 1, "attention": (False, False), "in_channels": 4, "out_channels": 4}
DIGITS = EXAMPLE | {"classes": 10, "label_dropout": 0.1}
CIFAR = {"channels": (128, 256, 256, 256), "blocks": 2, "attention": (False, True, False, False)}  # ddpm-cifar10-32
CIFAR |= {"in_channels": 3, "out_channels": 3, "groups": 32}
WORKS = [
    Work("32-64-128, 28x28, training step, batch 64", MNIST, 28, 64, training=True),
    Work("32-64-128, 28x28, training step, batch 128", MNIST, 28, 128, training=True),
    Work("32-64-128, 28x28, forward, batch 64", MNIST, 28, 64),
    Work("32-64-128, 28x28, forward, one image", MNIST, 28, 1),
    Work("32-64, 14x14x4, training step, batch 32 (mnist_ddpm.py)", EXAMPLE, 14, 32, training=True),
    Work("32-64, 14x14x4, forward, batch 64", EXAMPLE, 14, 64),
    Work("32-64, 14x14x4, forward, one image", EXAMPLE, 14, 1),
    Work("32-64, 14x14x4, sampling 64 digits, 25 steps, guidance", DIGITS, 14, 64, steps=25),
    Work("128-256-256-256, 32x32x3, forward, batch 8 (ddpm-cifar10-32)", CIFAR, 32, 8),
    Work("128-256-256-256, 32x32x3, training step, batch 8 (ddpm-cifar10-32)", CIFAR, 32, 8, training=True),
]
QUICK = [WORKS[i] for i in (0, 2, 3, 4)]
GPU_WORKS = [
    *WORKS[:2],
    Work("32-64-128, 28x28, training step, batch 512", MNIST, 28, 512, training=True),
    *(WORKS[i] for i in (2, 3, 4, 8)),
    Work("128-256-256-256, 32x32x3, forward, batch 64", CIFAR, 32, 64),
    Work("128-256-256-256, 32x32x3, training step, batch 64", CIFAR, 32, 64, training=True),
    Work("32-64-128, 28x28, sampling 64 images, 10 steps of DDPM", MNIST, 28, 64, steps=10),
]
GPU_QUICK = [GPU_WORKS[i] for i in (0, 3, 4, 5, 8, 9)]
GPU_COMPILED = [GPU_WORKS[i] for i in (0, 7)]  # each takes up to a minute to compile, in each precision


# --------------------------------------------------------------------------------------------------------------- ours


def network(net):
    """A U-Net in which no weight is zero. New ones are in some layers, and then all networks agree on the output."""
    unet, rng = UNet(**net), np.random.default_rng(0)
    for name, p in unet.named_parameters().items():
        noise = rng.standard_normal(p.shape, dtype=np.float32)
        p.data = noise / np.sqrt(p.data[..., 0].size, dtype=np.float32) if name.endswith("w") else p.data + 0.1 * noise
    return unet


def inputs(work):
    """Images (N, H, W, C) in [-1, 1] and timesteps (N,)."""
    rng, channels = np.random.default_rng(1), work.net.get("in_channels", 1)
    images = rng.uniform(-1, 1, (work.batch, work.size, work.size, channels)).astype(np.float32)
    return images, rng.integers(0, T, work.batch)


def labels_of(work):
    """Labels (N,) for a network that takes them: each class in turn, and -1, which is none."""
    classes = work.net.get("classes")
    return (np.arange(work.batch) + 1) % (classes + 1) - 1 if classes else None


def our_run(work, threads, stack, device="cpu", precision="float32"):
    """A function that does the work once; `stack` ends its threads or processes."""
    unet, (x, t) = network(work.net).to(device, precision=precision), inputs(work)
    diffusion = Diffusion(make_schedule("linear", T))
    if work.training:
        settings = {"lr": LR, "max_norm": MAX_NORM, "ema_decay": EMA_DECAY, "workers": threads}
        steps = train(unet, diffusion, x, sys.maxsize, work.batch, **settings)
        stack.callback(steps.close)
        return lambda: next(steps)
    if work.steps:
        settings = {"labels": np.arange(work.batch) % 10, "guidance": GUIDANCE} if unet.config["classes"] else {}
        return lambda: sample(diffusion, unet, x.shape, steps=work.steps, workers=threads, **settings)

    labels = labels_of(work)
    filters, x = ConstantFilters(unet), to_device(x, device)  # a sampler calls the same model again and again

    def predict(shard):
        with on_device(device), no_grad(), filters.in_force():
            return as_array(unet(x[shard], t[shard], **({} if labels is None else {"labels": labels[shard]})))

    if work.batch == 1 or device != "cpu":  # a plain call, in which the threads are those of BLAS
        return lambda: predict(slice(None))
    run = stack.enter_context(worker_threads(threads))  # and this is how `sample` does it
    return lambda: np.concatenate(list(run(predict, shards(x.shape, "cpu"))))


@contextlib.contextmanager
def every_op(around):
    """Within this block, op(...) anywhere in tinyddpm is around(op, ...)."""
    with contextlib.ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("tinyddpm.")]:
            for name, value in list(vars(module).items()):
                if inspect.isfunction(value) and hasattr(value, "raw"):  # an op, where it is made or imported
                    stack.enter_context(mock.patch.object(module, name, functools.partial(around, value)))
        yield


def flops(work):
    """Floating-point operations of the work: two for each multiplication and addition in convolutions (done directly),
    linear layers and attention. A backward pass takes twice those of the forward pass, guidance two forward passes."""
    count = 0

    def counting(op, *xs, **settings):
        nonlocal count
        y = op(*xs, **settings)
        if op.__name__ in ("conv2d", "linear"):
            count += 2 * y.data.size * math.prod(xs[1].shape[:-1])
        elif op.__name__ == "attention":  # q k^T, and its softmax times v
            count += 4 * y.data.size * xs[1].shape[1]
        return y

    with every_op(counting):
        our_run(work.forward._replace(batch=1), 1, None)()
    times = 3 if work.training else 1
    if work.steps:
        times = work.steps * (2 if work.net.get("classes") else 1)
    return count * work.batch * times


# ------------------------------------------------------------------------------------------------------------ PyTorch


def import_peers(threads):
    """PyTorch and diffusers take seconds and hundreds of megabytes to import: only when they are needed."""
    # threads that compile would stay alive, and `train` then take threads in place of processes
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    warnings.filterwarnings("error", message="workers: they are threads")
    global torch, diffusers
    import diffusers
    import torch

    torch.set_num_threads(threads)


def their_model(unet, size):
    """diffusers' network with the weights of ours."""
    model = diffusers.UNet2DModel.from_config(unet_config(unet, size))
    state = laid_out(unet.state_dict(), diffusers_layout)
    model.load_state_dict({name: torch.tensor(w).contiguous() for name, w in state.items()})
    return model


def their_run(work, variant, device="cpu"):
    """A function that does the work once, and what their network makes of the same inputs before it is trained."""
    model = their_model(network(work.net), work.size).to(device)
    images, t = (torch.from_numpy(a).to(device) for a in inputs(work))
    images = images.movedim(3, 1).contiguous()
    if variant == "channels-last":
        model, images = (a.to(memory_format=torch.channels_last) for a in (model, images))
    predict = torch.compile(model, dynamic=False) if variant == "compile" else model
    if not work.training:
        classes = work.net.get("classes")  # whose number is what no label is to theirs
        labels = torch.from_numpy(labels_of(work) % (classes + 1)).to(device) if classes else None
        run = torch.inference_mode()(lambda: predict(images, t, labels).sample)
        output = run().movedim(1, 3).cpu().numpy()
        return (their_sampler(predict, images, work.steps, classes) if work.steps else run), output

    alpha_bar = torch.tensor(make_schedule("linear", T).alpha_bar, dtype=torch.float32, device=device)
    optimizer = torch.optim.Adam(model.parameters(), LR, fused=True)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema)
    pair = list(average.module.parameters()), list(model.parameters())

    def step():
        t, eps = torch.randint(T, (work.batch,), device=device), torch.randn_like(images)
        signal = alpha_bar[t].view(-1, 1, 1, 1)
        x_t = signal.sqrt() * images + (1 - signal).sqrt() * eps
        loss = torch.nn.functional.mse_loss(predict(x_t, t).sample, eps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        if device != "cpu":
            ema(*pair, None)  # the same, without a count that it would copy to the GPU each time, and wait
            return loss
        average.update_parameters(model)
        return loss.item()

    return step, predict(images, t).sample.detach().movedim(1, 3).cpu().numpy()


def onnx_run(work, threads):
    """`their_run` of the forward pass, by onnxruntime: what an engine made for that alone does on this machine."""
    import onnxruntime

    model, (images, t) = their_model(network(work.net), work.size), map(torch.from_numpy, inputs(work))
    images, written = images.movedim(3, 1).contiguous(), io.BytesIO()

    class Prediction(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, t):
            return self.model(x, t).sample

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Prediction(), (images, t), written, input_names=["x", "t"], dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(written.getvalue(), options, ["CPUExecutionProvider"])
    run = lambda: session.run(None, {"x": images.numpy(), "t": t.numpy()})[0]
    return run, np.moveaxis(run(), 1, 3)


def their_sampler(predict, images, steps, classes):
    """What our `sample` does, with diffusers' scheduler. It looks at the timesteps, so they are not on the GPU; those
    that the network gets are there from the beginning. With classes it is guided, away from no label."""
    scheduler = diffusers.DDPMScheduler(T, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    there = scheduler.timesteps.to(images.device)
    if classes:
        labels = torch.arange(len(images), device=images.device) % classes
        both = torch.cat([torch.full_like(labels, classes), labels])

    def prediction(x, t):
        if not classes:
            return predict(x, t).sample
        u, c = predict(torch.cat([x, x]), t, both).sample.chunk(2)
        return u + GUIDANCE * (c - u)

    @torch.inference_mode()
    def run():
        x = torch.randn_like(images)
        for i, t in enumerate(scheduler.timesteps.tolist()):
            x = scheduler.step(prediction(x, there[i]), t, x).prev_sample
        return x

    return run


def compiled_run(work, device):
    """`their_run` compiled, or a word on why there is none, and no output."""

    def stop(*_):
        raise TimeoutError

    began, alarm = time.monotonic(), getattr(signal, "alarm", lambda seconds: None)  # on Windows there is no limit
    try:
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, stop)
        alarm(COMPILE_LIMIT)
        torch._dynamo.reset()
        run, output = their_run(work, "compile", device)
        run()  # only now is the backward pass compiled
        return run, output
    except Exception as error:  # no compiler, or any of the many ways in which one can fail
        took = time.monotonic() - began
        say(f"torch.compile failed after {took:.0f} s: {str(error).partition(chr(10))[0]}")
        return f"over {COMPILE_LIMIT} s" if took >= COMPILE_LIMIT else "failed", None
    finally:
        alarm(0)


# ------------------------------------------------------------------------------------------------------------- measure


def wait_for(device):
    """Until a GPU has done all that it was asked for, by us or by PyTorch."""
    if device != "cpu":
        on_device(device).synchronize()


def interleaved(runs, repeats, device="cpu"):
    """Median seconds of each function, one run of each in turn; short ones are called many times in a run."""

    def timed(run, calls):
        began = time.perf_counter()
        for _ in range(calls):
            run()
        wait_for(device)
        return (time.perf_counter() - began) / calls

    calls, times = {}, {name: [] for name in runs}
    for name, run in runs.items():
        timed(run, 1)  # the first allocates and chooses kernels
        calls[name] = math.ceil(0.5 / timed(run, 1))
    for _ in range(repeats):
        for name, run in runs.items():
            if device == "cpu":
                time.sleep(0.1)  # idle threads spin for a while before they sleep: not at the expense of the next
            times[name].append(timed(run, calls[name]))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def peak_of_gemm():
    """FLOP/s of the best product of two float32 matrices, on as many threads as BLAS has been given."""
    best = 0.0
    for n in (512, 1024, 2048):
        a = np.random.default_rng(0).standard_normal((n, n), dtype=np.float32)
        for _ in range(20):  # the fastest: whatever slows one down is no property of the machine
            began = time.perf_counter()
            a @ a
            best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def memory_in_use(pid):
    """Bytes of a process and all its children. PSS shares out what they share, so that the sum counts it once."""
    total, pids = 0, [pid]
    for pid in pids:  # which grows
        with contextlib.suppress(OSError, TypeError):  # it may end meanwhile
            about = pathlib.Path(f"/proc/{pid}")
            total += 1024 * int(re.search(r"^Pss: +(\d+)", (about / "smaps_rollup").read_text(), re.MULTILINE)[1])
            pids += " ".join(path.read_text() for path in about.glob("task/*/children")).split()
    return total


def memory(work, side, threads):
    """Peak memory of a few runs in a process of their own, and how much of that is beyond its imports, as text."""
    if not all(map(os.path.exists, ("/proc/self/smaps_rollup", "/proc/thread-self/children"))):
        return "n/a"
    command = [sys.executable, __file__, "--memory", side, str(WORKS.index(work)), f"--threads={threads}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()  # it has imported what it needs, and waits for a line to go on
        peak = imports = memory_in_use(process.pid)
        process.stdin.close()
        while process.poll() is None:
            peak = max(peak, memory_in_use(process.pid))
            time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"the memory of {work.name} could not be measured")
    return f"{peak / 2**20:.0f} ({(peak - imports) / 2**20:.0f}) MiB"


def run_for_memory(side, work, threads):
    """What `memory` starts."""
    if side == "theirs":
        import_peers(threads)
    print("ready", flush=True)
    sys.stdin.read()
    with contextlib.ExitStack() as stack:
        run = our_run(work, threads, stack) if side == "ours" else their_run(work, "eager")[0]
        for _ in range(3):
            run()


# --------------------------------------------------------------------------------------------------------------- tables


def say(text):
    print(text, file=sys.stderr, flush=True)


def table(title, heading, rows):
    """Print a table in Markdown, each row as soon as it is there."""
    print(f"\n{title}\n")
    for row in itertools.chain([heading, ["---"] + ["---:"] * (len(heading) - 1)], rows):
        print("|", " | ".join(row), "|", flush=True)


def duration(seconds):
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{1e3 * seconds:.2f} ms"


def contest(work, variants, threads, repeats, device="cpu", precisions=("float32",)):
    """Seconds of ours in each precision and of PyTorch's variants, as text those that failed, and by how much theirs
    differ in output from ours in the first precision. Exits if they do not agree."""
    with contextlib.ExitStack() as stack:  # ended before ours begin: they are processes where no threads are alive
        expected = to_numpy(our_run(work.forward, threads, stack, device, precisions[0])())
    with contextlib.ExitStack() as stack:
        runs = {precision: our_run(work, threads, stack, device, precision) for precision in precisions}
        failed, differ = {}, 0.0
        for variant in variants:
            if variant == "onnxruntime":
                if work != work.forward:
                    continue
                run, output = onnx_run(work, threads)
            else:
                run, output = compiled_run(work, device) if variant == "compile" else their_run(work, variant, device)
            if output is None:
                failed[variant] = run
                continue
            runs[variant] = run
            differ = max(differ, float(np.abs(output - expected).max() / np.abs(expected).max()))
        if not differ < {"float32": 1e-4, "tf32": 1e-2}[precisions[0]]:
            sys.exit(f"benchmark.py: {work.name}: the outputs differ by {differ:.1e} of the largest")
        return interleaved(runs, repeats, device), failed, differ


def compare(work, variants, threads, repeats, peak, memories):
    """A row of the main table."""
    seconds, failed, differ = contest(work, variants, threads, repeats)
    cells = failed | {name: duration(s) for name, s in seconds.items()}
    times = [cells.get(name, "") for name in ("float32", *variants)]
    ours, _ = seconds.pop("float32"), seconds.pop("onnxruntime", None)  # which is not PyTorch
    speed = flops(work) / ours
    shares = [f"{min(seconds.values()) / ours:.2f}", f"{speed / 1e9:.3g}", f"{speed / peak:.0%}"]
    return [work.name, *times, *shares, *memories, f"{differ:.0e}"]


def growth(title, works, threads, repeats):
    """Print the time of each work, and its time per FLOP relative to the first."""
    with contextlib.ExitStack() as stack:
        seconds = interleaved({work.name: our_run(work, threads, stack) for work in works}, repeats)
    rows, first = [], seconds[works[0].name] / flops(works[0])
    for work in works:
        s, f = seconds[work.name], flops(work)
        rows.append([work.name, duration(s), f"{f / 1e9:.1f}", f"{s / f / first:.2f}"])
    table(title, ["", "time", "GFLOP", "time per FLOP, relative"], rows)


def compare_workers(threads, repeats):
    """Print how much faster training is with several workers than with one."""
    with contextlib.ExitStack() as stack:
        seconds = interleaved({n: our_run(WORKS[0], n, stack) for n in (1, threads)}, repeats)
    rows = [[str(n), f"{WORKS[0].batch / s:.0f}", f"{seconds[1] / s:.2f}"] for n, s in seconds.items()]
    table(WORKS[0].name, ["workers", "images/s", "relative"], rows)


def time_imports():
    """Print how long it takes to import us, and NumPy, in a new process."""
    code, rows = "import time; began = time.perf_counter(); import {}; print(time.perf_counter() - began)", []
    for name in ("numpy", "tinyddpm"):
        times = [float(subprocess.check_output([sys.executable, "-c", code.format(name)])) for _ in range(5)]
        rows.append([f"import {name}", duration(statistics.median(times))])
    table("Import", ["", "time"], rows)


def profile(repeats):
    """Print which ops take how long in a training step's micro-batch, on one thread."""
    work = WORKS[0]._replace(batch=16)
    unet, (images, _), diffusion = network(work.net), inputs(work), Diffusion(make_schedule("linear", T))
    calls, forward, pulls = (collections.Counter() for _ in range(3))

    def timed(times, name, function, *xs, **settings):
        began = time.perf_counter()
        result = function(*xs, **settings)
        times[name] += time.perf_counter() - began
        calls[name] += times is forward
        return result

    around = lambda op, *xs, **settings: timed(forward, op.__name__, op, *xs, **settings)
    pull = functools.partial(lambda pull, node, g: timed(pulls, node.op, pull, node, g), chain_rule._pull)
    with threadpool_limits(1, "blas"), every_op(around), mock.patch.object(chain_rule, "_pull", pull):
        for i in range(-2, repeats):  # two to warm up
            if i == 0:
                began = time.perf_counter()
                for counter in (calls, forward, pulls):
                    counter.clear()
            backward(diffusion.loss(unet, images, np.random.default_rng(2 + i)))
        total = time.perf_counter() - began

    ms = lambda seconds: f"{1e3 * seconds / repeats:.2f}"
    rows = [
        [name, str(calls[name] // repeats), ms(forward[name]), ms(pulls[name]), f"{seconds / total:.1%}"]
        for name, seconds in (forward + pulls).most_common()
    ]
    rest = total - (forward + pulls).total()
    rows.append([f"the rest (engine, noise ...): {ms(rest)} ms", "", "", "", f"{rest / total:.1%}"])
    title = f"A micro-batch of 16, 32-64-128, 28x28, on one thread: {duration(total / repeats)}"
    table(title, ["op", "calls", "forward ms", "backward ms", "share"], rows)


# ------------------------------------------------------------------------------------------------------------ on a GPU


def import_gpu(device):
    """CuPy, and what of ours needs it. Raises RuntimeError if there is no such GPU."""
    global cupy, cuda
    on_device(device)
    import cupy

    from tinyddpm.speed import cuda


def why_no_peers(threads, device):
    """Import PyTorch, or return why it cannot be compared with on this device."""
    try:
        import_peers(threads)
        torch.ones(1, device=device).add(1).cpu()
    except Exception as error:  # it is not installed, or without CUDA, or knows no GPU as new or as old as this one
        return str(error).partition("\n")[0]
    torch.backends.cudnn.benchmark = True  # it tries its kernels at the first call, and takes the fastest
    return None


def release(device):
    """Give back what memory is free but kept: neither side shall be short of what the other does not use."""
    gc.collect()
    if device != "cpu":
        cupy.get_default_memory_pool().free_all_blocks()
        if "torch" in globals():
            torch.cuda.empty_cache()


def print_gpu_heading(device, names):
    """What the GPU is, and what it can do: copies, and products by way of our own `product`."""
    about = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    numbers = cupy.cuda.runtime.runtimeGetVersion(), cupy.cuda.runtime.driverGetVersion()
    runtime, driver = (f"{number // 1000}.{number % 1000 // 10}" for number in numbers)
    name, capability = about["name"].decode(), f"compute capability {about['major']}.{about['minor']}"
    print(f"{name}, {about['totalGlobalMem'] / 2**30:.0f} GiB, {capability}; {cpu_name()}")
    print(f"CUDA {runtime}, driver for {driver}, CuPy {cupy.__version__}, {versions(names)}")

    source, copy = cupy.zeros(COPIED, np.uint8), cupy.empty(COPIED, np.uint8)
    runs = {"copy": lambda: cupy.copyto(copy, source)}
    a = cupy.asarray(np.random.default_rng(0).standard_normal((MATRIX, MATRIX), dtype=np.float32))
    for precision in ("float32", "tf32", "bf16"):
        factor = cuda.rounded(a, precision)
        runs[precision] = functools.partial(cuda.product, factor, factor, precision)
    seconds = interleaved(runs, 3, device)
    bandwidth = 2 * COPIED / seconds.pop("copy")
    rates = ", ".join(f"{2 * MATRIX**3 / s / 1e12:.1f} in {precision}" for precision, s in seconds.items())
    print(f"Measured: {bandwidth / 1e9:.0f} GB/s, read and written, in copies of {COPIED >> 20} MiB;", end=" ")
    print(f"TFLOP/s in products of {MATRIX}x{MATRIX}: {rates}", flush=True)


def gpu_memory(work, device, peers):
    """Memory of the GPU in a training step that is not the first, which tries convolutions that need more; as text."""
    release(device)
    with contextlib.ExitStack() as stack:
        run = our_run(work, 1, stack, device)
        run()
        release(device)
        run()
        text = f"ours {cupy.get_default_memory_pool().total_bytes() / 2**20:.0f} MiB, all that its pool took"
    if peers:
        run, _ = their_run(work, "eager", device)
        run()
        release(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        used, took = (f(device) for f in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
        text += f"; PyTorch's {took / 2**20:.0f} MiB likewise, of which at most {used / 2**20:.0f} MiB in use"
    return text


def compare_on_gpu(work, device, variants, threads, repeats, precisions):
    """A row of the table of a GPU."""
    tried = [variant for variant in variants if variant != "compile" or work in GPU_COMPILED]
    try:
        seconds, failed, differ = contest(work, tried, threads, repeats, device, precisions)
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # CuPy's and PyTorch's are called the same
            raise
        return [work.name, "out of memory"]
    finally:
        release(device)
    cells = failed | {name: duration(s) for name, s in seconds.items()}
    row = [work.name, *(cells.get(name, "") for name in (*precisions, *variants))]
    if tried:
        ours, theirs = seconds[precisions[0]], min(seconds[name] for name in tried if name in seconds)
        row += [f"{theirs / ours:.2f}", f"{seconds['eager'] / ours:.2f}", f"{differ:.0e}"]
    return row


def main_on_gpu(device, threads, quick):
    why_not = why_no_peers(threads, device)
    variants = [] if why_not else ["eager", "channels-last"] if quick else ["eager", "channels-last", "compile"]
    print_gpu_heading(device, ["numpy", "torch", "diffusers"] if variants else ["numpy"])
    if why_not:
        print(f"Our times alone, since PyTorch cannot be compared with on {device}: {why_not}")
    works, repeats = (GPU_QUICK, 3) if quick else (GPU_WORKS, 5)
    print(f"\nMemory in {works[0].name}, float32: {gpu_memory(works[0], device, variants)}", flush=True)
    for precisions in (["float32"], ["tf32", "bf16"]):
        if variants:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precisions[0] == "tf32"
        heading = ["", "tinyddpm", *(f"tinyddpm, {other}" for other in precisions[1:]), *variants]
        heading += ["fastest / ours", "eager / ours", "outputs differ"] if variants else []
        rows = (compare_on_gpu(work, device, variants, threads, repeats, precisions) for work in works)
        table(f"On the GPU, {precisions[0]}", heading, rows)
    print("\nOurs draws batches, timesteps and noise in NumPy and copies them to the GPU, in each step of training and")
    print("sampling; PyTorch's images are there already, and its noise is drawn there. Its cudnn.benchmark is on.")
    if quick:
        print("Left out by --quick: torch.compile, batches 128 and 512, ddpm-cifar10-32 forward.")


def profile_on_gpu(work, device, precision, repeats):
    """Print how long the GPU takes for each op of a training step, and how long Python takes to ask for it.

    A GPU that waits for the next kernel would be timed waiting. So it is first made busy with products until the step
    has been asked for. Events before and after each op note the time when the GPU comes to them.
    """
    marks, (whole, calls, forward, pulls, python) = [], (collections.Counter() for _ in range(5))

    def marked(times, name, function, *xs, **settings):
        start, end, began = cupy.cuda.Event(), cupy.cuda.Event(), time.perf_counter()
        start.record()
        result = function(*xs, **settings)
        end.record()
        marks.append((times, name, time.perf_counter() - began, start, end))
        return result

    def step(products=0):
        """Do one, while the GPU is busy; return where to count, op, seconds of Python and of the GPU, itself last."""
        marks.clear()
        for _ in range(products):
            product()
        marked(whole, "step", run)
        wait_for(device)
        return [(*mark, cupy.cuda.get_elapsed_time(start, end) / 1e3) for *mark, start, end in marks]

    around = lambda op, *xs, **settings: marked(forward, op.__name__, op, *xs, **settings)
    pull = functools.partial(lambda pull, node, g: marked(pulls, node.op, pull, node, g), chain_rule._pull)
    others = "training.loop.to_device training.loop.flat_gradient training.loop.clip_norm training.optim.adam_update"
    others += " training.optim.ema_update diffusion.process.like"  # what takes time and is no op
    with contextlib.ExitStack() as stack:
        a = cupy.ones((MATRIX, MATRIX), np.float32)
        product, run = lambda: cuda.product(a, a), our_run(work, 1, stack, device, precision)
        seconds = interleaved({"step": run, "product": product}, 3, device)
        asked = statistics.median(step()[-1][2] for _ in range(repeats))
        enough = math.ceil(3 * asked / seconds["product"])
        computed = statistics.median(step(enough)[-1][3] for _ in range(repeats))
        stack.enter_context(every_op(around))
        stack.enter_context(mock.patch.object(chain_rule, "_pull", pull))
        for module, name in (other.rsplit(".", 1) for other in others.split()):
            module = sys.modules[f"tinyddpm.{module}"]
            patched = functools.partial(around, getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, patched))
        for _ in range(repeats):
            for _, name, took, _ in step():
                python[name] += took
            for times, name, _, took in step(enough):
                times[name] += took
                calls[name] += times is forward

    ms = lambda seconds: f"{1e3 * seconds / repeats:.2f}"
    total, ops = whole["step"], forward + pulls
    ops["the rest"] = total - ops.total()
    python["the rest"] = python["step"] - sum(python[name] for name in ops)
    rows = [
        [name, str(calls[name] // repeats), ms(forward[name]), ms(pulls[name]), f"{s / total:.1%}", ms(python[name])]
        for name, s in ops.most_common()
    ]
    title = f"{work.name}, {precision}: {duration(seconds['step'])}"
    table(title, ["op", "calls", "forward ms", "backward ms", "share", "Python ms"], rows)
    verdict = "the GPU waits for Python" if asked > computed else "Python waits for the GPU"
    print(f"\nPython takes {duration(asked)} to ask for a step, the GPU {duration(computed)} to compute it: {verdict}.")


# --------------------------------------------------------------------------------------------------------------- main


def cpu_name():
    with contextlib.suppress(OSError, TypeError):
        return re.search(r"model name\s*: (.+)", pathlib.Path("/proc/cpuinfo").read_text())[1]
    return platform.processor() or platform.machine()


def parse_arguments():
    parser = cli.Options(__doc__)
    add = parser.add
    add(
        "--threads",
        type=int,
        default=min(2, cpu_count()),
        least=1,
        help="on each side: ours, and PyTorch's [%(default)s]",
    )
    add("--device", default="cpu", help="on each side: cpu, cuda or cuda:N, an NVIDIA GPU [%(default)s]")
    add("--quick", action="store_true", help="about a minute: fewer repeats, no torch.compile, the shorter works")
    add("--profile", action="store_true", help="only: which of our ops take the time; needs no PyTorch")
    add("--memory", nargs=2, help=argparse.SUPPRESS)  # how this script calls itself
    return parser.parse_args()


def versions(names):
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def print_heading(threads, names):
    print(f"{cpu_name()}; {threads} thread(s) on each side; BLAS {blas_name()}")
    print(f"Python {platform.python_version()}, {versions(names)}", flush=True)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        print(
            f"WARNING: the machine has been busy (load {os.getloadavg()[0]:.1f}); if it still is, all times are wrong."
        )
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        if name in os.environ:
            print(
                f"WARNING: {name}={os.environ[name]} is set and changes BLAS: the figures are not this machine's own."
            )
            print(f"         To do without it: unset {name}")


def main():
    args = parse_arguments()
    threads, repeats = args.threads, 3 if args.quick else 7
    threadpool_limits(threads, "blas")
    if args.memory:
        return run_for_memory(args.memory[0], WORKS[int(args.memory[1])], threads)
    if args.device != "cpu":
        try:
            import_gpu(args.device)
        except (RuntimeError, ValueError) as error:
            sys.exit(f"benchmark.py: {error}")
        with on_device(args.device):
            if not args.profile:
                return main_on_gpu(args.device, threads, args.quick)
            print_gpu_heading(args.device, ["numpy"])
            return [profile_on_gpu(WORKS[0], args.device, precision, repeats) for precision in ("float32", "tf32")]
    missing = [name for name in ("torch", "diffusers") if not args.profile and not importlib.util.find_spec(name)]
    if missing:
        sys.exit(f"benchmark.py: to compare with PyTorch it needs {' and '.join(missing)}: pip install -e '.[peers]'")

    if args.profile:
        print_heading(1, ["numpy"])
        return profile(repeats)
    onnx = all(map(importlib.util.find_spec, ("onnx", "onnxruntime")))
    print_heading(threads, ["numpy", "torch", "diffusers"] + ["onnxruntime"] * onnx)

    works, variants = WORKS, ["eager", "channels-last", "compile"]
    if onnx:
        variants.append("onnxruntime")
    if args.quick:
        works, variants = QUICK, variants[:2]
    measured = works[:1] if args.quick else [work for work in works if work.batch > 1]
    memories = {}
    for work in measured:  # before this process has PyTorch, and shares its libraries with the one that is measured
        say(f"memory: {work.name}")
        memories[work.name] = [memory(work, side, threads) for side in ("ours", "theirs")]
    import_peers(threads)
    peak = peak_of_gemm()
    columns = "fastest PyTorch / ours|GFLOP/s|of peak|memory|PyTorch's|outputs differ".split("|")
    rows = (compare(work, variants, threads, repeats, peak, memories.get(work.name, ["", ""])) for work in works)
    table("tinyddpm, PyTorch" + ", onnxruntime" * (len(variants) > 3), ["", "tinyddpm", *variants, *columns], rows)
    print("\nGFLOP/s: ours, with convolutions counted as done directly. 3x3 ones take fewer multiplications.")
    print(f"Peak: that of a float32 matrix product, {peak / 1e9:.0f} GFLOP/s.")
    print("Memory: at its peak, and in brackets what of it is beyond the imports; PyTorch's is eager.")
    if threads > 1:
        compare_workers(threads, repeats)
    time_imports()
    if args.quick:
        print(
            "\nLeft out by --quick: torch.compile, onnxruntime, sampling, batch 128, 14x14x4 forward, ddpm-cifar10-32,"
        )
        print("most of the memory, growth.")
        return
    batches = [Work(f"batch {n}", MNIST, 28, n) for n in (8, 16, 32, 64, 128)]
    growth("Forward, 32-64-128, 28x28", batches, threads, repeats)
    small = {"channels": (16, 32, 64), "blocks": 1, "attention": (False, False, True)}
    sizes = [Work(f"{n}x{n}", small, n, 64) for n in (16, 32, 64, 128)]
    growth("Forward, 16-32-64, batch 64", sizes, threads, repeats)
    plain = {"blocks": 1, "attention": (False, False)}
    channels = [Work(f"{n}-{n}", {"channels": (n, n), **plain}, 16, 64) for n in (32, 64, 128, 256)]
    growth("Forward, 16x16, batch 64", channels, threads, repeats)


if __name__ == "__main__":
    cli.run(main)
