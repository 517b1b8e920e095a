"""The examples that use the model which comes with the package: each draws what it says, here in a tiny setting."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tinyddpm import load_digits, load_model, no_grad, sample
from tinyddpm.files.model import DIGITS_MODEL
from tinyddpm.files.pictures import grid

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
TINY = {
    "sample_digits": ["--digits=2026", "--rows=2", "--steps=3"],
    "samplers": ["--steps", "2", "3", "--most=4"],
    "denoise": ["--sigma", "0.5", "--steps=3", "--samples=2"],
    "inpaint": ["--known", "left", "dots", "--steps=3", "--tries=2", "--resamplings=2", "--told"],
    "interpolate": ["--pairs", "03", "16", "--count=3", "--steps=2"],
}


def run(name, *arguments):
    command = [sys.executable, EXAMPLES / f"{name}.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def drawn(tmp_path, name, *arguments):
    """The picture that the example draws in its tiny setting, as an array of greys, and what it prints."""
    result = run(name, *TINY[name], "--workers=1", f"--out={tmp_path / 'picture.png'}", *arguments)
    assert result.returncode == 0, result.stderr
    assert f"look at {tmp_path / 'picture.png'}" in result.stdout
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.mode == "L"
        return np.asarray(picture), result.stdout


def tiles(page, rows, columns):
    """The images of a page of named rows, (rows, columns, 28, 28), in [-1, 1]."""
    height = len(page) // rows
    strip = page[:, -2 * (30 * columns + 2) :]
    assert len(page) == rows * 64 and height == 64
    small = strip[::2, ::2].reshape(rows, 32, -1)[:, 2:30, 2:].reshape(rows, 28, columns, 30)[..., :28]
    return small.swapaxes(1, 2) / 127.5 - 1


class TestTheModel:
    def test_it_is_small_and_knows_digits(self):
        assert DIGITS_MODEL.stat().st_size < 2e6
        unet, diffusion = load_model()
        assert unet.config["classes"] == 10 and unet.config["label_dropout"] > 0 and unet.dtype == np.float32
        assert unet.config["image_size"] == (28, 28)

    def test_the_digits_it_draws_look_like_those_asked_for(self):
        """To the nearest of the bundled digits."""
        unet, diffusion = load_model()
        images, known = load_digits()
        labels = np.arange(20) % 10
        made = sample(diffusion, unet, (20, 28, 28, 1), "ddpm", 10, labels=labels, guidance=2.0)
        nearest = [known[((images - digit) ** 2).sum((1, 2, 3)).argmin()] for digit in made]
        assert (np.array(nearest) == labels).mean() >= 0.9

    def test_it_finds_the_noise_in_digits(self):
        unet, diffusion = load_model()
        images = load_digits()[0][::500]
        with no_grad():
            loss = [diffusion.loss(unet, images, np.random.default_rng(seed)).item() for seed in range(4)]
        assert np.mean(loss) < 0.035  # that of noise guessed as 0 is 1


def test_sample_digits(tmp_path):
    page, _ = drawn(tmp_path, "sample_digits", "--seed=3", "--guidance=1.5")
    unet, diffusion = load_model()
    labels = np.array([2, 0, 2, 6] * 2)
    expected = sample(diffusion, unet, (8, 28, 28, 1), "ddpm", 3, 3, labels=labels, guidance=1.5, workers=1)
    np.testing.assert_allclose(page.astype(int), np.asarray(grid(expected, columns=4, scale=4)).astype(int), atol=1)
    assert (page != drawn(tmp_path, "sample_digits", "--seed=3", "--guidance=0")[0]).any()


@pytest.mark.slow
def test_samplers(tmp_path):
    page, printed = drawn(tmp_path, "samplers")
    lines = printed.splitlines()
    assert [line.split()[:2] for line in lines[1:8]] == [
        ["ddpm", "2"], ["ddpm", "3"], ["ddpm", "4"], ["ddim", "2"], ["ddim", "3"], ["dpm++", "2"], ["dpm++", "3"],
    ]  # fmt: skip
    pictures = tiles(page, 8, 10)
    unet, diffusion = load_model()
    draw = lambda *how: sample(diffusion, unet, (10, 28, 28, 1), *how, labels=np.arange(10), workers=1)[..., 0]
    np.testing.assert_allclose(pictures[6], draw("dpm++", 3), atol=0.02)
    off = np.sqrt(np.mean((draw("dpm++", 3) - draw("dpm++", 6)) ** 2, axis=(1, 2))).mean()
    assert lines[7].split()[3] == f"{off:.3f}"
    images = load_digits()[0][..., 0]
    np.testing.assert_allclose(pictures[7], images[::1000], atol=0.01)
    apart = lambda i: np.sqrt(np.mean((images[i] - np.delete(images, i, axis=0)) ** 2, axis=(1, 2)))
    assert lines[8].split()[-1] == f"{np.mean([apart(i).min() for i in range(0, 10000, 1000)]):.3f}"


def test_denoise(tmp_path):
    page, printed = drawn(tmp_path, "denoise")
    digit, noisy, mean, one, another, told = tiles(page, 6, 2)
    images = load_digits()[0][..., 0]
    assert all((np.abs(images - d).max((1, 2)) < 0.01).any() for d in digit)
    error = lambda x: np.sqrt(np.mean((x - digit) ** 2))
    assert error(mean) < error(one) and error(mean) < 0.5 * error(noisy)
    assert (one != another).any() and (one != told).any()
    lines = [line.split() for line in printed.splitlines()[:5]]
    assert [line[:2] for line in lines] == [["sigma", "0.5"]] * 5 and lines[1][2] == "mean"
    assert abs(float(lines[1][-1]) - error(mean)) < 0.01


@pytest.mark.slow
def test_inpaint(tmp_path):
    page, _ = drawn(tmp_path, "inpaint")
    digit, left_known, *left, dots_known, first, second = tiles(page, 7, 10)
    known = np.arange(28) < np.full((28, 1), 14)
    for attempt in left:
        np.testing.assert_array_equal(attempt[:, known], digit[:, known])
        assert np.abs(attempt[:, ~known] - digit[:, ~known]).max() > 0.3
    np.testing.assert_allclose(left_known[:, ~known], -0.5, atol=0.01)
    assert (left[0] != left[1]).any() and (first != second).any()
    np.testing.assert_array_equal(first[:, ::2, ::2], digit[:, ::2, ::2])
    assert (dots_known[:, 1::2] == dots_known[0, 1, 0]).all()


def test_interpolate(tmp_path):
    page, _ = drawn(tmp_path, "interpolate")
    pixels, noise, *_ = tiles(page, 4, 3)
    np.testing.assert_allclose(pixels[1], (pixels[0] + pixels[2]) / 2, atol=0.01)
    images, labels = load_digits()
    away = np.abs(images[..., 0] - pixels[0]).max((1, 2))
    assert away.min() < 0.01 and labels[away.argmin()] == 0
    assert (noise[1] != pixels[1]).any()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sample_digits", ["--digits=2x"], "--digits must be digits such as 2026, got '2x'"),
        ("sample_digits", ["--digits="], "--digits must be digits such as 2026, got ''"),
        ("sample_digits", ["--rows=0"], "--rows must be 1 or greater, got 0"),
        ("sample_digits", ["--steps=1001"], "steps: expected an integer from 1 to 1000"),
        ("sample_digits", ["--steps=0"], "steps: expected an integer from 1 to 1000"),
        ("sample_digits", ["--guidance=nan"], "--guidance must be a number, got nan"),
        ("samplers", ["--guidance=-inf"], "--guidance must be a number, got -inf"),
        ("sample_digits", ["--method=euler"], "invalid choice: 'euler'"),
        ("sample_digits", ["--device=gpu"], "device: 'gpu' is unknown"),
        ("samplers", ["--steps", "0"], "steps: expected an integer from 1 to 1000"),
        ("samplers", ["--methods", "euler"], "invalid choice: 'euler'"),
        ("denoise", ["--sigma", "1", "-1"], "--sigma must be a number greater than 0, got -1.0"),
        ("denoise", ["--sigma", "nan"], "--sigma must be a number greater than 0, got nan"),
        ("denoise", ["--sigma", "1", "1000"], "sigma: 1000.0 is more noise than this schedule knows"),
        ("denoise", ["--samples=0"], "--samples must be 1 or greater, got 0"),
        ("denoise", ["--steps=-1"], "--steps must be 1 or greater, got -1"),
        ("inpaint", ["--known", "right"], "invalid choice: 'right'"),
        ("inpaint", ["--tries=0"], "--tries must be 1 or greater, got 0"),
        ("inpaint", ["--resamplings=0"], "resamplings: expected an integer >= 1, got 0"),
        ("interpolate", ["--pairs", "3"], "--pairs must be of two digits each, such as 38, got '3'"),
        ("interpolate", ["--count=1"], "count: expected an integer >= 2, got 1"),
        *((name, ["--seed=-1"], "--seed must be 0 or greater, got -1") for name in TINY),
        *((name, ["--workers=0"], "--workers must be 1 or greater, got 0") for name in TINY),
        *((name, ["--out=nowhere/p.png"], "--out: there is no folder nowhere") for name in TINY),
        *((name, ["--out=picture"], "--out: expected a picture such as") for name in TINY),
    ],
)
def test_bad_input_is_refused_in_a_line(refusal, name, arguments, message, tmp_path):
    out = [] if any("--out" in a for a in arguments) else [f"--out={tmp_path / 'p.png'}"]
    assert message in refusal(EXAMPLES / f"{name}.py", *TINY[name], *out, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(TINY))
def test_each_is_short_and_says_what_it_does(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 100
    result = run(name, "--help")
    assert result.returncode == 0 and f"python examples/{name}.py" in result.stdout
