"""What must hold for every schedule, drawn by hypothesis. Its formula and known values: test_formulas.py, 02 to 07."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make, schedules

from tinyddpm import Diffusion, Schedule, make_schedule
from tinyddpm.diffusion.schedule import GAMMA, SCHEDULES, cosine, discretise, linear, rescale_to_zero_terminal_snr

TABLES = ["alpha", "alpha_bar", "alpha_bar_prev", "snr", "log_snr", "posterior_mean_coef_x0", "posterior_mean_coef_xt"]
TABLES += ["posterior_variance", "posterior_log_variance", "one_minus_alpha_bar", "one_minus_alpha_bar_prev"]


@given(s=schedules())
def test_the_tables_follow_from_beta_step_by_step_and_b_shifts_the_log_snr_alone(s):
    assert all(0 < beta < 1 for beta in s.beta[:-1]) and 0 < s.beta[-1] <= 1
    bars, noises = [1.0], [0.0]
    for beta in s.beta.tolist():
        bars.append(bars[-1] * (1 - beta))
        noises.append(noises[-1] * (1 - beta) + beta)  # without a subtraction that loses digits
    bar, before, noise, noise_before = (np.array(x) for x in (bars[1:], bars[:-1], noises[1:], noises[:-1]))
    with np.errstate(divide="ignore"):
        log_snr = np.log(s.input_scale**2 * bar / noise)
    for name, expected in {
        "alpha": 1 - s.beta, "alpha_bar": bar, "alpha_bar_prev": before, "one_minus_alpha_bar": noise,
        "one_minus_alpha_bar_prev": noise_before, "snr": s.input_scale**2 * bar / noise,
        "posterior_variance": s.beta * noise_before / noise,
        "posterior_mean_coef_x0": np.sqrt(before) * s.beta / noise,
        "posterior_mean_coef_xt": np.sqrt(1 - s.beta) * noise_before / noise,
    }.items():  # fmt: skip
        np.testing.assert_allclose(getattr(s, name), expected, rtol=1e-9, atol=1e-300, err_msg=name)
    np.testing.assert_allclose(s.log_snr, log_snr, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(s.posterior_log_variance[1:], np.log(s.posterior_variance[1:]), rtol=1e-12)
    assert s.posterior_variance[0] == 0 == s.posterior_mean_coef_xt[0] and (s.alpha_bar[:-1] > 0).all()
    assert math.isclose(s.posterior_mean_coef_x0[0], 1, rel_tol=1e-15)
    for falling in (s.alpha_bar, s.snr, s.log_snr):
        assert np.all(np.diff(falling) < 0)
    plain, finite = Schedule(s.beta), np.isfinite(s.log_snr)
    shift = s.log_snr[finite] - plain.log_snr[finite]
    np.testing.assert_allclose(shift, 2 * math.log(s.input_scale), rtol=1e-9, atol=1e-12)
    for name in set(TABLES) - {"snr", "log_snr"}:
        np.testing.assert_array_equal(getattr(s, name), getattr(plain, name))


def test_what_stands_in_for_the_logarithm_of_0():
    """beta_tilde_1 = beta_1 (1 - alpha_bar_0) / (1 - alpha_bar_1); with one step only, beta_0."""
    for beta, first in (([0.3], 0.3), ([0.1, 0.5], 0.5 * 0.1 / 0.55), ([0.1, 0.5, 0.9], 0.5 * 0.1 / 0.55)):
        s = Schedule(beta)
        for stands_in in (s.posterior_log_variance[0], Diffusion(s, "v", "large").fixed_log_variance()[0]):
            assert math.isclose(stands_in, math.log(first))


def test_tables_are_float64_of_length_T_and_nothing_about_a_schedule_can_be_changed_not_even_in_a_copy():
    s = make("cosine", 10, tau=2)
    for same in (s, copy.copy(s), copy.deepcopy(s), pickle.loads(pickle.dumps(s)), dataclasses.replace(s)):
        assert (same.name, same.parameters, same.input_scale, len(same)) == ("cosine", {"tau": 2.0}, 1.0, 10)
        np.testing.assert_array_equal(same.beta, s.beta)
        with pytest.raises(TypeError):
            same.parameters["tau"] = 3
        for name in ["beta", *TABLES]:
            table = getattr(same, name)
            assert table.dtype == np.float64 and table.shape == (10,) and getattr(same, name) is table
            with pytest.raises(ValueError, match="read-only"):
                table[0] = 0
            with pytest.raises(AttributeError):
                setattr(same, name, table)


def test_a_schedule_of_one_s_own_and_numbers_of_numpy():
    beta = np.array([0.1, 0.2])
    s, other = Schedule(beta), Schedule([0.1, 0.2])
    beta[0] = 0.9
    assert s.beta[0] == 0.1 and (s.name, s.input_scale, s.parameters) == ("custom", 1, {})
    assert s == s and s != other and len({s, other, s}) == 2
    assert Schedule([0.5, 1]).alpha_bar[-1] == 0
    assert repr(s) == "Schedule('custom', T=2, input_scale=1.0)"
    s = make("linear", np.int64(10), np.float64(0.5), beta_end=np.float32(0.25))
    assert repr(s) == "Schedule('linear', T=10, input_scale=0.5, beta_end=0.25)"
    assert type(s.input_scale) is type(s.parameters["beta_end"]) is float


@given(name=st.sampled_from(sorted(GAMMA)), T=st.integers(1, 2000))
def test_every_gamma_falls_from_1_to_0_and_alpha_bar_follows_it(name, T):
    gamma, s = GAMMA[name](np.linspace(0, 1, T + 1)), make(name, T)
    assert math.isclose(gamma[0], 1, abs_tol=4e-7) and math.isclose(gamma[-1], 0, abs_tol=4e-7)
    assert np.all(np.diff(gamma) < 0)
    kept = np.cumprod(s.beta < 0.999).astype(bool)
    np.testing.assert_allclose(s.alpha_bar[kept], gamma[1:].clip(1e-9)[kept], rtol=1e-9)


def test_discretise():
    np.testing.assert_allclose(discretise(np.array([0.8, 0.4, 0.1])), [0.2, 0.5, 0.75], rtol=1e-12)
    with pytest.warns(UserWarning, match="^gamma: it is flat at 2 of 4 steps, which add no noise$"):
        np.testing.assert_array_equal(discretise(np.array([1.0, 0.9, 0.9, 0.0])), [1e-12, 1 - 0.9, 1e-12, 0.999])
    np.testing.assert_allclose(discretise(np.array([1e-8, 0.0])), [0.999, 0.9], rtol=1e-6)  # gamma is 1e-9 or more
    make("sigmoid", 100, tau=0.1)  # flat at either end
    assert not np.isnan(cosine(np.linspace(0, 1, 101), start=0.1, end=1, tau=0.3)).any()


@given(s=schedules(zero_terminal_snr=False).filter(lambda s: len(s) > 1))
def test_with_zero_terminal_snr_the_end_is_noise_and_the_beginning_stays(s):
    rescaled = Schedule(rescale_to_zero_terminal_snr(s.beta))
    assert rescaled.alpha_bar[-1] == 0 and rescaled.beta[-1] == 1
    root, before = np.sqrt(rescaled.alpha_bar), np.sqrt(s.alpha_bar)
    assert math.isclose(root[0], before[0], rel_tol=1e-12)
    expected = (before - before[-1]) * before[0] / (before[0] - before[-1])
    kept = np.cumprod(rescaled.beta < 0.999).astype(bool)
    np.testing.assert_allclose(root[kept], expected[kept], rtol=1e-6, atol=1e-12)


def test_make_schedule_rescales_to_zero_terminal_snr_and_says_so():
    s = make_schedule("linear", 50, zero_terminal_snr=True, input_scale=0.5)  # and does not warn
    np.testing.assert_array_equal(s.beta, rescale_to_zero_terminal_snr(linear(50)))
    assert s.parameters == {"zero_terminal_snr": True} and s.input_scale == 0.5
    again = make_schedule(s.name, len(s), s.input_scale, **s.parameters)
    np.testing.assert_array_equal(again.beta, s.beta)
    assert s.snr[-1] == 0 and s.log_snr[-1] == -np.inf and np.isfinite(s.log_snr[:-1]).all()
    s = make("cosine", 1000, s=0, tau=3, zero_terminal_snr=True)  # where gamma ends flat, all but the last leave some
    assert s.beta[-1] == 1 and s.beta[:-1].max() == 0.999 and s.alpha_bar[-2] > 0


def test_an_end_where_much_is_left_is_warned_about_and_no_other():
    cases = (("linear", 50, 1, 0.603), ("linear", 400, 1, 0.0175), ("linear", 1000, 40, 0.0646))  # 4.04e-5 * 40^2
    with pytest.warns(UserWarning) as seen:
        for name, T, b, _ in cases:
            make_schedule(name, T, b)
    message = (
        "schedule 'linear' with T = {} ends far from pure noise: {} of the image's variance is left at its last step"
    )
    message += " (input_scale^2 alpha_bar), but sampling starts from N(0, I); take more steps or add more noise in each"
    assert [str(w.message) for w in seen] == [message.format(T, left) for _, T, _, left in cases]
    assert {w.filename for w in seen} == {__file__}  # it points to the caller
    for name, T, b in (*[(name, 1000, 1) for name in SCHEDULES], ("linear", 500, 1), ("linear", 300, 0.1)):
        make_schedule(name, T, b)  # pytest makes an error of any warning
    assert len(make_schedule()) == 1000
