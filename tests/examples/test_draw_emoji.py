"""examples/measure/draw_emoji.py: without a font it says so; what it cuts out is in the middle; with one, pictures."""

import types

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from tinyddpm import ImageFolder


@pytest.fixture
def emoji(script):
    return script.loaded("draw_emoji")


def test_without_a_font_it_says_what_to_do(emoji, monkeypatch):
    monkeypatch.setitem(emoji.find_font.__globals__, "FONTS", ("/nowhere/**/*.ttf", "~/nowhere.ttc"))
    with pytest.raises(OSError, match="no font with emoji here; install one, such as Noto Color Emoji, or say"):
        emoji.find_font()


def test_letters_and_empty_boxes_are_not_in_colour(emoji):
    font = ImageFont.load_default(40)
    assert all(emoji.draw(character, font, 32) is None for character in "A \U0001f600")


def test_a_picture_is_cut_out_in_the_middle_of_a_white_square(emoji, monkeypatch):
    def ellipse(pen, at, character, font, embedded_color):
        assert embedded_color
        pen.ellipse((at[0] + 5, at[1] + 20, at[0] + 65, at[1] + 50), fill=(240, 160, 20))

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", ellipse)
    picture = emoji.draw("x", types.SimpleNamespace(size=109), 32)
    pixels = np.asarray(picture).astype(int)
    assert picture.size == (32, 32) and picture.mode == "RGB"
    np.testing.assert_allclose(pixels[16, 16], (240, 160, 20), atol=2)
    away = pixels.min(axis=2) < 200
    for axis in (0, 1):  # as far from one side as from the other
        found = np.flatnonzero(away.any(axis=axis))
        assert abs(found[0] - (31 - found[-1])) <= 1
    assert 28 <= np.ptp(np.flatnonzero(away.any(axis=0))) + 1 <= 32  # it fills the width
    assert (pixels[[0, -1]] > 250).all()


def test_it_draws_the_font_of_this_computer(emoji, tmp_path, example):
    try:
        emoji.find_font()
    except OSError as error:
        pytest.skip(str(error))
    example("draw_emoji", f"--out={tmp_path}")
    images = ImageFolder(tmp_path, 32)
    assert images.classes == tuple(sorted(emoji.KINDS)) and len(images) > 100
    assert np.bincount(images.labels).min() >= 5
    for heart, is_it in (("blue", lambda r, g, b: b > r + 50), ("black", lambda *color: max(color) < 120)):
        with Image.open(tmp_path / "hearts" / f"{heart} heart.png") as picture:
            assert is_it(*np.asarray(picture)[16, 16].astype(int))
