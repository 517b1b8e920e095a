"""Every schedule against values worked out elsewhere, and what must hold for all of them, drawn by hypothesis."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make, schedules

from tinyddpm import Schedule, make_schedule
from tinyddpm.diffusion.schedule import (
    BETA,
    GAMMA,
    SCHEDULES,
    cosine,
    cosine_logsnr,
    discretise,
    linear,
    linear_gamma,
    quadratic,
    rescale_to_zero_terminal_snr,
    sigmoid,
    sigmoid_beta,
    sigmoid_logsnr,
)

TABLES = ["alpha", "alpha_bar", "alpha_bar_prev", "snr", "log_snr", "posterior_mean_coef_x0", "posterior_mean_coef_xt",
          "posterior_variance", "posterior_log_variance", "one_minus_alpha_bar",
          "one_minus_alpha_bar_prev"]  # fmt: skip


class TestTables:
    @given(s=schedules())
    def test_step_by_step_from_beta(self, s):
        assert all(0 < beta < 1 for beta in s.beta[:-1]) and 0 < s.beta[-1] <= 1
        bar, noise, b2 = 1.0, 0.0, s.input_scale**2
        close = lambda a, b: math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-300)
        for t in range(len(s)):
            beta = s.beta[t]
            before, noise_before = bar, noise
            bar, noise = bar * (1 - beta), noise * (1 - beta) + beta  # without a subtraction that loses digits
            assert 0 <= bar < before <= 1 and (bar > 0 or t == len(s) - 1)
            assert s.alpha[t] == 1 - beta
            assert close(s.alpha_bar[t], bar) and close(s.alpha_bar_prev[t], before)
            assert close(s.one_minus_alpha_bar[t], noise) and close(s.one_minus_alpha_bar_prev[t], noise_before)
            assert close(s.snr[t], b2 * bar / noise)
            if bar > 0:
                assert math.isclose(s.log_snr[t], math.log(b2 * bar / noise), rel_tol=1e-9, abs_tol=1e-9)
            assert close(s.posterior_variance[t], beta * noise_before / noise)
            assert close(s.posterior_mean_coef_x0[t], math.sqrt(before) * beta / noise)
            assert close(s.posterior_mean_coef_xt[t], math.sqrt(1 - beta) * noise_before / noise)
            if t > 0:
                assert math.isclose(s.posterior_log_variance[t], math.log(s.posterior_variance[t]), rel_tol=1e-12)
        assert s.posterior_variance[0] == 0 and s.posterior_mean_coef_xt[0] == 0
        assert math.isclose(s.posterior_mean_coef_x0[0], 1, rel_tol=1e-15)

    @given(s=schedules())
    def test_alpha_bar_and_the_snr_fall_strictly(self, s):
        for table in (s.alpha_bar, s.snr, s.log_snr):
            assert np.all(np.diff(table) < 0)

    @pytest.mark.parametrize(
        ("beta", "first"), [([0.3], 0.3), ([0.1, 0.5], 0.5 * 0.1 / 0.55), ([0.1, 0.5, 0.9], 0.5 * 0.1 / 0.55)]
    )
    def test_what_stands_in_for_the_logarithm_of_0(self, beta, first):
        """beta_tilde_1 = beta_1 (1 - alpha_bar_0) / (1 - alpha_bar_1); with one step only, beta_0."""
        assert math.isclose(Schedule(beta).posterior_log_variance[0], math.log(first))

    def test_log_snr_is_minus_infinity_where_nothing_is_left(self):
        s = make_schedule("linear", 1000, zero_terminal_snr=True)
        assert s.snr[-1] == 0 and s.log_snr[-1] == -np.inf and np.isfinite(s.log_snr[:-1]).all()

    @given(s=schedules(), b=st.floats(0.05, 5))
    def test_scaling_shifts_the_log_snr_and_nothing_else(self, s, b):
        plain, scaled = Schedule(s.beta), Schedule(s.beta, b)
        finite = np.isfinite(plain.log_snr)
        shift = scaled.log_snr[finite] - plain.log_snr[finite]
        np.testing.assert_allclose(shift, 2 * math.log(b), rtol=1e-9, atol=1e-12)
        for name in set(TABLES) - {"snr", "log_snr"}:
            np.testing.assert_array_equal(getattr(scaled, name), getattr(plain, name))

    @pytest.mark.parametrize("name", ["beta", *TABLES])
    def test_tables_are_float64_of_length_T_and_read_only(self, name):
        s = make("linear", 7)
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
        assert s.beta[0] == 0.1 and s.name == "custom" and s.input_scale == 1 and s.parameters == {}
        assert Schedule([0.5, 1]).alpha_bar[-1] == 0

    def test_nothing_about_it_can_be_changed_not_even_in_a_copy(self):
        s = make("cosine", 10, tau=2)
        for same in (s, copy.copy(s), copy.deepcopy(s), pickle.loads(pickle.dumps(s)), dataclasses.replace(s)):
            assert (same.name, same.parameters, same.input_scale) == ("cosine", {"tau": 2.0}, 1.0)
            np.testing.assert_array_equal(same.beta, s.beta)
            with pytest.raises(TypeError):
                same.parameters["tau"] = 3
            with pytest.raises(ValueError, match="read-only"):
                same.beta[0] = 0.5
        assert type(Schedule([0.5], np.float64(0.7)).input_scale) is float

    def test_what_it_looks_like(self):
        assert repr(make("cosine", 10, 0.5, tau=2)) == "Schedule('cosine', T=10, input_scale=0.5, tau=2.0)"
        assert repr(Schedule([0.1, 0.2])) == "Schedule('custom', T=2, input_scale=1.0)"

    def test_a_schedule_is_equal_to_itself_only(self):
        s, other = Schedule([0.1, 0.2]), Schedule([0.1, 0.2])
        assert s == s and s != other and len({s, other, s}) == 2


class TestLinear:
    @pytest.mark.parametrize(
        ("T", "last"),
        [(50, 0.603), (100, 0.364), (200, 0.132), (250, 0.0797), (300, 0.0481), (400, 0.0175), (500, 0.0064)],
    )
    def test_what_is_left_of_the_image(self, T, last):
        assert math.isclose(make("linear", T).alpha_bar[-1], last, rel_tol=8e-3)

    def test_published_values(self):
        s = make_schedule()
        assert s.name == "linear" and len(s) == 1000
        assert s.beta[0] == 1e-4 and s.beta[-1] == 0.02
        np.testing.assert_allclose(np.diff(s.beta), 0.0199 / 999, rtol=1e-9)
        assert math.isclose(s.alpha_bar[-1], 4.036e-5, rel_tol=1e-3)
        assert math.isclose(s.posterior_variance[1], 5.4532e-5, rel_tol=1e-4)
        assert math.isclose(s.posterior_log_variance[0], -9.8167, abs_tol=1e-4)

    def test_the_square_is_in_quadratic(self):
        beta = make("quadratic", 3, beta_start=0.01, beta_end=0.09).beta
        np.testing.assert_allclose(beta, [0.01, 0.04, 0.09], rtol=1e-12)
        s = make_schedule("quadratic", 1000)
        assert math.isclose(s.beta[0], 1e-4) and math.isclose(s.beta[-1], 0.02)
        roots = [0.01 + (math.sqrt(0.02) - 0.01) * t / 999 for t in range(1000)]
        assert math.isclose(s.alpha_bar[-1], math.prod(1 - root**2 for root in roots), rel_tol=1e-9)

    def test_sigmoid_beta_is_a_logistic_curve_from_one_end_to_the_other(self):
        beta = make("sigmoid_beta", 13, beta_start=0.1, beta_end=0.3).beta
        np.testing.assert_allclose(beta, [0.1 + 0.2 / (1 + math.exp(-w)) for w in range(-6, 7)], rtol=1e-12)
        assert math.isclose(make_schedule("sigmoid_beta").beta[500] + make_schedule("sigmoid_beta").beta[499], 0.0201)


QUARTERS = np.array([0.25, 0.5, 0.75])


class TestGamma:
    @pytest.mark.parametrize(
        ("gamma", "settings", "values"),
        [
            (cosine, {"s": 0, "start": 0, "end": 1, "tau": 1}, (0.853553, 0.5, 0.146447)),
            (cosine, {"s": 0, "start": 0.2, "end": 1, "tau": 1}, (0.723607, 0.381966, 0.105573)),
            (sigmoid, {"start": -3, "end": 3, "tau": 0.9}, (0.866370, 0.5, 0.133630)),
            (sigmoid, {"start": 0, "end": 3, "tau": 0.3}, (0.151639, 0.013296, 0.001015)),
            (linear_gamma, {}, (0.75, 0.5, 0.25)),
        ],
    )
    def test_values_of_Chen(self, gamma, settings, values):
        np.testing.assert_allclose(gamma(QUARTERS, **settings), values, atol=5.01e-7)

    def test_cosine_of_Nichol_and_Dhariwal(self):
        s = make_schedule("cosine", 1000)
        f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        np.testing.assert_allclose(s.alpha_bar[:-1], [f((t + 1) / 1000) / f(0) for t in range(999)], rtol=1e-9)
        assert math.isclose(s.beta[0], 4.128e-5, rel_tol=2e-4) and s.beta[-1] == 0.999
        assert (s.beta >= 0.999).sum() == 1
        assert math.isclose(s.alpha_bar[-1], 2.43e-9, rel_tol=2e-3)

    def test_tau_bends_the_cosine(self):
        """v(w) = cos(w pi/2)^(2 tau), which from 0 to 1 is gamma itself."""
        for tau in (0.5, 2, 3):
            np.testing.assert_allclose(
                cosine(QUARTERS, s=0, tau=tau), np.cos(QUARTERS * np.pi / 2) ** (2 * tau), rtol=1e-12
            )
        assert not np.isnan(cosine(np.linspace(0, 1, 101), start=0.1, end=1, tau=0.3)).any()

    def test_sigmoid_discretised(self):
        s = make_schedule("sigmoid", 1000)
        assert math.isclose(s.beta[0], 3.003e-4, rel_tol=2e-4) and math.isclose(s.beta[-2], 0.5014, rel_tol=1e-4)
        assert s.beta[-1] == 0.999 and math.isclose(s.alpha_bar[-1], 3.0e-7, rel_tol=2e-2)

    @pytest.mark.parametrize("name", ["cosine_logsnr", "sigmoid_logsnr"])
    @pytest.mark.parametrize(("T", "low", "high", "shift"), [(1000, -15, 15, 0), (37, -9, 12, 0), (500, -12, 10, -1.4)])
    def test_log_snr_is_what_its_formula_says(self, name, T, low, high, shift):
        s = make(name, T, logsnr_max=high, logsnr_min=low, shift=shift)
        for t in (0, 1, T // 3, T - 2):
            u = (t + 1) / T
            if name == "cosine_logsnr":
                a, b = math.atan(math.exp(-high / 2)), math.atan(math.exp(-low / 2))
                expected = -2 * math.log(math.tan(a + u * (b - a)))
            else:
                expected = high + u * (low - high)
            assert math.isclose(s.log_snr[t], expected + shift, rel_tol=1e-8, abs_tol=1e-8)
        assert math.isclose(s.log_snr[-1], low + shift, abs_tol=1e-3) or s.beta[-1] == 0.999

    def test_limits_of_the_log_snr_forms(self):
        ends = np.array([0.0, 1.0])
        for gamma in (cosine_logsnr, sigmoid_logsnr):
            np.testing.assert_allclose(gamma(ends), [1 / (1 + math.exp(-15)), 1 / (1 + math.exp(15))], rtol=1e-9)
            moved = gamma(QUARTERS, shift=2 * math.log(64 / 256))
            g = gamma(QUARTERS)
            np.testing.assert_allclose(moved / (1 - moved), g / (1 - g) / 16, rtol=1e-9)
        np.testing.assert_allclose(sigmoid_logsnr(np.array([0.5])), 0.5)
        np.testing.assert_allclose(cosine_logsnr(np.array([0.5])), 0.5)

    @given(name=st.sampled_from(sorted(GAMMA)), T=st.integers(1, 2000))
    def test_every_gamma_falls_from_1_to_0_and_alpha_bar_follows_it(self, name, T):
        u = np.linspace(0, 1, T + 1)
        gamma = GAMMA[name](u)
        assert math.isclose(gamma[0], 1, abs_tol=4e-7) and math.isclose(gamma[-1], 0, abs_tol=4e-7)
        assert np.all(np.diff(gamma) < 0)
        s = make(name, T)
        kept = np.cumprod(s.beta < 0.999).astype(bool)  # until the first that was clipped
        np.testing.assert_allclose(s.alpha_bar[kept], gamma[1:].clip(1e-9)[kept], rtol=1e-9)

    def test_discretise(self):
        np.testing.assert_allclose(discretise(np.array([0.8, 0.4, 0.1])), [0.2, 0.5, 0.75], rtol=1e-12)
        with pytest.warns(UserWarning, match="^gamma: it is flat at 2 of 4 steps, which add no noise$"):
            np.testing.assert_array_equal(discretise(np.array([1.0, 0.9, 0.9, 0.0])), [1e-12, 1 - 0.9, 1e-12, 0.999])
        np.testing.assert_allclose(discretise(np.array([1e-8, 0.0])), [0.999, 0.9], rtol=1e-6)  # gamma is 1e-9 or more


class TestZeroTerminalSNR:
    @given(s=schedules(zero_terminal_snr=False))
    def test_the_end_is_noise_and_the_beginning_stays(self, s):
        if len(s) > 1:
            rescaled = Schedule(rescale_to_zero_terminal_snr(s.beta))
            assert rescaled.alpha_bar[-1] == 0 and rescaled.beta[-1] == 1
            root, before = np.sqrt(rescaled.alpha_bar), np.sqrt(s.alpha_bar)
            assert math.isclose(root[0], before[0], rel_tol=1e-12)
            expected = (before - before[-1]) * before[0] / (before[0] - before[-1])
            kept = np.cumprod(rescaled.beta < 0.999).astype(bool)
            np.testing.assert_allclose(root[kept], expected[kept], rtol=1e-6, atol=1e-12)

    def test_where_gamma_ends_flat_the_last_steps_but_one_still_leave_something(self):
        s = make("cosine", 1000, s=0, tau=3, zero_terminal_snr=True)
        assert s.beta[-1] == 1 and s.beta[:-1].max() == 0.999 and s.alpha_bar[-2] > 0

    def test_make_schedule_does_it_and_says_so(self):
        s = make_schedule("linear", 50, zero_terminal_snr=True, input_scale=0.5)  # and does not warn
        np.testing.assert_array_equal(s.beta, rescale_to_zero_terminal_snr(linear(50)))
        assert s.parameters == {"zero_terminal_snr": True} and s.input_scale == 0.5
        again = make_schedule(s.name, len(s), s.input_scale, **s.parameters)
        np.testing.assert_array_equal(again.beta, s.beta)
        assert make_schedule("linear", 1000).parameters == {}

    def test_one_step_cannot_be_rescaled(self):
        with pytest.raises(ValueError, match="zero_terminal_snr: takes 2 steps or more, got T = 1"):
            make_schedule("linear", 1, zero_terminal_snr=True)


class TestEndIsWarnedAbout:
    def test_where_too_much_is_left(self):
        with pytest.warns(UserWarning) as seen:
            make_schedule("linear", 50)
            make_schedule("linear", 400)
            make_schedule("linear", 1000, input_scale=40)  # 4.04e-5 * 40^2
        message = (
            "schedule 'linear' with T = {} ends far from pure noise: {} of the image's variance is left at its "
            "last step (input_scale^2 alpha_bar), but sampling starts from N(0, I); take more steps or add more noise "
            "in each"
        )
        cases = ((50, 0.603), (400, 0.0175), (1000, 0.0646))
        assert [str(w.message) for w in seen] == [message.format(*case) for case in cases]
        assert {w.filename for w in seen} == {__file__}  # it points to the caller

    def test_but_not_where_it_is_fine(self):  # pytest makes an error of any warning
        for name in SCHEDULES:
            make_schedule(name, 1000)
        make_schedule("linear", 500)
        make_schedule("linear", 300, input_scale=0.1)


class TestBadInput:
    @pytest.mark.parametrize(
        "beta", [[], [0.0, 0.1], [1.0, 0.1], [0.1, 1.0, 0.1], [0.1, 1.1], [-0.1], [[0.1]], [0.1, np.nan], 0.1]
    )
    def test_beta(self, beta):
        with pytest.raises(
            ValueError,
            match=r"^beta: expected a vector of one or more numbers in \(0, 1\), of which the last may be 1, got ",
        ):
            Schedule(beta)

    @pytest.mark.parametrize("beta", [[1e-17, 0.5], [0.5, 1e-17], [0.999] * 200])
    def test_beta_whose_alpha_bar_does_not_fall(self, beta):
        with pytest.raises(
            ValueError, match="^beta: alpha_bar must fall at every step, but .* is 0 before the last; got"
        ):
            Schedule(beta)

    @pytest.mark.parametrize(("b", "message"), [(0, "number > 0, got 0"), (-1, "number > 0, got -1"),
                             (math.inf, "number > 0, got inf"), ("x", "number > 0, got 'x'")])  # fmt: skip
    def test_input_scale(self, b, message):
        for make_it in (lambda: Schedule([0.5], b), lambda: make_schedule("cosine", 10, input_scale=b)):
            with pytest.raises(ValueError, match=f"^input_scale: expected a {message}"):
                make_it()

    @pytest.mark.parametrize("value", [math.nan, math.inf, "0.02", None])
    def test_parameters_that_are_no_finite_numbers(self, value):
        for name, parameter in (
            ("linear", "beta_end"),
            ("cosine", "tau"),
            ("sigmoid", "end"),
            ("cosine_logsnr", "shift"),
        ):
            with pytest.raises(ValueError, match=f"^{parameter}: expected a finite number, got {value!r}"):
                make_schedule(name, 10, **{parameter: value})

    def test_name_and_T(self):
        known = ", ".join(SCHEDULES)
        with pytest.raises(ValueError, match=f"name: unknown schedule 'liner'; known: {known}"):
            make_schedule("liner")
        with pytest.raises(ValueError, match=r"name: unknown schedule array.*\(of your own: Schedule\(beta\)\)"):
            make_schedule(np.array([0.1, 0.2]))
        for T in (0, -1, 10.0, None):
            with pytest.raises(ValueError, match=f"T: expected an integer >= 1, got {T}"):
                make_schedule("linear", T)

    @pytest.mark.parametrize("name", sorted(BETA))
    @pytest.mark.parametrize(("a", "b"), [(0, 0.1), (0.2, 0.1), (0.1, 1.0), (-0.1, 0.1)])
    def test_ends(self, name, a, b):
        with pytest.raises(ValueError, match="beta_start, beta_end: expected 0 < beta_start <= beta_end < 1, got"):
            make_schedule(name, 10, beta_start=a, beta_end=b)

    def test_parameters_of_gamma(self):
        for name in ("cosine", "sigmoid"):
            for tau in (0, -1):
                with pytest.raises(ValueError, match="tau: expected a number > 0, got"):
                    make_schedule(name, 10, tau=tau)
            for start, end in ((0.5, 0.5), (0.7, 0.2)):
                with pytest.raises(ValueError, match=f"start, end: expected .*start < end.*, got {start}, {end}"):
                    make_schedule(name, 10, start=start, end=end)
        for start, end in ((-0.1, 1), (0, 1.1)):
            with pytest.raises(ValueError, match="start, end: expected 0 <= start < end <= 1"):
                make_schedule("cosine", 10, start=start, end=end)
        with pytest.raises(ValueError, match="s: expected a number >= 0, got -0.1"):
            make_schedule("cosine", 10, s=-0.1)
        for name in ("cosine_logsnr", "sigmoid_logsnr"):
            for high, low in ((1, 1), (-1, 1), (101, 0), (0, -101)):
                message = f"expected -100 <= logsnr_min < logsnr_max <= 100, got {high}.0, {low}.0"
                with pytest.raises(ValueError, match=f"logsnr_max, logsnr_min: {message}"):
                    make_schedule(name, 10, logsnr_max=high, logsnr_min=low)

    def test_a_gamma_that_is_flat_nearly_everywhere(self):
        make("sigmoid", 100, tau=0.1)  # flat at either end
        for name, settings in (("sigmoid", {"tau": 1e-3}), ("sigmoid", {"end": 1e6}), ("cosine", {"tau": 1e4})):
            with pytest.raises(
                ValueError, match="^gamma: with these parameters it is flat at most of the steps, which add no noise$"
            ):
                make_schedule(name, 100, **settings)

    def test_unknown_parameters(self):
        for name in SCHEDULES:
            with pytest.raises(TypeError, match="slope"):
                make_schedule(name, 10, slope=1)

    def test_numbers_of_numpy_are_numbers(self):
        s = make_schedule("linear", np.int64(1000), beta_end=np.float32(0.25))
        assert len(s) == 1000 and s.parameters == {"beta_end": 0.25} and type(s.parameters["beta_end"]) is float

    def test_functions_take_their_defaults(self):
        np.testing.assert_array_equal(make_schedule("linear").beta, linear(1000, 1e-4, 0.02))
        np.testing.assert_array_equal(make_schedule("quadratic").beta, quadratic(1000, 1e-4, 0.02))
        np.testing.assert_array_equal(make_schedule("sigmoid_beta").beta, sigmoid_beta(1000, 1e-4, 0.02))
        np.testing.assert_array_equal(sigmoid(QUARTERS), sigmoid(QUARTERS, -3, 3, 1))
