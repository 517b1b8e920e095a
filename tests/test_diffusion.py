"""Schedule, forward process, posterior, loss and sampler against the formulas of Ho et al. 2020."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyddpm import Diffusion, Schedule, UNet, backward, make_schedule, sample
from tinyddpm.sample import SAMPLERS, SHARD, ddpm
from tinyddpm.schedule import linear as linear_beta
from tinyddpm.tensor import Parameter, Tensor


def linear(T, beta_start=1e-4, beta_end=0.02):
    """A linear schedule that need not end at pure noise."""
    return Schedule(linear_beta(T, beta_start, beta_end))


schedules = st.builds(
    lambda T, a, b: linear(T, min(a, b), max(a, b)),
    st.integers(1, 200), st.floats(1e-5, 0.5), st.floats(1e-5, 0.5),
)  # fmt: skip


def zeros(x, t):
    return np.zeros_like(x)


class TestForward:
    @given(s=schedules, seed=st.integers(0, 1000))
    def test_many_small_steps_equal_one_jump(self, s, seed):
        """Iterating q(x_t | x_{t-1}): mean and variance are exactly those of q(x_t | x_0)."""
        d = Diffusion(s)
        rng = np.random.default_rng(seed)
        x0, one = rng.standard_normal((1, 2, 2, 1)), np.ones((1, 2, 2, 1))
        mean, variance = x0, 0 * one
        for t in range(d.T):
            mean, variance = np.sqrt(1 - s.beta[t]) * mean, (1 - s.beta[t]) * variance + s.beta[t]
            ts = np.array([t])
            np.testing.assert_allclose(d.q_sample(x0, ts, 0 * one), mean, rtol=1e-10)
            np.testing.assert_allclose(d.q_sample(0 * x0, ts, one) ** 2, variance, rtol=1e-8)

    def test_samples_of_many_small_steps_have_that_mean_and_variance(self):
        s = linear(20, beta_end=0.3)
        rng = np.random.default_rng(0)
        x = np.full(200_000, 0.7)
        for beta in s.beta:
            x = np.sqrt(1 - beta) * x + np.sqrt(beta) * rng.standard_normal(x.shape)
        assert abs(x.mean() - np.sqrt(s.alpha_bar[-1]) * 0.7) < 0.01
        assert abs(x.var() - (1 - s.alpha_bar[-1])) < 0.01

    def test_each_image_has_a_timestep_of_its_own(self):
        d = Diffusion(linear(10))
        x0, eps = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 1))
        t = np.array([0, 9, 4])
        x_t = d.q_sample(x0, t, eps)
        for i in range(3):
            np.testing.assert_array_equal(x_t[i : i + 1], d.q_sample(x0[i : i + 1], t[i : i + 1], eps[i : i + 1]))

    @given(s=schedules, objective=st.sampled_from(["eps", "v"]), data=st.data())
    def test_predict_x0_undoes_q_sample(self, s, objective, data):
        d = Diffusion(s, objective)
        t = np.array([data.draw(st.integers(0, d.T - 1))])
        x0, eps = np.random.default_rng(0).standard_normal((2, 1, 3, 3, 1))
        if s.alpha_bar[t[0]] > 1e-6:
            np.testing.assert_allclose(d.predict_x0(d.q_sample(x0, t, eps), t, d.target(x0, t, eps)), x0, atol=1e-9)

    @given(s=schedules, data=st.data())
    def test_v_and_what_follows_from_it(self, s, data):
        t = data.draw(st.integers(0, len(s) - 1))
        a, b = math.sqrt(s.alpha_bar[t]), math.sqrt(1 - s.alpha_bar[t])
        x0, eps = np.random.default_rng(0).standard_normal((2, 1, 3, 3, 1))
        ts = np.array([t])
        x_t, v = Diffusion(s).q_sample(x0, ts, eps), Diffusion(s, "v").target(x0, ts, eps)
        np.testing.assert_allclose(v, a * eps - b * x0, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(a * v + b * x_t, eps, atol=1e-9)
        np.testing.assert_array_equal(Diffusion(s).target(x0, ts, eps), eps)

    def test_timesteps_may_be_unsigned(self):
        d = Diffusion(linear(10))
        x = np.random.default_rng(0).standard_normal((2, 4, 4, 1))
        signed, unsigned = (d.q_sample(x, np.array([3, 9], dtype), x) for dtype in ("int64", "uint8"))
        np.testing.assert_array_equal(signed, unsigned)

    def test_float32_stays_float32(self):
        d = Diffusion(linear(10))
        x = np.ones((2, 4, 4, 1), np.float32)
        t = np.array([3, 4])
        assert d.q_sample(x, t, x).dtype == d.predict_x0(x, t, x).dtype == d.posterior_mean(x, x, t).dtype == np.float32


class TestPosterior:
    @given(s=schedules, data=st.data())
    def test_two_ways_to_the_mean(self, s, data):
        """Without clipping, mu_tilde(x0hat(eps), x_t) is (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t)."""
        d = Diffusion(s)
        t = data.draw(st.integers(0, d.T - 1))
        if s.alpha_bar[t] > 1e-6:
            x_t, eps = np.random.default_rng(0).standard_normal((2, 1, 3, 3, 1))
            ts = np.array([t])
            mean = (x_t - s.beta[t] / np.sqrt(1 - s.alpha_bar[t]) * eps) / np.sqrt(s.alpha[t])
            np.testing.assert_allclose(d.posterior_mean(d.predict_x0(x_t, ts, eps), x_t, ts), mean, atol=1e-9)

    def test_it_is_bayes_theorem(self):
        """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0), here on a fine grid."""
        s = linear(50, beta_end=0.2)
        d = Diffusion(s)
        x0, x_t, t = 0.4, -0.3, 20
        x = np.linspace(-8, 8, 200_001)
        log = -((x_t - np.sqrt(s.alpha[t]) * x) ** 2) / (2 * s.beta[t])
        log -= (x - np.sqrt(s.alpha_bar[t - 1]) * x0) ** 2 / (2 * (1 - s.alpha_bar[t - 1]))
        p = np.exp(log - log.max())
        p /= p.sum()
        mean = d.posterior_mean(np.full((1, 1, 1, 1), x0), np.full((1, 1, 1, 1), x_t), np.array([t])).item()
        assert math.isclose((p * x).sum(), mean, rel_tol=1e-6)
        assert math.isclose((p * (x - mean) ** 2).sum(), s.posterior_variance[t], rel_tol=1e-6)

    def test_variances(self):
        s = linear(10)
        small, large = (np.exp(Diffusion(s, variance=v).log_variance()) for v in ("small", "large"))
        np.testing.assert_allclose(small[1:], s.posterior_variance[1:])
        np.testing.assert_allclose(large[1:], s.beta[1:])
        assert math.isclose(small[0], s.posterior_variance[1]) and math.isclose(large[0], s.posterior_variance[1])


class TestLoss:
    d = Diffusion(linear(100))
    x0 = np.random.default_rng(0).uniform(-1, 1, (4000, 2, 2, 1))

    def test_a_model_that_says_zero_has_the_variance_of_the_noise(self):
        assert abs(self.d.loss(zeros, self.x0, np.random.default_rng(0)).item() - 1) < 0.02

    def test_a_model_that_knows_x0_has_no_loss(self):
        def oracle(x_t, t):
            a = self.d.schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
            return (x_t - np.sqrt(a) * self.x0) / np.sqrt(1 - a)

        assert self.d.loss(oracle, self.x0, np.random.default_rng(0)).item() < 1e-20

    def test_with_v_a_model_that_knows_x0_has_no_loss_either(self):
        def oracle(x_t, t):
            a = self.d.schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
            eps = (x_t - np.sqrt(a) * self.x0) / np.sqrt(1 - a)
            return np.sqrt(a) * eps - np.sqrt(1 - a) * self.x0

        d = Diffusion(self.d.schedule, "v")
        assert d.loss(oracle, self.x0, np.random.default_rng(0)).item() < 1e-20
        assert d.loss(zeros, self.x0, np.random.default_rng(0)).item() > 0.1

    def test_timesteps_are_drawn_for_each_image_and_evenly(self):
        seen = []
        self.d.loss(lambda x, t: seen.append(t) or zeros(x, t), self.x0, np.random.default_rng(0))
        counts = np.bincount(seen[0], minlength=100)
        assert seen[0].shape == (4000,) and len(counts) == 100 and counts.min() > 15 and counts.max() < 75

    def test_the_gradient_of_a_model_of_one_parameter(self):
        w = Parameter(np.array([[[[0.5]]]]))
        seen = []

        def model(x, t):
            seen.append(x)
            return Tensor(x) * w

        loss = self.d.loss(model, self.x0, np.random.default_rng(3))
        rng = np.random.default_rng(3)
        rng.integers(0, 100, 4000)
        eps = rng.standard_normal(self.x0.shape)
        np.testing.assert_allclose(loss.item(), ((eps - 0.5 * seen[0]) ** 2).mean(), rtol=1e-12)
        np.testing.assert_allclose(backward(loss)[w], (-2 * (eps - 0.5 * seen[0]) * seen[0]).mean(), rtol=1e-10)

    def test_it_keeps_float32_and_the_generator_decides(self):
        x0 = self.x0[:5].astype(np.float32)
        first, again, other = (self.d.loss(zeros, x0, np.random.default_rng(s)) for s in (1, 1, 2))
        assert first.dtype == np.float32 and first.item() == again.item() != other.item()


class TestDiffusionBadInput:
    d = Diffusion(linear(10))
    x = np.zeros((2, 4, 4, 1))

    def test_names(self):
        s = linear(10)
        with pytest.raises(ValueError, match="objective: unknown 'noise'; known: eps, x0, v"):
            Diffusion(s, objective="noise")
        with pytest.raises(ValueError, match="variance: unknown 'tiny'; known: small, large, learned_range"):
            Diffusion(s, variance="tiny")
        with pytest.raises(TypeError, match="schedule: expected a Schedule from make_schedule, got str"):
            Diffusion("linear")

    @pytest.mark.parametrize("t", [[0, 10], [-1, 0]])
    def test_timesteps_out_of_range(self, t):
        with pytest.raises(ValueError, match="t: timesteps run from 0 to 9, got"):
            self.d.q_sample(self.x, np.array(t), self.x)

    def test_timesteps_of_the_wrong_shape_or_type(self):
        with pytest.raises(ValueError, match="t: expected 2 timesteps, one for each image, got shape"):
            self.d.q_sample(self.x, np.array([1]), self.x)
        for bad in (np.array([0.0, 1.0]), [0, 1], 3):
            with pytest.raises(TypeError, match="t: expected a NumPy array of integers"):
                self.d.q_sample(self.x, bad, self.x)

    def test_noise_of_another_shape(self):
        with pytest.raises(ValueError, match=r"eps: expected the shape of x0, \(2, 4, 4, 1\), got \(4, 4, 1\)"):
            self.d.q_sample(self.x, np.array([0, 1]), self.x[0])

    def test_a_seed_is_no_generator(self):
        with pytest.raises(TypeError, match="rng: expected a generator from numpy.random.default_rng, got int"):
            self.d.loss(zeros, self.x, 0)

    def test_images_of_integers(self):
        with pytest.raises(TypeError, match="images: expected floats in .-1, 1., got uint8"):
            self.d.q_sample(self.x.astype(np.uint8), np.array([0, 1]), self.x.astype(np.uint8))

    def test_loss(self):
        rng = np.random.default_rng(0)
        for bad in (self.x[:0], self.x[0]):
            with pytest.raises(ValueError, match="x0: expected one or more images"):
                self.d.loss(zeros, bad, rng)
        for dtype in ("uint8", "float16"):
            with pytest.raises(TypeError, match=f"x0: expected float32 or float64 images in .-1, 1., got {dtype}"):
                self.d.loss(zeros, self.x.astype(dtype), rng)
        with pytest.raises(ValueError, match=r"model: expected it to return the shape of x_t, .* got \(2, 4, 4, 2\)"):
            self.d.loss(lambda x, t: np.concatenate([x, x], -1), self.x, rng)
