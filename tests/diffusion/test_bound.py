"""The variational bound: its Gaussians and grey levels by integration, its terms by hand, bits per dimension."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ideal import at, ideal_denoiser, image, in_float64
from strategies import make

from tinyddpm import Diffusion, Schedule, backward, make_schedule
from tinyddpm.autograd.tensor import Parameter
from tinyddpm.diffusion.bound import BitsPerDim, discretised_gaussian, gaussian_kl, prior_terms, vlb_terms
from tinyddpm.diffusion.checks import OBJECTIVES
from tinyddpm.diffusion.schedule import linear

LEVELS = np.arange(256) / 127.5 - 1
TWO = LEVELS[[60, 190]]
TEN = Schedule(linear(10, 1e-2, 0.3))
moderate = st.floats(-3, 3)
normal_cdf = lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))


@given(m1=moderate, v1=moderate, m2=moderate, v2=moderate)
def test_kl_is_the_integral_of_p_ln_p_over_q(m1, v1, m2, v2):
    kl = gaussian_kl(*(np.array([a]) for a in (m1, v1, m2, v2))).item()
    x = m1 + math.exp(v1 / 2) * np.linspace(-12, 12, 20_001)
    log_p = -0.5 * ((x - m1) ** 2 / math.exp(v1) + v1 + math.log(2 * math.pi))
    log_q = -0.5 * ((x - m2) ** 2 / math.exp(v2) + v2 + math.log(2 * math.pi))
    integral = (np.exp(log_p) * (log_p - log_q)).sum() * (x[1] - x[0])
    assert math.isclose(kl, integral, rel_tol=1e-9, abs_tol=1e-9) and kl >= -1e-12


@given(k=st.integers(0, 255), mean=st.floats(-1.2, 1.2), log_std=st.floats(-5, 1))
def test_the_probability_of_a_grey_level_is_an_integral_of_the_density(k, mean, log_std):
    x, s = k / 127.5 - 1, math.exp(log_std)
    lower, upper = (x - 1 / 255 - mean) / s, (x + 1 / 255 - mean) / s
    p = (1 if k == 255 else normal_cdf(upper)) - (0 if k == 0 else normal_cdf(lower))
    ours = discretised_gaussian(np.array([x]), np.array([mean]), np.array([2 * log_std])).item()
    assert math.isclose(ours, math.log(max(p, 1e-12)), abs_tol=1e-9 + 1e-15 / max(p, 1e-12))


@pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
def test_float32_keeps_its_digits_on_either_side(level):
    """Far out, two values of the cumulative distribution close to 1 would leave nothing of their difference."""
    x0, log_variance = LEVELS[[level] * 7], np.full(7, -9.5)
    away, found = np.array([-6.5, -3.0, -0.5, 0.0, 0.5, 3.0, 6.5]), []
    for dtype in (np.float32, np.float64):
        mean, spread = (Parameter(x.astype(dtype)) for x in (x0 + away * np.exp(log_variance / 2), log_variance))
        ln_p = discretised_gaussian(x0.astype(dtype), mean, spread)
        assert ln_p.dtype == dtype
        gradients = backward(ln_p.sum())
        found.append([ln_p.data, gradients[mean], gradients[spread]])
    np.testing.assert_allclose(*found, rtol=2e-4, atol=2e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("variance", "b"), [("small", 1.0), ("large", 1.0), ("small", 0.5), ("large", 2.0)])
def test_every_term_is_its_formula(objective, variance, b):
    """L_t of two Gaussians whose means differ by w b (x_0 - x0hat), w the weight of x_0 in mu_tilde; L_0 of a level in
    a Gaussian around b x0hat; the prior. All from beta, in bits, each image with a t of its own."""
    beta, t = linear(12, 2e-2, 0.4), np.arange(12)
    bar = np.cumprod(1 - beta)
    before, d = np.append(1, bar[:-1]), Diffusion(Schedule(beta, b), objective, variance)
    tilde = beta * (1 - before) / (1 - bar)
    tilde[0] = tilde[1]
    sigma2 = np.append(tilde[0], beta[1:]) if variance == "large" else tilde
    x_t = image(*np.sin(3 * t))
    for x0 in LEVELS[[0, 128, 255]]:
        images, guess = image(*np.full(12, x0)), x0 + 0.1 * np.cos(t)
        prediction = d.target(image(*guess), t, d.eps_from_x0(x_t, t, image(*guess)))
        gap, ratio = np.sqrt(before) * beta / (1 - bar) * b * (x0 - guess), tilde / sigma2
        nats = 0.5 * (ratio - 1 - np.log(ratio) + gap**2 / sigma2)
        upper, lower = (normal_cdf(b * (x0 + edge - guess[0]) / math.sqrt(sigma2[0])) for edge in (1 / 255, -1 / 255))
        nats[0] = -math.log((1 if x0 == 1 else upper) - (0 if x0 == -1 else lower))
        np.testing.assert_allclose(vlb_terms(d, images, x_t, t, prediction).data, nats / math.log(2), rtol=1e-9)
        of_levels = vlb_terms(d, images[:1], x_t[:1], t[:1], prediction[:1]).data  # there is none but t = 0
        np.testing.assert_allclose(of_levels, nats[:1] / math.log(2), rtol=1e-9)
        prior = 0.5 * (-bar[-1] - math.log(1 - bar[-1]) + bar[-1] * (b * x0) ** 2) / math.log(2)
        np.testing.assert_allclose(prior_terms(d, images).data, prior, rtol=1e-9)


def test_the_prior_is_a_mean_over_all_numbers():
    grey_and_white = np.repeat(image(0, 1), 64 * 3, axis=0).reshape(2, 8, 8, 3)
    np.testing.assert_allclose(prior_terms(Diffusion(make_schedule()), grey_and_white).data, [0, 2.911e-5], atol=4e-9)


def test_a_learned_variance_at_either_end_is_the_fixed_one():
    x0, x_t, prediction = np.random.default_rng(0).standard_normal((3, 4, 2, 2, 1)).clip(-1, 1)
    learned = Diffusion(TEN, "eps", "learned_range", "vlb")
    for variance, end, t in (("small", -1.0, at(0, 1, 5, 9)), ("large", 1.0, at(1, 5, 9, 2))):
        fixed = vlb_terms(Diffusion(TEN, "eps", variance), x0, x_t, t, prediction).data
        np.testing.assert_allclose(vlb_terms(learned, x0, x_t, t, prediction, 0 * x0 + end).data, fixed, rtol=1e-9)


@pytest.mark.parametrize("variance", ["small", "learned_range"])
def test_bits_per_dim_are_means_of_the_terms_with_noise_of_each_image(variance):
    """From a stream of its own, whatever the others and the workers are."""
    d = Diffusion(Schedule(linear(5, 0.05, 0.5), 0.8), "v", variance, "vlb")
    x0 = np.random.default_rng(0).choice(LEVELS, (11, 2, 2, 1))
    model = lambda x, t: np.concatenate([0.2 * x, np.sin(x)], -1)[..., : 1 if variance == "small" else 2]
    for seed in (0, 6):
        of = lambda workers, rng=seed: d.bits_per_dim(model, x0, clip=False, progress=False, workers=workers, rng=rng)
        bits = of(3)
        np.testing.assert_array_equal(of(1).terms, bits.terms)
        streams = np.random.default_rng(seed).spawn(11)
        for t in reversed(range(5)):
            eps, ts = np.stack([rng.standard_normal((2, 2, 1)) for rng in streams]), np.full(11, t)
            x_t = d.q_sample(x0, ts, eps)
            terms = vlb_terms(d, x0, x_t, ts, *d.predict(model, x_t, ts)).data
            assert math.isclose(bits.terms[t], terms.mean(), rel_tol=1e-12)
        assert math.isclose(bits.prior, prior_terms(d, x0).data.mean(), rel_tol=1e-12)


def test_a_label_goes_with_its_image_and_can_save_bits():
    """A model that is told which of two images it is needs no bit to say so."""
    d, data = Diffusion(make_schedule("cosine", 40)), image(-0.6, 0.6)  # levels 51 and 204
    images, labels, of_each = np.tile(data, (50, 1, 1, 1)), [0, 1] * 50, [ideal_denoiser(x[None], d) for x in data]
    told = lambda x, t, labels: np.where(labels.reshape(-1, 1, 1, 1) == 0, *[known(x, t) for known in of_each])
    settings = dict(clip=False, progress=False, workers=1)
    bits = lambda model, labels: d.bits_per_dim(model, images, labels=labels, **settings).total
    saved = bits(ideal_denoiser(data, d), None) - bits(told, labels)
    assert abs(saved - 1) < 0.15 and bits(told, labels[::-1]) > 100


def test_the_result_cannot_be_changed_and_is_equal_to_itself_only():
    bits, other = (BitsPerDim(0.5, np.array([1.0, 0.25])) for _ in range(2))
    assert bits.total == 1.75 and bits == bits and bits != other
    with pytest.raises(AttributeError):
        bits.prior = 0


def test_x0_is_clipped_as_the_diffusion_says_unless_told_otherwise_and_of_the_model_s_dtype():
    far, seen = lambda x, t: seen.append(x.dtype) or 0 * x + 3, []
    x0 = np.random.default_rng(0).choice(LEVELS, (3, 2, 2, 1)).astype(np.float32)
    of_own = lambda clip: Diffusion(make("linear", 4), "x0", clip=clip)
    bits = lambda own, **told: of_own(own).bits_per_dim(in_float64(far), x0, progress=False, **told)
    for clip in (0.25, True, False):
        np.testing.assert_array_equal(bits(clip).terms, bits("dynamic", clip=clip).terms)
    assert bits(0.25).total != bits(True).total < bits(False).total and set(seen) == {np.dtype("float64")}
    x, t, d = np.full((1, 2, 2, 1), 0.5), at(4), Diffusion(TEN, "x0")
    far, at_one = (vlb_terms(d, x, x, t, 0 * x + p, clip=c).item() for p, c in ((3.0, True), (1.0, False)))
    assert far == at_one < vlb_terms(d, x, x, t, 0 * x + 3).item()
