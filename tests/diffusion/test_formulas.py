"""The checklist: 26 formulas, each with the mistake that implementations make of it. One test for each, by number.

Values given to several digits were computed independently of this package, from the papers.
"""

import inspect
import math

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from ideal import ideal_denoiser
from strategies import make, processes, schedules

from tinyddpm import EMA, Diffusion, Schedule, UNet, make_schedule, sample
from tinyddpm.autograd.fused import attention
from tinyddpm.diffusion.bound import discretised_gaussian, gaussian_kl, prior_terms
from tinyddpm.diffusion.checks import OBJECTIVES
from tinyddpm.diffusion.clipping import dynamic_threshold
from tinyddpm.diffusion.sample import ddim, ddpm, dpm_solver, guided, respace
from tinyddpm.diffusion.schedule import GAMMA, cosine, cosine_logsnr, sigmoid, sigmoid_beta, sigmoid_logsnr
from tinyddpm.network.nn import GroupNorm
from tinyddpm.network.unet import timestep_encoding

LINEAR = make_schedule("linear", 1000)
QUARTERS = np.array([0.25, 0.5, 0.75])


def image(*values):
    return np.array(values, dtype=float).reshape(-1, 1, 1, 1)


def at(*t):
    return np.array(t)


def seen_in_loss(diffusion, x0, output):
    """The x and t that a model gets to see in `loss`."""
    seen = []
    diffusion.loss(lambda x, t: seen.append((x, t)) or output(x), x0, np.random.default_rng(0))
    return seen[0]


# -------------------------------------------------------------------------------------------------- forward process


@given(s=schedules())
def test_01_one_step_iterated_is_one_jump_and_t_is_drawn_for_each_image(s):
    """Mistakes: variances added where they must shrink first; one t for the whole batch."""
    d = Diffusion(s, "v")
    mean, variance = image(s.input_scale * 0.6), 0.0
    for t in range(len(s)):
        mean = d.q_step(mean, at(t), image(0))
        variance = (1 - s.beta[t]) * variance + s.beta[t]
    np.testing.assert_allclose(d.q_sample(image(0.6), at(t), image(0)), mean, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(d.q_sample(image(0), at(t), image(1)) ** 2, variance, rtol=1e-9)
    if d.T > 10:
        assert len(set(seen_in_loss(d, np.zeros((64, 1, 1, 1)), lambda x: x)[1])) > 5


def test_02_what_linear_leaves_of_the_image_and_the_warning():
    """Mistake: T lowered and beta left as it is, so that half of the image survives and sampling starts elsewhere."""
    for T, left in (
        (50, 0.603),
        (100, 0.364),
        (200, 0.132),
        (250, 0.0797),
        (300, 0.0481),
        (400, 0.0175),
        (500, 0.0064),
    ):
        assert math.isclose(make("linear", T).alpha_bar[-1], left, rel_tol=8e-3)
    assert math.isclose(LINEAR.alpha_bar[-1], 4.036e-5, rel_tol=1e-3)
    with pytest.warns(UserWarning, match="ends far from pure noise"):
        make_schedule("linear", 100)


# -------------------------------------------------------------------------------------------------------- schedules


def test_03_cosine():
    """Mistakes: alpha_bar read off the cosine, 0 at the end, instead of computed from the clipped beta; s forgotten."""
    s = make_schedule("cosine", 1000)
    assert math.isclose(s.beta[0], 4.128e-5, rel_tol=2e-4)
    assert s.beta[-1] == 0.999 and (s.beta == 0.999).sum() == 1  # clipped once
    assert math.isclose(s.alpha_bar[-1], 2.43e-9, rel_tol=2e-3)  # recomputed from the clipped beta: not 0


def test_04_gamma_functions_of_Chen():
    """Mistakes: no normalisation to 1 ... 0; tau in the wrong place; in quadratic, the square forgotten."""
    np.testing.assert_allclose(GAMMA["linear_gamma"](QUARTERS), [0.75, 0.5, 0.25])
    for gamma, settings, values in [
        (cosine, {"start": 0, "end": 1, "tau": 1, "s": 0}, [0.853553, 0.5, 0.146447]),
        (cosine, {"start": 0.2, "end": 1, "tau": 1, "s": 0}, [0.723607, 0.381966, 0.105573]),
        (sigmoid, {"start": -3, "end": 3, "tau": 0.9}, [0.866370, 0.5, 0.133630]),
        (sigmoid, {"start": 0, "end": 3, "tau": 0.3}, [0.151639, 0.013296, 0.001015]),
    ]:
        np.testing.assert_allclose(gamma(QUARTERS, **settings), values, atol=5.01e-7)
    s = make_schedule("sigmoid", 1000)
    assert math.isclose(s.beta[0], 3.003e-4, rel_tol=2e-4) and math.isclose(s.beta[-2], 0.5014, rel_tol=1e-4)
    assert s.beta[-1] == 0.999 and math.isclose(s.alpha_bar[-1], 3.0e-7, rel_tol=0.02)
    quadratic = make("quadratic", 3, beta_start=0.01, beta_end=0.09)
    np.testing.assert_allclose(quadratic.beta, [0.01, 0.04, 0.09])  # the square of equal steps, not equal steps


def test_05_log_snr_forms():
    """Mistakes: a and b, or the limits, exchanged; the logarithm of the amplitudes instead of the powers."""
    u = np.arange(1, 1001) / 1000
    a, b = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))
    np.testing.assert_allclose(make_schedule("cosine_logsnr", 1000).log_snr, -2 * np.log(np.tan(a + u * (b - a))),
                               atol=1e-6)  # fmt: skip
    np.testing.assert_allclose(make_schedule("sigmoid_logsnr", 1000).log_snr, 15 - 30 * u, atol=1e-6)
    shift = 2 * math.log(64 / 256)
    shifted = make_schedule("cosine_logsnr", 1000, shift=shift).log_snr
    np.testing.assert_allclose(shifted - make_schedule("cosine_logsnr", 1000).log_snr, shift, atol=1e-6)
    for gamma in (cosine_logsnr, sigmoid_logsnr):
        assert math.isclose(gamma(np.array([0.5])).item(), 0.5)


def test_06_the_sigmoid_of_beta_is_another_thing_with_another_name():
    """Mistake: two schedules of one name taken for the same."""
    w = np.linspace(-6, 6, 1000)
    np.testing.assert_allclose(sigmoid_beta(1000), 1e-4 + (0.02 - 1e-4) / (1 + np.exp(-w)), rtol=1e-12)
    assert np.abs(make_schedule("sigmoid_beta").beta - make_schedule("sigmoid").beta).max() > 0.9


def test_07_zero_terminal_snr():
    """Mistakes: alpha_bar shifted instead of its root; eps predicted where there is no signal to divide by."""
    s = make_schedule("linear", 1000, zero_terminal_snr=True)
    root = np.sqrt(LINEAR.alpha_bar)
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    np.testing.assert_allclose(np.sqrt(s.alpha_bar), expected, atol=1e-12)
    assert s.alpha_bar[-1] == 0 and math.isclose(s.alpha_bar[0], LINEAR.alpha_bar[0])
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
    t = at(len(s) // 2)
    g = s.alpha_bar[t[0]]
    x_t = scaled.q_sample(image(0.5), t, image(-0.4))
    assert math.isclose(x_t.item(), math.sqrt(g) * b * 0.5 - math.sqrt(1 - g) * 0.4, abs_tol=1e-12)
    seen = []  # the network's input is normalised, the sampler's x_t is not
    scaled.p_mean_variance(lambda x, t: seen.append(x.item()) or x, x_t, t)
    assert math.isclose(seen[0], x_t.item() / math.sqrt((b * b - 1) * g + 1), abs_tol=1e-12)
    ends = [sample(scaled, lambda x, t: 0 * x + 9, (1, 1, 1, 1), method, steps=1).item() for method in ("ddpm", "ddim")]
    np.testing.assert_allclose(ends, 1, rtol=1e-6)  # b x_0 clipped to b, and divided by b at the end


# -------------------------------------------------------------------------------------------------- reverse process


@given(p=processes(1e-2))
def test_09_posterior_mean_two_ways(p):
    """Mistakes: alpha_bar for alpha, t for t-1; the step at t = 0 not ending in x_0."""
    d, x0, t, eps = p
    bar, beta = (table[t].reshape(-1, 1, 1, 1) for table in (d.schedule.alpha_bar, d.schedule.beta))
    if (bar < 1 - 1e-4).all():
        x_t = d.q_sample(x0, t, eps)
        np.testing.assert_allclose(
            d.posterior_mean(x0, x_t, t), (x_t - beta / np.sqrt(1 - bar) * eps) / np.sqrt(1 - beta), atol=1e-11
        )
    linear_d = Diffusion(LINEAR)
    t = np.full(len(x0), 500)
    x_t, bar = linear_d.q_sample(x0, t, eps), LINEAR.alpha_bar[500]
    two = (x_t - LINEAR.beta[500] / np.sqrt(1 - bar) * eps) / np.sqrt(1 - LINEAR.beta[500])
    np.testing.assert_allclose(linear_d.posterior_mean(x0, x_t, t), two, atol=1e-13 * max(1, np.abs(two).max()))
    assert math.isclose(LINEAR.posterior_mean_coef_x0[0], 1, rel_tol=1e-12) and LINEAR.posterior_mean_coef_xt[0] == 0


def test_10_posterior_variance_and_its_logarithm():
    """Mistakes: the logarithm of beta_tilde_0 = 0, or of a tiny number in its place; large at t = 0."""
    s = LINEAR
    np.testing.assert_allclose(s.posterior_variance[1:], (s.beta * (1 - s.alpha_bar_prev) / (1 - s.alpha_bar))[1:])
    assert s.posterior_variance[0] == 0
    assert math.isclose(s.posterior_variance[1], 5.4532e-5, rel_tol=1e-4)
    assert math.isclose(s.posterior_log_variance[0], -9.8167, abs_tol=1e-4)
    large = Diffusion(s, variance="large").log_variance(np.zeros((1000, 1, 1, 1)), np.arange(1000)).ravel()
    np.testing.assert_allclose(np.exp(large), [s.posterior_variance[1], *s.beta[1:]], rtol=1e-12)


def test_11_noise_until_t_is_1_and_x0_clipped_before_the_mean():
    """Mistakes: noise after the last step, or none at t = 1; the mean clipped instead of x_0."""
    d, drawn = Diffusion(make("linear", 6)), []
    list(ddpm(d, lambda x, t: 0 * x, image(0.5), lambda: drawn.append(1) or image(1)))
    assert len(drawn) == 5  # t = 5 ... 1
    mean, _, x0 = d.p_mean_variance(lambda x, t: 0 * x - 50, image(0.5), at(3))
    assert x0.item() == 1 and math.isclose(mean.item(), d.posterior_mean(image(1), image(0.5), at(3)).item())


def test_12_respaced_steps():
    """Mistakes: alpha_bar_prev of the next timestep down, not of the next one visited; the network given 0, 1, 2 ..."""
    ts = np.array([99, 499, 999])
    short = respace(Diffusion(LINEAR, variance="large"), ts)
    np.testing.assert_allclose(short.schedule.alpha_bar_prev, [1, LINEAR.alpha_bar[99], LINEAR.alpha_bar[499]])
    np.testing.assert_allclose(short.schedule.beta, 1 - LINEAR.alpha_bar[ts] / short.schedule.alpha_bar_prev)
    assert short.variance == "small"
    asked = []
    sample(Diffusion(LINEAR), lambda x, t: asked.append(t[0]) or x, (1, 1, 1, 1), steps=2)
    assert asked == [999, 499]  # the network is asked for the t it knows


# ----------------------------------------------------------------------------------------- parametrisations, losses


@given(p=processes(1e-6))
def test_13_parametrisations(p):
    """Mistake: a sign in v."""
    d, x0, t, eps = p
    a, s = (np.sqrt(x[t]).reshape(-1, 1, 1, 1) for x in (d.schedule.alpha_bar, 1 - d.schedule.alpha_bar))
    x0_scaled, x_t = d.schedule.input_scale * x0, d.q_sample(x0, t, eps)
    v = Diffusion(d.schedule, "v").target(x0, t, eps)
    np.testing.assert_allclose(v, a * eps - s * x0_scaled, atol=1e-12)
    np.testing.assert_allclose(a * x_t - s * v, x0_scaled, atol=1e-9)
    np.testing.assert_allclose(s * x_t + a * v, eps, atol=1e-9)
    np.testing.assert_allclose(d.predict_x0(x_t, t, d.target(x0, t, eps)), x0, atol=1e-8)


def test_14_min_snr_weights():
    """Mistake: the weight for eps used for v and x_0, too."""
    bar = np.array([0.9, 0.45, 0.045])
    s, snr = Schedule([0.1, 0.5, 0.9]), bar / (1 - bar)
    cut = np.minimum(snr, 5)
    for objective, weight in (("eps", cut / snr), ("x0", cut), ("v", cut / (snr + 1))):
        d = Diffusion(s, objective, loss_type="min_snr")
        for t in range(3):
            loss = d.loss_at(lambda x, t: 0 * x, image(0.5), at(t), image(-0.8)).item()
            target = d.target(image(0.5), at(t), image(-0.8)).item()
            assert math.isclose(loss, weight[t] * target**2, rel_tol=1e-9)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_15_the_first_form_of_the_loss_is_the_second_exactly(variance):
    """Mistakes: sigma for sigma^2, a 2 lost, alpha_bar for alpha."""
    x0 = np.random.default_rng(0).uniform(-1, 1, (500, 2, 2, 1))
    model = lambda x, t: np.cos(x)
    first, second, simple = (
        Diffusion(LINEAR, "eps", variance, loss).loss(model, x0, np.random.default_rng(1)).item()
        for loss in ("weighted_mu", "weighted_eps", "simple")
    )
    assert math.isclose(first, second, rel_tol=1e-9) and abs(simple / first - 1) > 0.1


def test_16_kl_of_gaussians_and_the_prior_term():
    """Mistakes: nats for bits, a sum over pixels for a mean, the two Gaussians exchanged."""
    kl = gaussian_kl(image(0.3), image(math.log(4)), image(-0.2), image(math.log(9))).item()
    assert math.isclose(kl, 0.5 * (-1 + math.log(9) - math.log(4) + 4 / 9 + 0.25 / 9))
    d = Diffusion(LINEAR)
    assert math.isclose(
        prior_terms(d, np.ones((1, 4, 4, 1))).item(), 2.9e-5, rel_tol=0.01
    )  # bits, mean over dimensions
    assert prior_terms(d, np.ones((1, 8, 8, 3))).item() == pytest.approx(prior_terms(d, np.ones((1, 4, 4, 1))).item())


@given(mean=st.floats(-1.5, 1.5), log_std=st.floats(-7, 0))
def test_17_the_256_levels_sum_to_1(mean, log_std):
    """Mistakes: bins of 1/255 instead of 2/255; closed ends, so that the sum falls short of 1."""
    levels = np.arange(256) / 127.5 - 1
    ln_p = discretised_gaussian(levels, np.full(256, mean), np.full(256, 2 * log_std)).data
    assert math.isclose(np.exp(ln_p).sum(), 1, abs_tol=3e-10) and ln_p.min() >= math.log(1e-12) - 1e-9


def test_18_learned_variance_and_hybrid_loss():
    """Mistakes: variances interpolated instead of logarithms; the bound of a step, not their sum; the mean not held."""
    learned = Diffusion(LINEAR, variance="learned_range", loss_type="hybrid")
    for out, t in ((-1, 700), (1, 700), (0.2, 30), (0.2, 0)):
        v = (out + 1) / 2
        expected = v * math.log(LINEAR.beta[t]) + (1 - v) * LINEAR.posterior_log_variance[t]
        assert math.isclose(learned.log_variance(image(0), at(t), image(out)).item(), expected, rel_tol=1e-12)
    x0 = np.random.default_rng(0).uniform(-1, 1, (20, 1, 1, 1))
    model = lambda x, t: np.concatenate([np.cos(x), np.sin(x)], axis=-1)
    hybrid, vlb = (
        Diffusion(LINEAR, "eps", "learned_range", loss).loss(model, x0, np.random.default_rng(3)).item()
        for loss in ("hybrid", "vlb")
    )
    simple = Diffusion(LINEAR).loss(lambda x, t: np.cos(x), x0, np.random.default_rng(3)).item()
    assert math.isclose(hybrid, simple + 0.001 * vlb, rel_tol=1e-12)  # vlb is the sum over t: T times one term
    assert UNet(channels=(4,), blocks=1, attention=(False,), groups=2, out_channels=2)(
        np.zeros((1, 4, 4, 1), np.float32), at(0)
    ).shape == (1, 4, 4, 2)


# --------------------------------------------------------------------------------------------------------- samplers


def test_19_ddim():
    """Mistakes: epshat left as it was when x0hat is clipped; sigma not taken off the direction."""
    d = Diffusion(make("linear", 20, beta_start=0.01, beta_end=0.4))
    model = lambda x, t: np.sin(2 * x)

    def run(sampler, **settings):
        noise = np.random.default_rng(0)
        return [x.item() for _, x, _ in sampler(d, model, image(0.7), lambda: noise.standard_normal((1, 1, 1, 1)),
                                                **settings)]  # fmt: skip

    np.testing.assert_allclose(run(ddim, eta=1.0), run(ddpm), atol=1e-12)  # the same z, every step
    assert run(ddim) == run(ddim) and run(ddim) != run(ddim, eta=0.5)
    perfect = ideal_denoiser(image(0.3), d)
    for steps in (1, 3, 20):
        np.testing.assert_allclose(sample(d, perfect, (3, 1, 1, 1), "ddim", steps=steps), 0.3, rtol=1e-5)
    x, bar, before = 0.7, d.schedule.alpha_bar[-1], d.schedule.alpha_bar[-2]
    _, got, x0 = next(ddim(d, lambda x, t: 0 * x - 9, image(x), None))
    eps = (x - math.sqrt(bar) * 1) / math.sqrt(1 - bar)  # derived anew from the clipped x0hat, not the model's -9
    assert x0.item() == 1 and math.isclose(got.item(), math.sqrt(before) + math.sqrt(1 - before) * eps)


def test_20_dpm_solver():
    """Mistakes: r upside down; the sign of e^-h - 1; a division by sigma = 0 at the end."""
    d = Diffusion(Schedule([0.2, 0.5, 0.6]), "x0")
    model = lambda x, t: 0.9 * np.sin(x + t[0])
    steps = [x.item() for _, x, _ in dpm_solver(d, model, image(0.7), None)]
    alpha, sigma = np.sqrt(d.schedule.alpha_bar[::-1]), np.sqrt(1 - d.schedule.alpha_bar[::-1])
    l = np.log(alpha / sigma)
    h = l[1:] - l[:-1]
    m = [model(0.7, at(2)), model(steps[0], at(1)), model(steps[1], at(0))]
    first = sigma[1] / sigma[0] * 0.7 - alpha[1] * math.expm1(-h[0]) * m[0]
    D = m[1] + (m[1] - m[0]) / (h[0] / h[1]) / 2
    second = sigma[2] / sigma[1] * steps[0] - alpha[2] * math.expm1(-h[1]) * D
    np.testing.assert_allclose(steps, [first, second, m[2]], rtol=1e-9)  # at sigma = 0, x = m


def test_21_guidance():
    """Mistake: (1 + s) for s, so that 0 is conditional already."""
    u, c = (lambda x, t: x + 1), (lambda x, t: 3 * x)
    x = image(0.5, -2.0)
    for s, expected in ((1, c(x, 0)), (0, u(x, 0)), (4, u(x, 0) + 4 * (c(x, 0) - u(x, 0)))):
        np.testing.assert_allclose(guided(u, c, s)(x, at(0, 0)), expected)


def test_22_dynamic_threshold():
    """Mistakes: s below 1, which stretches; clipped without dividing; one quantile for the batch."""
    x0 = np.random.default_rng(0).standard_normal((2, 20, 20, 1)) * np.array([2, 0.1]).reshape(2, 1, 1, 1)
    s = np.quantile(np.abs(x0[0]), 0.995)
    np.testing.assert_allclose(dynamic_threshold(x0)[0], np.clip(x0[0], -s, s) / s)
    np.testing.assert_array_equal(dynamic_threshold(x0)[1], x0[1])  # s is at least 1
    np.testing.assert_allclose(dynamic_threshold(x0, most=2)[0], np.clip(x0[0], -2, 2) / 2)


# ------------------------------------------------------------------------------------------------ network, training


def test_23_position_encodings():
    """Mistakes: i for 2i, half for half - 1; t / T, or the index in the batch, for t."""
    t, d = np.array([0, 3, 999]), 6
    article, ddpm_form, improved = (timestep_encoding(t, d, form) for form in ("interleaved", "ddpm", "improved"))
    for row, k in enumerate(t):
        for i in range(3):
            angle = k / 10000 ** (2 * i / d)
            np.testing.assert_allclose(article[row, 2 * i : 2 * i + 2], [math.sin(angle), math.cos(angle)], atol=1e-12)
            np.testing.assert_allclose(improved[row, [i, 3 + i]], [math.cos(angle), math.sin(angle)], atol=1e-12)
            angle = k * math.exp(-math.log(1e4) * i / (3 - 1))
            np.testing.assert_allclose(ddpm_form[row, [i, 3 + i]], [math.sin(angle), math.cos(angle)], atol=1e-12)
    x, t = seen_in_loss(Diffusion(LINEAR), np.zeros((50, 1, 1, 1)), lambda x: x)
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
    q = np.broadcast_to(q, (1, 2, 4)).copy()
    score = (q[0, 0] @ q[0, 0]) / math.sqrt(4)  # C^-1/2
    weight = math.exp(2 * score) / (math.exp(score) + math.exp(2 * score))
    np.testing.assert_allclose(attention(q, k, v, heads=1).data, weight, rtol=1e-12)


def test_25_the_moving_average():
    """Mistakes: an average that starts at zero, or shares its arrays with the model."""
    unet = UNet(channels=(4,), blocks=1, attention=(False,), groups=2)
    ema = EMA(unet, 0.9)
    start = ema.average.copy()
    np.testing.assert_array_equal(start, np.concatenate([p.data.ravel() for p in unet.parameters()]))  # a copy
    assert ema.model is not unet
    expected = start.astype(float)
    for n in range(100):
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * (start + n)
        ema.update(start + np.float32(n))
    np.testing.assert_allclose(ema.average, expected, rtol=1e-4)
    flat = np.concatenate([p.data.ravel() for p in ema.model.parameters()])
    np.testing.assert_array_equal(flat, ema.average)  # it is what one samples from


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_26_an_oracle_without_training(objective):
    """Mistakes: whatever the 25 others have missed."""
    data = image(-0.7, 0.1, 0.8)
    d = Diffusion(LINEAR, objective)
    for method in ("ddpm", "ddim", "dpm++"):
        drawn = sample(d, ideal_denoiser(data, d), (200, 1, 1, 1), method, steps=100).ravel()
        away = np.abs(drawn[:, None] - data.ravel())
        assert np.quantile(away.min(axis=1), 0.9) < 0.05
        assert np.bincount(away.argmin(axis=1), minlength=3).min() > 40


def test_every_point_of_the_checklist_has_its_test():
    numbers = sorted(int(name[5:7]) for name in globals() if name.startswith("test_") and name[5:7].isdecimal())
    assert numbers == list(range(1, 27))
