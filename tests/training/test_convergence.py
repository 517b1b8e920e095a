"""Of which order the samplers are, against paths that are known; and what holds whatever `sample` is asked for.

If x_0 is drawn from a mixture of Gaussians, then E[x_0 | x_t] has a closed form, and the path along which `ddim` and
`dpm++` go in ever smaller steps (Song et al. 2021, Score-based generative modeling through SDEs, equation 13) comes of
the Runge-Kutta method: z = x_t / sqrt(alpha_bar_t) obeys, along l = ln sqrt(alpha_bar_t / (1 - alpha_bar_t)),

    dz/dl = b E[x_0 | x_t] - z
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, schedules

from tinyddpm import Diffusion, make_schedule, sample
from tinyddpm.diffusion.checks import OBJECTIVES, SPACINGS, VARIANCES
from tinyddpm.diffusion.sample import SAMPLERS, timesteps

STEPS, FINE, STARTS = [8, 16, 32, 64, 128], 40 * 128, np.linspace(-2, 2, 41).reshape(1, -1, 1, 1)
W, M, S = np.array([0.4, 0.6]), np.array([-0.7, 0.5]), np.array([0.15, 0.2])  # weights, means, standard deviations


class Ideal:
    """E[x_0 | x_t] of the mixture, in every pixel for itself."""

    dtype = np.dtype("float64")

    def __init__(self, b):
        self.b, self.schedule = b, make_schedule("sigmoid_logsnr", FINE + 1, input_scale=b, logsnr_min=-5, logsnr_max=3)

    def x0(self, x_t, bar):
        v = bar * self.b**2 * S**2 + 1 - bar
        away = x_t[..., None] - np.sqrt(bar) * self.b * M
        p = W / np.sqrt(v) * np.exp(-(away**2) / (2 * v))
        return (p * (M + np.sqrt(bar) * self.b * S**2 / v * away)).sum(-1) / p.sum(-1)

    def __call__(self, x, t):
        bar = self.schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
        x_t = x * np.sqrt((self.b**2 - 1) * bar + 1)  # what a network sees is divided by this
        return self.x0(x_t, bar[..., None])

    def end_of_path(self, n=500):
        def slope(z, l):
            bar = 1 / (1 + np.exp(-2 * l))
            return self.b * self.x0(np.sqrt(bar) * z, bar) - z

        ends = self.schedule.alpha_bar[[-1, 0]]
        first, last = 0.5 * (np.log(ends) - np.log1p(-ends))
        z, h = STARTS / np.sqrt(ends[0]), (last - first) / n
        for l in first + h * np.arange(n):
            k1 = slope(z, l)
            k2 = slope(z + h / 2 * k1, l + h / 2)
            k3 = slope(z + h / 2 * k2, l + h / 2)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(z + h * k3, l + h))
        return np.sqrt(ends[1]) * z


@pytest.mark.parametrize("b", [1.0, 0.5])
@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpm++", 2)])
def test_the_error_falls_with_this_power_of_the_number_of_steps(method, order, b):
    """In steps of equal length in ln SNR, to the lowest timestep: the last jump, to x_0, is of its own length."""
    ideal, errors = Ideal(b), []
    d, known = Diffusion(ideal.schedule, "x0", clip=False), ideal.end_of_path()
    for n in STEPS:
        ts = np.arange(n + 1) * (FINE // n)
        path = sample(d, ideal, STARTS.shape, method, ts, start=STARTS, trajectory=True, workers=1)
        errors.append(np.abs(b * path[-2] - known).mean())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])  # from 8 steps to 16, from 16 to 32 ...
    assert np.all(np.abs(orders / order - 1) < 0.1) and abs(orders[-1] / order - 1) < 0.03


def model(x, t):
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
@settings(max_examples=100)
@given(requests(), st.data())
def test_the_timesteps_lead_from_the_start_to_images_that_depend_neither_on_workers_nor_on_others(request, data):
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
    noise = np.stack([rng.standard_normal(shape[1:]) for rng in np.random.default_rng(asked["rng"]).spawn(shape[0])])
    np.testing.assert_array_equal(path[0], asked.get("start", noise) / d.schedule.input_scale)
    if asked["clip"] is not False:
        most = 0.5 if asked["clip"] == 0.5 else 1
        assert np.abs(path[-1]).max() <= most + 1e-12  # the weight of x_0 in the last mean is 1 but for rounding
    for workers in (1, 2):
        np.testing.assert_array_equal(sample(d, predict, shape, **asked, workers=workers), path[-1])
    fewer = data.draw(st.integers(1, shape[0]))
    if "start" in asked:
        asked = asked | {"start": asked["start"][:fewer]}
    alone = sample(d, predict, (fewer, *shape[1:]), **asked, workers=1)
    np.testing.assert_allclose(alone, path[-1, :fewer], rtol=0, atol=1e-9 * (1 + np.abs(path[-1]).max()))
