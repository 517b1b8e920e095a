"""The checklist: 26 formulas, each with the mistakes that implementations make of it, and where they would be noticed:
in the test of this number in test_article.py (A) or here (*), or in another file.

 1  one step iterated is one jump: variances added where they must shrink first (A 04); one t for the batch (A 12)
 2  "linear": T lowered and beta left as it is, so that half of the image survives (schedule)
 3  "cosine": alpha_bar read off the cosine, 0 at the end, instead of computed from the clipped beta; s forgotten (*)
 4  gamma of Chen: no normalisation to 1 ... 0; tau in the wrong place; in quadratic, the square forgotten (*)
 5  log-SNR forms: a and b, or the limits, exchanged; the logarithm of amplitudes instead of powers (*)
 6  "sigmoid_beta": two schedules of one name taken for the same (*)
 7  zero terminal SNR: alpha_bar shifted instead of its root (schedule); eps predicted without signal (refusals)
 8  input scaling: the sampler's x_t normalised, too; x0hat clipped to 1 and not b (*); no division by b (sample)
 9  mu_tilde: alpha_bar for alpha, t for t-1 (A 07, A 10); the step at t = 0 not ending in x_0 (schedule)
10  beta_tilde: the logarithm of beta_tilde_0 = 0, or of a tiny number in its place; large at t = 0 (*, A 06, schedule)
11  "ddpm": noise after the last step, or none at t = 1; the mean clipped instead of x_0 (*)
12  respacing: alpha_bar_prev of the next timestep, not the next one visited (*); the network given 0, 1, 2 ... (sample)
13  parametrisations: a sign in v (*)
14  min-SNR: the weight for eps used for v and x_0, too (*)
15  two forms of the loss: sigma for sigma^2, a 2 lost, alpha_bar for alpha (A 09, A 11, *)
16  KL and the prior: nats for bits, a sum over pixels for a mean, the two Gaussians exchanged (bound)
17  grey levels: bins of 1/255 instead of 2/255; closed ends, so that the 256 do not add up to 1 (bound)
18  learned variance: variances interpolated, not logarithms (*); the bound of a step, not their sum (process)
19  "ddim": epshat left as it was when x0hat is clipped; sigma not taken off the direction (*)
20  "dpm++": r upside down; the sign of e^-h - 1; a division by sigma = 0 at the end (*)
21  guidance: (1 + s) for s, so that 0 is conditional already (sample)
22  dynamic threshold: s below 1, which stretches; clipped without dividing; one quantile for the batch (*)
23  encodings: i for 2i, half for half - 1 (unet); t / T, or the index in the batch, for t (A 12)
24  the network: padding on both sides, eps 1e-5, attention scaled by 1/C, nothing that starts at zero (unet)
25  the moving average: one that starts at zero, or shares its arrays with the model (optim)
26  all of it, without training: what the others have missed (ideal)

Values given to several digits were computed independently of this package, from the papers.
"""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ideal import at, column, image
from strategies import SEEDS, make, processes

from tinyddpm import Diffusion, Schedule, make_schedule
from tinyddpm.diffusion.checks import OBJECTIVES
from tinyddpm.diffusion.clipping import dynamic_threshold
from tinyddpm.diffusion.sample import ddim, ddpm, dpm_solver, respace

LINEAR = make_schedule("linear", 1000)
ALL, BUT_LAST = slice(None), slice(-1)
U = np.arange(1, 1001) / 1000
of_cosine = lambda u: np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
sigma = lambda w: 1 / (1 + np.exp(-w))


def log_snr_of_cosine(u, high=15, low=-15):
    a, b = math.atan(math.exp(-high / 2)), math.atan(math.exp(-low / 2))
    return -2 * np.log(np.tan(a + u * (b - a)))


# fmt: off
KNOWN = [  # schedule, T, settings, one of its tables, where in it, values, their relative error, or None: of six digits
    ("linear", 1000, {}, "alpha_bar", -1, 4.036e-5, 1e-3),
    ("linear", 1000, {}, "beta", ALL, 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999, 1e-9),
    ("linear", 1000, {}, "posterior_variance", 1, 5.4532e-5, 1e-4),
    ("linear", 1000, {}, "posterior_log_variance", 0, -9.8167, 1e-5),
    ("cosine", 1000, {}, "beta", 0, 4.128e-5, 2e-4),
    ("cosine", 1000, {}, "beta", -1, 0.999, 1e-15),
    ("cosine", 1000, {}, "alpha_bar", BUT_LAST, (of_cosine(U) / of_cosine(0))[:-1], 1e-9),
    ("cosine", 1000, {}, "alpha_bar", -1, 2.43e-9, 2e-3),  # recomputed from the clipped beta: not 0
    ("linear_gamma", 4, {}, "alpha_bar", BUT_LAST, [0.75, 0.5, 0.25], 1e-9),
    ("cosine", 4, dict(s=0), "alpha_bar", BUT_LAST, [0.853553, 0.5, 0.146447], None),
    ("cosine", 4, dict(s=0, start=0.2), "alpha_bar", BUT_LAST, [0.723607, 0.381966, 0.105573], None),
    *[("cosine", 4, dict(s=0, tau=tau), "alpha_bar", BUT_LAST, np.cos(math.pi / 8 * np.arange(1, 4)) ** (2 * tau), 1e-9)
      for tau in (0.5, 2, 3)],
    ("sigmoid", 4, dict(tau=0.9), "alpha_bar", BUT_LAST, [0.866370, 0.5, 0.133630], None),
    ("sigmoid", 4, dict(start=0, tau=0.3), "alpha_bar", BUT_LAST, [0.151639, 0.013296, 0.001015], None),
    *[("sigmoid", 1000, {}, "beta", t, value, error)
      for t, value, error in ((0, 3.003e-4, 2e-4), (-2, 0.5014, 1e-4), (-1, 0.999, 1e-15))],
    ("sigmoid", 1000, {}, "alpha_bar", -1, 3.0e-7, 0.02),
    ("quadratic", 3, dict(beta_start=0.01, beta_end=0.09), "beta", ALL, [0.01, 0.04, 0.09], 1e-12),
    ("quadratic", 1000, {}, "beta", ALL, (0.01 + (math.sqrt(0.02) - 0.01) * np.arange(1000) / 999) ** 2, 1e-9),
    ("cosine_logsnr", 1000, {}, "log_snr", ALL, log_snr_of_cosine(U), 1e-8),
    ("sigmoid_logsnr", 1000, {}, "log_snr", ALL, 15 - 30 * U, 1e-8),
    *[(name, 1000, dict(logsnr_max=12, logsnr_min=-9, shift=shift), "log_snr", ALL, values + shift, 1e-8)
      for name, values in (("cosine_logsnr", log_snr_of_cosine(U, 12, -9)), ("sigmoid_logsnr", 12 - 21 * U))
      for shift in (0, 2 * math.log(64 / 256))],
    ("sigmoid_beta", 1000, {}, "beta", ALL, 1e-4 + (0.02 - 1e-4) * sigma(np.linspace(-6, 6, 1000)), 1e-12),
    ("sigmoid_beta", 5, dict(beta_start=0.1, beta_end=0.3), "beta", ALL, 0.1 + 0.2 * sigma(3.0 * np.arange(-2, 3)),
     1e-12),
]
# fmt: on


@pytest.mark.parametrize(("name", "T", "settings", "table", "where", "values", "error"), KNOWN)
def test_02_to_06_and_10_known_values_of_schedules(name, T, settings, table, where, values, error):
    """Values of log_snr near 0 to 1e-8."""
    tolerance = dict(rtol=error, atol=1e-8 * (table == "log_snr")) if error else dict(rtol=0, atol=5.01e-7)
    np.testing.assert_allclose(getattr(make(name, T, **settings), table)[where], values, **tolerance)


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


LEARNED = dict(variance="learned_range", loss_type="hybrid")
EVERY_STEP = [  # sampler, its name here, whether it draws noise, settings of its own, and of the diffusion
    *[(ddpm, "ddpm", True, {}, own) for own in ({"variance": "small"}, {"variance": "large"}, LEARNED)],
    *[(ddim, "ddim", eta > 0, {"eta": eta}, {}) for eta in (0.0, 0.3, 1.0)], (ddim, "ddim", False, {}, LEARNED),
    (dpm_solver, "dpm++", False, {}, {}),
]  # fmt: skip


@pytest.mark.parametrize("b", [1.0, 0.5])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("sampler", "method", "random", "settings", "own"), EVERY_STEP)
def test_11_19_20_every_step_of_the_samplers(sampler, method, random, settings, own, objective, b):
    """For a model some of whose x0hat are clipped and others not."""
    both = lambda x, t: np.concatenate([np.cos(2 * x + t[0]), np.tanh(x)], axis=-1)
    d = Diffusion(Schedule(np.linspace(1e-3, 0.5, 20), b), objective, **own)
    model = both if d.variance == "learned_range" else lambda x, t: both(x, t)[..., :1]
    x, *zs = np.random.default_rng(0).standard_normal((20, 3, 2, 2, 1))
    ours, theirs = iter(zs), iter(zs)
    steps = sampler(d, model, x, (lambda: next(ours)) if random else None, **settings)
    by_paper = by_the_paper(method, d, both, x, lambda: next(theirs), **settings)
    for (_, x, x0), (x_by_paper, x0_by_paper) in zip(steps, by_paper, strict=True):
        np.testing.assert_allclose(x, x_by_paper, atol=1e-9)
        np.testing.assert_allclose(x0, x0_by_paper, atol=1e-9)
    assert len([*ours]) == len([*theirs])  # as many z were drawn


def test_12_respaced_steps():
    ts, s = at(99, 499, 999), Schedule(LINEAR.beta, 0.7)
    for before, after in (("small", "small"), ("large", "small"), ("learned_range", "learned_range")):
        short = respace(Diffusion(s, "v", before, "vlb", 3.0, clip=False), ts)
        np.testing.assert_allclose(short.schedule.alpha_bar, s.alpha_bar[ts], rtol=1e-12)
        np.testing.assert_allclose(short.schedule.alpha_bar_prev, [1, *s.alpha_bar[ts[:-1]]], rtol=1e-12)
        assert short == Diffusion(short.schedule, "v", after, "vlb", 3.0, clip=False)
        assert short.schedule.input_scale == 0.7
    assert respace(Diffusion(s), at(7, 8)).T == 2  # neighbours, too


@given(p=processes(1e-6))
def test_13_parametrisations(p):
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
    bar, x0, eps = np.array([0.9, 0.45, 0.045]), image(0.5), image(-0.8)
    for b, gamma in ((1, 5), (1, 0.5), (0.5, 5), (0.5, 0.5)):
        snr = b**2 * bar / (1 - bar)
        cut, of_v = np.minimum(snr, gamma), snr + 1 if b == 1 else snr / bar
        for objective, weight in (("eps", cut / snr), ("x0", cut), ("v", cut / of_v)):
            of_gamma = {} if gamma == 5 else {"min_snr_gamma": gamma}
            d = Diffusion(Schedule([0.1, 0.5, 0.9], b), objective, loss_type="min_snr", **of_gamma)
            for t in range(3):
                expected = weight[t] * (0.3 - d.target(x0, at(t), eps).item()) ** 2
                assert math.isclose(d.loss_at(lambda x, t: 0 * x + 0.3, x0, at(t), eps).item(), expected, rel_tol=1e-9)


@given(p=processes(1e-4), variance=st.sampled_from(["small", "large"]), seed=SEEDS)
def test_15_the_first_form_of_the_loss_is_the_second_exactly(p, variance, seed):
    """||mu_tilde - mu_theta||^2 / (2 sigma^2) is the error in eps, weighted: for every objective."""
    d, x0, t, _ = p
    s, losses = Schedule(d.schedule.beta[: t.max() + 1], d.schedule.input_scale), []
    assume(s.alpha_bar[0] < 1 - 1e-6)
    for form in ("weighted_mu", "weighted_eps"):
        weighted = Diffusion(s, d.objective, variance, form)
        losses.append(weighted.loss(lambda x, t: np.sin(3 * x), x0, np.random.default_rng(seed)).item())
    assert math.isclose(*losses, rel_tol=1e-7, abs_tol=1e-12)


def test_22_dynamic_threshold():
    x0 = np.random.default_rng(0).standard_normal((2, 20, 20, 1)) * image(2, 0.1)
    s = np.quantile(np.abs(x0[0]), 0.995)
    np.testing.assert_allclose(dynamic_threshold(x0)[0], np.clip(x0[0], -s, s) / s)
    np.testing.assert_array_equal(dynamic_threshold(x0)[1], x0[1])  # s is at least 1
    np.testing.assert_allclose(dynamic_threshold(x0, most=2)[0], np.clip(x0[0], -2, 2) / 2)
    s = np.quantile(np.abs(x0[0]), 0.9)
    np.testing.assert_allclose(dynamic_threshold(x0, 0.9, 5)[0], np.clip(x0[0], -s, s) / s)
