"""The whole of diffusion without training: the ideal denoiser of a finite data set, against samplers and losses."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ideal import expected_x0, ideal_denoiser
from strategies import SEEDS, schedules

from tinyddpm import Diffusion, Schedule, UNet, make_schedule, sample, train
from tinyddpm.diffusion.checks import OBJECTIVES
from tinyddpm.diffusion.sample import SAMPLERS
from tinyddpm.diffusion.schedule import linear

DATA = np.random.default_rng(1).uniform(-1, 1, (5, 3, 3, 1))


def nearest(images, data):
    """For each image, which of the data is nearest, and how far away the pixel is that differs most."""
    far = np.abs(images[:, None] - data).max(axis=(2, 3, 4))
    return far.argmin(1), far.min(1)


class TestTheOracleItself:
    def test_it_is_bayes_theorem_on_one_pixel(self):
        """The x_0 that are right on average among pairs (x_0, x_t) whose x_t falls into a narrow bin."""
        rng = np.random.default_rng(0)
        data, s = np.array([-0.8, 0.1, 0.5]).reshape(3, 1, 1, 1), Schedule([0.4], 0.9)
        x0 = data.ravel()[rng.integers(0, 3, 2_000_000)]
        x_t = np.sqrt(0.6) * 0.9 * x0 + np.sqrt(0.4) * rng.standard_normal(x0.shape)
        for x in (-1.0, 0.0, 0.6):
            near = x0[np.abs(x_t - x) < 0.02]
            ideal = expected_x0(data, s, np.full((1, 1, 1, 1), x), np.array([0])).item()
            assert abs(near.mean() - ideal) < 4 * near.std() / math.sqrt(len(near))

    def test_with_one_image_it_knows_it(self):
        x = np.random.default_rng(0).standard_normal((4, 3, 3, 1))
        s = make_schedule("cosine", 10)
        np.testing.assert_allclose(expected_x0(DATA[:1], s, x, np.arange(4)), np.broadcast_to(DATA[:1], x.shape))


class TestSamplersDrawTheData:
    @pytest.mark.parametrize("method", sorted(SAMPLERS))
    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize(("name", "b"), [("linear", 1.0), ("cosine", 0.5), ("sigmoid", 1.5)])
    def test_every_sampler_objective_and_scale(self, method, objective, name, b):
        """Every sample is one of the images, and each is drawn about as often."""
        d = Diffusion(make_schedule(name, 1000, input_scale=b), objective)
        images = sample(d, ideal_denoiser(DATA, d), (300, 3, 3, 1), method, steps=60)
        which, away = nearest(images, DATA)
        assert np.quantile(away, 0.95) < 0.02  # a few end between two images, more of them with few steps
        counts = np.bincount(which, minlength=5)
        assert counts.min() > 35 and counts.max() < 90  # 60 each, 4 standard deviations are 28

    @pytest.mark.parametrize(
        ("method", "variance"), [("ddpm", "small"), ("ddpm", "large"), ("ddim", "small"), ("dpm++", "small")]
    )
    def test_in_all_steps_no_sample_ends_elsewhere(self, method, variance):
        d = Diffusion(make_schedule("linear", 1000), variance=variance)
        which, away = nearest(sample(d, ideal_denoiser(DATA, d), (64, 3, 3, 1), method), DATA)
        assert away.max() < 0.02 and set(which) == set(range(5))

    @pytest.mark.parametrize("method", sorted(SAMPLERS))
    def test_zero_terminal_snr(self, method):
        d = Diffusion(make_schedule("linear", 200, zero_terminal_snr=True), "v")
        images = sample(d, ideal_denoiser(DATA, d), (100, 3, 3, 1), method)
        assert np.quantile(nearest(images, DATA)[1], 0.95) < 0.02

    def test_a_learned_variance_between_the_two(self):
        d = Diffusion(make_schedule("cosine", 200), "v", "learned_range", "hybrid")
        ideal = ideal_denoiser(DATA, d)
        model = lambda x, t: np.concatenate([ideal(x, t), np.zeros_like(x)], axis=-1)
        assert np.quantile(nearest(sample(d, model, (50, 3, 3, 1)), DATA)[1], 0.95) < 0.02


class TestNothingIsBetter:
    @settings(max_examples=15)
    @given(s=schedules(zero_terminal_snr=False), objective=st.sampled_from(OBJECTIVES), seed=SEEDS)
    def test_the_simple_loss_of_any_other_prediction_is_greater_by_the_distance(self, s, objective, seed):
        """E ||y - f(x_t)||^2 = E ||y - f*(x_t)||^2 + E ||f(x_t) - f*(x_t)||^2, for f* is a conditional mean."""
        rng = np.random.default_rng(seed)
        d = Diffusion(s, objective)
        ideal = ideal_denoiser(DATA, d)
        offset, slope, away = rng.normal(), rng.normal(), []

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

    @pytest.mark.slow
    def test_nor_is_a_network_after_training(self):
        data = DATA[:2].repeat(4, axis=1)[:, :4].repeat(4, axis=2)[:, :, :4].astype(np.float32)
        d = Diffusion(Schedule(linear(20, 1e-2, 0.5)))
        unet = UNet(channels=(8,), blocks=1, attention=(False,), groups=2)
        states = list(train(unet, d, data, steps=60, batch=16, lr=5e-3, workers=1))
        images = data[np.arange(1000) % 2]
        ideal, trained, untrained = (
            d.loss(model, images, np.random.default_rng(0)).item()
            for model in (ideal_denoiser(data, d), unet, UNet(channels=(8,), blocks=1, attention=(False,), groups=2))
        )
        assert ideal < trained < untrained and states[-1].loss < states[0].loss
