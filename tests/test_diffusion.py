"""Schedule, forward process, posterior, loss and sampler against the formulas of Ho et al. 2020."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyddpm import Diffusion, Schedule, UNet, backward, make_schedule, sample
from tinyddpm.sample import SAMPLERS, SHARD, ddpm
from tinyddpm.schedule import linear_beta
from tinyddpm.tensor import Parameter, Tensor

TABLES = ["alpha", "alpha_bar", "alpha_bar_prev", "snr", "posterior_mean_x0", "posterior_mean_xt", "posterior_variance",
          "posterior_log_variance"]  # fmt: skip


def linear(T, beta_start=1e-4, beta_end=0.02):
    """A linear schedule that need not end at pure noise."""
    return Schedule(linear_beta(T, beta_start, beta_end))


schedules = st.builds(
    lambda T, a, b: linear(T, min(a, b), max(a, b)),
    st.integers(1, 200), st.floats(1e-5, 0.5), st.floats(1e-5, 0.5),
)  # fmt: skip


def zeros(x, t):
    return np.zeros_like(x)


class TestSchedule:
    @pytest.mark.parametrize(
        ("T", "last"),
        [
            (50, 0.603),
            (100, 0.364),
            (200, 0.132),
            (250, 0.0797),
            (300, 0.0481),
            (400, 0.0175),
            (500, 0.0064),
            (1000, 4.036e-5),
        ],
    )
    def test_what_the_linear_schedule_leaves_of_the_image(self, T, last):
        assert math.isclose(linear(T).alpha_bar[-1], last, rel_tol=8e-3)

    def test_published_values(self):
        s = make_schedule("linear", 1000)
        assert (
            s.beta[0] == 1e-4 and s.beta[-1] == 0.02 and math.isclose(s.beta[1] - s.beta[0], 0.0199 / 999, rel_tol=1e-9)
        )
        assert math.isclose(s.alpha_bar[-1], 4.036e-5, rel_tol=1e-3)
        assert math.isclose(s.posterior_variance[1], 5.4532e-5, rel_tol=1e-4)
        assert s.posterior_variance[0] == 0
        assert math.isclose(s.posterior_log_variance[0], -9.8167, abs_tol=1e-4)
        assert s.posterior_log_variance[0] == s.posterior_log_variance[1]
        assert math.isclose(s.posterior_mean_x0[0], 1, rel_tol=1e-12) and s.posterior_mean_xt[0] == 0

    @given(s=schedules)
    def test_tables_step_by_step(self, s):
        bar = 1.0
        for t in range(len(s)):
            before, bar = bar, bar * (1 - s.beta[t])
            assert s.alpha[t] == 1 - s.beta[t]
            assert math.isclose(s.alpha_bar[t], bar, rel_tol=1e-12) and math.isclose(
                s.alpha_bar_prev[t], before, rel_tol=1e-12
            )
            assert math.isclose(s.snr[t], bar / (1 - bar), rel_tol=1e-9)
            assert math.isclose(
                s.posterior_variance[t], s.beta[t] * (1 - before) / (1 - bar), rel_tol=1e-9, abs_tol=1e-300
            )
            x0, xt = math.sqrt(before) * s.beta[t] / (1 - bar), math.sqrt(1 - s.beta[t]) * (1 - before) / (1 - bar)
            assert math.isclose(s.posterior_mean_x0[t], x0, rel_tol=1e-9) and math.isclose(
                s.posterior_mean_xt[t], xt, rel_tol=1e-9
            )
            if t > 0:
                assert math.isclose(s.posterior_log_variance[t], math.log(s.posterior_variance[t]), rel_tol=1e-12)

    def test_one_step(self):
        s = linear(1)
        assert s.alpha_bar[0] == 1 - s.beta[0] and s.posterior_log_variance[0] == math.log(s.beta[0])

    @pytest.mark.parametrize("name", ["beta", *TABLES])
    def test_tables_are_float64_of_length_T_and_read_only(self, name):
        s = linear(7)
        table = getattr(s, name)
        assert table.dtype == np.float64 and table.shape == (7,) and len(s) == 7
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0
        assert getattr(s, name) is table
        with pytest.raises(AttributeError):
            setattr(s, name, table)

    def test_a_given_beta_is_copied(self):
        beta = np.array([0.1, 0.2])
        s = Schedule(beta)
        beta[0] = 0.9
        assert s.beta[0] == 0.1 and s.name == "custom"

    @pytest.mark.parametrize("beta", [[], [0.0, 0.1], [0.1, 1.0], [[0.1]], [0.1, np.nan]])
    def test_bad_beta(self, beta):
        with pytest.raises(ValueError, match=r"beta: expected a vector of one or more numbers in \(0, 1\)"):
            Schedule(beta)

    def test_a_schedule_that_ends_far_from_noise_is_warned_about(self):
        with pytest.warns(
            UserWarning, match="'linear' with T = 50 ends far from pure noise: its last alpha_bar is 0.603"
        ):
            make_schedule("linear", 50)
        make_schedule("linear", 1000)  # pytest makes an error of any other warning

    def test_numbers_of_numpy_are_numbers(self):
        s = make_schedule("linear", np.int64(1000), beta_end=np.float32(0.25))
        assert len(s) == 1000 and s.parameters == {"beta_end": 0.25} and type(s.parameters["beta_end"]) is float

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="name: unknown schedule 'liner'; known: linear"):
            make_schedule("liner")
        for T in (0, -1, 10.0, None):
            with pytest.raises(ValueError, match="T: expected an integer >= 1"):
                make_schedule("linear", T)
        for a, b in ((0, 0.1), (0.2, 0.1), (0.1, 1.0)):
            with pytest.raises(ValueError, match="beta_start, beta_end: expected 0 < beta_start <= beta_end < 1"):
                make_schedule("linear", 10, beta_start=a, beta_end=b)
        with pytest.raises(TypeError, match="slope"):
            make_schedule("linear", 10, slope=1)


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
        with pytest.raises(ValueError, match="objective: unknown 'noise'; known: eps, v"):
            Diffusion(s, objective="noise")
        with pytest.raises(ValueError, match="variance: unknown 'tiny'; known: small, large"):
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
        with pytest.raises(ValueError, match=r"model: expected it to return the shape of x0, .* got \(2, 4, 4, 2\)"):
            self.d.loss(lambda x, t: np.concatenate([x, x], -1), self.x, rng)


class TestSample:
    d = Diffusion(linear(30, beta_start=1e-4, beta_end=0.5))

    @pytest.mark.parametrize("variance", ["small", "large"])
    def test_the_chain_is_algorithm_2(self, variance):
        """Step by step with the paper's own form of the mean, on a model whose x0 is never clipped."""
        s, d = self.d.schedule, Diffusion(self.d.schedule, variance=variance)
        beta_tilde = s.beta * (1 - s.alpha_bar_prev) / (1 - s.alpha_bar)
        sigma = np.sqrt(beta_tilde if variance == "small" else s.beta)
        model = lambda x, t: 0.1 * x
        noises = iter(np.random.default_rng(1).standard_normal((30, 3, 2, 2, 1)))
        x = np.random.default_rng(2).standard_normal((3, 2, 2, 1))
        ours = [step for _, step, _ in ddpm(d, model, x, lambda: next(noises), clip=False)]
        z = iter(np.random.default_rng(1).standard_normal((30, 3, 2, 2, 1)))
        for t, got in zip(range(29, -1, -1), ours):
            x = (x - s.beta[t] / np.sqrt(1 - s.alpha_bar[t]) * model(x, t)) / np.sqrt(s.alpha[t])
            if t > 0:
                x = x + sigma[t] * next(z)
            np.testing.assert_allclose(got, x, rtol=1e-9)
        assert len(ours) == 30

    def test_a_model_of_v_takes_the_same_way_as_the_same_model_of_eps(self):
        s = self.d.schedule
        eps = lambda x, t: 0.1 * x
        v = lambda x, t: (eps(x, t) - np.sqrt(1 - s.alpha_bar[t[0]]) * x) / np.sqrt(s.alpha_bar[t[0]])
        ways = []
        for d, model in ((self.d, eps), (Diffusion(s, "v"), v)):
            rng = np.random.default_rng(1)
            x = rng.standard_normal((3, 2, 2, 1))
            ways.append([step for _, step, _ in ddpm(d, model, x, lambda rng=rng: rng.standard_normal((3, 2, 2, 1)))])
        np.testing.assert_allclose(ways[0], ways[1], atol=1e-9)

    def test_noise_is_added_at_every_step_but_the_last(self):
        calls = []
        list(ddpm(self.d, zeros, np.zeros((1, 2, 2, 1)), lambda: calls.append(1) or np.zeros((1, 2, 2, 1))))
        assert len(calls) == 29

    def test_it_starts_from_standard_normal_noise(self):
        seen = []
        sample(self.d, lambda x, t: seen.append(x) or zeros(x, t), (100, 10, 10, 1))
        first = np.concatenate(seen[: -(-100 // SHARD)])
        assert abs(first.mean()) < 0.05 and abs(first.var() - 1) < 0.05

    def test_an_oracle_for_one_image_arrives_at_it(self):
        target = np.random.default_rng(0).uniform(-1, 1, (4, 4, 1))

        def oracle(x_t, t):
            a = self.d.schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
            return ((x_t - np.sqrt(a) * target) / np.sqrt(1 - a)).astype(x_t.dtype)

        images = sample(self.d, oracle, (3, 4, 4, 1))
        np.testing.assert_allclose(images, np.broadcast_to(target, images.shape), atol=1e-4)

    def test_an_ideal_denoiser_of_two_images_draws_each_half_of_the_time(self):
        a, b = np.full((1, 1, 1), -0.5), np.full((1, 1, 1), 0.5)
        d = Diffusion(linear(200, beta_start=5e-4, beta_end=0.1))

        def ideal(x, t):  # E[eps | x_t], a softmax over the data
            bar = d.schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
            wa, wb = (np.exp(-((x - np.sqrt(bar) * y) ** 2) / (2 * (1 - bar))) + 1e-300 for y in (a, b))
            x0 = (wa * a + wb * b) / (wa + wb)
            return ((x - np.sqrt(bar) * x0) / np.sqrt(1 - bar)).astype(x.dtype)

        images = sample(d, ideal, (400, 1, 1, 1))
        assert np.abs(np.abs(images) - 0.5).max() < 0.02
        assert 0.4 < (images > 0).mean() < 0.6

    def test_clipping(self):
        big = lambda x, t: -100 * np.ones_like(x)
        kept, wild = (sample(self.d, big, (2, 2, 2, 1), clip=c) for c in (True, False))
        assert np.abs(kept).max() <= 1 and np.abs(wild).max() > 1

    def test_an_image_depends_neither_on_the_others_nor_on_the_workers(self):
        unet = UNet(channels=(4, 8), blocks=1, attention=(False, True), groups=2)
        for p in unet.parameters():
            p.data = (p.data + 0.1 * np.random.default_rng(0).standard_normal(p.shape)).astype(np.float32)
        n = 2 * SHARD + 3
        images = [sample(self.d, unet, (n, 4, 4, 1), rng=5, workers=w) for w in (1, 2, 3)]
        np.testing.assert_array_equal(images[0], images[1])
        np.testing.assert_array_equal(images[0], images[2])
        for fewer in (1, 4, SHARD + 1):  # other shapes of matrix may round differently
            np.testing.assert_allclose(images[0][:fewer], sample(self.d, unet, (fewer, 4, 4, 1), rng=5), atol=1e-3)
        assert len({image.tobytes() for image in images[0]}) == n
        assert np.abs(sample(self.d, unet, (n, 4, 4, 1), rng=6) - images[0]).max() > 0.1

    def test_every_shard_gets_its_own_timesteps(self, monkeypatch):
        def odd(diffusion, model, x, noise, clip):
            yield 0, model(x, np.arange(len(x))), x

        monkeypatch.setitem(SAMPLERS, "odd", odd)
        ts = sample(self.d, lambda x, t: 0 * x + t.reshape(-1, 1, 1, 1).astype(x.dtype), (20, 2, 2, 1), method="odd")
        assert ts[:, 0, 0, 0].tolist() == list(range(20))

    def test_the_callback_sees_every_step(self):
        seen = []
        last = sample(self.d, zeros, (2, 2, 2, 1), callback=lambda t, x, x0: seen.append((t, x, x0)))
        assert [t for t, _, _ in seen] == list(range(29, -1, -1))
        np.testing.assert_array_equal(seen[-1][1], last)
        np.testing.assert_array_equal(seen[-1][2], last)  # at t = 0 the mean is the predicted x0

    def test_it_takes_models_that_return_tensors_and_draws_in_their_dtype(self):
        class Model:
            dtype = np.dtype("float64")

            def __call__(self, x, t):
                return Tensor(x) * 0.1

        assert sample(self.d, Model(), (1, 2, 2, 1)).dtype == np.float64
        assert sample(self.d, zeros, (1, 2, 2, 1)).dtype == np.float32

    def test_no_graph_is_kept_in_the_workers(self):
        w, nodes = Parameter(np.ones(1, np.float32)), []

        def model(x, t):
            y = Tensor(x) * w
            nodes.append(y.node)
            return y

        sample(self.d, model, (1, 2, 2, 1))
        assert set(nodes) == {None}

    def test_bad_input(self):
        with pytest.raises(ValueError, match="method: unknown sampler 'dpm'; known: ddpm"):
            sample(self.d, zeros, (1, 2, 2, 1), method="dpm")
        for shape in ((2, 2, 1), (0, 2, 2, 1), 16):
            with pytest.raises(ValueError, match=r"shape: expected \(N, H, W, C\), each at least 1"):
                sample(self.d, zeros, shape)
        with pytest.raises(
            ValueError, match="steps: 'ddpm' takes all 30 steps of the schedule; leave steps out, got 10"
        ):
            sample(self.d, zeros, (1, 2, 2, 1), steps=10)
        for workers in (0, 1.5):
            with pytest.raises(ValueError, match=f"workers: expected an integer >= 1, got {workers}"):
                sample(self.d, zeros, (1, 2, 2, 1), workers=workers)
        for model in (lambda x, t: x[..., :1], lambda x, t: x[:1], lambda x, t: np.concatenate([x, x], -1)):
            with pytest.raises(ValueError, match=r"model: expected it to return the shape of x_t, \(2, 2, 2, 3\), got"):
                sample(self.d, model, (2, 2, 2, 3))
        with pytest.raises(FloatingPointError, match="model: it led to images that are not finite"):
            sample(self.d, lambda x, t: x * np.float32(np.nan), (1, 2, 2, 1))
        sample(self.d, zeros, (1, 2, 2, 1), steps=30)
