"""The diffusion process: forward, posterior, parametrisations and losses against the papers' formulas."""

import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import SEEDS, processes, schedules

from tinyddpm import Diffusion, Schedule, backward, make_schedule
from tinyddpm.autograd.functional import concat
from tinyddpm.autograd.tensor import Parameter, Tensor
from tinyddpm.diffusion.bound import prior_terms, vlb_terms
from tinyddpm.diffusion.checks import LOSSES, OBJECTIVES
from tinyddpm.diffusion.clipping import dynamic_threshold, limit
from tinyddpm.diffusion.schedule import linear as linear_beta


def linear(T, beta_start=1e-4, beta_end=0.02, b=1.0):
    """A linear schedule that need not end at pure noise."""
    return Schedule(linear_beta(T, beta_start, beta_end), b)


def zeros(x, t):
    return np.zeros_like(x)


def column(table, t):
    """table[t] to go with images (N, H, W, C)."""
    return table[t].reshape(-1, 1, 1, 1)


class TestForward:
    @given(s=schedules())
    def test_many_small_steps_equal_one_jump(self, s):
        """Iterating q(x_t | x_{t-1}) from b x_0: mean and variance are exactly those of q(x_t | x_0)."""
        d, b = Diffusion(s, "v"), s.input_scale
        x0, one = np.full((1, 1, 1, 1), 0.7), np.ones((1, 1, 1, 1))
        mean, variance = b * x0, 0 * one
        for t in range(d.T):
            ts = np.array([t])
            mean = d.q_step(mean, ts, 0 * one)
            variance = d.q_step(np.sqrt(variance), ts, 0 * one) ** 2 + d.q_step(0 * one, ts, one) ** 2
            if t < 5 or t % 97 == 0 or t == d.T - 1:
                np.testing.assert_allclose(d.q_sample(x0, ts, 0 * one), mean, rtol=1e-9, atol=1e-15)
                np.testing.assert_allclose(d.q_sample(0 * x0, ts, one) ** 2, variance, rtol=1e-9)

    def test_samples_of_many_small_steps_have_that_mean_and_variance(self):
        d = Diffusion(linear(20, beta_end=0.3, b=0.8))
        rng = np.random.default_rng(0)
        x = np.full((1, 200_000, 1, 1), 0.8 * 0.7)
        for t in range(20):
            x = d.q_step(x, np.array([t]), rng.standard_normal(x.shape))
        bar = np.prod([1 - beta for beta in np.linspace(1e-4, 0.3, 20)])
        assert abs(x.mean() - math.sqrt(bar) * 0.56) < 0.01 and abs(x.var() - (1 - bar)) < 0.01

    def test_one_step(self):
        x, eps = np.random.default_rng(0).standard_normal((2, 3, 2, 2, 1))
        t = np.array([0, 4, 9])
        beta = column(np.linspace(1e-4, 0.02, 10), t)
        np.testing.assert_allclose(
            Diffusion(linear(10, b=3.0)).q_step(x, t, eps), np.sqrt(1 - beta) * x + np.sqrt(beta) * eps, rtol=1e-12
        )

    def test_each_image_has_a_timestep_of_its_own(self):
        d = Diffusion(linear(10))
        x0, eps = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 1))
        t = np.array([0, 9, 4])
        x_t = d.q_sample(x0, t, eps)
        for i in range(3):
            np.testing.assert_array_equal(x_t[i : i + 1], d.q_sample(x0[i : i + 1], t[i : i + 1], eps[i : i + 1]))

    def test_timesteps_may_be_unsigned(self):
        d = Diffusion(linear(10))
        x = np.random.default_rng(0).standard_normal((2, 4, 4, 1))
        signed, unsigned = (d.q_sample(x, np.array([3, 9], dtype), x) for dtype in ("int64", "uint8"))
        np.testing.assert_array_equal(signed, unsigned)

    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("b", [1.0, 0.5])
    def test_float32_stays_float32(self, objective, b):
        d = Diffusion(linear(10, b=b), objective)
        x, t = np.ones((2, 4, 4, 1), np.float32), np.array([3, 4])
        made = [f(x, t, x) for f in (d.q_step, d.q_sample, d.target, d.predict_x0, d.predict_eps, d.eps_from_x0)]
        made += [d.posterior_mean(x, x, t), d.log_variance(x, t), prior_terms(d, x), vlb_terms(d, x, x, t, x)]
        made += [*d.p_mean_variance(zeros, x, t), d.p_mean_variance(zeros, x, t, "dynamic")[2]]
        assert {a.dtype for a in made} == {np.dtype("float32")}


class TestParametrisations:
    @given(p=processes(1e-6))
    def test_all_are_inverse_to_each_other(self, p):
        d, x0, t, eps = p
        x_t, prediction = d.q_sample(x0, t, eps), d.target(x0, t, eps)
        np.testing.assert_allclose(d.predict_x0(x_t, t, prediction), x0, atol=1e-8)
        noise = np.sqrt(1 - d.schedule.alpha_bar[t]).min()
        np.testing.assert_allclose(d.predict_eps(x_t, t, prediction), eps, atol=1e-12 / noise)
        np.testing.assert_allclose(d.eps_from_x0(x_t, t, x0), eps, atol=1e-12 / noise)

    @given(p=processes(1e-6))
    def test_any_prediction_says_the_same_of_x0_and_of_eps(self, p):
        """x_t = sqrt(alpha_bar) b x0hat + sqrt(1 - alpha_bar) epshat, whatever the network predicts."""
        d, x0, t, eps = p
        x_t, prediction = d.q_sample(x0, t, eps), np.sin(7 * x0)
        x0hat, epshat = d.predict_x0(x_t, t, prediction), d.predict_eps(x_t, t, prediction)
        a, b = (np.sqrt(column(table, t)) for table in (d.schedule.alpha_bar, 1 - d.schedule.alpha_bar))
        np.testing.assert_allclose(a * d.schedule.input_scale * x0hat + b * epshat, x_t, atol=1e-9)

    @given(p=processes())
    def test_targets(self, p):
        d, x0, t, eps = p
        a, b = (np.sqrt(column(table, t)) for table in (d.schedule.alpha_bar, 1 - d.schedule.alpha_bar))
        v = a * eps - b * d.schedule.input_scale * x0
        expected = {"eps": eps, "x0": x0, "v": v}[d.objective]
        np.testing.assert_allclose(d.target(x0, t, eps), expected, rtol=1e-12, atol=1e-15)

    def test_the_network_sees_unit_variance_and_nobody_else_does(self):
        rng = np.random.default_rng(0)
        x0, eps = rng.standard_normal((2, 4, 200, 200, 1))
        t, seen = np.array([0, 3, 6, 9]), []
        for b in (0.3, 1.0, 2.5):
            d = Diffusion(linear(10, 0.05, 0.3, b=b))
            x_t = d.q_sample(x0, t, eps)
            d.p_mean_variance(lambda x, t: seen.append(x) or zeros(x, t), x_t, t)
            np.testing.assert_allclose(seen[-1].var(axis=(1, 2, 3)), 1, atol=0.02)
            alpha_bar = column(d.schedule.alpha_bar, t)
            np.testing.assert_allclose(seen[-1] * np.sqrt(b * b * alpha_bar + 1 - alpha_bar), x_t, rtol=1e-12)
            if b == 1:
                assert seen[-1] is x_t


class TestPosterior:
    @given(p=processes(1e-6))
    def test_two_ways_to_the_mean(self, p):
        """Without clipping, mu_tilde(x0hat, x_t) is (x_t - beta_t / sqrt(1 - alpha_bar_t) epshat) / sqrt(alpha_t)."""
        d, x0, t, eps = p
        x_t, prediction = d.q_sample(x0, t, eps), np.cos(5 * x0)
        beta, bar = column(d.schedule.beta, t), column(d.schedule.alpha_bar, t)
        mean = (x_t - beta / np.sqrt(1 - bar) * d.predict_eps(x_t, t, prediction)) / np.sqrt(1 - beta)
        assume((bar < 1 - 1e-6).all())  # 1 - alpha_bar keeps enough digits
        np.testing.assert_allclose(d.posterior_mean(d.predict_x0(x_t, t, prediction), x_t, t), mean, atol=1e-8)
        np.testing.assert_array_equal(
            d.p_mean_variance(lambda x, t: prediction, x_t, t, clip=False)[0],
            d.posterior_mean(d.predict_x0(x_t, t, prediction), x_t, t),
        )

    @pytest.mark.parametrize("b", [1.0, 0.4])
    def test_it_is_bayes_theorem(self, b):
        """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0), here on a fine grid."""
        s = linear(50, beta_end=0.2, b=b)
        d = Diffusion(s)
        x0, x_t, t = 0.4, -0.3, 20
        x = np.linspace(-8, 8, 200_001)
        log = -((x_t - np.sqrt(s.alpha[t]) * x) ** 2) / (2 * s.beta[t])
        log -= (x - np.sqrt(s.alpha_bar[t - 1]) * b * x0) ** 2 / (2 * (1 - s.alpha_bar[t - 1]))
        p = np.exp(log - log.max())
        p /= p.sum()
        mean = d.posterior_mean(np.full((1, 1, 1, 1), x0), np.full((1, 1, 1, 1), x_t), np.array([t])).item()
        assert math.isclose((p * x).sum(), mean, rel_tol=1e-6)
        assert math.isclose((p * (x - mean) ** 2).sum(), s.posterior_variance[t], rel_tol=1e-6)

    def test_fixed_variances(self):
        s, x, t = linear(10), np.zeros((10, 1, 1, 1)), np.arange(10)
        small, large = (np.exp(Diffusion(s, variance=v).log_variance(x, t)) for v in ("small", "large"))
        assert small.shape == large.shape == (10, 1, 1, 1)
        np.testing.assert_allclose(small[1:, 0, 0, 0], s.posterior_variance[1:])
        np.testing.assert_allclose(large[1:, 0, 0, 0], s.beta[1:])
        np.testing.assert_allclose([small[0].item(), large[0].item()], s.posterior_variance[1])

    def test_the_large_variance_of_a_single_step(self):
        x = np.zeros((1, 1, 1, 1))
        assert math.isclose(
            Diffusion(Schedule([0.3]), "v", "large").log_variance(x, np.array([0])).item(), math.log(0.3)
        )

    def test_the_predicted_image_is_clipped_unless_told_not_to(self):
        d, x, t = Diffusion(linear(10), "x0"), np.zeros((1, 1, 1, 1)), np.array([5])
        far = lambda x, t: x + 3
        assert d.denoise(far, x, t)[0] == d.p_mean_variance(far, x, t)[2] == 1
        assert d.denoise(far, x, t, False)[0] == d.p_mean_variance(far, x, t, False)[2] == 3

    @given(s=schedules(zero_terminal_snr=False), data=st.data())
    def test_a_learned_variance_lies_between_them(self, s, data):
        d = Diffusion(s, variance="learned_range", loss_type="hybrid")
        t = np.array([data.draw(st.integers(0, d.T - 1))])
        x = np.zeros((1, 1, 1, 1))
        at = lambda v: d.log_variance(x, t, np.full((1, 1, 1, 1), v)).item()
        small, large = s.posterior_log_variance[t[0]], math.log(s.beta[t[0]])
        assert math.isclose(at(-1.0), small, rel_tol=1e-12) and math.isclose(
            at(1.0), large, rel_tol=1e-12, abs_tol=1e-12
        )
        assert math.isclose(at(0.5), 0.75 * large + 0.25 * small, rel_tol=1e-9, abs_tol=1e-12)

    def test_a_learned_variance_takes_the_second_half_of_the_channels(self):
        d = Diffusion(linear(10), variance="learned_range", loss_type="hybrid")
        x, t = np.random.default_rng(0).standard_normal((2, 3, 3, 2)), np.array([2, 7])
        model = lambda x, t: np.concatenate([0.1 * x, np.tanh(x)], axis=-1)
        mean, log_variance, x0 = d.p_mean_variance(model, x, t, clip=False)
        plain = Diffusion(linear(10)).p_mean_variance(lambda x, t: 0.1 * x, x, t, clip=False)
        np.testing.assert_array_equal(mean, plain[0])
        np.testing.assert_array_equal(log_variance, d.log_variance(x, t, np.tanh(x)))
        np.testing.assert_array_equal(x0, plain[2])
        with pytest.raises(
            ValueError, match=r"it must return 4 channels for images of 2 \(a U-Net with out_channels=4\)"
        ):
            d.p_mean_variance(lambda x, t: x, x, t)
        with pytest.raises(ValueError, match=r"return the shape of x_t, \(2, 3, 3, 2\), got \(2, 3, 3, 4\)"):
            Diffusion(linear(10)).p_mean_variance(model, x, t)

    def test_p_mean_variance_keeps_no_graph(self):
        w = Parameter(np.ones(1))
        made = []
        Diffusion(linear(10)).p_mean_variance(
            lambda x, t: made.append(Tensor(x) * w) or made[-1], np.zeros((1, 2, 2, 1)), np.array([3])
        )
        assert made[0].node is None


class TestLimit:
    x0 = np.array([-3.0, -0.5, 0.2, 1.5]).reshape(1, 2, 2, 1)

    def test_clip(self):
        np.testing.assert_array_equal(limit(self.x0, True), np.clip(self.x0, -1, 1))
        assert limit(self.x0, False) is self.x0
        np.testing.assert_array_equal(limit(self.x0, 2), np.clip(self.x0, -2, 2))
        np.testing.assert_array_equal(limit(self.x0, 1.0), np.clip(self.x0, -1, 1))
        for bad in ("static", None, 0, -1, math.inf, math.nan, ("dynamic", 0.5), ("dynamic", 0.5, 0.9),
                    ("dynamic", 1.1, 2), ("dynamic", -0.1, 2), ("dynamic", "a", 2), ("static", 0.5, 2)):  # fmt: skip
            with pytest.raises(ValueError, match=re.escape(f"most) with 0 <= quantile <= 1 <= most, got {bad!r}")):
                limit(self.x0, bad)
            with pytest.raises(ValueError, match="clip: expected True, False, a number > 0, 'dynamic' or "):
                Diffusion(linear(10), clip=bad)

    def test_of_the_diffusion(self):
        x_t, t, model = 3 * self.x0, np.array([5]), lambda x, t: np.zeros_like(x)
        for clip in (True, False, 0.3, "dynamic", ("dynamic", 0.6, 1.5), ("dynamic", 0, 1), ("dynamic", 1, 1)):
            d = Diffusion(linear(10), clip=clip)
            expected = limit(d.predict_x0(x_t, t, model(x_t, t)), clip)
            for x0 in (d.denoise(model, x_t, t)[0], d.p_mean_variance(model, x_t, t)[2]):
                np.testing.assert_array_equal(x0, expected)
            np.testing.assert_array_equal(d.denoise(model, x_t, t, 0.1)[0].max(), 0.1)
        assert type(Diffusion(linear(10), clip=np.float32(0.5)).clip) is float  # as JSON wants it
        dynamic = Diffusion(linear(10), clip=("dynamic", np.float32(0.5), np.int64(2))).clip
        assert dynamic == ("dynamic", 0.5, 2.0) and all(type(n) is float for n in dynamic[1:])
        assert Diffusion(linear(10), clip=["dynamic", 0.6, 2]).clip == ("dynamic", 0.6, 2.0)  # as JSON has it

    def test_the_bound_is_of_the_diffusion_too(self):
        levels = np.random.default_rng(0).integers(0, 256, (2, 2, 2, 1)) / 127.5 - 1
        bits = lambda own, **told: Diffusion(linear(10), clip=own).bits_per_dim(
            lambda x, t: 3 * x, levels, progress=False, **told
        )
        own, told, plain = bits(0.25), bits(True, clip=0.25), bits(True)
        np.testing.assert_array_equal(own.terms, told.terms)
        assert np.abs(np.subtract(own.terms, plain.terms)).max() > 1e-6

    def test_dynamic_threshold(self):
        rng = np.random.default_rng(0)
        x0 = rng.standard_normal((3, 10, 10, 3)) * np.array([0.2, 1, 3]).reshape(3, 1, 1, 1)
        for most, quantile in ((math.inf, 0.995), (1.5, 0.9)):
            y = dynamic_threshold(x0, quantile, most)
            for x, got in zip(x0, y):
                s = min(max(np.quantile(np.abs(x), quantile), 1), most)
                np.testing.assert_allclose(got, np.clip(x, -s, s) / s, rtol=1e-12)
        np.testing.assert_array_equal(limit(x0, "dynamic"), dynamic_threshold(x0))
        np.testing.assert_array_equal(limit(x0, ("dynamic", 0.9, 1.5)), y)
        np.testing.assert_array_equal(y[0], x0[0])  # within [-1, 1] already
        assert np.abs(limit(x0, "dynamic")).max() == 1


def seen_by(d, x0, rng):
    """What `d.loss(model, x0, rng)` draws: x_t, t and eps."""
    t = rng.integers(0, d.T, size=len(x0))
    eps = rng.standard_normal(x0.shape)
    return d.q_sample(x0, t, eps), t, eps


class TestLoss:
    d = Diffusion(linear(100))
    x0 = np.random.default_rng(0).uniform(-1, 1, (4000, 2, 2, 1))

    def test_a_model_that_says_zero_has_the_variance_of_the_noise(self):
        assert abs(self.d.loss(zeros, self.x0, np.random.default_rng(0)).item() - 1) < 0.02

    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("loss_type", ["simple", "weighted_eps", "weighted_mu", "min_snr"])
    @pytest.mark.parametrize("b", [1.0, 0.6])
    def test_a_model_that_knows_x0_has_no_loss(self, objective, loss_type, b):
        d = Diffusion(linear(100, b=b), objective, loss_type=loss_type)
        a = d.schedule.alpha_bar

        def oracle(x, t):
            x_t = x * np.sqrt(column((b * b - 1) * a + 1, t))
            return d.target(self.x0, t, (x_t - np.sqrt(column(a, t)) * b * self.x0) / np.sqrt(column(1 - a, t)))

        assert d.loss(oracle, self.x0, np.random.default_rng(0)).item() < 1e-20
        assert d.loss(zeros, self.x0, np.random.default_rng(0)).item() > 0.01

    def test_timesteps_are_drawn_for_each_image_and_evenly(self):
        seen = []
        self.d.loss(lambda x, t: seen.append(t) or zeros(x, t), self.x0, np.random.default_rng(0))
        counts = np.bincount(seen[0], minlength=100)
        assert seen[0].shape == (4000,) and len(counts) == 100 and counts.min() > 15 and counts.max() < 75

    def test_the_gradient_of_a_model_of_one_parameter(self):
        w = Parameter(np.array([[[[0.5]]]]))
        loss = self.d.loss(lambda x, t: Tensor(x) * w, self.x0, np.random.default_rng(3))
        x_t, t, eps = seen_by(self.d, self.x0, np.random.default_rng(3))
        np.testing.assert_allclose(loss.item(), ((eps - 0.5 * x_t) ** 2).mean(), rtol=1e-12)
        np.testing.assert_allclose(backward(loss)[w], (-2 * (eps - 0.5 * x_t) * x_t).mean(), rtol=1e-10)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("loss_type", LOSSES)
    def test_it_keeps_the_dtype_and_the_generator_decides(self, dtype, loss_type):
        learned = loss_type == "hybrid"
        d = Diffusion(linear(100), variance="learned_range" if learned else "small", loss_type=loss_type)
        model = lambda x, t: np.concatenate([0 * x, 0 * x], -1) if learned else 0 * x
        x0 = self.x0[:5].astype(dtype)
        first, again, other = (d.loss(model, x0, np.random.default_rng(s)) for s in (1, 1, 2))
        assert first.dtype == dtype and first.shape == () and first.item() == again.item() != other.item()

    @given(p=processes(1e-4), variance=st.sampled_from(["small", "large"]), seed=SEEDS)
    def test_the_article_s_two_weighted_forms_are_one(self, p, variance, seed):
        """||mu_tilde - mu_theta||^2 / (2 sigma^2) is the error in eps, weighted: exactly, and for every objective."""
        d, x0, t, eps = p
        s = Schedule(d.schedule.beta[: t.max() + 1], d.schedule.input_scale)
        assume(s.alpha_bar[0] < 1 - 1e-6)
        model = lambda x, t: np.sin(3 * x)
        mean, weighted = (
            Diffusion(s, d.objective, variance, loss).loss(model, x0, np.random.default_rng(seed)).item()
            for loss in ("weighted_mu", "weighted_eps")
        )
        assert math.isclose(mean, weighted, rel_tol=1e-7, abs_tol=1e-12)

    @pytest.mark.parametrize("variance", ["small", "large"])
    @pytest.mark.parametrize("b", [1.0, 0.5])
    def test_the_mean_form_by_the_paper(self, variance, b):
        """Equations 7, 8 and 11, with tables worked out here."""
        d, x0 = Diffusion(linear(20, 1e-3, 0.3, b=b), "eps", variance, "weighted_mu"), self.x0[:50]
        loss = d.loss(lambda x, t: np.cos(x), x0, np.random.default_rng(5)).item()
        x_t, ts, eps = seen_by(d, x0, np.random.default_rng(5))
        beta = np.linspace(1e-3, 0.3, 20)
        total = 0.0
        for x, start, t in zip(x_t, x0, ts):
            bar, before = np.prod(1 - beta[: t + 1]), np.prod(1 - beta[:t])
            tilde = beta[t] * (1 - before) / (1 - bar) if t else beta[1] * beta[0] / (1 - (1 - beta[0]) * (1 - beta[1]))
            sigma2 = beta[t] if variance == "large" and t else tilde
            mu_tilde = (np.sqrt(before) * beta[t] * b * start + np.sqrt(1 - beta[t]) * (1 - before) * x) / (1 - bar)
            eps_theta = np.cos(x / np.sqrt(b * b * bar + 1 - bar))
            mu_theta = (x - beta[t] / np.sqrt(1 - bar) * eps_theta) / np.sqrt(1 - beta[t])
            total += ((mu_tilde - mu_theta) ** 2).mean() / (2 * sigma2) / len(x0)
        assert math.isclose(loss, total, rel_tol=1e-9)

    @pytest.mark.parametrize("gamma", [5.0, 0.5])
    @pytest.mark.parametrize("b", [1.0, 0.5])
    def test_min_snr_is_one_loss_whatever_the_objective(self, gamma, b):
        """Each counts an error in x_0 min(SNR, gamma) times."""
        s = linear(100, 1e-3, 0.1, b=b)
        losses = []
        for objective in OBJECTIVES:
            d = Diffusion(s, objective, loss_type="min_snr", min_snr_gamma=gamma)

            def model(x, t, d=d):  # knows eps but for 0.1, and tells it as the objective wants it
                x_t, t, eps = seen_by(d, self.x0, np.random.default_rng(7))
                x0 = (x_t - np.sqrt(column(1 - s.alpha_bar, t)) * (eps + 0.1)) / (b * np.sqrt(column(s.alpha_bar, t)))
                return d.target(x0, t, eps + 0.1)

            losses.append(d.loss(model, self.x0, np.random.default_rng(7)).item())
        t = seen_by(d, self.x0, np.random.default_rng(7))[1]
        snr = b * b * s.alpha_bar[t] / (1 - s.alpha_bar[t])
        np.testing.assert_allclose(losses, (np.minimum(snr, gamma) / snr * 0.01).mean(), rtol=1e-9)

    def test_min_snr_weights_as_published(self):
        """Hang et al. 2023: min(SNR, gamma) / SNR, min(SNR, gamma), min(SNR, gamma) / (SNR + 1)."""
        s = linear(3, 0.1, 0.9)
        bar = np.cumprod([0.9, 0.5, 0.1])
        snr = bar / (1 - bar)
        assert snr[0] > 5 > snr[1]
        weights = {"eps": np.minimum(snr, 5) / snr, "x0": np.minimum(snr, 5), "v": np.minimum(snr, 5) / (snr + 1)}
        for objective, weight in weights.items():
            d = Diffusion(s, objective, loss_type="min_snr")
            assert d.min_snr_gamma == 5
            x0 = self.x0[:100]
            x_t, t, eps = seen_by(d, x0, np.random.default_rng(1))
            expected = (column(weight, t) * d.target(x0, t, eps) ** 2).mean()
            assert math.isclose(d.loss(zeros, x0, np.random.default_rng(1)).item(), expected, rel_tol=1e-12)

    @given(p=processes(1e-3), seed=SEEDS)
    def test_vlb_is_T_times_the_mean_of_its_terms(self, p, seed):
        d, x0, t, eps = p
        d = Diffusion(d.schedule, d.objective, loss_type="vlb")
        x_t, t, eps = seen_by(d, x0, np.random.default_rng(seed))
        model = lambda x, t: 0.1 * np.sin(x)
        terms = vlb_terms(d, x0, x_t, t, d.predict(model, x_t, t)[0]).data
        assert math.isclose(d.loss(model, x0, np.random.default_rng(seed)).item(), d.T * terms.mean(), rel_tol=1e-9)

    def test_hybrid_is_simple_plus_a_thousandth_of_the_bound(self):
        s = linear(100)
        hybrid, vlb = (Diffusion(s, variance="learned_range", loss_type=loss) for loss in ("hybrid", "vlb"))
        model = lambda x, t: np.concatenate([0.3 * x, np.sin(x)], axis=-1)
        x0 = self.x0[:20]
        simple = Diffusion(s).loss(lambda x, t: 0.3 * x, x0, np.random.default_rng(0)).item()
        bound = vlb.loss(model, x0, np.random.default_rng(0)).item()
        expected = simple + 0.001 * bound
        assert math.isclose(hybrid.loss(model, x0, np.random.default_rng(0)).item(), expected, rel_tol=1e-12)

    def test_in_hybrid_the_bound_teaches_the_variance_only(self):
        """The gradient of the prediction is that of the simple loss, that of the variance 0.001 times the bound's."""
        s, x0 = linear(100), self.x0[:20]
        w, v = Parameter(np.array([[[[0.3]]]])), Parameter(np.array([[[[0.2]]]]))

        model = lambda x, t: concat(Tensor(x) * w, Tensor(x) * v)
        hybrid, vlb = (
            backward(Diffusion(s, "eps", "learned_range", loss).loss(model, x0, np.random.default_rng(0)))
            for loss in ("hybrid", "vlb")
        )
        simple = backward(Diffusion(s).loss(lambda x, t: Tensor(x) * w, x0, np.random.default_rng(0)))
        np.testing.assert_allclose(hybrid[w], simple[w], rtol=1e-12)
        np.testing.assert_allclose(hybrid[v], 0.001 * vlb[v], rtol=1e-9)
        assert abs(vlb[w] - simple[w]).item() > 1e-3 and hybrid[v].item() != 0

    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("loss_type", LOSSES)
    def test_gradients(self, objective, loss_type):
        """Against central differences, for every loss and objective."""
        variances = ["learned_range"] if loss_type == "hybrid" else ["small", "large"]
        variances += ["learned_range"] if loss_type == "vlb" else []
        for variance in variances:
            d = Diffusion(linear(4, 0.05, 0.5, b=0.8), objective, variance, loss_type)
            x0 = np.round(self.x0[:12] * 127.5 + 0.5) / 127.5 - 1 / 255
            w = Parameter(np.array([0.3, -0.2] if variance == "learned_range" else [0.3]))

            def loss(w=w, d=d, x0=x0):
                return d.loss(lambda x, t: Tensor(x) * w + 0.1 * w, x0, np.random.default_rng(2))

            gradient, h = backward(loss())[w], 1e-6
            for i in range(len(w.data)):
                values = []
                for sign in (1, -1):
                    moved = w.data.copy()
                    moved[i] += sign * h
                    if loss_type == "hybrid" and i == 0:  # the bound does not see it: differentiate the simple loss
                        moved = Parameter(moved[:1])
                        plain = Diffusion(d.schedule, objective)
                        values.append(loss(moved, plain).item())
                    else:
                        values.append(loss(Parameter(moved)).item())
                assert math.isclose(gradient[i], (values[0] - values[1]) / (2 * h), rel_tol=1e-5, abs_tol=1e-9)


class TestDiffusionBadInput:
    d = Diffusion(linear(10))
    x = np.zeros((2, 4, 4, 1))

    def test_names(self):
        s = linear(10)
        with pytest.raises(ValueError, match="objective: unknown 'noise'; known: eps, x0, v"):
            Diffusion(s, objective="noise")
        with pytest.raises(ValueError, match="variance: unknown 'tiny'; known: small, large, learned_range"):
            Diffusion(s, variance="tiny")
        with pytest.raises(ValueError, match="spacing: unknown 'karras'; known: trailing, leading, linspace"):
            Diffusion(linear(10), spacing="karras")
        with pytest.raises(
            ValueError, match="loss_type: unknown 'l2'; known: simple, weighted_eps, weighted_mu, min_snr, vlb, hybrid"
        ):
            Diffusion(s, loss_type="l2")
        with pytest.raises(TypeError, match="schedule: expected a Schedule from make_schedule, got str"):
            Diffusion("linear")

    @pytest.mark.parametrize("t", [[0, 10], [-1, 0]])
    def test_timesteps_out_of_range(self, t):
        with pytest.raises(ValueError, match="t: timesteps run from 0 to 9, got"):
            self.d.q_sample(self.x, np.array(t), self.x)

    def test_timesteps_of_the_wrong_shape_or_type(self):
        with pytest.raises(ValueError, match="t: expected 2 timesteps, one for each image, got shape"):
            self.d.q_sample(self.x, np.array([1]), self.x)
        for bad, named in ((np.array([0.0, 1.0]), "float64"), ([0, 1], "list"), (3, "int")):
            with pytest.raises(TypeError, match=f"t: expected a NumPy array of integers, got {named}"):
                self.d.q_sample(self.x, bad, self.x)

    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("method", ["predict_x0", "predict_eps", "target", "posterior_mean", "eps_from_x0"])
    def test_timesteps_whatever_is_predicted(self, method, objective):
        """Also where they are not needed for the numbers."""
        diffusion, x = Diffusion(make_schedule("linear", 10, beta_end=0.9), objective), np.zeros((2, 4, 4, 1))
        call = getattr(diffusion, method)
        bad = [
            ([1, 2], TypeError),
            (np.array([0.5, 1]), TypeError),
            (np.array([1]), ValueError),
            (np.array([1, 10]), ValueError),
        ]
        for t, error in bad if method != "target" or objective == "v" else []:
            arguments = (x, x, t) if method == "posterior_mean" else (x, t, x)
            with pytest.raises(error, match="t: "):
                call(*arguments)

    def test_noise_of_another_shape(self):
        with pytest.raises(ValueError, match=r"eps: expected the shape of the images, \(2, 4, 4, 1\), got \(4, 4, 1\)"):
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

    def test_a_loss_that_does_not_train_what_is_learned(self):
        for loss_type in set(LOSSES) - {"vlb", "hybrid"}:
            with pytest.raises(ValueError, match=f"loss_type: '{loss_type}' cannot train variance 'learned_range'"):
                Diffusion(linear(10), variance="learned_range", loss_type=loss_type)
        for variance in ("small", "large"):
            with pytest.raises(
                ValueError, match=f"'hybrid' trains variance 'learned_range', but variance is '{variance}"
            ):
                Diffusion(linear(10), variance=variance, loss_type="hybrid")

    def test_zero_terminal_snr(self):
        s = make_schedule("cosine", 10, zero_terminal_snr=True)
        for objective, loss_type, named in (
            ("eps", "simple", "objective: .* take 'v' or 'x0', not 'eps'$"),
            ("v", "weighted_eps", "loss_type: .* the weight is infinite; take another than 'weighted_eps'$"),
            ("x0", "min_snr", "loss_type: .* the weight is 0, .* take another than 'min_snr'$"),
        ):
            with pytest.raises(ValueError, match=named) as error:
                Diffusion(s, objective, loss_type=loss_type)
            assert "the schedule ends with alpha_bar = 0 (zero terminal SNR), where the" in str(error.value)
        for objective in ("x0", "v"):
            for variance, loss_type in (("small", "weighted_mu"), ("large", "vlb"), ("learned_range", "vlb")):
                Diffusion(s, objective, variance, loss_type)

    @pytest.mark.parametrize("gamma", [0, -1, math.nan])
    def test_min_snr_gamma(self, gamma):
        with pytest.raises(ValueError, match="min_snr_gamma: expected a number > 0, got"):
            Diffusion(linear(10), min_snr_gamma=gamma)

    @pytest.mark.parametrize(
        ("low", "high", "remedy"),
        [
            (0, 1, "; if black is 0 and white is 1, take x0 / 0.5 - 1"),
            (0, 0.3, "; if black is 0 and white is 1, take x0 / 0.5 - 1"),
            (0, 255, "; if black is 0 and white is 255, take x0 / 127.5 - 1"),
            (0, 2e4, "; if black is 0 and white is 65535, take x0 / 32767.5 - 1"),
            (-0.5, 0.5, ""),
            (-0.42, 2.82, ""),
            (-2.1, 0, ""),
            (-1e9, 0.5, ""),
            (255, 255, "; if black is 0 and white is 255, take x0 / 127.5 - 1"),
        ],
    )
    def test_images_on_another_scale_are_warned_about_once(self, low, high, remedy):
        """With the range that was seen, and what is to be done; it points to the caller."""
        rng, x0, d = np.random.default_rng(0), np.linspace(low, high, 1024).reshape(4, 16, 16, 1), Diffusion(linear(9))
        with pytest.warns(UserWarning) as seen:
            for batch in (0 * x0, x0, x0, 0.9 * x0):  # what tells nothing counts as nothing
                d.loss(zeros, batch, rng)
        expected = f"x0: expected images in [-1, 1], got values from {low:.3g} to {high:.3g}{remedy}"
        assert [(str(w.message), w.filename) for w in seen] == [(expected, __file__)]

    @pytest.mark.parametrize(
        "x0",
        [np.zeros((2, 32, 32, 1)), np.linspace(0, 1, 32).reshape(2, 4, 4, 1), np.linspace(-0.6, 0.1, 2048)],
        ids=len,
    )
    def test_images_that_may_be_as_they_are_are_not(self, x0):
        """Of one colour, too few to tell, dark."""
        Diffusion(linear(9)).loss(zeros, x0.reshape(2, 4, -1, 1), np.random.default_rng(0))

    def test_images_that_are_no_array(self):
        for images in (self.x.tolist(), Tensor(self.x)):
            for use in (
                lambda x: self.d.loss(zeros, x, np.random.default_rng(0)),
                lambda x: self.d.bits_per_dim(zeros, x),
            ):
                with pytest.raises(TypeError, match=f"x0: expected an array of images, got {type(images).__name__}"):
                    use(images)

    def test_everything_of_another_shape(self):
        x, small, t = self.x, self.x[:, :2], np.array([0, 1])
        for objective in OBJECTIVES:
            d = Diffusion(linear(10), objective)
            for name, use in {
                "eps": [d.q_step, d.q_sample, d.target],
                "prediction": [d.predict_x0, d.predict_eps],
                "x0": [d.eps_from_x0, lambda x, t, other, d=d: d.posterior_mean(other, x, t)],
            }.items():
                for f in use:
                    message = rf"^{name}: expected the shape of the images, \(2, 4, 4, 1\), got \(2, 2, 4, 1\)"
                    with pytest.raises(ValueError, match=message):
                        f(x, t, small)

    def test_a_learned_variance_that_is_not_given(self):
        d = Diffusion(linear(10), variance="learned_range", loss_type="vlb")
        for use in (lambda x, t: d.log_variance(x, t), lambda x, t: vlb_terms(d, x, x, t, x)):
            with pytest.raises(
                ValueError, match="^spread: with variance 'learned_range' it is needed, the second half of"
            ):
                use(self.x, np.array([0, 1]))

    def test_a_diffusion_cannot_be_changed(self):
        with pytest.raises(AttributeError):
            self.d.objective = "x0"
        changed = dataclasses.replace(self.d, objective="x0")
        assert changed.objective == "x0" and changed.schedule is self.d.schedule and changed != self.d
