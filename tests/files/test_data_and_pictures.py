"""The bundled digits, and the pictures: what they show, pixel by pixel."""

import argparse
import errno
import gzip
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from tinyddpm import Diffusion, load_digits, make_schedule
from tinyddpm.cli import picture_path
from tinyddpm.files.data import DIGITS, load_mnist
from tinyddpm.files.pictures import (
    format_of,
    grid,
    noising_strip,
    rows,
    save_gif,
    save_loss_curve,
    save_picture,
    to_uint8,
)

MNIST = pathlib.Path(__file__).parents[3] / "shared" / "data" / "mnist"


class TestDigits:
    images, labels = load_digits()

    def test_shapes_range_and_classes(self):
        assert self.images.shape == (10000, 28, 28, 1) and self.images.dtype == np.float32
        assert self.images.min() == -1 and self.images.max() == 1
        assert np.bincount(self.labels).tolist() == [1000] * 10

    def test_they_are_cut_out_of_the_picture_where_they_stand(self):
        picture = Image.open(DIGITS)
        for i in (0, 1, 99, 100, 4321, 9999):
            row, column = divmod(i, 100)
            tile = picture.crop((28 * column, 28 * row, 28 * column + 28, 28 * row + 28))
            np.testing.assert_array_equal(to_uint8(self.images[i : i + 1])[0, :, :, 0], np.asarray(tile))

    def test_images_match_their_labels(self):
        """Leave one in ten out: the nearest class mean gets most of them right, which no shuffled labels would."""
        train = np.arange(10000) % 10 > 0
        means = np.stack([self.images[train & (self.labels == k)].mean(0).ravel() for k in range(10)])
        rest = self.images[~train].reshape(1000, -1)
        distance = (rest**2).sum(1)[:, None] - 2 * rest @ means.T + (means**2).sum(1)
        assert (distance.argmin(1) == self.labels[~train]).mean() > 0.75

    @pytest.mark.skipif(not MNIST.exists(), reason="the full MNIST is not at hand")
    def test_they_are_the_first_thousand_of_each_class_of_mnist(self):
        with gzip.open(MNIST / "train-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28, 1)
        with gzip.open(MNIST / "train-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        for k in range(10):
            np.testing.assert_array_equal(to_uint8(self.images[self.labels == k]), images[labels == k][:1000])

    @pytest.mark.skipif(not MNIST.exists(), reason="the full MNIST is not at hand")
    def test_the_held_out_ones_are_two_hundred_of_each_class_of_its_test_digits_evenly_spread(self):
        images, labels = load_mnist(full=True, train=False, cache=MNIST.parent)
        held_out, its_labels = load_digits(train=False)
        assert np.bincount(its_labels).tolist() == [200] * 10 and (np.diff(its_labels) >= 0).all()
        for k in range(10):
            place = np.linspace(0, np.count_nonzero(labels == k) - 1, 200).astype(int)
            np.testing.assert_array_equal(held_out[its_labels == k], images[labels == k][place])

    def test_none_of_the_held_out_is_among_those_for_training(self):
        held_out, labels = load_digits(train=False)
        assert held_out.shape == (2000, 28, 28, 1) and held_out.dtype == np.float32
        assert not {x.tobytes() for x in held_out} & {x.tobytes() for x in self.images}

    def test_their_licence_stands_beside_them(self):
        text = (DIGITS.parent / "LICENSE.txt").read_text()
        assert "LeCun" in text and "Attribution-ShareAlike 3.0" in text


def test_to_uint8_clips_and_rounds():
    assert to_uint8(np.array([-2, -1, -0.999, 0, 0.5, 1, 3])).tolist() == [0, 0, 0, 128, 191, 255, 255]


@given(arrays(np.uint8, (3, 4)))
def test_to_uint8_undoes_the_scaling_of_the_digits(pixels):
    np.testing.assert_array_equal(to_uint8(pixels.astype(np.float32) / np.float32(127.5) - 1), pixels)


@given(
    n=st.integers(1, 7),
    columns=st.integers(1, 5),
    channels=st.sampled_from([1, 3]),
    scale=st.integers(1, 3),
    gap=st.integers(0, 2),
)
def test_every_image_stands_in_its_place_in_the_grid(n, columns, channels, scale, gap):
    images = np.random.default_rng(0).uniform(-1, 1, (n, 4, 5, channels))
    page = np.asarray(grid(images, columns, scale, gap))
    page = page.reshape(*page.shape[:2], channels)
    rows = -(-n // columns)
    assert page.shape[:2] == (scale * (rows * (4 + gap) + gap), scale * (columns * (5 + gap) + gap))
    for i in range(n):
        top, left = gap + (i // columns) * (4 + gap), gap + (i % columns) * (5 + gap)
        tile = page[scale * top : scale * (top + 4) : scale, scale * left : scale * (left + 5) : scale]
        np.testing.assert_array_equal(tile, to_uint8(images[i]))


def test_a_grid_is_about_a_square():
    assert grid(np.zeros((64, 8, 8, 1)), scale=1, gap=0).size == (64, 64)
    assert grid(np.zeros((10, 8, 8, 1)), scale=1, gap=0).size == (32, 24)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_of_images_stands_beside_its_name(channels):
    images = np.random.default_rng(0).uniform(-1, 1, (5, 6, 7, channels))
    page = np.asarray(rows({"some": images[:2], "all of them": images}, scale=3, gap=1))
    strip = np.asarray(grid(images, 5, scale=3, gap=1))
    height, width = strip.shape[:2]
    assert page.shape[0] == 2 * height and page.shape[2:] == strip.shape[2:]
    np.testing.assert_array_equal(page[height:, -width:], strip)
    margin = page.shape[1] - width
    some = np.asarray(grid(images[:2], 2, scale=3, gap=1))
    np.testing.assert_array_equal(page[:height, margin : margin + some.shape[1]], some)
    assert (page[:height, margin + some.shape[1] :] == 32).all()
    assert all(
        (names > 128).any() and names[0, 0].max() == 32 for names in (page[:height, :margin], page[height:, :margin])
    )
    assert (page[:, margin - 5 : margin] == 32).all()  # no name is cut off
    headed = np.asarray(rows({"some": images[:2], "all of them": images}, scale=3, gap=1, columns=["t = 1", "t = 2"]))
    np.testing.assert_array_equal(headed[-2 * height :], page)
    over = headed[: -2 * height]
    of_column = [over[:, margin + i * 24 : margin + (i + 1) * 24] for i in range(5)]
    assert [(names > 128).any() for names in of_column] == [True, True, False, False, False]
    for bad, got in (({}, "none"), ({"a": images, "b": images[..., :1].repeat(4 - channels, axis=3)}, "a, b")):
        with pytest.raises(ValueError, match=f"named: expected rows that are all grey or all RGB, got {got}"):
            rows(bad)


@pytest.mark.parametrize("b", [1, 0.5])
def test_noising_strip_goes_from_the_image_to_noise(b):
    d = Diffusion(make_schedule("linear", 100, beta_end=0.2, input_scale=b))
    x0 = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
    strip = np.asarray(noising_strip(d, x0, np.random.default_rng(1), columns=5))
    assert strip.shape == (2 * (2 * 10 + 2), 2 * (5 * 10 + 2))
    eps = np.random.default_rng(1).standard_normal(x0.shape).astype(np.float32)
    for column, t in enumerate([None, 25, 50, 74, 99]):
        x = x0 if t is None else d.q_sample(x0, np.array([t, t]), eps) / b  # as bright as x0
        for row in range(2):
            top, left = 2 * (2 + 10 * row), 2 * (2 + 10 * column)
            np.testing.assert_array_equal(strip[top : top + 16 : 2, left : left + 16 : 2], to_uint8(x[row])[:, :, 0])


FRAME = Image.new("L", (4, 4))


@pytest.mark.parametrize(
    "save",
    [
        lambda path: save_picture(path.with_suffix(".png"), FRAME),
        lambda path: save_gif(path.with_suffix(".gif"), [FRAME, FRAME]),
        lambda path: save_loss_curve(path.with_suffix(".png"), [1, 2]),
    ],
    ids=["picture", "gif", "loss_curve"],
)
def test_a_picture_is_there_whole_or_not_at_all(save, request, tmp_path, monkeypatch):
    """On a disk that is full before it is complete, what was there stays."""
    if "loss_curve" in request.node.name:
        pytest.importorskip("matplotlib")
    save(tmp_path / "a")
    (before,) = tmp_path.iterdir()
    whole, own = before.read_bytes(), Image.Image.save

    def full(picture, path, *how, **settings):
        own(picture, path, *how, **settings)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=f"path: cannot write {before}: No space left on device"):
        save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == [before] and before.read_bytes() == whole


def test_a_picture_has_the_suffix_of_one(tmp_path):
    with pytest.raises(ValueError, match="path: expected the name of a picture, such as digits.png, got"):
        save_picture(tmp_path / "digits.txt", FRAME)


@pytest.mark.parametrize("suffix", sorted(Image.registered_extensions()))
def test_a_suffix_of_which_nothing_can_be_written_is_refused_before_any_work(tmp_path, suffix):
    """Many are of formats that Pillow only reads, or writes with another program, or not grey or not in colour."""
    path = tmp_path / f"p{suffix}"
    for mode in ("L", "RGB"):
        if format_of(path):
            save_picture(path, Image.new(mode, (300, 290)))
            assert path.stat().st_size and picture_path(str(path)) == path
            continue
        with pytest.raises(ValueError, match="path: expected the name of a picture, such as digits.png, got"):
            save_picture(path, Image.new(mode, (300, 290)))
        with pytest.raises(argparse.ArgumentTypeError, match="^expected a picture such as digits.png, got"):
            picture_path(str(path))
    assert format_of(path) or suffix not in (".png", ".jpg", ".jpeg", ".gif", ".tif", ".bmp", ".webp")


def test_a_gif_plays_its_frames_and_holds_the_last(tmp_path):
    frames = [grid(np.full((1, 4, 4, 1), v)) for v in (-1.0, 0.0, 1.0)]
    save_gif(tmp_path / "a.gif", frames, seconds=0.6, hold=1.5)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        durations = []
        for i, value in enumerate((0, 128, 255)):
            gif.seek(i)
            durations.append(gif.info["duration"])
            assert abs(np.asarray(gif.convert("L"))[6, 6] - value) <= 1
    assert durations == [200, 200, 1500]


def test_frames_keep_their_look_in_few_colours(tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3))
    for name, page in (("grey", grid(images[..., :1])), ("colour", grid(images))):
        save_gif(tmp_path / f"{name}.gif", [page, page])
        with Image.open(tmp_path / f"{name}.gif") as gif:
            difference = np.asarray(gif.convert(page.mode)).astype(int) - np.asarray(page)
        assert np.abs(difference).mean() < 12


def test_frames_are_shown_long_enough_to_be_shown_at_all(tmp_path):
    save_gif(tmp_path / "a.gif", [grid(np.full((1, 4, 4, 1), v)) for v in np.linspace(-1, 1, 100)], seconds=0.1)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["duration"] == 20  # browsers slow down what is faster


def test_the_loss_curve_shows_every_step_and_the_running_mean(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    seen = []
    drawn = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *how, **more: (seen.append(self), drawn(self, *how, **more))
    )
    losses = np.random.default_rng(0).uniform(0.1, 1, 150)
    save_loss_curve(tmp_path / "loss.png", losses)
    raw, mean = seen[0].axes[0].lines
    np.testing.assert_array_equal(raw.get_xydata(), np.stack([np.arange(1, 151), losses], 1))
    means = [losses[i - 3 : i].mean() for i in range(3, 151)]  # 2 % of 150 steps
    np.testing.assert_allclose(mean.get_xydata(), np.stack([np.arange(3, 151), means], 1))


@pytest.mark.parametrize("n", [1, 2, 500])
def test_the_loss_curve_is_drawn(tmp_path, n):
    pytest.importorskip("matplotlib")
    save_loss_curve(tmp_path / "loss.png", 1 / np.arange(1, n + 1))
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (840, 480) and np.asarray(picture.convert("L")).std() > 5


class TestBadInput:
    @pytest.mark.parametrize("shape", [(4, 4, 1), (0, 4, 4, 1), (1, 4, 4, 2)])
    def test_grid(self, shape):
        with pytest.raises(
            ValueError, match=r"images: expected \(N, H, W, 1\) or \(N, H, W, 3\) with N >= 1, got shape"
        ):
            grid(np.zeros(shape))

    def test_columns(self):
        with pytest.raises(ValueError, match="columns: expected an integer >= 1, got 0"):
            grid(np.zeros((1, 4, 4, 1)), columns=0)

    def test_gif(self, tmp_path):
        with pytest.raises(ValueError, match="frames: expected at least one image, all of them grey or RGB, got"):
            save_gif(tmp_path / "a.gif", [])
