"""The whole of diffusion without training: the ideal denoiser of a finite data set, against samplers and losses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ideal import gaussian, ideal_denoiser, image
from strategies import SEEDS, schedules

from tinyddpm import Diffusion, make_schedule, sample
from tinyddpm.diffusion.checks import OBJECTIVES
from tinyddpm.diffusion.sample import SAMPLERS

DATA = np.random.default_rng(1).uniform(-1, 1, (5, 3, 3, 1))


@pytest.mark.parametrize("method", sorted(SAMPLERS))
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("name", "b"), [("cosine", 0.5), ("sigmoid", 1.5), ("linear", 1)])
def test_every_sampler_draws_the_data_whatever_the_objective_and_the_schedule(method, name, b, objective):
    """Every sample is one of the images, and each is drawn about as often; also if all signal is gone at the end."""
    zero = name == "linear" and objective != "eps"
    d = Diffusion(make_schedule(name, 1000, b, zero_terminal_snr=zero), objective)
    images = sample(d, ideal_denoiser(DATA, d), (300, 3, 3, 1), method, steps=40, workers=1)
    far = np.abs(images[:, None] - DATA).max(axis=(2, 3, 4))  # by how much the pixel differs that differs most
    assert np.quantile(far.min(1), 0.95) < 0.02  # a few end between two images, more of them with few steps
    counts = np.bincount(far.argmin(1), minlength=5)
    assert counts.min() > 35 and counts.max() < 90  # 60 each, 4 standard deviations are 28


@pytest.mark.parametrize("b", [1.0, 0.5])
@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpm++", 2)])
def test_the_error_falls_with_this_power_of_the_number_of_steps(method, order, b):
    """Of N(0, s^2), all that happens to an x_t in ever smaller steps (Song et al. 2021, Score-based generative modeling
    through SDEs, equation 13) is that it is scaled as the standard deviation. In steps of equal length in ln SNR, to
    the lowest timestep: the last jump, to x_0, is of its own length."""
    fine, s, errors = 40 * 128, 0.2, []
    d = Diffusion(make_schedule("sigmoid_logsnr", fine + 1, b, logsnr_min=-5, logsnr_max=3), "x0", clip=False)
    std = np.sqrt((b * s) ** 2 * d.schedule.alpha_bar + d.schedule.one_minus_alpha_bar)
    for n in (8, 16, 32, 64, 128):
        settings = dict(start=image(1), trajectory=True, workers=1)
        path = sample(d, gaussian(d, s), (1, 1, 1, 1), method, np.arange(n + 1) * (fine // n), **settings)
        errors.append(abs(b * path[-2].item() - std[0] / std[-1]))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])  # from 8 steps to 16, from 16 to 32 ...
    assert np.all(np.abs(orders / order - 1) < 0.1) and abs(orders[-1] / order - 1) < 0.03


@settings(max_examples=15)
@given(s=schedules(zero_terminal_snr=False), objective=st.sampled_from(OBJECTIVES), seed=SEEDS)
def test_the_simple_loss_of_any_other_prediction_is_greater_by_the_distance(s, objective, seed):
    """E ||y - f(x_t)||^2 = E ||y - f*(x_t)||^2 + E ||f(x_t) - f*(x_t)||^2, for f*, the ideal, is a conditional mean."""
    rng, d = np.random.default_rng(seed), Diffusion(s, objective)
    ideal, offset, slope, away = ideal_denoiser(DATA, d), rng.normal(), rng.normal(), []

    def other(x, t):
        best = ideal(x, t)
        f = best + offset + slope * np.sin(x)
        away.append(((f - best) ** 2).mean(axis=(1, 2, 3)))
        return f

    images = DATA[rng.integers(0, 5, 4000)]
    losses = [d.loss(model, images, np.random.default_rng(seed)).item() for model in (other, ideal)]
    # what is left is twice the mean of (y - f*)(f - f*), which is 0 on average; by Cauchy-Schwarz the mean over
    # 4000 images strays by sqrt(E (y - f*)^2 E (f - f*)^2 / 4000) or so: allow four times that
    tolerance = 4 * 2 * np.sqrt(away[0].mean() * losses[1] / 4000)
    assert abs(losses[0] - losses[1] - away[0].mean()) < tolerance + 1e-9
