"""The checklist: 26 formulas, each with the mistake that implementations make of it. One test for each, by number.

Values given to several digits were computed independently of this package, from the papers.
"""

import inspect
import itertools
import math

import numpy as np
import pytest
import reference
from hypothesis import assume, given
from hypothesis import strategies as st
from ideal import at, column, ideal_denoiser, image, zeros
from strategies import SEEDS, make, processes, schedules

from tinyddpm import EMA, Diffusion, Schedule, Tensor, UNet, make_schedule, sample
from tinyddpm.autograd.fused import attention
from tinyddpm.diffusion.bound import discretised_gaussian, gaussian_kl, prior_terms
from tinyddpm.diffusion.checks import OBJECTIVES
from tinyddpm.diffusion.clipping import dynamic_threshold
from tinyddpm.diffusion.sample import ddim, ddpm, dpm_solver, guided, respace
from tinyddpm.diffusion.schedule import GAMMA
from tinyddpm.network.nn import GroupNorm
from tinyddpm.network.unet import timestep_encoding

LINEAR = make_schedule("linear", 1000)
SMALL = dict(channels=(4,), blocks=1, attention=(False,), groups=2)
close = math.isclose


def seen_in_loss(diffusion, x0):
    """The x and t that a model gets to see in `loss`."""
    seen = []
    diffusion.loss(lambda x, t: seen.append((x, t)) or x, x0, np.random.default_rng(0))
    return seen[0]


@given(s=schedules())
def test_01_one_step_iterated_is_one_jump_and_t_is_drawn_for_each_image(s):
    """Mistakes: variances added where they must shrink first; one t for the whole batch."""
    d = Diffusion(s, "v")
    mean, std = s.input_scale * 0.6, 0.0
    for t in range(len(s)):
        mean, kept, added = d.q_step(image(mean, std, 0), at(t, t, t), image(0, 0, 1)).ravel()
        std = math.hypot(kept, added)
        if t < 5 or t % 97 == 0 or t == len(s) - 1:
            of_image, of_noise = d.q_sample(image(0.6, 0), at(t, t), image(0, 1)).ravel()
            assert close(of_image, mean, rel_tol=1e-9, abs_tol=1e-15) and close(of_noise**2, std**2, rel_tol=1e-9)
    if d.T > 10:
        assert len(set(seen_in_loss(d, np.zeros((64, 1, 1, 1)))[1])) > 5


ALL, BUT_LAST = slice(None), slice(-1)
U = np.arange(1, 1001) / 1000
of_cosine = lambda u: np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
sigma = lambda w: 1 / (1 + np.exp(-w))


def log_snr_of_cosine(u, high=15, low=-15):
    a, b = math.atan(math.exp(-high / 2)), math.atan(math.exp(-low / 2))
    return -2 * np.log(np.tan(a + u * (b - a)))


# fmt: off
KNOWN = [  # point of the checklist, schedule, T, settings, one of its tables, where in it, values, their relative error
    *[(2, "linear", T, {}, "alpha_bar", -1, left, 8e-3) for T, left in ((50, 0.603), (100, 0.364), (200, 0.132),
      (250, 0.0797), (300, 0.0481), (400, 0.0175), (500, 0.0064))],
    (2, "linear", 1000, {}, "alpha_bar", -1, 4.036e-5, 1e-3),
    (2, "linear", 1000, {}, "beta", ALL, 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999, 1e-9),
    (3, "cosine", 1000, {}, "beta", 0, 4.128e-5, 2e-4),
    (3, "cosine", 1000, {}, "alpha_bar", BUT_LAST, (of_cosine(U) / of_cosine(0))[:-1], 1e-9),
    (3, "cosine", 1000, {}, "alpha_bar", -1, 2.43e-9, 2e-3),  # recomputed from the clipped beta: not 0
    (4, "linear_gamma", 4, {}, "alpha_bar", BUT_LAST, [0.75, 0.5, 0.25], 1e-9),
    (4, "cosine", 4, dict(s=0), "alpha_bar", BUT_LAST, [0.853553, 0.5, 0.146447], None),
    (4, "cosine", 4, dict(s=0, start=0.2), "alpha_bar", BUT_LAST, [0.723607, 0.381966, 0.105573], None),
    *[(4, "cosine", 4, dict(s=0, tau=tau), "alpha_bar", BUT_LAST, np.cos(math.pi / 8 * np.arange(1, 4)) ** (2 * tau),
       1e-9) for tau in (0.5, 2, 3)],
    (4, "sigmoid", 4, dict(tau=0.9), "alpha_bar", BUT_LAST, [0.866370, 0.5, 0.133630], None),
    (4, "sigmoid", 4, dict(start=0, tau=0.3), "alpha_bar", BUT_LAST, [0.151639, 0.013296, 0.001015], None),
    (4, "sigmoid", 1000, {}, "beta", 0, 3.003e-4, 2e-4),
    (4, "sigmoid", 1000, {}, "beta", -2, 0.5014, 1e-4),
    (4, "sigmoid", 1000, {}, "alpha_bar", -1, 3.0e-7, 0.02),
    (4, "quadratic", 3, dict(beta_start=0.01, beta_end=0.09), "beta", ALL, [0.01, 0.04, 0.09], 1e-12),
    (4, "quadratic", 1000, {}, "beta", ALL, (0.01 + (math.sqrt(0.02) - 0.01) * np.arange(1000) / 999) ** 2, 1e-9),
    (5, "cosine_logsnr", 1000, {}, "log_snr", ALL, log_snr_of_cosine(U), 1e-8),
    (5, "sigmoid_logsnr", 1000, {}, "log_snr", ALL, 15 - 30 * U, 1e-8),
    *[(5, name, 1000, dict(logsnr_max=12, logsnr_min=-9, shift=shift), "log_snr", ALL, values + shift, 1e-8)
      for name, values in (("cosine_logsnr", log_snr_of_cosine(U, 12, -9)), ("sigmoid_logsnr", 12 - 21 * U))
      for shift in (0, 2 * math.log(64 / 256))],
    (6, "sigmoid_beta", 1000, {}, "beta", ALL, 1e-4 + (0.02 - 1e-4) * sigma(np.linspace(-6, 6, 1000)), 1e-12),
    (6, "sigmoid_beta", 5, dict(beta_start=0.1, beta_end=0.3), "beta", ALL, 0.1 + 0.2 * sigma(3.0 * np.arange(-2, 3)),
     1e-12),
]
# fmt: on


def check_known_values(point):
    """To the last of six digits where no relative error is given; values of log_snr near 0 to 1e-8."""
    for number, name, T, settings, table, where, values, error in KNOWN:
        if number == point:
            tolerance = dict(rtol=error, atol=1e-8 * (table == "log_snr")) if error else dict(rtol=0, atol=5.01e-7)
            s = make(name, T, **settings)
            np.testing.assert_allclose(getattr(s, table)[where], values, err_msg=f"{s}", **tolerance)
            assert (s.name, len(s), s.parameters) == (name, T, settings)


def test_02_what_linear_leaves_of_the_image_and_the_warning():
    """Mistake: T lowered and beta left as it is, so that half of the image survives and sampling starts elsewhere."""
    check_known_values(2)
    with pytest.warns(UserWarning, match="ends far from pure noise"):
        make_schedule("linear", 100)


def test_03_cosine():
    """Mistakes: alpha_bar read off the cosine, 0 at the end, instead of computed from the clipped beta; s forgotten."""
    check_known_values(3)
    beta = make_schedule("cosine", 1000).beta
    assert beta[-1] == 0.999 and (beta == 0.999).sum() == 1  # clipped once


def test_04_gamma_functions_of_Chen():
    """Mistakes: no normalisation to 1 ... 0; tau in the wrong place; in quadratic, the square forgotten."""
    check_known_values(4)
    assert make_schedule("sigmoid", 1000).beta[-1] == 0.999


def test_05_log_snr_forms():
    """Mistakes: a and b, or the limits, exchanged; the logarithm of the amplitudes instead of the powers."""
    check_known_values(5)
    for name in ("cosine_logsnr", "sigmoid_logsnr"):
        assert math.isclose(GAMMA[name](0.5), 0.5)


def test_06_the_sigmoid_of_beta_is_another_thing_with_another_name():
    """Mistake: two schedules of one name taken for the same."""
    check_known_values(6)
    assert np.abs(make_schedule("sigmoid_beta").beta - make_schedule("sigmoid").beta).max() > 0.9


def test_07_zero_terminal_snr():
    """Mistakes: alpha_bar shifted instead of its root; eps predicted where there is no signal to divide by."""
    s, root = make_schedule("linear", 1000, zero_terminal_snr=True), np.sqrt(LINEAR.alpha_bar)
    np.testing.assert_allclose(np.sqrt(s.alpha_bar), (root - root[-1]) * root[0] / (root[0] - root[-1]), atol=1e-12)
    assert s.alpha_bar[-1] == 0 and close(s.alpha_bar[0], LINEAR.alpha_bar[0])
    with pytest.raises(ValueError, match="zero terminal SNR"):
        Diffusion(s, "eps")
    for objective in ("x0", "v"):
        d = Diffusion(s, objective)
        assert np.isfinite(sample(d, ideal_denoiser(image(0.3), d), (2, 1, 1, 1), "ddim", steps=5)).all()


@given(s=schedules(zero_terminal_snr=False), b=st.floats(0.1, 3))
def test_08_input_scaling(s, b):
    """Mistakes: the sampler's x_t normalised as well; x0hat clipped to 1 instead of b; no division by b at the end."""
    scaled = Diffusion(Schedule(s.beta, b), "x0")
    np.testing.assert_allclose(scaled.schedule.log_snr - Schedule(s.beta).log_snr, 2 * math.log(b), atol=1e-9)
    t, g = at(len(s) // 2), s.alpha_bar[len(s) // 2]
    x_t = scaled.q_sample(image(0.5), t, image(-0.4))
    assert close(x_t.item(), math.sqrt(g) * b * 0.5 - math.sqrt(1 - g) * 0.4, abs_tol=1e-12)
    seen = []  # the network's input is normalised, the sampler's x_t is not
    scaled.p_mean_variance(lambda x, t: seen.append(x.item()) or x, x_t, t)
    assert close(seen[0], x_t.item() / math.sqrt((b * b - 1) * g + 1), abs_tol=1e-12)
    ends = [sample(scaled, lambda x, t: 0 * x + 9, (1, 1, 1, 1), method, steps=1).item() for method in ("ddpm", "ddim")]
    np.testing.assert_allclose(ends, 1, rtol=1e-6)  # b x_0 clipped to b, and divided by b at the end


def by_the_paper(method, d, model, x, z, eta=0.0):
    """Every (x_{t-1}, x0hat): Ho et al. 2020, algorithm 2, with x0hat clipped; Song et al. 2021, equation 12; Lu et al.
    2022, algorithm 2, from alpha, sigma and lambda at every point."""
    beta, b = d.schedule.beta, d.schedule.input_scale
    bars, ms, l = np.append(1, np.cumprod(1 - beta)), [], np.inf
    for t in range(len(beta) - 1, -1, -1):
        before, bar = bars[t], bars[t + 1]
        out, spread = np.split(model(x / np.sqrt(b * b * bar + 1 - bar), at(t)), 2, axis=-1)
        b_x0 = {"eps": (x - np.sqrt(1 - bar) * out) / np.sqrt(bar), "x0": b * out,
                "v": np.sqrt(bar) * x - np.sqrt(1 - bar) * out}[d.objective]  # fmt: skip
        b_x0, tilde = b_x0.clip(-b, b), beta[t] * (1 - before) / (1 - bar)
        if method == "ddpm":
            x = (np.sqrt(before) * beta[t] * b_x0 + np.sqrt(1 - beta[t]) * (1 - before) * x) / (1 - bar)
            w = {"small": 0, "large": 1, "learned_range": (spread + 1) / 2}[d.variance]
            x = x + (beta[t] ** (w / 2) * tilde ** ((1 - w) / 2) * z() if t > 0 else 0)
        elif method == "ddim":
            eps, s = (x - np.sqrt(bar) * b_x0) / np.sqrt(1 - bar), eta * np.sqrt(tilde)  # anew, for x0hat was clipped
            x = np.sqrt(before) * b_x0 + np.sqrt(np.maximum(1 - before - s**2, 0)) * eps + (s * z() if s else 0)
        elif t == 0:
            x = b_x0
        else:
            l_before, l, ms = l, np.log(np.sqrt(bar / (1 - bar))), [*ms, b_x0]
            h = np.log(np.sqrt(before / (1 - before))) - l
            r = (l - l_before) / h
            m = ms[-1] if len(ms) == 1 else (1 + 1 / (2 * r)) * ms[-1] - 1 / (2 * r) * ms[-2]
            x = np.sqrt((1 - before) / (1 - bar)) * x - np.sqrt(before) * (np.exp(-h) - 1) * m
        yield x, b_x0 / b


def check_every_step(sampler, method, random=True, settings=(), **of_diffusion):
    """Of every objective and scale, for a model some of whose x0hat are clipped and others not."""
    both = lambda x, t: np.concatenate([np.cos(2 * x + t[0]), np.tanh(x)], axis=-1)
    for objective, b in itertools.product(OBJECTIVES, (1.0, 0.5)):
        d = Diffusion(Schedule(np.linspace(1e-3, 0.5, 20), b), objective, **of_diffusion)
        model = both if d.variance == "learned_range" else lambda x, t: both(x, t)[..., :1]
        x, *zs = np.random.default_rng(0).standard_normal((20, 3, 2, 2, 1))
        ours, theirs = iter(zs), iter(zs)
        steps = sampler(d, model, x, (lambda zs=ours: next(zs)) if random else None, **dict(settings))
        by_paper = by_the_paper(method, d, both, x, lambda zs=theirs: next(zs), **dict(settings))
        for (_, x, x0), (x_by_paper, x0_by_paper) in zip(steps, by_paper, strict=True):
            np.testing.assert_allclose(x, x_by_paper, atol=1e-9)
            np.testing.assert_allclose(x0, x0_by_paper, atol=1e-9)
        assert len([*ours]) == len([*theirs])  # as many z were drawn


@given(p=processes(1e-6))
def test_09_posterior_mean_two_ways(p):
    """Mistakes: alpha_bar for alpha, t for t-1; the step at t = 0 not ending in x_0."""
    d, x0, t, eps = p
    two_ways = lambda s, t, x_t, eps: (
        (x_t - column(s.beta, t) / np.sqrt(1 - column(s.alpha_bar, t)) * eps) / np.sqrt(1 - column(s.beta, t))
    )
    middle = np.full(len(x0), 500)
    x_t = Diffusion(LINEAR).q_sample(x0, middle, eps)
    mean = two_ways(LINEAR, middle, x_t, eps)
    np.testing.assert_allclose(
        Diffusion(LINEAR).posterior_mean(x0, x_t, middle), mean, atol=1e-13 * max(1, np.abs(mean).max())
    )
    assert close(LINEAR.posterior_mean_coef_x0[0], 1, rel_tol=1e-12) and LINEAR.posterior_mean_coef_xt[0] == 0
    bar, x_t = d.schedule.alpha_bar[t], d.q_sample(x0, t, eps)
    if 1e-2 <= bar.min() and bar.max() < 1 - 1e-4:
        np.testing.assert_allclose(d.posterior_mean(x0, x_t, t), two_ways(d.schedule, t, x_t, eps), atol=1e-11)
    assume(bar.max() < 1 - 1e-6)  # 1 - alpha_bar keeps enough digits; any prediction then, not only the true one
    prediction = np.cos(5 * x0)
    epshat, x0hat = d.predict_eps(x_t, t, prediction), d.predict_x0(x_t, t, prediction)
    mean = d.p_mean_variance(lambda x, t: prediction, x_t, t, clip=False)[0]
    np.testing.assert_allclose(mean, two_ways(d.schedule, t, x_t, epshat), atol=1e-8)
    np.testing.assert_array_equal(mean, d.posterior_mean(x0hat, x_t, t))


def test_10_posterior_variance_and_its_logarithm():
    """Mistakes: the logarithm of beta_tilde_0 = 0, or of a tiny number in its place; large at t = 0."""
    s = LINEAR
    np.testing.assert_allclose(s.posterior_variance[1:], (s.beta * (1 - s.alpha_bar_prev) / (1 - s.alpha_bar))[1:])
    assert s.posterior_variance[0] == 0 and close(s.posterior_variance[1], 5.4532e-5, rel_tol=1e-4)
    assert close(s.posterior_log_variance[0], -9.8167, abs_tol=1e-4)
    for variance, later in (("small", s.posterior_variance[1:]), ("large", s.beta[1:])):
        of_all = Diffusion(s, variance=variance).log_variance(np.zeros((1000, 1, 1, 1)), np.arange(1000))
        np.testing.assert_allclose(np.exp(of_all).ravel(), [s.posterior_variance[1], *later], rtol=1e-12)
    one = Diffusion(Schedule([0.3]), "v", "large").log_variance(image(0), at(0))
    assert close(one.item(), math.log(0.3))  # of a single step


def test_11_noise_until_t_is_1_and_x0_clipped_before_the_mean():
    """Mistakes: noise after the last step, or none at t = 1; the mean clipped instead of x_0."""
    for variance, loss_type in (("small", "simple"), ("large", "simple"), ("learned_range", "hybrid")):
        check_every_step(ddpm, "ddpm", variance=variance, loss_type=loss_type)


def test_12_respaced_steps():
    """Mistakes: alpha_bar_prev of the next timestep down, not of the next one visited; the network given 0, 1, 2 ..."""
    ts, s = at(99, 499, 999), Schedule(LINEAR.beta, 0.7)
    learned = ("learned_range", "learned_range", "hybrid")
    for before, after, loss in (("small", "small", "vlb"), ("large", "small", "vlb"), learned):
        short = respace(Diffusion(s, "v", before, loss, 3.0, clip=False), ts)
        np.testing.assert_allclose(short.schedule.alpha_bar, s.alpha_bar[ts], rtol=1e-12)
        np.testing.assert_allclose(short.schedule.alpha_bar_prev, [1, *s.alpha_bar[ts[:-1]]], rtol=1e-12)
        np.testing.assert_allclose(short.schedule.beta, 1 - s.alpha_bar[ts] / short.schedule.alpha_bar_prev)
        assert (
            short == Diffusion(short.schedule, "v", after, loss, 3.0, clip=False) and short.schedule.input_scale == 0.7
        )
    assert respace(Diffusion(s), at(7, 8)).T == 2  # neighbours, too
    asked = []
    sample(Diffusion(LINEAR), lambda x, t: asked.append(t[0]) or x, (1, 1, 1, 1), steps=2)
    assert asked == [999, 499]  # the network is asked for the t it knows


@given(p=processes(1e-6))
def test_13_parametrisations(p):
    """Mistake: a sign in v."""
    d, x0, t, eps = p
    a, s = (np.sqrt(column(table, t)) for table in (d.schedule.alpha_bar, 1 - d.schedule.alpha_bar))
    b_x0, x_t = d.schedule.input_scale * x0, d.q_sample(x0, t, eps)
    v, target = a * eps - s * b_x0, d.target(x0, t, eps)
    np.testing.assert_allclose(target, {"eps": eps, "x0": x0, "v": v}[d.objective], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(a * x_t - s * v, b_x0, atol=1e-9)
    np.testing.assert_allclose(s * x_t + a * v, eps, atol=1e-9)
    np.testing.assert_allclose(d.predict_x0(x_t, t, target), x0, atol=1e-8)
    for found in (d.predict_eps(x_t, t, target), d.eps_from_x0(x_t, t, x0)):
        np.testing.assert_allclose(found, eps, atol=1e-12 / s.min())
    prediction = np.sin(7 * x0)  # any prediction says the same of x_0 and of eps
    x0hat, epshat = d.predict_x0(x_t, t, prediction), d.predict_eps(x_t, t, prediction)
    np.testing.assert_allclose(a * d.schedule.input_scale * x0hat + s * epshat, x_t, atol=1e-9)


def test_14_min_snr_weights():
    """Mistake: the weight for eps used for v and x_0, too."""
    bar = np.array([0.9, 0.45, 0.045])
    for b, gamma in ((1, 5), (1, 0.5), (0.5, 5), (0.5, 0.5)):
        snr = b**2 * bar / (1 - bar)
        cut, of_v = np.minimum(snr, gamma), snr + 1 if b == 1 else snr / bar
        for objective, weight in (("eps", cut / snr), ("x0", cut), ("v", cut / of_v)):
            of_gamma = {} if gamma == 5 else {"min_snr_gamma": gamma}
            d = Diffusion(Schedule([0.1, 0.5, 0.9], b), objective, loss_type="min_snr", **of_gamma)
            for t in range(3):
                loss = d.loss_at(zeros, image(0.5), at(t), image(-0.8)).item()
                assert close(loss, weight[t] * d.target(image(0.5), at(t), image(-0.8)).item() ** 2, rel_tol=1e-9)


@given(p=processes(1e-4), variance=st.sampled_from(["small", "large"]), seed=SEEDS)
def test_15_the_first_form_of_the_loss_is_the_second_exactly(p, variance, seed):
    """||mu_tilde - mu_theta||^2 / (2 sigma^2) is the error in eps, weighted: for every objective.

    Mistakes: sigma for sigma^2, a 2 lost, alpha_bar for alpha."""
    d, x0, t, _ = p
    of = lambda s, objective, loss, x0: (
        Diffusion(s, objective, variance, loss).loss(lambda x, t: np.sin(3 * x), x0, np.random.default_rng(seed)).item()
    )
    s = Schedule(d.schedule.beta[: t.max() + 1], d.schedule.input_scale)
    assume(s.alpha_bar[0] < 1 - 1e-6)
    means, noises = (of(s, d.objective, loss, x0) for loss in ("weighted_mu", "weighted_eps"))
    assert close(means, noises, rel_tol=1e-7, abs_tol=1e-12)
    many = np.linspace(-1, 1, 500).reshape(-1, 1, 1, 1)
    means, noises, simple = (of(LINEAR, "eps", loss, many) for loss in ("weighted_mu", "weighted_eps", "simple"))
    assert close(means, noises, rel_tol=1e-9) and abs(simple / means - 1) > 0.1


def test_16_kl_of_gaussians_and_the_prior_term():
    """Mistakes: nats for bits, a sum over pixels for a mean, the two Gaussians exchanged."""
    kl = gaussian_kl(image(0.3), image(math.log(4)), image(-0.2), image(math.log(9))).item()
    assert close(kl, 0.5 * (-1 + math.log(9) - math.log(4) + 4 / 9 + 0.25 / 9))
    bits = lambda *shape: prior_terms(Diffusion(LINEAR), np.ones(shape)).item()
    assert close(bits(1, 4, 4, 1), 2.9e-5, rel_tol=0.01)  # mean over dimensions
    assert close(bits(1, 8, 8, 3), bits(1, 4, 4, 1), rel_tol=1e-6)
    np.testing.assert_allclose(prior_terms(Diffusion(LINEAR), image(0, 1)).data, [0, 2.911e-5], atol=4e-9)


@given(mean=st.floats(-2, 2), log_std=st.floats(-8, 1))
def test_17_the_256_levels_sum_to_1(mean, log_std):
    """Mistakes: bins of 1/255 instead of 2/255; closed ends, so that the sum falls short of 1."""
    levels = np.arange(256) / 127.5 - 1
    ln_p = discretised_gaussian(levels, np.full(256, mean), np.full(256, 2 * log_std)).data
    assert close(np.exp(ln_p).sum(), 1, abs_tol=256e-12 + 1e-12) and ln_p.min() >= math.log(1e-12) - 1e-9


def test_18_learned_variance_and_hybrid_loss():
    """Mistakes: variances interpolated instead of logarithms; the bound of a step, not their sum; the mean not held."""
    learned = Diffusion(LINEAR, variance="learned_range", loss_type="hybrid")
    for out, t in ((-1, 700), (1, 700), (0.2, 30), (0.2, 0)):
        v = (out + 1) / 2
        expected = v * math.log(LINEAR.beta[t]) + (1 - v) * LINEAR.posterior_log_variance[t]
        assert close(learned.log_variance(image(0), at(t), image(out)).item(), expected, rel_tol=1e-12)
    x0 = np.random.default_rng(0).uniform(-1, 1, (20, 1, 1, 1))
    model = lambda x, t: np.concatenate([np.cos(x), np.sin(x)], axis=-1)
    loss = lambda d, model: d.loss(model, x0, np.random.default_rng(3)).item()
    hybrid, vlb = (loss(Diffusion(LINEAR, "eps", "learned_range", kind), model) for kind in ("hybrid", "vlb"))
    simple = loss(Diffusion(LINEAR), lambda x, t: np.cos(x))
    assert close(hybrid, simple + 0.001 * vlb, rel_tol=1e-12)  # vlb is the sum over t: T times one term
    assert UNet(**SMALL, out_channels=2)(np.zeros((1, 4, 4, 1), np.float32), at(0)).shape == (1, 4, 4, 2)


def test_19_ddim():
    """Mistakes: epshat left as it was when x0hat is clipped; sigma not taken off the direction."""
    for eta in (0.0, 0.3, 1.0):
        check_every_step(ddim, "ddim", random=eta > 0, settings={"eta": eta})
    check_every_step(ddim, "ddim", random=False, variance="learned_range", loss_type="hybrid")


def test_20_dpm_solver():
    """Mistakes: r upside down; the sign of e^-h - 1; a division by sigma = 0 at the end."""
    check_every_step(dpm_solver, "dpm++", random=False)


def test_21_guidance():
    """Mistake: (1 + s) for s, so that 0 is conditional already."""
    u, c, x, t = (lambda x, t: Tensor(x + 1)), (lambda x, t: x + column(t, ALL)), image(0.5, -2.0), at(1, 3)
    for s, expected in ((1, c(x, t)), (0, x + 1), (np.float64(4), x + 1 + 4 * (c(x, t) - (x + 1)))):
        np.testing.assert_allclose(guided(u, c, s)(x, t), expected, rtol=1e-12)
    assert guided(c, c, np.float64(3))(x.astype(np.float32), t.astype(np.float32)).dtype == np.float32


def test_22_dynamic_threshold():
    """Mistakes: s below 1, which stretches; clipped without dividing; one quantile for the batch."""
    x0 = np.random.default_rng(0).standard_normal((2, 20, 20, 1)) * image(2, 0.1)
    s = np.quantile(np.abs(x0[0]), 0.995)
    np.testing.assert_allclose(dynamic_threshold(x0)[0], np.clip(x0[0], -s, s) / s)
    np.testing.assert_array_equal(dynamic_threshold(x0)[1], x0[1])  # s is at least 1
    np.testing.assert_allclose(dynamic_threshold(x0, most=2)[0], np.clip(x0[0], -2, 2) / 2)
    s = np.quantile(np.abs(x0[0]), 0.9)
    np.testing.assert_allclose(dynamic_threshold(x0, 0.9, 5)[0], np.clip(x0[0], -s, s) / s)


def test_23_position_encodings():
    """Mistakes: i for 2i, half for half - 1; t / T, or the index in the batch, for t."""
    t, d = at(0, 1, 7, 999), 8
    for i in range(d // 2):
        angle, of_ddpm = t / 10000 ** (2 * i / d), t * math.exp(-math.log(1e4) * i / (d // 2 - 1))
        for form, columns, expected in (
            ("interleaved", [2 * i, 2 * i + 1], (np.sin(angle), np.cos(angle))),
            ("improved", [i, d // 2 + i], (np.cos(angle), np.sin(angle))),
            ("ddpm", [i, d // 2 + i], (np.sin(of_ddpm), np.cos(of_ddpm))),
        ):
            np.testing.assert_allclose(timestep_encoding(t, d, form)[:, columns], np.transpose(expected), atol=1e-12)
    _, t = seen_in_loss(Diffusion(LINEAR), np.zeros((50, 1, 1, 1)))
    assert t.dtype.kind == "i" and t.max() > 500 and len(set(t)) > 40  # not t / T, not the index in the batch


def test_24_details_of_the_network():
    """Mistakes: padding on both sides; eps 1e-5; attention scaled by 1/C or not at all; nothing that starts at zero."""
    unet = UNet(channels=(4, 8), blocks=1, attention=(False, True), groups=2)
    assert unet.down[0].resize.padding == ((0, 1), (0, 1)) and unet.down[0].resize.stride == 2
    assert inspect.signature(GroupNorm).parameters["eps"].default == 1e-6 == unet.norm_out.eps
    zero = {name for name, p in unet.named_parameters().items() if not p.data.any() and name.endswith(".w")}
    assert zero == reference.STARTS_AS_ZERO
    q = np.array([1.0, 2.0, 0.5, 0.3]).reshape(1, 1, 4)
    k, v = np.stack([q[0], 2 * q[0]], axis=1), np.array([0.0, 1.0]).reshape(1, 2, 1).repeat(4, axis=2)
    score = (q[0, 0] @ q[0, 0]) / math.sqrt(4)  # C^-1/2
    weight = math.exp(2 * score) / (math.exp(score) + math.exp(2 * score))
    np.testing.assert_allclose(attention(q.repeat(2, axis=1), k, v, heads=1).data, weight, rtol=1e-12)


def test_25_the_moving_average():
    """Mistakes: an average that starts at zero, or shares its arrays with the model."""
    unet, flat = UNet(**SMALL), lambda module: np.concatenate([p.data.ravel() for p in module.parameters()])
    ema = EMA(unet, 0.9)
    start = ema.average.copy()
    np.testing.assert_array_equal(start, flat(unet))  # a copy
    assert ema.model is not unet
    expected = start.astype(float)
    for n in range(100):
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * (start + n)
        ema.update(start + np.float32(n))
    np.testing.assert_allclose(ema.average, expected, rtol=1e-4)
    np.testing.assert_array_equal(flat(ema.model), ema.average)  # it is what one samples from


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_26_an_oracle_without_training(objective):
    """Mistakes: whatever the 25 others have missed."""
    data, d = image(-0.7, 0.1, 0.8), Diffusion(LINEAR, objective)
    for method in ("ddpm", "ddim", "dpm++"):
        drawn = sample(d, ideal_denoiser(data, d), (200, 1, 1, 1), method, steps=100, workers=1).ravel()
        away = np.abs(drawn[:, None] - data.ravel())
        assert np.quantile(away.min(axis=1), 0.9) < 0.05
        assert np.bincount(away.argmin(axis=1), minlength=3).min() > 40


def test_every_point_of_the_checklist_has_its_test():
    numbers = sorted(int(name[5:7]) for name in globals() if name.startswith("test_") and name[5:7].isdecimal())
    assert numbers == list(range(1, 27))
