"""Of which order the samplers are, against paths that are known; and what holds whatever `sample` is asked for.

If x_0 is drawn from a mixture of Gaussians, then E[x_0 | x_t] has a closed form, and so has for one Gaussian N(m, s^2)
the path along which `ddim` and `dpm++` go in ever smaller steps (Song et al. 2021, Score-based generative modeling
through SDEs, equation 13): with v_t = alpha_bar_t b^2 s^2 + 1 - alpha_bar_t, the variance of x_t,

    x_t = sqrt(alpha_bar_t) b m + (x_T - sqrt(alpha_bar_T) b m) sqrt(v_t / v_T)
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, schedules

from tinyddpm import Diffusion, make_schedule, sample
from tinyddpm.diffusion.checks import OBJECTIVES, SPACINGS, VARIANCES
from tinyddpm.diffusion.sample import SAMPLERS, timesteps

STEPS = [8, 16, 32, 64, 128]
ONE, TWO = ([1.0], [0.3], [0.1]), ([0.4, 0.6], [-0.7, 0.5], [0.15, 0.2])  # weights, means, standard deviations


class Ideal:
    """E[x_0 | x_t] of a mixture of Gaussians, in every pixel for itself."""

    dtype = np.dtype("float64")

    def __init__(self, mixture, schedule):
        self.w, self.m, self.s = map(np.array, mixture)
        self.b, self.alpha_bar = schedule.input_scale, schedule.alpha_bar

    def x0(self, x_t, bar):
        x_t = x_t[..., None]
        v = bar * self.b**2 * self.s**2 + 1 - bar
        away = x_t - np.sqrt(bar) * self.b * self.m
        p = self.w / np.sqrt(v) * np.exp(-(away**2) / (2 * v))
        return (p * (self.m + np.sqrt(bar) * self.b * self.s**2 / v * away)).sum(-1) / p.sum(-1)

    def __call__(self, x, t):
        bar = self.alpha_bar[t].reshape(-1, 1, 1, 1)
        x_t = x * np.sqrt((self.b**2 - 1) * bar + 1)  # what a network sees is divided by this
        return self.x0(x_t, bar[..., None])


def path_of_one(mixture, b, bar, x):
    """The closed form: from x at alpha_bar bar[0] to bar[1]."""
    (m,), (s,) = mixture[1:]
    before, after = (g * b**2 * s**2 + 1 - g for g in bar)
    return np.sqrt(bar[1]) * b * m + (x - np.sqrt(bar[0]) * b * m) * np.sqrt(after / before)


def path_of_any(ideal, bar, x, n=1000):
    """The same path in n steps of the Runge-Kutta method: z = x_t / sqrt(alpha_bar_t) obeys dz/dl = b E[x_0 | x_t] - z
    along l = ln sqrt(alpha_bar_t / (1 - alpha_bar_t))."""

    def slope(z, l):
        g = 1 / (1 + np.exp(-2 * l))
        return ideal.b * ideal.x0(np.sqrt(g) * z, g) - z

    first, last = 0.5 * (np.log(bar) - np.log1p(-bar))
    z, h = x / np.sqrt(bar[0]), (last - first) / n
    for l in first + h * np.arange(n):
        k1 = slope(z, l)
        k2 = slope(z + h / 2 * k1, l + h / 2)
        k3 = slope(z + h / 2 * k2, l + h / 2)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(z + h * k3, l + h))
    return np.sqrt(bar[1]) * z


class TestOrder:
    starts = np.linspace(-2, 2, 41).reshape(1, -1, 1, 1)
    ends = {"logsnr_min": -5, "logsnr_max": 3}

    @pytest.mark.parametrize("b", [1.0, 0.5])
    @pytest.mark.parametrize("mixture", [ONE, TWO], ids=["one", "two"])
    @pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpm++", 2)])
    def test_the_error_falls_with_this_power_of_the_number_of_steps(self, method, order, mixture, b):
        """In steps of equal length in ln SNR, as far as the lowest timestep: the last jump, to x_0, is of its own
        length."""
        fine = 40 * STEPS[-1]
        s = make_schedule("sigmoid_logsnr", fine + 1, input_scale=b, **self.ends)
        d, ideal, bar = Diffusion(s, "x0", clip=False), Ideal(mixture, s), s.alpha_bar[[-1, 0]]
        known = path_of_one(mixture, b, bar, self.starts) if mixture is ONE else path_of_any(ideal, bar, self.starts)
        errors = []
        for n in STEPS:
            ts = np.arange(n + 1) * (fine // n)
            path = sample(d, ideal, self.starts.shape, method, ts, start=self.starts, trajectory=True, workers=1)
            errors.append(np.abs(b * path[-2] - known).mean())
        orders = np.log2(np.array(errors[:-1]) / errors[1:])  # from 8 steps to 16, from 16 to 32 ...
        assert np.all(np.abs(orders / order - 1) < 0.1) and abs(orders[-1] / order - 1) < 0.03

    @pytest.mark.parametrize("b", [1.0, 0.5])
    def test_the_two_ways_to_the_path_agree(self, b):
        s = make_schedule("sigmoid_logsnr", 100, input_scale=b, **self.ends)
        bar = s.alpha_bar[[-1, 0]]
        closed = path_of_one(ONE, b, bar, self.starts)
        np.testing.assert_allclose(path_of_any(Ideal(ONE, s), bar, self.starts), closed, rtol=0, atol=1e-10)


def model(x, t):
    """Some prediction and, for a learned variance, a spread."""
    return np.sin(3 * x + t.reshape(-1, 1, 1, 1))


def model_with_spread(x, t):
    return np.concatenate([model(x, t), np.cos(5 * x)], axis=-1)


model.dtype = model_with_spread.dtype = np.dtype("float64")


@st.composite
def requests(draw):
    """What `sample` may be asked for, and the timesteps that this should visit, in that order."""
    objective, variance = draw(st.sampled_from(OBJECTIVES)), draw(st.sampled_from(VARIANCES))
    loss = "hybrid" if variance == "learned_range" else "simple"
    d = Diffusion(draw(schedules(zero_terminal_snr=objective != "eps")), objective, variance, loss)
    shape = (draw(st.integers(1, 9)), 2, 2, 1)
    asked = {"rng": draw(SEEDS), "clip": draw(st.sampled_from([True, False, 0.5, "dynamic"]))}
    asked["method"] = draw(st.sampled_from(sorted(SAMPLERS)))
    if asked["method"] == "ddim":
        asked["eta"] = draw(st.floats(0, 1))
    if draw(st.booleans()):
        asked["start"] = np.random.default_rng(draw(SEEDS)).standard_normal(shape)
    if draw(st.booleans()):
        steps = draw(st.lists(st.integers(0, d.T - 1), min_size=1, max_size=8, unique=True).map(sorted))
        visited = steps[::-1]
        asked["steps"] = draw(st.sampled_from([steps, visited]))
    else:
        spacing = draw(st.sampled_from(SPACINGS))
        asked |= {"spacing": spacing, "steps": draw(st.integers(1, min(d.T, 12)))}
        visited = timesteps(d.T, asked["steps"], spacing)[::-1].tolist()
    return d, model_with_spread if variance == "learned_range" else model, shape, asked, visited


@pytest.mark.filterwarnings("ignore:steps")  # of which the first may be far from noise
class TestWhateverIsAsked:
    @settings(max_examples=100)
    @given(requests())
    def test_the_trajectory_runs_from_the_start_to_the_images_by_way_of_the_timesteps(self, request):
        d, predict, shape, asked, visited = request
        seen = []

        def look(x, t):
            assert len(set(t)) == 1 and x.dtype == np.float64
            seen.append(t[0])
            return predict(x, t)

        look.dtype = np.dtype("float64")
        path = sample(d, look, shape, **asked, trajectory=True, workers=1)
        assert list(dict.fromkeys(seen)) == visited
        assert path.shape == (len(visited) + 1, *shape) and np.isfinite(path).all()
        streams = np.random.default_rng(asked["rng"]).spawn(shape[0])
        noise = np.stack([stream.standard_normal(shape[1:]) for stream in streams])
        np.testing.assert_array_equal(path[0], asked.get("start", noise) / d.schedule.input_scale)
        if asked["clip"] is not False:
            most = 0.5 if asked["clip"] == 0.5 else 1
            assert np.abs(path[-1]).max() <= most + 1e-12  # the weight of x_0 in the last mean is 1 but for rounding
        np.testing.assert_array_equal(sample(d, predict, shape, **asked, workers=1), path[-1])

    @settings(max_examples=60)
    @given(requests(), st.data())
    def test_an_image_depends_neither_on_the_workers_nor_on_the_others(self, request, data):
        d, predict, shape, asked, _ = request
        images, again = (sample(d, predict, shape, **asked, workers=workers) for workers in (1, 2))
        np.testing.assert_array_equal(images, again)
        fewer = data.draw(st.integers(1, shape[0]))
        if "start" in asked:
            asked = asked | {"start": asked["start"][:fewer]}
        alone = sample(d, predict, (fewer, *shape[1:]), **asked, workers=1)
        np.testing.assert_allclose(alone, images[:fewer], rtol=0, atol=1e-9 * (1 + np.abs(images).max()))
