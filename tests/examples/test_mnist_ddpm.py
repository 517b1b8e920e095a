"""The example itself, as a user would run it, on a tiny setting."""

import inspect
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import tinyddpm
from tinyddpm import (
    Diffusion,
    UNet,
    load_digits,
    load_model,
    make_schedule,
    program,
    sample,
    save_diffusers,
    save_model,
)
from tinyddpm.exchange.names import laid_out, original_layout
from tinyddpm.files.pictures import grid

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "mnist_ddpm.py"
TINY = [
    "--steps=5",
    "--batch=4",
    "--channels",
    "8",
    "16",
    "--timesteps=25",
    "--samples=2",
    "--workers=2",
]


on_posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of a process are POSIX's")


def run(*arguments, timeout=120, **settings):
    command = [sys.executable, EXAMPLE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **settings)


def test_it_trains_and_draws_and_leaves_what_it_promises(tmp_path):
    out = tmp_path / "new" / "folder"
    result = run(*TINY, "--sample-every=4", "--samples=6", "--save-every=3", f"--out={out}")
    assert result.returncode == 0, result.stderr
    for words in (
        "device   cpu, 2 workers, BLAS",
        "parameters",
        "10,000 images of 28 x 28 pixels, the digits that come along",
        "parameters, T = 25",
        "training 5 steps, 4 images a step",
    ):
        assert words in result.stdout
    assert str(out) in result.stdout and "images/s" in result.stderr and "loss" in result.stderr
    assert "\r" not in result.stderr and len(result.stderr.splitlines()) == 4  # in a file, of each bar two lines
    made = {p.name for p in out.iterdir()} - {"loss.png"}  # without matplotlib there is none
    assert made == {
        "options.json",
        "noising.png",
        "step_00004.png",
        "samples.png",
        "denoising.gif",
        "model.safetensors",
        "metrics.csv",
        "checkpoint.safetensors",  # after the last step
        "checkpoint.previous.safetensors",  # after the third
    }
    with Image.open(out / "denoising.gif") as gif:
        assert gif.n_frames > 10
    unet, diffusion = load_model(out / "model.safetensors")
    assert unet.config["channels"] == (8, 16) and unet.config["image_size"] == (28, 28) and diffusion.T == 25
    for name, w in unet.state_dict().items():
        np.testing.assert_array_equal(load_model(out / "checkpoint.safetensors")[0].state_dict()[name], w)
    log = np.loadtxt(out / "metrics.csv", delimiter=",", skiprows=1)
    assert log.shape == (5, 6) and log[:, 0].tolist() == [1, 2, 3, 4, 5] and np.isfinite(log).all()
    again = sample(diffusion, unet, (6, 28, 28, 1), rng=0, labels=np.arange(6), guidance=1.5)
    again = grid(again)  # the file is the model that drew the samples
    np.testing.assert_array_equal(np.asarray(again), np.asarray(Image.open(out / "samples.png")))


def test_the_loss_curve_is_left_out_politely_without_matplotlib(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); "
    code += f"sys.argv[1:] = {[*TINY, f'--out={tmp_path}/out']!r}; "
    code += f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    text = result.stdout + result.stderr
    assert text.count("no loss curve after 5 steps: that needs matplotlib, pip install 'tinyddpm[plots]'") == 1
    assert (tmp_path / "out" / "samples.png").exists()


@pytest.mark.slow
def test_a_rehearsal_tells_how_many_steps_take_so_many_minutes(tmp_path):
    """And the same many give the same digits, so that nothing but their number depends on the clock."""
    options = TINY[1:]
    result = run(*options, "--minutes=0.1", f"--out={tmp_path / 'clock'}")
    assert result.returncode == 0, result.stderr
    (steps,) = re.findall(r"training ([\d,]+) steps, about 0.1 minutes", result.stdout)
    assert ("so few learn little" in result.stdout) == (int(steps.replace(",", "")) < 200)
    seconds = np.loadtxt(tmp_path / "clock" / "metrics.csv", delimiter=",", skiprows=1)[-1, 5]
    assert 2 < seconds < 18, (steps, seconds)  # of 6, for others may be at work here
    assert run(*options, f"--steps={steps.replace(',', '')}", f"--out={tmp_path / 'count'}").returncode == 0
    assert (tmp_path / "clock" / "samples.png").read_bytes() == (tmp_path / "count" / "samples.png").read_bytes()


def interrupted(out, number, *arguments):
    """Run the example, send it a signal soon after its first step, and return its output."""
    arguments = [sys.executable, str(EXAMPLE), *TINY, *arguments, f"--out={out}"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (out / "metrics.csv").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


@on_posix
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_ctrl_c_or_sigterm_ends_politely(tmp_path, number):
    code, stdout, stderr = interrupted(tmp_path, number, "--steps=1000000")
    assert code == 0, stderr
    assert "Traceback" not in stderr and "done in" in stdout
    assert "what was trained is saved and sampled in a moment; again to quit at once" in stderr
    made = {"model.safetensors", "checkpoint.safetensors", "metrics.csv", "samples.png", "denoising.gif"}
    assert {p.name for p in tmp_path.iterdir()} >= made


@on_posix
def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(tmp_path):
    arguments = [sys.executable, str(EXAMPLE), *TINY, "--steps=1000000", f"--out={tmp_path}"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "metrics.csv").exists() and process.poll() is None:
            time.sleep(0.02)
        before = {path.name for path in tmp_path.iterdir()}
        for more in ([], ["--resume"]):
            second = run(*TINY, *more, f"--out={tmp_path}")
            assert second.returncode in (1, 2) and f"{tmp_path} is in use by process {process.pid} on " in second.stderr
        assert {path.name for path in tmp_path.iterdir()} == before
        process.kill()
        process.wait()
    third = run(*TINY, "--seed=1", f"--out={tmp_path}")
    assert third.returncode == 0 and not (tmp_path / "running.lock").exists(), third.stderr


@on_posix
def test_ctrl_c_that_ends_who_reads_along_too_loses_nothing(tmp_path):
    """As of `python examples/mnist_ddpm.py 2>&1 | tee log`."""
    arguments = [sys.executable, str(EXAMPLE), *TINY, "--steps=1000000", f"--out={tmp_path}"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not (tmp_path / "metrics.csv").exists() and process.poll() is None:
            time.sleep(0.02)
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert {"model.safetensors", "samples.png", "denoising.gif"} <= {path.name for path in tmp_path.iterdir()}


RESUMED = [*TINY, "--steps=40", "--save-every=1", "--samples=1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(*RESUMED, f"--out={folder}").returncode == 0
    return folder


@on_posix
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(getattr(signal, "SIGKILL", None), marks=pytest.mark.slow)]
)
def test_it_goes_on_as_if_it_had_not_been_stopped(whole, tmp_path, number):
    """The same model, pictures and log, but for the times in it."""
    parts = tmp_path
    code, _, stderr = interrupted(parts, number, *RESUMED)
    assert code == (0 if number == signal.SIGINT else -signal.SIGKILL), stderr
    assert 1 <= sum(1 for _ in open(parts / "metrics.csv")) - 1 < 40
    for workers in (
        [],
        ["--workers=1"],
    ):  # the options are those of before; and of what is complete, nothing is trained
        result = run("--resume", *workers, f"--out={parts}")
        assert result.returncode == 0 and "trained  40 steps" in result.stdout, result.stderr
    for name, w in load_file(whole / "checkpoint.safetensors").items():
        np.testing.assert_array_equal(load_file(parts / "checkpoint.safetensors")[name], w, err_msg=name)
    columns = dict(delimiter=",", skiprows=1, usecols=(0, 1, 2, 3))
    np.testing.assert_array_equal(*(np.loadtxt(folder / "metrics.csv", **columns) for folder in (whole, parts)))
    assert (whole / "samples.png").read_bytes() == (parts / "samples.png").read_bytes()


@pytest.mark.slow
def test_another_run_in_the_folder_does_not_lose_the_checkpoint_of_the_one_before(tmp_path):
    for seed in (1, 2):
        assert run(*TINY, "--save-every=4", f"--seed={seed}", f"--out={tmp_path}").returncode == 0
    made = {"checkpoint.safetensors", "checkpoint.previous.safetensors", "metrics.csv", "model.safetensors"}
    made |= {"options.json", "noising.png", "samples.png", "denoising.gif"}
    assert {p.name for p in (tmp_path / "earlier-1").iterdir()} - {"loss.png"} == made  # that needs matplotlib
    resumed = run(*TINY, "--seed=1", "--resume", f"--out={tmp_path}")
    assert resumed.returncode == 2 and "--seed: a run goes on as it began, with --seed 2; --start " in resumed.stderr
    for folder in (tmp_path, tmp_path / "earlier-1"):  # what was refused has changed nothing
        resumed = run("--resume", f"--out={folder}")
        says = f"ended    this run has had its 5 steps; --start {folder} with a new --out learns on from it"
        assert resumed.returncode == 0 and says in resumed.stdout and "resumed" not in resumed.stdout, resumed.stderr
    again = run(*TINY, "--steps=1", f"--out={tmp_path}")
    assert "the run that was there is in earlier-2 now; it had had all its steps" in again.stdout
    assert {p.name for p in (tmp_path / "earlier-2").iterdir()} - {"loss.png"} == made


@on_posix
def test_a_disk_that_is_full_is_told_once_and_does_not_end_the_training(tmp_path):
    """No file can grow beyond so many bytes; then the model cannot be written in the end either, and it is named."""
    import resource

    def little_space():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    (tmp_path / "metrics.csv").mkdir()  # in the way
    result = run(*TINY, "--steps=15", "--save-every=5", "--resume", f"--out={tmp_path}", preexec_fn=little_space)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    text = result.stdout + result.stderr
    assert re.findall(r"no checkpoint after (\d+) steps: ", text) == ["5", "15"]  # the first time, and the last
    assert re.findall(r"no line in metrics.csv after (\d+) steps: ", text) == ["1", *["15"] * 3]
    assert "mnist_ddpm.py: " in text and "cannot write" in text and "model.safetensors: File too large" in text
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.safetensors"))


def test_a_loss_that_is_not_finite_ends_it_with_the_last_checkpoint_kept(tmp_path):
    result = run(*TINY, "--steps=400", "--lr=1e9", "--save-every=1", f"--out={tmp_path}")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (step,) = re.findall(r"mnist_ddpm.py: step (\d+): the loss is ", result.stderr)
    kept = f"the checkpoint after {int(step) - 1} steps is kept: --resume goes on from it"
    assert kept in result.stdout + result.stderr
    weights = load_file(tmp_path / "checkpoint.safetensors")
    assert all(np.isfinite(w).all() for w in weights.values()) and not (tmp_path / "samples.png").exists()
    assert sum(1 for _ in open(tmp_path / "metrics.csv")) == int(step)  # a header, and the steps before


@pytest.fixture
def photos(tmp_path):
    """Two classes of pictures larger than they are asked for, and one that is none."""
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "cats" / "broken.png").write_bytes(b"nothing")
    return tmp_path / "photos"


def test_images_of_ones_own(photos, tmp_path):
    """In colour, flipped, with a class per folder, and what cannot be read is reported."""
    settings = [*TINY, f"--data={photos}", "--size=16", "--flip", "--samples=4"]
    result = run(*settings, f"--out={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert (
        "8 images of 16 x 16 pixels" in result.stdout and "1 of 9 files are left out: cats/broken.png" in result.stderr
    )
    assert "classes  0 cats, 1 dogs" in result.stdout
    unet, _ = load_model(tmp_path / "out" / "model.safetensors")
    expected = {"in_channels": 3, "out_channels": 3, "image_size": (16, 16), "classes": 2}
    assert {name: unet.config[name] for name in expected} == expected
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.mode == "RGB" and picture.size == (2 * (2 * 18 + 2), 2 * (2 * 18 + 2))
    result = run("--grey", f"--out={tmp_path / 'out'}", "--resume")
    assert result.returncode == 2 and "--grey: a run goes on as it began, without --grey; --start " in result.stderr
    assert json.loads((tmp_path / "out" / "options.json").read_text())["data"] == str(photos)
    result = run("--digits=12", f"--out={tmp_path / 'out'}")
    assert result.returncode == 1 and "--digits: this model knows 0 to 1, got 12" in result.stderr


@on_posix
def test_names_that_a_terminal_cannot_show(photos, tmp_path):
    """Classes in Japanese, and bytes that are no text, where the output is piped on a machine of another encoding."""
    (photos / "dogs").rename(photos / "\u732b")
    os.rename(photos / "cats", os.fsencode(photos) + b"/\xff")
    settings = os.environ | {"PYTHONIOENCODING": "cp1252", "LC_ALL": "C", "PYTHONUTF8": "0"}
    for more in ([], ["--resume"]):
        result = run(*TINY, *more, f"--data={photos}", "--size=8", f"--out={tmp_path / 'out'}", env=settings)
        assert result.returncode == 0, result.stderr
        assert "\nclasses  0 " in result.stdout and "left out: \\udcff/broken.png: " in result.stderr
    assert (tmp_path / "out" / "samples.png").exists()


def test_the_options_of_before(refusal, photos, tmp_path, monkeypatch):
    """A folder of pictures is found from elsewhere; the number of steps cannot be changed; damage is named."""
    (photos / "cats" / "broken.png").unlink()
    monkeypatch.chdir(photos.parent)
    out, few = tmp_path / "out", [*TINY, "--steps=1", "--data=photos", "--size=8"]
    with monkeypatch.context() as patch:
        run_here(patch, out, *few)
    assert json.loads((out / "options.json").read_text())["data"] == str(photos)
    message = "--minutes: the run that is to go on has 1 steps, and keeps them"
    assert message in refusal(EXAMPLE, f"--out={out}", "--resume", "--minutes=9")
    for damage, says in {
        "{": "Expecting property name",
        "[1]": "expected an object of options, got [1]",
        "3": "expected an object of options, got 3",
        '{"steps": "many"}': "argument --steps: invalid int value: 'many'",
        '{"channels": 5.5}': "argument --channels: invalid int value: '5.5'",
        '{"flip": "yes"}': "argument --flip: ignored explicit argument 'yes'",
        '{"lr": true}': "argument --lr: expected one argument",
        '{"objective": 3}': "argument --objective: invalid choice: '3'",
        '{"batch": 0}': "--batch must be 1 or greater, got 0",
    }.items():
        (out / "options.json").write_text(damage)
        told = refusal(EXAMPLE, f"--out={out}", "--resume")
        assert f"--resume: {out / 'options.json'} is damaged: {says}" in told


def test_a_grid_has_a_column_for_each_class_unless_these_are_few_or_many():
    """Few would make it a tower, many a strip."""
    page = runpy.run_path(str(EXAMPLE))["page"]
    images = np.zeros((64, 8, 8, 1), np.float32)
    for classes, columns in ((None, 8), (1, 8), (2, 8), (5, 5), (10, 10), (64, 64), (65, 8)):
        assert page(images, classes).size[0] == 2 * (10 * columns + 2)


@on_posix
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.slow
def test_too_little_memory_is_said(photos, tmp_path, workers):
    import resource

    def little_memory():
        resource.setrlimit(resource.RLIMIT_AS, (3 * 2**29, 3 * 2**29))

    options = ["--size=4096", "--batch=2", f"--workers={workers}", f"--data={photos}", f"--out={tmp_path / 'out'}"]
    one_thread = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # each of BLAS's would want some of it
    result = run(*TINY, *options, preexec_fn=little_memory, env=one_thread)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "mnist_ddpm.py: out of memory, of which fewer --workers or a smaller --batch need less: " in result.stderr


@pytest.mark.parametrize("why", ["there are no classes", "--no-labels"])
def test_without_labels(photos, tmp_path, why):
    options = [f"--data={photos / 'dogs'}"] if why == "there are no classes" else ["--no-labels"]
    result = run(*TINY, *options, f"--out={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    unet, _ = load_model(tmp_path / "out" / "model.safetensors")
    assert unet.config["classes"] is None and (tmp_path / "out" / "samples.png").exists()


@pytest.mark.parametrize("data", ["mnist", "fashion"])
def test_without_a_network_it_says_what_there_is(tmp_path, data):
    """Proxies that refuse make it one."""
    nowhere = {"XDG_CACHE_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    result = run(*TINY, f"--data={data}", f"--out={tmp_path / 'out'}", env=os.environ | nowhere)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    for words in ("no mirror gave it", "https://", "bundled 10,000 digits", "--data FOLDER"):
        assert words in result.stderr


def test_data_sets_arrive(monkeypatch, tmp_path):
    asked = []
    images = np.random.default_rng(0).uniform(-1, 1, (12, 28, 28, 1)).astype(np.float32)
    for name in ("load_mnist", "load_fashion_mnist"):
        load = lambda name=name, **settings: asked.append((name, settings)) or (images, np.arange(12) % 6)
        monkeypatch.setattr(program, name, load)
    for kind in ("mnist", "fashion"):
        with monkeypatch.context() as patch:
            calls = run_here(patch, tmp_path, f"--data={kind}", "--steps=1", "--samples=1")
        assert calls["train"][0][0]["images"] is images and calls["UNet"][0][1].config["classes"] == 6
    assert asked == [("load_mnist", {"full": True}), ("load_fashion_mnist", {})]


@on_posix
def test_ctrl_c_again_ends_at_once(tmp_path):
    arguments = [sys.executable, str(EXAMPLE), *TINY, "--samples=500", f"--out={tmp_path}"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        seen = ""
        while "sampling:" not in seen and process.poll() is None:
            seen += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "mnist_ddpm.py: interrupted" in stderr and "Traceback" not in stderr
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "samples.png").exists()


def test_after_the_first_ctrl_c_the_second_is_not_caught(monkeypatch, tmp_path):
    handlers, train = [], tinyddpm.train

    def interrupted(*args, **kwargs):
        for state in train(*args, **kwargs):
            if state.step == 2:
                signal.raise_signal(signal.SIGINT)
            handlers.append(signal.getsignal(signal.SIGINT))
            yield state

    monkeypatch.setattr(tinyddpm, "train", interrupted)
    run_here(monkeypatch, tmp_path)
    assert callable(handlers[0]) and handlers[1:] == [signal.SIG_DFL] * 2  # for the third step was the last
    assert sum(1 for _ in open(tmp_path / "metrics.csv")) == 4
    assert (tmp_path / "samples.png").exists()


def run_here(monkeypatch, tmp_path, *arguments):
    """Run the example in this process, and return how it called the package."""
    calls = {}

    def recorded(name, function):
        def wrapper(*args, **kwargs):
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            result = function(*args, **kwargs)
            calls.setdefault(name, []).append((bound.arguments, result))
            return result

        return wrapper

    for name in ("UNet", "Diffusion", "train", "sample", "save_model"):
        monkeypatch.setattr(tinyddpm, name, recorded(name, getattr(tinyddpm, name)))
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *TINY, f"--out={tmp_path}", *arguments])
    handler = signal.getsignal(signal.SIGINT)
    try:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, handler)
    return calls


def test_every_option_arrives_where_it_belongs(monkeypatch, tmp_path):
    options = ["--batch=6", "--lr=0.003", "--blocks=2", "--seed=7", "--steps=4", "--timesteps=30", "--objective=v"]
    options += ["--sample-every=2", "--samples=10", "--flip", "--patch=1", "--sampling-steps=10", "--guidance=3"]
    calls = run_here(monkeypatch, tmp_path, *options)
    unet, diffusion = calls["UNet"][0], calls["Diffusion"][0][1]
    expected = {"channels": [8, 16], "blocks": 2, "rng": 7, "attention": [False, False], "patch": 1, "classes": 10}
    assert {name: unet[0][name] for name in expected} == expected
    assert (
        diffusion.objective == "v" and diffusion.T == 30 and diffusion.schedule.alpha_bar[-1] < 1e-4
    )  # as noisy at the end as with 1000 steps
    assert all(call["steps"] == 10 and call["guidance"] == 3 for call, _ in calls["sample"])
    training = calls["train"][0][0]
    expected = {
        "steps": 4,
        "decay_steps": 2,
        "batch": 6,
        "lr": 0.003,
        "workers": 2,
        "seed": 7,
        "flip": True,
        "resume": None,
        "model": unet[1],
        "diffusion": diffusion,
    }
    assert {name: training[name] for name in expected} == expected
    averages = [arguments["model"] for arguments, _ in calls["sample"]] + [calls["save_model"][0][0]["unet"]]
    assert len(averages) == 3 and all(model is averages[0] is not unet[1] for model in averages)
    assert [(arguments["shape"], arguments["rng"], arguments["workers"]) for arguments, _ in calls["sample"]] == [
        ((20, 28, 28, 1), 7, 2),  # after step 2; step 4 is the last, whose grid is the final one
        ((10, 28, 28, 1), 7, 2),
    ]
    with Image.open(tmp_path / "denoising.gif") as gif:
        gif.seek(gif.n_frames - 1)  # its last frame is the result
        difference = np.asarray(gif.convert("L")).astype(int) - np.asarray(Image.open(tmp_path / "samples.png"))
    assert gif.n_frames == 10 and np.abs(difference).max() <= 24  # it has 16 greys


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ([], 1175),
        (["--minutes=30"], 7159),
        (["--minutes=1"], 230),
        (["--minutes=0.001"], 1),
        (["--steps=7"], 7),
    ],
)
def test_steps_and_minutes(monkeypatch, tmp_path, given, steps):
    """By a clock on which a step takes 0.25 seconds, but the first a whole one: 6 s of 300, 10 of 1800 go by in the
    rehearsal, or as much as seven steps take; what is left is for steps."""

    class Enough(Exception):
        pass

    clock = [0.0]

    def pretend(*args, stop, resume="rehearsal", **kwargs):
        if resume != "rehearsal":
            raise Enough(args[3])
        for step in range(args[3]):
            clock[0] += 0.25 if step else 1.0
            last = stop()
            yield type("State", (), {"seconds": clock[0], "look": lambda: None})
            if last:
                return

    monkeypatch.setattr(tinyddpm, "train", pretend)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), f"--out={tmp_path}", *given])
    with pytest.raises(Enough) as error:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert error.value.args == (steps,)
    assert json.loads((tmp_path / "options.json").read_text())["steps"] == steps


@pytest.mark.slow
def test_the_same_seed_gives_the_same_digits(tmp_path):
    names = ["first", "again", "other"]
    for name, seed in zip(names, (3, 3, 4)):
        assert run(*TINY, f"--seed={seed}", f"--out={tmp_path / name}").returncode == 0
    first, again, other = ((tmp_path / name / "samples.png").read_bytes() for name in names)
    assert first == again != other


@pytest.mark.slow
def test_a_grid_that_cannot_be_written_does_not_lose_the_training(tmp_path):
    (tmp_path / "step_00004.png").mkdir()  # in the way
    result = run(*TINY, "--sample-every=4", f"--out={tmp_path}")
    assert result.returncode == 0 and "no grid after 4 steps" in result.stderr + result.stdout
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "samples.png").exists()


@pytest.mark.slow
def test_a_result_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "samples.png").mkdir()
    result = run(*TINY, f"--out={tmp_path}")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "mnist_ddpm.py: " in result.stderr and "samples.png" in result.stderr
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_two_minutes_of_training_learn_digits(tmp_path):
    """The default recipe, cut short, draws digits of which a classifier recognises most as what they were to be."""
    result = run("--steps=400", "--samples=60", "--sample-every=1000", f"--out={tmp_path}", timeout=900)
    assert result.returncode == 0, result.stderr
    unet, diffusion = load_model(tmp_path / "model.safetensors")
    labels = np.arange(60) % 10
    images = sample(diffusion, unet, (60, 28, 28, 1), steps=25, rng=0, labels=labels, guidance=1.5)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples.png")), np.asarray(grid(images, 10)))
    evaluate = runpy.run_path(str(EXAMPLE.parent / "measure" / "evaluate_digits.py"))
    _, p = evaluate["load_classifier"](evaluate["CLASSIFIER"]).look(images)
    assert (p.argmax(axis=1) == labels).mean() > 0.8


def test_digits_that_are_asked_for(monkeypatch, tmp_path):
    """It draws what it is told, in the grids and later; the model is not trained again."""
    calls = run_here(monkeypatch, tmp_path, "--seed=3", "--steps=3", "--samples=12")
    unet, labels = calls["UNet"][0][1], load_digits()[1]
    assert unet.config["classes"] == 10 and unet.config["label_dropout"] == 0.1
    np.testing.assert_array_equal(calls["train"][0][0]["labels"], labels)
    ((arguments, _),) = calls["sample"]
    assert arguments["labels"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert not (tmp_path / "digits.png").exists()
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (2 * (10 * 30 + 2), 2 * (2 * 30 + 2))  # a column for each digit

    monkeypatch.undo()
    before = (tmp_path / "model.safetensors").read_bytes()
    calls = run_here(monkeypatch, tmp_path, "--digits=2026", "--guidance=2.5", "--seed=4")
    assert set(calls) == {"sample"} and (tmp_path / "model.safetensors").read_bytes() == before
    ((arguments, digits),) = calls["sample"]
    wanted = {"shape": (4, 28, 28, 1), "labels": [2, 0, 2, 6], "guidance": 2.5, "rng": 4, "workers": 2, "steps": 25}
    assert {name: arguments[name] for name in wanted} == wanted
    with Image.open(tmp_path / "digits.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(grid(digits, 4, scale=4)))


def test_digits_cannot_be_asked_for_without_labels(tmp_path):
    result = run(*TINY, "--digits=1", f"--out={tmp_path}")
    assert result.returncode == 2 and "--digits: there is no model in" in result.stderr
    save_model(tmp_path / "model.safetensors", UNet(), Diffusion(make_schedule("linear", 1000)))
    result = run("--digits=1", f"--out={tmp_path}")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "was trained without labels, so it does not know digits" in result.stderr


def test_help_documents_every_option():
    result = run("--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    options = set(re.findall(r" --([a-z-]+)", text.partition("options:")[2])) - {"help"}
    assert len(options) == 28
    for option in options:
        # its meaning, and its default in brackets
        assert re.search(rf"--{option}( \{{\S+\}}| [A-Z_ \[\].]+)? [^-]+\[[^\]]+\]", text), option


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "--steps must be 1 or greater, got 0"),
        (["--batch=-3"], "--batch must be 1 or greater, got -3"),
        (["--lr=nan"], "--lr must be a number greater than 0, got nan"),
        (["--sample-every=0"], "--sample-every must be 1 or greater"),
        (["--save-every=0"], "--save-every must be 1 or greater"),
        (["--workers=0"], "--workers must be 1 or greater"),
        (["--data=nowhere"], "--data must be digits, mnist, fashion or a folder, and there is no folder nowhere"),
        (["--timesteps=0"], "--timesteps must be 1 or greater, got 0"),
        (["--channels", "16", "12"], "--channels must be multiples of 8, got 12"),
        (["--channels", "8", "8", "8", "8"], "a height and a width that are multiples of 16"),
        (["--patch=0"], "--patch must be 1 or greater, got 0"),
        (["--minutes=inf"], "--minutes must be a number greater than 0, got inf"),
        (["--sampling-steps=0"], "--sampling-steps must be 1 or greater, got 0"),
        (["--device=gpu"], "device: 'gpu' is unknown; use 'cpu', 'cuda' or 'cuda:N'"),
        (["--seed=-1"], "--seed must be 0 or greater, got -1"),
        (["--objective=y"], "invalid choice: 'y'"),
        (["--digits=1.5"], "--digits must be digits such as 2026, got '1.5'"),
        (["--guidance=nan"], "--guidance must be a number, got nan"),
        (["--digits="], "--digits must be digits such as 2026, got ''"),
        (["--colour=red"], "unrecognized arguments: --colour=red"),
    ],
)
def test_bad_input_is_refused_in_a_line(refusal, tmp_path, arguments, message):
    assert message in refusal(EXAMPLE, f"--out={tmp_path}", *arguments)


def test_an_output_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run(f"--out={tmp_path / 'file' / 'out'}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"--out: cannot write to {tmp_path / 'file' / 'out'}: Not a directory" in result.stderr
    result = run(f"--out={tmp_path / 'file'}")
    assert result.returncode == 2 and "File exists" in result.stderr


def test_it_can_be_read_as_a_tutorial():
    assert len(EXAMPLE.read_text().splitlines()) < 100


class TestSamplePretrained:
    """examples/sample_pretrained.py, on small networks of random weights."""

    @staticmethod
    def run(*arguments):
        example = EXAMPLE.with_name("sample_pretrained.py")
        return subprocess.run([sys.executable, example, *arguments], capture_output=True, text=True, timeout=120)

    @pytest.mark.parametrize(
        ("options", "arguments", "steps"),
        [
            (dict(image_size=8), [], 50),
            (dict(in_channels=3, out_channels=3, image_size=(8, 12)), ["--method=ddpm", "--samples=5"], 60),
            (dict(classes=3, image_size=8), ["--steps=4", "--seed=3"], 4),
            (dict(classes=3, image_size=8), ["--steps=4", "--label=2", "--method=dpm++"], 4),
        ],
    )
    def test_it_samples_what_the_folder_holds(self, tmp_path, options, arguments, steps):
        unet = UNet(**dict(channels=(8, 8), blocks=1, attention=(False, True)) | options, rng=1)
        for p in unet.parameters():
            p.data = p.data + np.float32(0.05) * np.cos(np.arange(p.data.size, dtype=np.float32)).reshape(p.shape)
        diffusion = Diffusion(make_schedule("linear", 60, beta_end=0.3), clip=0.9, spacing="leading")
        save_diffusers(tmp_path / "model", unet, diffusion)
        result = self.run(tmp_path / "model", f"--out={tmp_path / 'p.png'}", *arguments)
        assert result.returncode == 0, result.stderr
        settings = dict(a[2:].split("=") for a in arguments)
        n, (height, width), C = int(settings.get("samples", 16)), unet.config["image_size"], unet.config["in_channels"]
        for words in (
            "U-Net 8-8",
            f"{unet.size:,} parameters",
            f"{n} of {height} x {width} pixels",
            f"in {steps} steps",
        ):
            assert words in result.stdout
        assert f"{steps}/{steps}" in result.stderr  # the bar
        labels = None
        if unet.config["classes"]:
            labels = np.full(n, int(settings["label"])) if "label" in settings else np.arange(n) % 3
        images = sample(diffusion, unet, (n, height, width, C), settings.get("method", "ddim"), steps,
                        rng=int(settings.get("seed", 0)), labels=labels)  # fmt: skip
        with Image.open(tmp_path / "p.png") as picture:
            np.testing.assert_allclose(np.asarray(picture, int), np.asarray(grid(images), int), atol=1)

    def test_a_file_with_the_original_names(self, tmp_path):
        unet = UNet(1, 1, (32, 32), 1, (False, True), groups=32)
        state = laid_out(unet.state_dict(), lambda name, ndim: original_layout(name, ndim, 2))
        state = {name: np.ascontiguousarray(w) for name, w in state.items()}
        save_file(state, tmp_path / "ema.safetensors")
        result = self.run(tmp_path / "ema.safetensors", f"--out={tmp_path / 'p.png'}", "--steps=2", "--size=8")
        assert result.returncode == 0, result.stderr
        assert "16 of 8 x 8 pixels" in result.stdout and (tmp_path / "p.png").exists()
        result = self.run(tmp_path / "ema.safetensors", f"--out={tmp_path / 'q.png'}")
        assert "--size: this model does not say how large its images are, so it has to be given" in result.stderr

    def test_it_says_how_to_fetch_a_model(self, tmp_path):
        for result in (self.run("--help"), self.run(tmp_path / "nowhere")):
            text = " ".join((result.stdout + result.stderr).split())
            assert "hf download google/ddpm-cifar10-32 --local-dir ddpm-cifar10-32" in text
        assert result.returncode == 2 and "FOLDER: there is no" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--out=nowhere/p.png"], "--out: there is no folder nowhere"),
            (["--steps=0"], "--steps must be 1 or greater, got 0"),
            (["--steps=61"], "steps: expected an integer from 1 to 60"),
            (["--samples=0"], "--samples must be 1 or greater, got 0"),
            (["--seed=-1"], "--seed must be 0 or greater, got -1"),
            (["--out=picture"], "--out: expected a picture such as digits.png, got picture"),
            (["--size=7"], "x: height and width must be multiples of 2"),
            (["--label=1"], "--label: this model knows no classes, so leave it out"),
            (["--variant=fp16"], "diffusion_pytorch_model.fp16.safetensors"),
            (["--variant=../fp16"], "variant: expected a word such as 'fp16', got '../fp16'"),
            (["--device=gpu"], "device: 'gpu' is unknown"),
        ],
    )
    def test_bad_input_is_refused_in_a_line(self, refusal, tmp_path, arguments, message):
        unet = UNet(channels=(8, 8), blocks=1, attention=(False, True), image_size=8)
        save_diffusers(tmp_path / "model", unet, Diffusion(make_schedule("linear", 60, beta_end=0.3)))
        example = EXAMPLE.with_name("sample_pretrained.py")
        assert message in refusal(example, tmp_path / "model", f"--out={tmp_path / 'p.png'}", *arguments)
        assert not (tmp_path / "p.png").exists()

    @pytest.mark.parametrize("label", [-1, 3])
    def test_a_class_that_the_model_does_not_know(self, refusal, tmp_path, label):
        unet = UNet(channels=(8, 8), blocks=1, attention=(False, True), image_size=8, classes=3)
        save_diffusers(tmp_path, unet, Diffusion(make_schedule("linear", 60, beta_end=0.3)))
        says = refusal(EXAMPLE.with_name("sample_pretrained.py"), tmp_path, f"--label={label}", "--steps=1")
        assert f"--label: this model knows 0 to 2, got {label}" in says

    def test_a_folder_that_is_no_model(self, tmp_path):
        result = self.run(tmp_path)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert f"there is no file {tmp_path / 'config.json'}" in result.stderr
