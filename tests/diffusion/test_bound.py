"""The variational bound: its Gaussians and grey levels, its terms against numerical integration, bits per dimension."""

import math

import numpy as np
import pytest
from gradcheck import check_model
from hypothesis import given, settings
from hypothesis import strategies as st
from ideal import ideal_denoiser
from strategies import SEEDS, make

from tinyddpm import Diffusion, Schedule, UNet, backward, make_schedule
from tinyddpm.autograd.tensor import Parameter
from tinyddpm.diffusion.bound import BitsPerDim, discretised_gaussian, gaussian_kl, prior_terms, vlb_terms
from tinyddpm.diffusion.checks import OBJECTIVES
from tinyddpm.diffusion.schedule import linear

LEVELS = np.arange(256) / 127.5 - 1
moderate = st.floats(-3, 3)


def zeros(x, t):
    return np.zeros_like(x)


def normal_cdf(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


class TestGaussianKL:
    @given(m1=moderate, v1=moderate, m2=moderate, v2=moderate)
    def test_it_is_the_integral_of_p_ln_p_over_q(self, m1, v1, m2, v2):
        kl = gaussian_kl(*(np.array([a]) for a in (m1, v1, m2, v2))).item()
        s = math.exp(v1 / 2)
        x = m1 + s * np.linspace(-12, 12, 20_001)
        log_p = -0.5 * ((x - m1) ** 2 / math.exp(v1) + v1 + math.log(2 * math.pi))
        log_q = -0.5 * ((x - m2) ** 2 / math.exp(v2) + v2 + math.log(2 * math.pi))
        integral = (np.exp(log_p) * (log_p - log_q)).sum() * (x[1] - x[0])
        assert math.isclose(kl, integral, rel_tol=1e-9, abs_tol=1e-9) and kl >= -1e-12

    def test_it_is_zero_for_the_same_and_elementwise(self):
        a = np.random.default_rng(0).standard_normal((2, 3))
        np.testing.assert_array_equal(gaussian_kl(a, a, a, a).data, 0)
        assert gaussian_kl(a, a, a[:1], a[:, :1]).shape == (2, 3)

    def test_gradients(self):
        rng = np.random.default_rng(0)
        four = [Parameter(rng.standard_normal((2, 3))) for _ in range(4)]
        check_model(lambda: gaussian_kl(*four).sum(), four, rng)


class TestDiscretisedGaussian:
    @given(mean=st.floats(-2, 2), log_std=st.floats(-8, 1))
    def test_the_256_levels_add_up_to_1(self, mean, log_std):
        ln_p = discretised_gaussian(LEVELS, np.full(256, mean), np.full(256, 2 * log_std)).data
        assert math.isclose(np.exp(ln_p).sum(), 1, abs_tol=256e-12 + 1e-12)

    @given(k=st.integers(0, 255), mean=st.floats(-1.2, 1.2), log_std=st.floats(-5, 1))
    def test_each_is_an_integral_of_the_density(self, k, mean, log_std):
        x, s = k / 127.5 - 1, math.exp(log_std)
        lower, upper = (x - 1 / 255 - mean) / s, (x + 1 / 255 - mean) / s
        p = (1 if k == 255 else normal_cdf(upper)) - (0 if k == 0 else normal_cdf(lower))
        ours = discretised_gaussian(np.array([x]), np.array([mean]), np.array([2 * log_std])).item()
        assert math.isclose(ours, math.log(max(p, 1e-12)), abs_tol=1e-9 + 1e-15 / max(p, 1e-12))

    def test_at_least_a_millionth_of_a_millionth(self):
        far = discretised_gaussian(LEVELS[128:129], np.array([5.0]), np.array([-4.0])).item()
        assert math.isclose(far, math.log(1e-12))

    def test_gradients(self):
        rng = np.random.default_rng(0)
        x0 = LEVELS[[0, 255, 100, 101, 30, 200]]
        mean, log_variance = Parameter(x0 + 0.02 * rng.standard_normal(6)), Parameter(rng.uniform(-7, -2, 6))
        check_model(lambda: discretised_gaussian(x0, mean, log_variance).sum(), [mean, log_variance], rng)

    @pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
    @pytest.mark.parametrize("away", [-6.5, -3.0, -0.5, 0.0, 0.5, 3.0, 6.5])
    def test_float32_keeps_its_digits_on_either_side(self, level, away):
        """Far out, two values of the cumulative distribution close to 1 would leave nothing of their difference."""
        x0, log_variance = LEVELS[[level]], np.array([-9.5])
        exact, ours = [], []
        for dtype, results in ((np.float64, exact), (np.float32, ours)):
            mean = Parameter((x0 + away * np.exp(log_variance / 2)).astype(dtype))
            spread = Parameter(log_variance.astype(dtype))
            ln_p = discretised_gaussian(x0.astype(dtype), mean, spread)
            assert ln_p.dtype == dtype
            gradients = backward(ln_p.sum())
            results += [ln_p.item(), gradients[mean].item(), gradients[spread].item()]
        np.testing.assert_allclose(ours, exact, rtol=2e-4, atol=2e-3)


def bits_by_integration(data, x0, schedule, variance="small", x0hat=None):
    """Every term of the bound for one grey level x0 by brute force, in bits: prior, L_0 ... L_{T-1}.

    p_theta's mean rests on x0hat(x_t, t), by default the ideal denoiser for levels `data`; all in plain Python floats
    but for the sums over a grid of 4001 values of x_t.
    """
    beta, b = [float(x) for x in schedule.beta], schedule.input_scale
    bar = [math.prod(1 - x for x in beta[: t + 1]) for t in range(len(beta))]
    tilde = [beta[t] * (1 - bar[t - 1]) / (1 - bar[t]) if t else 0.0 for t in range(len(beta))]
    tilde[0] = tilde[1]
    terms = []
    for t in range(len(beta)):
        before = bar[t - 1] if t else 1.0
        mean, var = math.sqrt(bar[t]) * b * x0, 1 - bar[t]
        x = mean + math.sqrt(var) * np.linspace(-9, 9, 4001)
        q = np.exp(-((x - mean) ** 2) / (2 * var))
        q /= q.sum()
        if x0hat is None:
            w = np.exp(-((x[:, None] - math.sqrt(bar[t]) * b * data) ** 2) / (2 * var))
            guess = (w * data).sum(1) / w.sum(1)
        else:
            guess = x0hat(x, t)
        on_x0, on_xt = (
            math.sqrt(before) * beta[t] / (1 - bar[t]) * b,
            math.sqrt(1 - beta[t]) * (1 - before) / (1 - bar[t]),
        )
        sigma2 = beta[t] if variance == "large" and t > 0 else tilde[t]
        if t == 0:
            s = math.sqrt(sigma2)
            upper, lower = (
                np.vectorize(normal_cdf)((b * (x0 + e / 255) - on_x0 * guess - on_xt * x) / s) for e in (1, -1)
            )
            upper, lower = (1.0 if x0 > 0.999 else upper), (0.0 if x0 < -0.999 else lower)
            nats = -np.log(np.maximum(upper - lower, 1e-12))
        else:
            nats = 0.5 * (tilde[t] / sigma2 - 1 - math.log(tilde[t] / sigma2) + (on_x0 * (x0 - guess)) ** 2 / sigma2)
        terms.append((q * nats).sum() / math.log(2))
    prior = 0.5 * (1 - bar[-1] - 1 - math.log(1 - bar[-1]) + bar[-1] * (b * x0) ** 2) / math.log(2)
    return prior, np.array(terms)


class TestTerms:
    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize(("variance", "b"), [("small", 1.0), ("large", 1.0), ("small", 0.5), ("large", 2.0)])
    def test_expected_over_x_t_they_are_what_integration_says(self, objective, variance, b):
        """E over x_t by Gauss-Hermite quadrature over eps, not by random samples: equal to 1e-4; the bins of L_0, which
        are not smooth, to 2e-3."""
        data = np.array([LEVELS[10], LEVELS[128], LEVELS[255]])
        s = Schedule(linear(12, 2e-2, 0.4), b)
        d = Diffusion(s, objective, variance)
        model = ideal_denoiser(data.reshape(3, 1, 1, 1), d)
        nodes, weights = np.polynomial.hermite_e.hermegauss(180)
        weights = weights / weights.sum()
        eps = nodes.reshape(-1, 1, 1, 1)
        for x0 in data:
            prior, terms = bits_by_integration(data, x0, s, variance)
            images = np.full_like(eps, x0)
            assert math.isclose(prior_terms(d, images).data[0], prior, rel_tol=1e-9)
            for t in range(d.T):
                ts = np.full(len(eps), t)
                x_t = d.q_sample(images, ts, eps)
                bits = vlb_terms(d, images, x_t, ts, d.predict(model, x_t, ts)[0])
                assert bits.shape == (len(eps),)
                assert math.isclose(
                    (weights * bits.data).sum(), terms[t], rel_tol=2e-3 if t == 0 else 1e-4, abs_tol=1e-6
                )

    def test_prior(self):
        d = Diffusion(make_schedule("linear", 1000))
        assert math.isclose(prior_terms(d, np.ones((2, 3, 3, 1))).data[0], 2.9e-5, rel_tol=0.01)
        np.testing.assert_allclose(
            prior_terms(d, np.array([0.0, 1.0]).reshape(2, 1, 1, 1)).data, [0, 2.911e-5], atol=4e-9
        )

    def test_mixed_timesteps_give_each_image_its_own_term(self):
        rng = np.random.default_rng(0)
        x0, x_t, prediction, v = rng.standard_normal((4, 5, 3, 3, 2)).clip(-1, 1)
        t = np.array([0, 3, 9, 0, 1])
        for variance, vs in (("small", None), ("learned_range", v)):
            d = Diffusion(Schedule(linear(10, 1e-2, 0.3), 0.7), "v", variance, "vlb")
            together = vlb_terms(d, x0, x_t, t, prediction, vs).data
            for i in range(5):
                one = slice(i, i + 1)
                alone = vlb_terms(d, x0[one], x_t[one], t[one], prediction[one], None if vs is None else vs[one])
                np.testing.assert_allclose(together[one], alone.data, rtol=1e-12)

    def test_a_learned_variance_at_either_end_is_the_fixed_one(self):
        rng = np.random.default_rng(0)
        x0, x_t, prediction = rng.standard_normal((3, 4, 2, 2, 1)).clip(-1, 1)
        t, s = np.array([1, 5, 9, 2]), Schedule(linear(10, 1e-2, 0.3))
        learned = Diffusion(s, "eps", "learned_range", "vlb")
        for variance, end in (("small", -1.0), ("large", 1.0)):
            fixed = vlb_terms(Diffusion(s, "eps", variance), x0, x_t, t, prediction).data
            np.testing.assert_allclose(vlb_terms(learned, x0, x_t, t, prediction, 0 * x0 + end).data, fixed, rtol=1e-9)

    def test_clipping_the_predicted_x0(self):
        d = Diffusion(Schedule(linear(10, 1e-2, 0.3)), "x0")
        x0, t = np.full((1, 2, 2, 1), 0.5), np.array([4])
        far, at_one = (vlb_terms(d, x0, x0, t, 0 * x0 + p, clip=c).item() for p, c in ((3.0, True), (1.0, False)))
        assert far == at_one < vlb_terms(d, x0, x0, t, 0 * x0 + 3).item()


class TestBitsPerDim:
    def test_ideal_denoiser_in_one_dimension(self):
        """Two grey levels of a picture of one pixel: the mean over images and noise is what integration says."""
        data = np.array([LEVELS[60], LEVELS[190]])
        s = Schedule(linear(15, 5e-2, 0.5))
        d = Diffusion(s)
        images = np.repeat(data, 2000).reshape(-1, 1, 1, 1)
        bits = d.bits_per_dim(ideal_denoiser(data.reshape(2, 1, 1, 1), d), images, progress=False)
        both = [bits_by_integration(data, x0, s) for x0 in data]
        np.testing.assert_allclose(bits.prior, np.mean([prior for prior, _ in both]), rtol=1e-9)
        expected = np.mean([terms for _, terms in both], axis=0)
        np.testing.assert_allclose(bits.terms, expected, rtol=0.06)
        assert math.isclose(bits.total, bits.prior + expected.sum(), rel_tol=0.02)
        assert bits.terms.shape == (15,) and bits.terms.dtype == np.float64 and type(bits.prior) is float

    @pytest.mark.slow
    def test_it_bounds_the_likelihood_that_integration_finds(self):
        """-log2 of what the reverse chain gives to a level, by carrying p(x_t) from N(0, 1) down a grid: the bound lies
        above it, and not far where steps are small."""
        data = np.array([LEVELS[60], LEVELS[190]])
        s = Schedule(linear(60, 1e-2, 0.2))
        d = Diffusion(s)
        model = ideal_denoiser(data.reshape(2, 1, 1, 1), d)
        x = np.linspace(-5, 5, 2001)
        p = np.exp(-(x**2) / 2)
        p /= p.sum()
        for t in reversed(range(d.T)):
            images = x.reshape(-1, 1, 1, 1)
            mean, log_variance, _ = d.p_mean_variance(model, images, np.full(len(x), t))
            mean, std = mean.ravel(), math.exp(log_variance.ravel()[0] / 2)
            if t > 0:
                step = np.exp(-((x[:, None] - mean) ** 2) / (2 * std**2))
                p = step @ (p / step.sum(0))
            else:
                levels = [
                    np.exp(discretised_gaussian(0 * mean + x0, mean, 0 * mean + 2 * math.log(std)).data) for x0 in data
                ]
                exact = -np.log2([(p * given_x).sum() for given_x in levels])
        bounds = np.array([prior + terms.sum() for prior, terms in (bits_by_integration(data, x0, s) for x0 in data)])
        assert np.all(exact >= 1 - 1e-6)  # nothing can store one of two equally likely levels in less than a bit
        assert np.all(exact < bounds) and np.all(bounds < exact + 1)

    @pytest.mark.parametrize("variance", ["small", "learned_range"])
    def test_on_average_the_loss_vlb_is_the_bound_without_its_prior(self, variance):
        d = Diffusion(Schedule(linear(5, 0.05, 0.5), 0.8), "v", variance, "vlb")
        x0 = np.random.default_rng(0).choice(LEVELS, (4000, 1, 1, 1))
        model = lambda x, t: np.concatenate([0.2 * x, np.sin(x)], -1)[..., : 1 if variance == "small" else 2]
        bits = d.bits_per_dim(model, x0, clip=False, progress=False)
        losses = [d.loss(model, x0, np.random.default_rng(i)).item() for i in range(10)]
        assert math.isclose(np.mean(losses), bits.terms.sum(), rel_tol=0.02)

    def test_scaling_the_input_changes_only_the_schedule(self):
        """b x_0 with alpha_bar has the log-SNR of x_0 with another alpha_bar: two such chains, in their own units, are
        one, so with the same predictions of x_0 every term but the prior and L_0's sigma agrees."""
        b = 0.5
        scaled = make_schedule("sigmoid_logsnr", 40, input_scale=b)
        shifted = make_schedule("sigmoid_logsnr", 40, shift=2 * math.log(b))
        np.testing.assert_allclose(scaled.log_snr, shifted.log_snr, rtol=1e-6, atol=1e-6)
        data = np.array([LEVELS[60], LEVELS[190]]).reshape(2, 1, 1, 1)
        images = np.repeat(data, 20, axis=0)
        terms = []
        for s in (scaled, shifted):
            d = Diffusion(s, "x0")
            terms.append(d.bits_per_dim(ideal_denoiser(data, d), images, rng=1, progress=False).terms)
        np.testing.assert_allclose(terms[0][1:], terms[1][1:], rtol=1e-4, atol=1e-9)

    @settings(max_examples=10)
    @given(seed=SEEDS)
    def test_no_other_prediction_is_better_than_the_ideal_one(self, seed):
        rng = np.random.default_rng(seed)
        data = rng.choice(LEVELS, (3, 2, 2, 1))
        d = Diffusion(Schedule(linear(8, 0.02, 0.6)), "x0")
        images, ideal, by = np.repeat(data, 50, axis=0), ideal_denoiser(data, d), rng.uniform(0.2, 0.5)
        bits = lambda model: d.bits_per_dim(model, images, clip=False, progress=False).total
        assert bits(ideal) < bits(lambda x, t: ideal(x, t) + by) and bits(ideal) < bits(
            lambda x, t: (1 - by) * ideal(x, t)
        )

    def test_an_image_s_bits_depend_neither_on_the_others_nor_on_the_workers(self):
        unet = UNet(channels=(4, 8), blocks=1, attention=(False, True), groups=2)
        for p in unet.parameters():
            p.data = (p.data + 0.1 * np.random.default_rng(0).standard_normal(p.shape)).astype(np.float32)
        d = Diffusion(make("linear", 6))
        images = np.random.default_rng(0).choice(LEVELS, (19, 4, 4, 1)).astype(np.float32)
        all_of_them, again = (d.bits_per_dim(unet, images, workers=w, progress=False) for w in (1, 3))
        np.testing.assert_array_equal(all_of_them.terms, again.terms)
        assert all_of_them.prior == again.prior
        each = [d.bits_per_dim(unet, images[: i + 1], progress=False).terms * (i + 1) for i in range(len(images))]
        total = each[0] + sum(after - before for before, after in zip(each, each[1:]))
        np.testing.assert_allclose(all_of_them.terms * len(images), total, rtol=1e-6)
        assert np.abs(d.bits_per_dim(unet, images, rng=1, progress=False).terms - again.terms).max() > 1e-6
        assert len({term.tobytes() for term in np.diff(each, axis=0)}) == len(images) - 1

    def test_a_label_goes_with_its_image_and_can_save_bits(self):
        """A model that is told which of two images it is needs no bit to say so."""
        d, data = Diffusion(make_schedule("cosine", 100)), np.array([-0.6, 0.6]).reshape(2, 1, 1, 1)
        images, labels = np.tile(data, (50, 1, 1, 1)), [0, 1] * 50  # levels 51 and 204

        def told(x, t, labels):
            known = [ideal_denoiser(data[label : label + 1], d)(x, t) for label in (0, 1)]
            return np.where(labels.reshape(-1, 1, 1, 1) == 0, *known)

        bits = lambda model, labels: d.bits_per_dim(model, images, clip=False, progress=False, labels=labels).total
        saved = bits(ideal_denoiser(data, d), None) - bits(told, labels)
        assert abs(saved - 1) < 0.15 and bits(told, labels[::-1]) > 100
        with pytest.raises(ValueError, match="labels: expected 100, one for each image, got shape"):
            bits(told, [0, 1])

    def test_it_is_computed_where_the_model_is_and_there_in_one_batch(self, on_second_gpu):
        model, went, shapes = on_second_gpu("bound")
        d, x0 = Diffusion(make("linear", 3)), np.ones((11, 2, 2, 1))
        d.bits_per_dim(model, x0, progress=False)
        assert set(went) == {"cuda:1"} and set(shapes) == {x0.shape}
        shapes.clear()
        d.bits_per_dim(lambda x, t: shapes.append(x.shape) or 0 * x, x0, progress=False)
        assert set(shapes) == {(4, 2, 2, 1), (3, 2, 2, 1)}

    def test_the_result_cannot_be_changed_and_is_equal_to_itself_only(self):
        bits, other = (BitsPerDim(0.5, np.array([1.0, 0.25])) for _ in range(2))
        assert bits.total == 1.75 and bits == bits and bits != other
        with pytest.raises(AttributeError):
            bits.prior = 0

    def test_clip_and_dtype(self):
        x0 = np.random.default_rng(0).choice(LEVELS, (3, 2, 2, 1))
        seen = []

        class Model:
            dtype = np.dtype("float32")

            def __call__(self, x, t):
                seen.append(x.dtype)
                return 0 * x + 3

        d = Diffusion(make("linear", 4), "x0")
        clipped, free = (d.bits_per_dim(Model(), x0, clip=c, progress=False).total for c in (True, False))
        assert clipped < free and set(seen) == {np.dtype("float32")}
        assert clipped == d.bits_per_dim(Model(), x0, progress=False).total

    def test_a_bar_shows_the_progress_unless_told_not_to(self, capsys):
        d, x0 = Diffusion(make("linear", 4)), np.full((2, 1, 1, 1), LEVELS[3])
        d.bits_per_dim(zeros, x0, progress=False)
        assert capsys.readouterr().err == ""
        d.bits_per_dim(zeros, x0)
        assert "bits/dim: 100%" in (shown := capsys.readouterr().err) and "4/4" in shown

    def test_bad_input(self):
        d = Diffusion(make("linear", 4))
        for bad in (np.zeros((0, 2, 2, 1)), np.zeros((2, 2, 1))):
            with pytest.raises(ValueError, match="x0: expected one or more images"):
                d.bits_per_dim(zeros, bad)
        with pytest.raises(TypeError, match="x0: expected float32 or float64 images in .-1, 1., got uint8"):
            d.bits_per_dim(zeros, np.zeros((2, 2, 2, 1), np.uint8))
        with pytest.raises(ValueError, match="model: expected it to return the shape of x_t"):
            d.bits_per_dim(lambda x, t: x[:, :1], np.ones((2, 2, 2, 1)), progress=False)

    @pytest.mark.parametrize(
        "wrong", [LEVELS / 2 + 0.5, 0.999 * LEVELS, LEVELS + 2 / 255, LEVELS - 2 / 255, 255 * LEVELS]
    )
    def test_images_that_are_not_of_8_bits(self, wrong):
        d = Diffusion(make("linear", 4))
        for images in (wrong, np.append(LEVELS, np.nan)):
            with pytest.raises(
                ValueError, match="x0: expected the levels k / 127.5 - 1 of 8-bit images.* got values from"
            ):
                d.bits_per_dim(zeros, images.reshape(1, -1, 1, 1), progress=False)
        d.bits_per_dim(zeros, LEVELS.reshape(1, -1, 1, 1).astype(np.float32), progress=False)
