"""The examples that use the model which comes with the package: each draws what it says, here in a tiny setting."""

import numpy as np
import pytest
from PIL import Image

from tinyddpm import load_model, no_grad, sample
from tinyddpm.files.model import DIGITS_MODEL
from tinyddpm.files.pictures import grid

TINY = {
    "sample_digits": "--digits=26 --rows=2 --steps=2",
    "samplers": "--steps 2 3 --most=4",
    "denoise": "--sigma 0.5 --steps=2 --samples=2",
    "inpaint": "--known left dots --steps=3 --tries=2 --resamplings=2 --told",
    "interpolate": "--pairs 03 16 --count=3 --steps=2",
}
UNET, DIFFUSION = load_model()


@pytest.fixture
def drawn(example, tmp_path):
    """The picture that an example draws in its tiny setting, as an array of greys, and what it prints."""

    def draw(name, *arguments):
        settings = *TINY[name].split(), "--workers=1", f"--out={tmp_path / 'picture.png'}", *arguments
        printed = example(name, *settings).out
        assert f"look at {tmp_path / 'picture.png'}" in printed
        with Image.open(tmp_path / "picture.png") as picture:
            assert picture.mode == "L"
            return np.asarray(picture), printed

    return draw


def tiles(page, rows, columns):
    """The images of a page of named rows, (rows, columns, 28, 28), in [-1, 1]."""
    strip = page[:, -2 * (30 * columns + 2) :]
    assert len(page) == rows * 64
    small = strip[::2, ::2].reshape(rows, 32, -1)[:, 2:30, 2:].reshape(rows, 28, columns, 30)[..., :28]
    return small.swapaxes(1, 2) / 127.5 - 1


def test_the_model_is_small_and_knows_digits(digits):
    assert DIGITS_MODEL.stat().st_size < 2e6
    assert UNET.config["classes"] == 10 and UNET.config["label_dropout"] > 0 and UNET.dtype == np.float32
    assert UNET.config["image_size"] == (28, 28)
    (images, known), labels = digits(), np.arange(10)
    with no_grad():
        loss = DIFFUSION.loss(UNET, images[::500], np.random.default_rng(0)).item()
    assert loss < 0.035  # that of noise guessed as 0 is 1
    made = sample(DIFFUSION, UNET, (10, 28, 28, 1), "dpm++", 3, labels=labels, guidance=2.0, workers=1)
    nearest = [known[((images - digit) ** 2).sum((1, 2, 3)).argmin()] for digit in made]
    assert (np.array(nearest) == labels).mean() >= 0.9  # the digits look like those asked for


def test_sample_digits(drawn):
    page, _ = drawn("sample_digits", "--seed=3", "--guidance=1.5")
    labels = np.array([2, 6] * 2)
    expected = sample(DIFFUSION, UNET, (4, 28, 28, 1), "ddpm", 2, 3, labels=labels, guidance=1.5, workers=1)
    np.testing.assert_allclose(page.astype(int), np.asarray(grid(expected, columns=2, scale=4)).astype(int), atol=1)


@pytest.mark.slow
def test_samplers(drawn, digits):
    page, printed = drawn("samplers")
    lines, methods = printed.splitlines(), "ddpm 2, ddpm 3, ddpm 4, ddim 2, ddim 3, dpm++ 2, dpm++ 3"
    assert [line.split()[:2] for line in lines[1:8]] == [method.split() for method in methods.split(", ")]
    pictures = tiles(page, 8, 10)
    draw = lambda *how: sample(DIFFUSION, UNET, (10, 28, 28, 1), *how, labels=np.arange(10), workers=1)[..., 0]
    np.testing.assert_allclose(pictures[6], draw("dpm++", 3), atol=0.02)
    off = np.sqrt(np.mean((draw("dpm++", 3) - draw("dpm++", 6)) ** 2, axis=(1, 2))).mean()
    assert lines[7].split()[3] == f"{off:.3f}"
    images = digits()[0][..., 0]
    np.testing.assert_allclose(pictures[7], images[::1000], atol=0.01)
    apart = lambda i: np.sqrt(np.mean((images[i] - np.delete(images, i, axis=0)) ** 2, axis=(1, 2)))
    assert lines[8].split()[-1] == f"{np.mean([apart(i).min() for i in range(0, 10000, 1000)]):.3f}"


def test_denoise(drawn, digits):
    page, printed = drawn("denoise")
    digit, noisy, mean, one, another, told = tiles(page, 6, 2)
    chosen = np.random.default_rng(0).choice(10_000, 2, replace=False)
    np.testing.assert_allclose(digit, digits()[0][chosen, ..., 0], atol=0.01)
    error = lambda x: np.sqrt(np.mean((x - digit) ** 2))
    assert error(mean) < error(one) and error(mean) < 0.5 * error(noisy)
    assert (one != another).any() and (one != told).any()
    lines = [line.split() for line in printed.splitlines()[:5]]
    assert [line[:2] for line in lines] == [["sigma", "0.5"]] * 5 and lines[1][2] == "mean"
    assert abs(float(lines[1][-1]) - error(mean)) < 0.01


@pytest.mark.slow
def test_inpaint(drawn):
    digit, left_known, *left, dots_known, first, second = tiles(drawn("inpaint")[0], 7, 10)
    known = np.arange(28) < np.full((28, 1), 14)
    for attempt in left:
        np.testing.assert_array_equal(attempt[:, known], digit[:, known])
        assert np.abs(attempt[:, ~known] - digit[:, ~known]).max() > 0.3
    np.testing.assert_allclose(left_known[:, ~known], -0.5, atol=0.01)
    assert (left[0] != left[1]).any() and (first != second).any()
    np.testing.assert_array_equal(first[:, ::2, ::2], digit[:, ::2, ::2])
    assert (dots_known[:, 1::2] == dots_known[0, 1, 0]).all()


@pytest.mark.filterwarnings("ignore:steps, iterations")  # of two steps
def test_interpolate(drawn, digits):
    pixels, noise, *_ = tiles(drawn("interpolate")[0], 4, 3)
    np.testing.assert_allclose(pixels[1], (pixels[0] + pixels[2]) / 2, atol=0.01)
    images, labels = digits()
    away = np.abs(images[..., 0] - pixels[0]).max((1, 2))
    assert away.min() < 0.01 and labels[away.argmin()] == 0
    assert (noise[1] != pixels[1]).any()


@pytest.mark.parametrize("name", sorted(TINY))
def test_each_is_short_and_says_what_it_does(name, example, script):
    assert len(script(name).read_text().splitlines()) < 100
    assert f"python examples/{name}.py" in example(name, "--help").out
