"""The example itself, as a user would run it, on a tiny setting."""

import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tinyddpm import load_model, sample
from tinyddpm.image import grid

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
        "device   cpu, 2 worker threads, BLAS",
        "parameters",
        "10,000 digits of 28 x 28 pixels, T = 25",
        "5 steps of 4 images",
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
    assert unet.config["channels"] == (8, 16) and diffusion.T == 25
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
        while "images/s" not in seen:  # until the first step is done
            seen += process.stderr.read(1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr and "done in" in stdout
    assert {p.name for p in tmp_path.iterdir()} >= {"model.safetensors", "samples.png", "denoising.gif"}


def test_help_documents_every_option():
    result = run("--help")
    assert result.returncode == 0
    options = ["steps", "minutes", "batch", "lr", "channels", "blocks", "dropout", "timesteps", "samples",
               "sample-every", "device", "workers", "seed", "out"]  # fmt: skip
    for option in options:
        assert f"--{option} " in result.stdout
    assert " ".join(result.stdout.split()).count("(default: ") == len(options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "--steps must be greater than 0, got 0"),
        (["--batch=-3"], "--batch must be greater than 0, got -3"),
        (["--lr=nan"], "--lr must be greater than 0, got nan"),
        (["--sample-every=0"], "--sample-every must be greater than 0"),
        (["--timesteps=20"], "--timesteps must be greater than 20 to get from an image to noise, got 20"),
        (["--channels", "12"], "channels: expected one or more multiples of groups = 8, got (12,)"),
        (["--channels", "8", "8", "8", "8"], "x: height and width must be multiples of 8"),
        (["--dropout=1"], "dropout: expected a probability in [0, 1), got 1.0"),
        (["--device=gpu"], "device: 'gpu' is unknown; use 'cpu', 'cuda' or 'cuda:N'"),
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
    assert len(EXAMPLE.read_text().splitlines()) < 150
