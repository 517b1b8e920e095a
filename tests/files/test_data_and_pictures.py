"""The bundled digits, and the pictures: what they show, pixel by pixel."""

import argparse
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from tinyddpm import Diffusion, load_digits, load_mnist, make_schedule
from tinyddpm.cli import picture_path
from tinyddpm.files import pictures
from tinyddpm.files.data import DIGITS, MIRRORS
from tinyddpm.files.pictures import format_of, grid, rows, save_gif, save_loss_curve, save_picture, to_uint8

MNIST = pathlib.Path(__file__).parents[3] / "shared" / "data" / "mnist"


def drawn(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


class TestDigits:
    def test_they_are_cut_out_of_the_picture_where_they_stand(self, digits):
        with Image.open(DIGITS) as picture:
            for i in (0, 1, 99, 100, 4321, 9999):
                row, column = divmod(i, 100)
                tile = picture.crop((28 * column, 28 * row, 28 * column + 28, 28 * row + 28))
                np.testing.assert_array_equal(to_uint8(digits[0][i : i + 1])[0, :, :, 0], np.asarray(tile))
        assert digits[0].min() == -1 and digits[0].max() == 1

    def test_none_of_those_held_out_is_among_those_for_training(self, digits):
        held_out = load_digits(train=False)
        for (images, labels), count in ((digits, 10000), (held_out, 2000)):
            assert images.shape == (count, 28, 28, 1) and images.dtype == np.float32
            np.testing.assert_array_equal(labels, np.repeat(np.arange(10), count // 10))
        assert not {x.tobytes() for x in held_out[0]} & {x.tobytes() for x in digits[0]}

    @pytest.mark.skipif(not MNIST.exists(), reason="the full MNIST is not at hand")
    @pytest.mark.parametrize("train, n, first", [(True, 60_000, [5, 0, 4, 1, 9]), (False, 10_000, [7, 2, 1, 0, 4])])
    def test_they_are_of_mnist(self, train, n, first, monkeypatch):
        """The first thousand of each class for training; 200 of those for testing, evenly spread. That the files of
        MNIST are what they should be is compared, by their hashes, whenever they are read."""
        monkeypatch.setitem(MIRRORS, "mnist", ())  # it is in the cache
        whole, classes = load_mnist(full=True, train=train, cache=MNIST.parent)
        assert whole.shape == (n, 28, 28, 1) and classes.shape == (n,) and classes[:5].tolist() == first
        images, labels = load_digits(train)
        for k in range(10):
            of_class = whole[classes == k]
            chosen = slice(1000) if train else np.linspace(0, len(of_class) - 1, 200).astype(int)
            np.testing.assert_array_equal(images[labels == k], of_class[chosen])

    def test_their_licence_stands_beside_them(self):
        text = (DIGITS.parent / "LICENSE.txt").read_text()
        assert "LeCun" in text and "Attribution-ShareAlike 3.0" in text


@given(arrays(np.uint8, (3, 4)))
def test_to_uint8_undoes_the_scaling_of_the_digits_and_clips_and_rounds(pixels):
    np.testing.assert_array_equal(to_uint8(pixels.astype(np.float32) / np.float32(127.5) - 1), pixels)
    assert to_uint8(np.array([-2, -1, -0.999, 0, 0.5, 1, 3])).tolist() == [0, 0, 0, 128, 191, 255, 255]


@given(st.integers(1, 7), st.integers(1, 5), st.sampled_from([1, 3]), st.integers(1, 3), st.integers(0, 2))
def test_every_image_stands_in_its_place_in_the_grid(n, columns, channels, scale, gap):
    images = drawn(n, 4, 5, channels)
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


def test_a_grid_has_a_column_for_each_class_unless_these_are_few_or_many():
    """Few would make it a tower, many a strip."""
    images = np.zeros((64, 8, 8, 1))
    for classes, columns in ((None, 8), (1, 8), (2, 8), (4, 8), (5, 5), (10, 10), (64, 64), (65, 8)):
        assert pictures.page(images, classes).size[0] == 2 * (10 * columns + 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_of_images_stands_beside_its_name(channels):
    images = drawn(5, 6, 7, channels)
    named = {"some": images[:2], "all of them": images}
    page = np.asarray(rows(named, scale=3, gap=1))
    some, strip = (np.asarray(grid(row, len(row), scale=3, gap=1)) for row in named.values())
    height, width = strip.shape[:2]
    margin = page.shape[1] - width
    assert page.shape[0] == 2 * height and page.shape[2:] == strip.shape[2:]
    np.testing.assert_array_equal(page[height:, margin:], strip)
    np.testing.assert_array_equal(page[:height, margin : margin + some.shape[1]], some)
    assert (page[:height, margin + some.shape[1] :] == 32).all()
    for names in (page[:height, :margin], page[height:, :margin]):
        assert (names > 128).any() and names[0, 0].max() == 32
    assert (page[:, margin - 5 : margin] == 32).all()  # no name is cut off
    headed = np.asarray(rows(named, scale=3, gap=1, columns=["t = 1", "t = 2"]))
    np.testing.assert_array_equal(headed[-2 * height :], page)
    over = headed[: -2 * height, margin:]
    assert [(over[:, i * 24 : (i + 1) * 24] > 128).any() for i in range(5)] == [True, True, False, False, False]


def test_what_is_not_said_is_as_the_documentation_has_it(tmp_path):
    named = {"a": drawn(3, 6, 7, 1), "of another size": drawn(2, 5, 8, 1)}
    assert rows(named) == rows(named, scale=2, gap=2)
    strip = lambda **how: pictures.noising_strip(Diffusion(make_schedule()), drawn(2, 8, 8, 1), 0, **how)
    assert strip() == strip(columns=10)
    save_gif(tmp_path / "a.gif", [grid(drawn(1, 8, 8, 1)), grid(-drawn(1, 8, 8, 1))])
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["duration"] == 2000  # of 4 seconds
        gif.seek(1)
        assert gif.info["duration"] == 2000


@pytest.mark.parametrize("b", [1, 0.5])
def test_noising_strip_goes_from_the_image_to_noise(b):
    d = Diffusion(make_schedule("linear", 100, beta_end=0.2, input_scale=b))
    x0 = drawn(2, 8, 8, 1).astype(np.float32)
    strip = np.asarray(pictures.noising_strip(d, x0, np.random.default_rng(1), columns=5))
    assert strip.shape == (2 * (2 * 10 + 2), 2 * (5 * 10 + 2))
    eps = np.random.default_rng(1).standard_normal(x0.shape).astype(np.float32)
    for column, t in enumerate([None, 25, 50, 74, 99]):
        x = x0 if t is None else d.q_sample(x0, np.array([t, t]), eps) / b  # as bright as x0
        for row in range(2):
            top, left = 2 * (2 + 10 * row), 2 * (2 + 10 * column)
            np.testing.assert_array_equal(strip[top : top + 16 : 2, left : left + 16 : 2], to_uint8(x[row])[:, :, 0])


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
    assert format_of(path) or suffix not in ".bmp .eps .gif .jpeg .jpg .pcx .pdf .png .ppm .sgi .tga .tif .webp".split()


def test_a_gif_plays_its_frames_and_holds_the_last(tmp_path):
    frames = [grid(np.full((1, 4, 4, 1), v)) for v in (-1.0, 0.0, 1.0)]
    save_gif(tmp_path / "a.gif", frames, seconds=0.6, hold=1.5)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        for i, (value, duration) in enumerate([(0, 200), (128, 200), (255, 1500)]):
            gif.seek(i)
            assert gif.info["duration"] == duration and abs(np.asarray(gif.convert("L"))[6, 6] - value) <= 1
    save_gif(tmp_path / "a.gif", [grid(np.full((1, 4, 4, 1), v)) for v in np.linspace(-1, 1, 100)], seconds=0.1)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["duration"] == 20  # browsers slow down what is faster


def test_frames_keep_their_look_in_few_colours(tmp_path):
    images = drawn(4, 8, 8, 3)
    for name, page in (("grey", grid(images[..., :1])), ("colour", grid(images))):
        save_gif(tmp_path / f"{name}.gif", [page, page])
        with Image.open(tmp_path / f"{name}.gif") as gif:
            difference = np.asarray(gif.convert(page.mode)).astype(int) - np.asarray(page)
        assert np.abs(difference).mean() < 12


@pytest.mark.parametrize("n", [1, 150])
def test_the_loss_curve_shows_every_step_and_the_running_mean(tmp_path, monkeypatch, n):
    figure = pytest.importorskip("matplotlib.figure")
    seen, draw = [], figure.Figure.savefig
    save = lambda self, *how, **more: (seen.append(self), draw(self, *how, **more))
    monkeypatch.setattr(figure.Figure, "savefig", save)
    losses = np.random.default_rng(0).uniform(0.1, 1, n)
    save_loss_curve(tmp_path / "loss", losses)  # PNG, unless its name says something else
    raw, mean = seen[0].axes[0].lines
    np.testing.assert_array_equal(raw.get_xydata(), np.stack([np.arange(1, n + 1), losses], 1))
    window = {150: 3}.get(n, 1)  # 2 % of 150 steps
    means = [losses[i - window : i].mean() for i in range(window, n + 1)]
    np.testing.assert_allclose(mean.get_xydata(), np.stack([np.arange(window, n + 1), means], 1))
    with Image.open(tmp_path / "loss") as picture:
        assert picture.format == "PNG" and picture.size == (840, 480) and np.asarray(picture.convert("L")).std() > 5
    for shape in ((), 0, (2, 2)):
        with pytest.raises(ValueError, match="^losses, steps: expected two vectors of one length, got shapes"):
            save_loss_curve(tmp_path / "loss", np.ones(shape))


SHAPE = r"images: expected \(N, H, W, 1\) or \(N, H, W, 3\) with N >= 1, got shape"


@pytest.mark.parametrize(("use", "message"), [
    *((lambda shape=shape: grid(np.zeros(shape)), SHAPE) for shape in ((4, 4, 1), (0, 4, 4, 1), (1, 4, 4, 2))),
    (lambda: rows({}), "named: expected rows that are all grey or all RGB, got none"),
    (lambda: rows({"a": drawn(1, 4, 4, 1), "b": drawn(1, 4, 4, 3)}), "named: expected .* or all RGB, got a, b"),
])  # fmt: skip
def test_what_is_no_picture(use, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        use()
