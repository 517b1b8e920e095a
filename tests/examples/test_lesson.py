"""examples/lesson.py: what it tells is so, and it leaves its pictures."""

import re

import numpy as np
import pytest
from ideal import expected_x0
from PIL import Image

from tinyddpm import make_schedule


def test_its_ideal_guess_is_that_of_the_tests(script, digits):
    data, schedule = digits()[0][3000:3050], make_schedule("linear", 1000)
    t = np.array([5, 100, 400, 999])
    eps = np.random.default_rng(0).standard_normal((4, 28, 28, 1))
    bar = schedule.alpha_bar[t][:, None, None, None]
    x_t = (np.sqrt(bar) * data[:4] + np.sqrt(1 - bar) * eps).astype(np.float32)
    guess = script.loaded("lesson").ideal(data, schedule)
    np.testing.assert_allclose(guess(x_t, t), expected_x0(data, schedule, x_t, t), atol=2e-4)


@pytest.mark.slow
def test_the_whole_of_it(tmp_path, example):
    text = example("lesson", "--steps=120", f"--out={tmp_path}").out
    assert [int(n) for n in re.findall(r"^(\d)\. ", text, re.MULTILINE)] == [1, 2, 3, 4, 5, 6]
    names = {"1_noise.png", "3_best_guess.png", "6_way_back.png", "6_digits.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        with Image.open(tmp_path / name) as picture:
            assert picture.mode == "L" and picture.width > 500

    def table(first, last):
        part = text.partition(first)[2].partition(last)[0]
        rows = [line for line in part.splitlines() if re.match(r"[-\d]", line.strip())]
        return np.array([re.findall(r"-?\d+\.?\d*", row) for row in rows], float)

    noised = table("in one jump\n", "At the end")  # t; mean and variance by the formula, by steps, by a jump
    assert noised.shape == (8, 7)
    for of_mean, of_variance in ((3, 4), (5, 6)):  # of 200 copies: four standard deviations
        variance = noised[:, 2]
        assert (np.abs(noised[:, of_mean] - noised[:, 1]) < 0.011 + 4 * np.sqrt(variance / 200)).all()
        assert (np.abs(noised[:, of_variance] - variance) < 0.011 + 4 * variance * np.sqrt(2 / 200)).all()
    back = table("those that came by\n", "It is, but")
    assert back.shape == (3, 5)
    np.testing.assert_allclose(back[:, 3:], back[:, 1:3], atol=2e-3)
    t, ideal_known, of_known, ideal_other, of_others = table("others: ideal  network\n", "Of what it knows")[:, :5].T
    assert (ideal_known <= of_known + 0.002).all() and (of_others < ideal_other)[t < 400].all()
    far, near, apart = map(float, re.findall(r"(\d\.\d\d) away", text))
    assert near < 0.1 < apart / 2 < far < 2 * apart
