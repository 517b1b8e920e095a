"""The derivation as articles on DDPM tell it, one test per equation, in order: from a step of noise to the simple loss.

Equations are numbered as in Ho, Jain & Abbeel 2020. Each is worked out here with plain numbers, step by step, and
compared with the function whose docstring states it.
"""

import math

import numpy as np
import pytest
from ideal import at, image

from tinyddpm import Diffusion, Schedule, sample
from tinyddpm.diffusion.losses import weighted_eps, weighted_mu
from tinyddpm.diffusion.sample import ddpm
from tinyddpm.diffusion.schedule import linear
from tinyddpm.network.unet import timestep_encoding

T = 12
BETA = [0.01 + (0.4 - 0.01) * t / (T - 1) for t in range(T)]
ALPHA = [1 - beta for beta in BETA]
ALPHA_BAR = [math.prod(ALPHA[: t + 1]) for t in range(T)]
BEFORE = [1.0, *ALPHA_BAR[:-1]]  # alpha_bar_{t-1}
BETA_TILDE = [BETA[t] * (1 - BEFORE[t]) / (1 - ALPHA_BAR[t]) for t in range(T)]
SCHEDULE = Schedule(linear(T, 0.01, 0.4))
D = Diffusion(SCHEDULE)


def eps_theta(x, t):
    """Some model; what it predicts does not matter."""
    return np.sin(2 * x) + 0.1 * t.reshape(-1, 1, 1, 1)


def predicted(x, t):
    return eps_theta(x, at(t)).item()


def mu(t, x, eps):
    return (x - BETA[t] / math.sqrt(1 - ALPHA_BAR[t]) * eps) / math.sqrt(ALPHA[t])


def mu_tilde(t, x0, x):
    """Equation 7."""
    return (math.sqrt(BEFORE[t]) * BETA[t] * x0 + math.sqrt(ALPHA[t]) * (1 - BEFORE[t]) * x) / (1 - ALPHA_BAR[t])


def sigma2(t, variance):
    """beta_tilde_t or beta_t; at t = 0, where beta_tilde_t is 0, beta_tilde of the next step."""
    return BETA[t] if variance == "large" and t > 0 else BETA_TILDE[max(t, 1)]


def test_01_a_step_of_noise_is_a_gaussian_with_this_mean_and_variance():
    """q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (equation 2)."""
    for t in range(T):
        expected = math.sqrt(1 - BETA[t]) * 0.7 + math.sqrt(BETA[t]) * -0.3
        assert math.isclose(D.q_step(image(0.7), at(t), image(-0.3)).item(), expected)


def test_02_alpha_bar_is_the_product_of_alpha():
    """beta rises linearly, alpha_t = 1 - beta_t, alpha_bar_t = alpha_0 ... alpha_t."""
    np.testing.assert_allclose(SCHEDULE.beta, BETA, rtol=1e-12)
    np.testing.assert_allclose(SCHEDULE.alpha, ALPHA, rtol=1e-12)
    np.testing.assert_allclose(SCHEDULE.alpha_bar, ALPHA_BAR, rtol=1e-12)


def test_03_variance_one_is_kept():
    """If x_{t-1} has variance 1, so has x_t: (1 - beta_t) + beta_t."""
    for t in range(T):
        signal, noise = D.q_step(image(1, 0), at(t, t), image(0, 1)).ravel()
        assert math.isclose(signal**2 + noise**2, 1)


def test_04_all_steps_in_one():
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) (equation 4), which is `q_step` t + 1 times."""
    mean, variance = 0.7, 0.0
    for t in range(T):
        mean, variance = math.sqrt(ALPHA[t]) * mean, ALPHA[t] * variance + BETA[t]
        assert math.isclose(D.q_sample(image(0.7), at(t), image(0)).item(), mean)
        assert math.isclose(D.q_sample(image(0), at(t), image(1)).item() ** 2, variance)


def test_05_at_the_end_nothing_is_left_of_the_image():
    """At T = 1000 the mean is near 0, the variance near 1 (section 4)."""
    mean, std = Diffusion(Schedule(linear(1000))).q_sample(image(1, 0), at(999, 999), image(0, 1)).ravel()
    assert 0 < mean < 0.0064 and 0.99997 < std < 1


@pytest.mark.parametrize("variance", ["small", "large"])
def test_06_the_reverse_step_is_a_gaussian_whose_mean_is_learned(variance):
    """p_theta(x_{t-1} | x_t) = N(mu_theta(x_t, t), sigma_t^2 I) (equation 1), sigma_t^2 = beta_tilde_t or beta_t."""
    for t in range(T):
        d = Diffusion(SCHEDULE, variance=variance)
        mean, log_variance, _ = d.p_mean_variance(eps_theta, image(0.3), at(t), clip=False)
        assert math.isclose(mean.item(), mu(t, 0.3, predicted(0.3, t)))
        assert math.isclose(math.exp(log_variance.item()), sigma2(t, variance))


def test_07_the_step_back_if_the_image_were_known():
    """q(x_{t-1} | x_t, x_0) = N(mu_tilde_t, beta_tilde_t I) (equations 6 and 7)."""
    for t in range(T):
        assert math.isclose(D.posterior_mean(image(0.7), image(0.3), at(t)).item(), mu_tilde(t, 0.7, 0.3))
        assert math.isclose(SCHEDULE.posterior_variance[t], BETA_TILDE[t], abs_tol=1e-300)


def test_08_the_reverse_step_adds_sigma_z():
    """x_{t-1} = 1/sqrt(alpha_t) (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_theta) + sigma_t z, z = 0 in the last step
    (algorithm 2)."""
    zs, x = np.random.default_rng(0).standard_normal(T), 0.4
    left = iter(zs)
    for (t, got, _), z in zip(ddpm(D, eps_theta, image(x), lambda: image(next(left)), clip=False), zs, strict=True):
        x = mu(t, x, predicted(x, t)) + (math.sqrt(BETA_TILDE[t]) * z if t > 0 else 0)
        assert math.isclose(got.item(), x, rel_tol=1e-9)
    assert t == 0 and next(left) == zs[-1]  # T - 1 of them were used


X0 = np.random.default_rng(1).uniform(-1, 1, (30, 1, 1, 1))
EITHER = [(variance, seed) for variance in ("small", "large") for seed in range(3)]


def loss_of(loss_type, seed, variance="small"):
    rng = np.random.default_rng(seed)
    return Diffusion(SCHEDULE, variance=variance, loss_type=loss_type).loss(eps_theta, X0, rng).item()


def drawn(seed):
    """(t, x_0, eps, x_t) that a loss with this seed draws, as plain numbers."""
    rng = np.random.default_rng(seed)
    ts, eps = rng.integers(0, T, 30), rng.standard_normal(X0.shape).ravel()
    for t, x0, e in zip(ts, X0.ravel(), eps):
        yield t, x0, e, math.sqrt(ALPHA_BAR[t]) * x0 + math.sqrt(1 - ALPHA_BAR[t]) * e


@pytest.mark.parametrize(("variance", "seed"), EITHER)
def test_09_the_loss_of_the_means(variance, seed):
    """E [1 / (2 sigma_t^2) ||mu_tilde_t - mu_theta||^2] (equation 8)."""
    terms = [(mu_tilde(t, x0, x) - mu(t, x, predicted(x, t))) ** 2 / (2 * sigma2(t, variance))
             for t, x0, _, x in drawn(seed)]  # fmt: skip
    assert math.isclose(loss_of("weighted_mu", seed, variance), sum(terms) / 30, rel_tol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_10_mu_tilde_in_terms_of_the_noise(seed):
    """Substituting x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t) makes mu_tilde equation 11."""
    for t, x0, eps, x in drawn(seed):
        assert math.isclose(D.posterior_mean(image(x0), image(x), at(t)).item(), mu(t, x, eps), rel_tol=1e-9)


@pytest.mark.parametrize(("variance", "seed"), EITHER)
def test_11_the_loss_of_the_noise(variance, seed):
    """E [beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)) ||eps - eps_theta||^2] (equation 12), equal to 8."""
    total = 0
    for t, _, eps, x in drawn(seed):
        weight = BETA[t] ** 2 / (2 * sigma2(t, variance) * ALPHA[t] * (1 - ALPHA_BAR[t]))
        total += weight * (eps - predicted(x, t)) ** 2
    assert math.isclose(loss_of("weighted_eps", seed, variance), total / 30, rel_tol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_12_the_simple_loss(seed):
    """E ||eps - eps_theta(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t)||^2 (equation 14)."""
    total = sum((eps - predicted(x, t)) ** 2 for t, _, eps, x in drawn(seed))
    assert math.isclose(loss_of("simple", seed), total / 30, rel_tol=1e-9)


def test_13_from_noise_to_images():
    """Algorithm 2 from x_T ~ N(0, I): a model that knows the noise in x_t draws the image."""
    knows = lambda x, t: ((x - math.sqrt(ALPHA_BAR[t[0]]) * 0.5) / math.sqrt(1 - ALPHA_BAR[t[0]])).astype(x.dtype)
    np.testing.assert_allclose(sample(D, knows, (4, 2, 2, 1)), 0.5, rtol=1e-5)


def test_the_docstrings_state_what_is_tested_here():
    """The equations stand where a reader looks for them: beside the code that computes them."""
    for function, equation in [
        (Diffusion.q_step, "q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)"),
        (Diffusion.q_sample, "q(x_t | x_0) = N(sqrt(alpha_bar_t) b x_0, (1 - alpha_bar_t) I)"),
        (Schedule.alpha_bar.func, "alpha_bar_t = alpha_0 alpha_1 ... alpha_t"),
        (Diffusion.p_mean_variance, "p_theta(x_{t-1} | x_t) = N(mu_theta(x_t, t), sigma_t^2 I)"),
        (Diffusion.posterior_mean, "q(x_{t-1} | x_t, x_0) = N(mu_tilde_t, beta_tilde_t I)"),
        (ddpm, "x_{t-1} = mu_tilde(x0hat, x_t) + sigma_t z"),
        (timestep_encoding, "P(k, 2i) = sin(k / n^(2i/d)),  P(k, 2i+1) = cos(k / n^(2i/d))"),
        (weighted_mu, "E [1 / (2 sigma_t^2) ||mu_tilde_t(x_t, x_0) - mu_theta(x_t, t)||^2]"),
        (weighted_eps, "E [beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)) ||eps - eps_theta(x_t, t)||^2]"),
        (Diffusion.loss, "E ||eps - eps_theta(sqrt(alpha_bar_t) b x_0 + sqrt(1 - alpha_bar_t) eps, t)||^2"),
    ]:
        assert equation in function.__doc__, equation
