"""The example itself, as a user would run it, on a tiny setting."""

import inspect
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
from safetensors.numpy import save_file

import tinyddpm
from tinyddpm import (
    Diffusion,
    UNet,
    load_digits,
    load_model,
    make_schedule,
    no_grad,
    sample,
    save_diffusers,
    save_model,
)
from tinyddpm.image import grid
from tinyddpm.layouts import laid_out, original_layout

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "mnist_ddpm.py"
TINY = [
    "--steps=5",
    "--batch=4",
    "--channels",
    "8",
    "16",
    "--timesteps=25",
    "--samples=6",
    "--sample-every=2",
    "--workers=2",
]


def run(*arguments, timeout=120):
    return subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, timeout=timeout)


def test_it_trains_and_draws_and_leaves_what_it_promises(tmp_path):
    out = tmp_path / "new" / "folder"
    result = run(*TINY, f"--out={out}")
    assert result.returncode == 0, result.stderr
    for words in (
        "device   cpu, 2 workers, BLAS",
        "parameters",
        "10,000 digits of 28 x 28 pixels, T = 25",
        "training 5 steps, 4 images a step",
    ):
        assert words in result.stdout
    assert str(out) in result.stdout and "images/s" in result.stderr and "loss" in result.stderr
    made = {p.name for p in out.iterdir()} - {"loss.png"}  # without matplotlib there is none
    assert made == {
        "noising.png",
        "step_00002.png",
        "step_00004.png",
        "samples.png",
        "denoising.gif",
        "model.safetensors",
    }
    with Image.open(out / "denoising.gif") as gif:
        assert gif.n_frames > 10
    unet, diffusion = load_model(out / "model.safetensors")
    assert unet.config["channels"] == (8, 16) and unet.config["image_size"] == (28, 28) and diffusion.T == 25
    again = grid(sample(diffusion, unet, (6, 28, 28, 1), rng=0))  # the file is the model that drew the samples
    np.testing.assert_array_equal(np.asarray(again), np.asarray(Image.open(out / "samples.png")))


def test_the_loss_curve_is_left_out_politely_without_matplotlib(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); "
    code += f"sys.argv[1:] = {[*TINY, f'--out={tmp_path}/out']!r}; "
    code += f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "no loss curve: that needs matplotlib" in result.stdout and (tmp_path / "out" / "samples.png").exists()


def test_the_clock_stops_it_too(tmp_path):
    result = run(*TINY, "--steps=100000", "--minutes=0.02", "--sample-every=100000", f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "samples.png").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to a child there")
def test_ctrl_c_ends_politely(tmp_path):
    arguments = [sys.executable, str(EXAMPLE), *TINY, "--steps=1000000", "--sample-every=1000000", f"--out={tmp_path}"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        seen = ""
        while "images/s" not in seen and process.poll() is None:  # until the first step is done
            seen += process.stderr.read(1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr and "done in" in stdout
    assert {p.name for p in tmp_path.iterdir()} >= {"model.safetensors", "samples.png", "denoising.gif"}


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to a child there")
def test_ctrl_c_again_ends_at_once(tmp_path):
    arguments = [sys.executable, str(EXAMPLE), *TINY, "--samples=500", f"--out={tmp_path}"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        seen = ""
        while "sampling:" not in seen and process.poll() is None:
            seen += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "samples.png").exists()


def test_after_the_first_ctrl_c_the_second_is_not_caught(monkeypatch, tmp_path):
    handlers, train = [], tinyddpm.train

    def interrupted(*args, **kwargs):
        for state in train(*args, **kwargs):
            signal.raise_signal(signal.SIGINT)
            handlers.append(signal.getsignal(signal.SIGINT))
            yield state

    monkeypatch.setattr(tinyddpm, "train", interrupted)
    run_here(monkeypatch, tmp_path)
    assert handlers == [signal.SIG_DFL]  # and it was asked for no second step
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
    calls = run_here(monkeypatch, tmp_path, *options)
    unet, diffusion = calls["UNet"][0], calls["Diffusion"][0][1]
    expected = {"channels": [8, 16], "blocks": 2, "rng": 7, "attention": [False, True]}
    assert {name: unet[0][name] for name in expected} == expected
    assert (
        diffusion.objective == "v" and diffusion.T == 30 and diffusion.schedule.alpha_bar[-1] < 1e-4
    )  # as noisy at the end as with 1000 steps
    training = calls["train"][0][0]
    expected = {
        "steps": 4,
        "decay_steps": 2,
        "batch": 6,
        "lr": 0.003,
        "workers": 2,
        "seed": 7,
        "model": unet[1],
        "diffusion": diffusion,
    }
    assert {name: training[name] for name in expected} == expected
    averages = [arguments["model"] for arguments, _ in calls["sample"]] + [calls["save_model"][0][0]["unet"]]
    assert len(averages) == 3 and all(model is averages[0] is not unet[1] for model in averages)
    assert [(arguments["shape"], arguments["rng"], arguments["workers"]) for arguments, _ in calls["sample"]] == [
        ((16, 28, 28, 1), 7, 2),  # after step 2; step 4 is the last, whose grid is the final one
        ((6, 28, 28, 1), 7, 2),
    ]
    with Image.open(tmp_path / "denoising.gif") as gif:
        gif.seek(gif.n_frames - 1)  # its last frame is the result
        difference = np.asarray(gif.convert("L")).astype(int) - np.asarray(Image.open(tmp_path / "samples.png"))
    assert gif.n_frames == 30 and np.abs(difference).max() <= 24  # it has 16 greys


@pytest.mark.parametrize(
    ("given", "steps"),
    [([], 2400), (["--minutes=0.01"], sys.maxsize), (["--steps=7"], 7), (["--steps=3", "--minutes=9"], 3)],
)
def test_steps_and_minutes(monkeypatch, tmp_path, given, steps):
    class Enough(Exception):
        pass

    def stop_here(*args, **kwargs):
        raise Enough(args[3])

    monkeypatch.setattr(tinyddpm, "train", stop_here)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), f"--out={tmp_path}", *given])
    with pytest.raises(Enough) as error:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert error.value.args == (steps,)


def test_the_same_seed_gives_the_same_digits(tmp_path):
    names = ["first", "again", "other"]
    for name, seed in zip(names, (3, 3, 4)):
        assert run(*TINY, "--sample-every=100", f"--seed={seed}", f"--out={tmp_path / name}").returncode == 0
    first, again, other = ((tmp_path / name / "samples.png").read_bytes() for name in names)
    assert first == again != other


def test_a_grid_that_cannot_be_written_does_not_lose_the_training(tmp_path):
    (tmp_path / "step_00002.png").mkdir()  # in the way
    result = run(*TINY, f"--out={tmp_path}")
    assert result.returncode == 0 and "no grid after 2 steps" in result.stderr + result.stdout
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "samples.png").exists()


def test_a_result_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "samples.png").mkdir()
    result = run(*TINY, f"--out={tmp_path}")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "mnist_ddpm.py: " in result.stderr and "samples.png" in result.stderr
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_two_minutes_of_training_learn_something(tmp_path):
    """The default recipe, cut short: noise is predicted far better than by chance, which would be a loss of 1."""
    result = run("--steps=400", "--samples=16", "--sample-every=1000", f"--out={tmp_path}", timeout=900)
    assert result.returncode == 0, result.stderr
    unet, diffusion = load_model(tmp_path / "model.safetensors")
    with no_grad():
        loss = diffusion.loss(unet, load_digits()[0][::50], np.random.default_rng(0)).item()
    assert loss < 0.06
    digits = np.asarray(Image.open(tmp_path / "samples.png")) / 255
    assert 0.05 < (digits > 0.5).mean() < 0.3  # strokes on a dark ground, as in the data (0.13)


def test_digits_that_are_asked_for(monkeypatch, tmp_path):
    """Trained with labels, it draws what it is told, in the grids and later; the model is not trained again."""
    calls = run_here(monkeypatch, tmp_path, "--labels", "--seed=3", "--steps=3")
    unet, labels = calls["UNet"][0][1], load_digits()[1]
    assert unet.config["classes"] == 10 and unet.config["label_dropout"] == 0.2
    np.testing.assert_array_equal(calls["train"][0][0]["labels"], labels)
    for (arguments, _), n in zip(calls["sample"], (16, 6), strict=True):
        assert arguments["labels"].tolist() == [i % 10 for i in range(n)]
    assert not (tmp_path / "digits.png").exists()
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (2 * (10 * 30 + 2), 2 * 32)  # a column for each digit

    monkeypatch.undo()
    before = (tmp_path / "model.safetensors").read_bytes()
    calls = run_here(monkeypatch, tmp_path, "--digits=2026", "--guidance=1.5", "--seed=4")
    assert set(calls) == {"sample"} and (tmp_path / "model.safetensors").read_bytes() == before
    ((arguments, digits),) = calls["sample"]
    wanted = {"shape": (4, 28, 28, 1), "labels": [2, 0, 2, 6], "guidance": 1.5, "rng": 4, "workers": 2}
    assert {name: arguments[name] for name in wanted} == wanted
    with Image.open(tmp_path / "digits.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(grid(digits, 4, scale=4)))

    monkeypatch.undo()
    calls = run_here(monkeypatch, tmp_path, "--labels", "--digits=7", "--steps=1", "--samples=1")
    assert len(calls["train"]) == 1 and calls["sample"][-1][0]["labels"] == [7]
    assert calls["sample"][-1][0]["guidance"] == 2.0


def test_digits_cannot_be_asked_for_without_labels(tmp_path):
    result = run(*TINY, "--digits=1", f"--out={tmp_path}")
    assert result.returncode == 2 and "--digits: there is no model in" in result.stderr
    save_model(tmp_path / "model.safetensors", UNet(), Diffusion(make_schedule("linear", 1000)))
    result = run("--digits=1", f"--out={tmp_path}")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "was trained without --labels, so it does not know digits" in result.stderr


def test_help_documents_every_option():
    result = run("--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    for option in ("steps", "minutes", "batch", "lr", "channels", "blocks", "timesteps", "labels", "digits", "guidance",
                   "objective", "samples", "sample-every", "device", "workers", "seed", "out"):  # fmt: skip
        # its meaning, and its default in brackets
        assert re.search(rf"--{option}( \{{\S+\}}| [A-Z_ \[\].]+)? [^-]+\[[^\]]+\]", text), option


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "--steps must be greater than 0, got 0"),
        (["--batch=-3"], "--batch must be greater than 0, got -3"),
        (["--lr=nan"], "--lr must be greater than 0, got nan"),
        (["--sample-every=0"], "--sample-every must be greater than 0"),
        (["--timesteps=20"], "--timesteps must be greater than 20 to get from an image to noise, got 20"),
        (["--channels", "12"], "channels: expected multiples of groups = 8, got [12]"),
        (["--channels", "8", "8", "8", "8"], "a height and a width that are multiples of 8"),
        (["--device=gpu"], "device: 'gpu' is unknown; use 'cpu', 'cuda' or 'cuda:N'"),
        (["--seed=-1"], "--seed must be 0 or greater, got -1"),
        (["--objective=y"], "invalid choice: 'y'"),
        (["--digits=1.5"], "--digits must be digits such as 2026, got '1.5'"),
        (["--labels", "--digits=1", "--guidance=nan"], "--guidance must be a number, got nan"),
        (["--labels", "--digits="], "--digits must be digits such as 2026, got ''"),
        (["--colour=red"], "unrecognized arguments: --colour=red"),
    ],
)
def test_bad_input_is_refused_in_a_line(tmp_path, arguments, message):
    result = run(f"--out={tmp_path}", "--steps=1", *arguments)
    assert result.returncode != 0
    assert message in result.stderr and "Traceback" not in result.stderr


def test_an_output_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run(f"--out={tmp_path / 'file' / 'out'}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"--out: cannot write to {tmp_path / 'file' / 'out'}: Not a directory" in result.stderr
    result = run(f"--out={tmp_path / 'file'}")
    assert result.returncode == 2 and "File exists" in result.stderr


def test_it_can_be_read_as_a_tutorial():
    assert len(EXAMPLE.read_text().splitlines()) < 190


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
            assert "huggingface-cli download google/ddpm-cifar10-32 --local-dir ddpm-cifar10-32" in text
        assert result.returncode == 2 and "FOLDER: there is no" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--out=nowhere/p.png"], "--out: there is no folder nowhere"),
            (["--steps=0"], "--steps must be at least 1, got 0"),
            (["--steps=61"], "steps: expected an integer from 1 to 60"),
            (["--samples=0"], "--samples must be at least 1, got 0"),
            (["--seed=-1"], "--seed must be 0 or greater, got -1"),
            (["--out=picture"], "--out: expected a picture such as digits.png, got picture"),
            (["--size=7"], "x: height and width must be multiples of 2"),
            (["--label=1"], "--label: this model knows no classes, so leave it out"),
            (["--variant=fp16"], "diffusion_pytorch_model.fp16.safetensors"),
            (["--variant=../fp16"], "variant: expected a word such as 'fp16', got '../fp16'"),
            (["--device=gpu"], "device: 'gpu' is unknown"),
        ],
    )
    def test_bad_input_is_refused_in_a_line(self, tmp_path, arguments, message):
        unet = UNet(channels=(8, 8), blocks=1, attention=(False, True), image_size=8)
        save_diffusers(tmp_path / "model", unet, Diffusion(make_schedule("linear", 60, beta_end=0.3)))
        result = self.run(tmp_path / "model", f"--out={tmp_path / 'p.png'}", *arguments)
        assert result.returncode != 0 and not (tmp_path / "p.png").exists()
        assert message in result.stderr and "Traceback" not in result.stderr

    def test_a_folder_that_is_no_model(self, tmp_path):
        result = self.run(tmp_path)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert f"there is no file {tmp_path / 'config.json'}" in result.stderr
