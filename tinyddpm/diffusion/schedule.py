"""Noise schedules: how much noise each step of the forward process adds.

A schedule is the array beta (T,); everything else follows from it (Ho et al. 2020, section 2). There are two ways to
write one down: beta itself as a function of the step ("linear", "quadratic"), or alpha_bar, what is left of the image's
variance, as a function of time, alpha_bar_t = gamma(u) at u = (t + 1) / T ("cosine", "sigmoid", ...; Chen 2023).
`make_schedule` takes either by name. Steps are counted t = 0 ... T-1, and alpha_bar before the first step is 1. All
tables are float64, read-only and of length T; whoever uses them casts what is gathered. The first file on diffusion;
next: process.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from ..arguments import array_of_numbers, check_instance, integer, number, warn


def _table(function):
    """A read-only array of length T, computed when first asked for."""

    @functools.wraps(function)
    def compute(self):
        table = function(self)
        table.flags.writeable = False
        return table

    return functools.cached_property(compute)


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The tables that follow from beta; `name` and `parameters` say how `make_schedule` made it.

    `input_scale` is b of Chen 2023: the image is multiplied by it before noise is added, x_t = sqrt(alpha_bar_t) b x_0
    + sqrt(1 - alpha_bar_t) eps, which multiplies the signal-to-noise ratio of every step by b^2.

    Raises ValueError unless beta is a vector of one or more numbers in (0, 1), of which the last may also be 1 (then
    nothing is left of the image: zero terminal SNR), alpha_bar falls at every step, and b > 0.
    """

    beta: np.ndarray
    input_scale: float = 1.0
    name: str = "custom"
    parameters: Mapping = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_instance("name", self.name, str, "a name")
        check_instance("parameters", self.parameters, Mapping, "a mapping")
        beta = array_of_numbers("beta", self.beta)
        beta.flags.writeable = False
        object.__setattr__(self, "beta", beta)
        object.__setattr__(self, "input_scale", number("input_scale", self.input_scale, "(0, inf)"))
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))
        _check_beta(self)

    def __reduce__(self):
        """Copies and pickles are made anew, so that they are as immutable."""
        return type(self), (self.beta, self.input_scale, self.name, dict(self.parameters))

    def __repr__(self) -> str:
        settings = {"T": len(self), "input_scale": self.input_scale, **self.parameters}
        return f"Schedule({self.name!r}, {', '.join(f'{key}={value}' for key, value in settings.items())})"

    def __len__(self) -> int:
        """T, the number of steps."""
        return len(self.beta)

    @_table
    def alpha(self) -> np.ndarray:
        """alpha_t = 1 - beta_t."""
        return 1 - self.beta

    @_table
    def alpha_bar(self) -> np.ndarray:
        """alpha_bar_t = alpha_0 alpha_1 ... alpha_t: what is left of the image's variance (Ho et al., equation 4)."""
        return np.cumprod(self.alpha)

    @_table
    def alpha_bar_prev(self) -> np.ndarray:
        """alpha_bar_{t-1}, with alpha_bar_{-1} = 1."""
        return np.append(1.0, self.alpha_bar[:-1])

    @_table
    def one_minus_alpha_bar(self) -> np.ndarray:
        """1 - alpha_bar_t, the variance of the noise in x_t, through logarithms: where alpha_bar_t is nearly 1, the
        subtraction would lose its digits."""
        with np.errstate(divide="ignore"):  # the last beta may be 1
            return -np.expm1(np.cumsum(np.log1p(-self.beta)))

    @_table
    def one_minus_alpha_bar_prev(self) -> np.ndarray:
        """1 - alpha_bar_{t-1}, which is 0 at t = 0."""
        return np.append(0.0, self.one_minus_alpha_bar[:-1])

    @_table
    def snr(self) -> np.ndarray:
        """Signal-to-noise ratio b^2 alpha_bar_t / (1 - alpha_bar_t) of an image of variance 1 (Kingma et al. 2021)."""
        return self.input_scale**2 * self.alpha_bar / self.one_minus_alpha_bar

    @_table
    def log_snr(self) -> np.ndarray:
        """lambda_t = ln snr_t, which b shifts by 2 ln b. It is -inf where nothing is left."""
        with np.errstate(divide="ignore"):
            return np.log(self.snr)

    @_table
    def posterior_mean_coef_x0(self) -> np.ndarray:
        """Weight of (b times) x_0 in the mean of q(x_{t-1} | x_t, x_0) (equation 7):

        sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t).
        """
        return np.sqrt(self.alpha_bar_prev) * self.beta / self.one_minus_alpha_bar

    @_table
    def posterior_mean_coef_xt(self) -> np.ndarray:
        """Weight of x_t in that mean: sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)."""
        return np.sqrt(self.alpha) * self.one_minus_alpha_bar_prev / self.one_minus_alpha_bar

    @_table
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0), which is 0 at t = 0 (equation 7):

        beta_tilde_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t).
        """
        return self.beta * self.one_minus_alpha_bar_prev / self.one_minus_alpha_bar

    @_table
    def posterior_log_variance(self) -> np.ndarray:
        """log beta_tilde_t, where beta_tilde_1 stands in for beta_tilde_0 = 0 (Ho et al.'s code)."""
        variance = self.posterior_variance
        first = variance[1] if len(self) > 1 else self.beta[0]
        return np.log(np.append(first, variance[1:]))


def linear(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """beta rises linearly from beta_start to beta_end (Ho et al. 2020, section 4, whose T is 1000).

    With fewer steps each has to add more noise: scale both ends by 1000 / T to arrive at about the same alpha_bar.
    """
    _check_ends(beta_start, beta_end)
    return np.linspace(beta_start, beta_end, T)


def quadratic(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """sqrt(beta) rises linearly, so that beta rises as a square ("quad" in Ho et al.'s code, "scaled_linear" in
    diffusers)."""
    _check_ends(beta_start, beta_end)
    return np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), T) ** 2


def sigmoid_beta(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """beta rises along a logistic curve: beta_start + (beta_end - beta_start) sigma(w), w = -6 ... 6 (Xu et al. 2022,
    GeoDiff). diffusers calls this "sigmoid"; it has nothing to do with Chen's."""
    _check_ends(beta_start, beta_end)
    return beta_start + (beta_end - beta_start) * _sigma(np.linspace(-6, 6, T))


def cosine(u: np.ndarray, s: float = 0.008, start: float = 0.0, end: float = 1.0, tau: float = 1.0) -> np.ndarray:
    """gamma(u) from a piece of a cosine: with v(w) = cos((w + s) / (1 + s) pi/2)^(2 tau), w from `start` to `end`,

        gamma(u) = (v(end) - v(start + u (end - start))) / (v(end) - v(start))

    The defaults are Nichol & Dhariwal's 2021 (equation 17), whose s keeps the first steps from being too small; s = 0
    is Chen's 2023 (algorithm 1).
    """
    number("s", s, "[0, inf)")
    if not 0 <= start < end <= 1:
        raise ValueError(f"start, end: expected 0 <= start < end <= 1, got {start}, {end}")
    number("tau", tau, "(0, inf)")
    v = lambda w: np.cos((w + s) / (1 + s) * math.pi / 2) ** (2 * tau)
    return _piece(v, u, start, end)


def sigmoid(u: np.ndarray, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> np.ndarray:
    """gamma(u) from a piece of a logistic curve: with v(w) = sigma(w / tau), w from `start` to `end`,

        gamma(u) = (v(end) - v(start + u (end - start))) / (v(end) - v(start))

    (Jabri et al. 2022; Chen 2023, algorithm 1.) A smaller tau gathers the change in the middle of the piece.
    """
    if not start < end:
        raise ValueError(f"start, end: expected start < end, got {start}, {end}")
    number("tau", tau, "(0, inf)")
    return _piece(lambda w: _sigma(w / tau), u, start, end)


def linear_gamma(u: np.ndarray) -> np.ndarray:
    """gamma(u) = 1 - u (Chen 2023, the simplest of all)."""
    return 1 - u


def cosine_logsnr(u: np.ndarray, logsnr_max: float = 15.0, logsnr_min: float = -15.0, shift: float = 0.0) -> np.ndarray:
    """gamma(u) = sigma(lambda(u)), where the log-SNR lambda = ln(gamma / (1 - gamma)) is that of a cosine,

        lambda(u) = -2 ln tan(a + u (b - a)) + shift,   a = arctan e^(-logsnr_max/2),  b = arctan e^(-logsnr_min/2)

    (Hoogeboom et al. 2023, simple diffusion.) For images of another size than the schedule was made for, their
    shift = 2 ln(base / size), such as 2 ln(64 / 256), gives each resolution the noise of the base.
    """
    _check_limits(logsnr_max, logsnr_min)
    a, b = math.atan(math.exp(-logsnr_max / 2)), math.atan(math.exp(-logsnr_min / 2))
    return _sigma(-2 * np.log(np.tan(a + u * (b - a))) + shift)


def sigmoid_logsnr(
    u: np.ndarray, logsnr_max: float = 15.0, logsnr_min: float = -15.0, shift: float = 0.0
) -> np.ndarray:
    """gamma(u) = sigma(lambda(u)), where the log-SNR falls linearly:

        lambda(u) = logsnr_max + u (logsnr_min - logsnr_max) + shift

    (Kingma et al. 2021, variational diffusion models.)
    """
    _check_limits(logsnr_max, logsnr_min)
    return _sigma(logsnr_max + u * (logsnr_min - logsnr_max) + shift)


def _sigma(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # where e^-x overflows the result is 0, as it should be
        return 1 / (1 + np.exp(-x))


def _piece(v, u: np.ndarray, start: float, end: float) -> np.ndarray:
    """The piece of the curve v between `start` and `end`, stretched to fall from 1 to 0 (Chen 2023)."""
    with np.errstate(invalid="ignore"):  # of a piece that is flat, `discretise` says so
        return (v(end) - v(start + u * (end - start))) / (v(end) - v(start))


def _check_beta(schedule: Schedule) -> None:
    """Raise ValueError unless beta is as `Schedule` says."""
    beta, fault = schedule.beta, None
    if beta.ndim != 1 or len(beta) == 0 or not (np.all(beta > 0) and np.all(beta[:-1] < 1) and beta[-1] <= 1):
        fault = "expected a vector of one or more numbers in (0, 1), of which the last may be 1,"
    elif not np.all(np.diff(schedule.alpha_bar, prepend=1) < 0):
        fault = (
            "alpha_bar must fall at every step, but in double precision some step leaves it as it is, or it is 0 "
            "before the last;"
        )
    if fault:
        raise ValueError(f"beta: {fault} got {np.array2string(beta, threshold=6)}")


def _check_ends(beta_start: float, beta_end: float) -> None:
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"beta_start, beta_end: expected 0 < beta_start <= beta_end < 1, got {beta_start}, {beta_end}")


def _check_limits(logsnr_max: float, logsnr_min: float) -> None:
    if not -100 <= logsnr_min < logsnr_max <= 100:
        raise ValueError(
            f"logsnr_max, logsnr_min: expected -100 <= logsnr_min < logsnr_max <= 100, got {logsnr_max}, {logsnr_min}"
        )


def discretise(gamma: np.ndarray) -> np.ndarray:
    """beta from gamma(1/T), gamma(2/T) ... gamma(1), the alpha_bar that the T steps should arrive at:

        beta_t = 1 - gamma((t+1)/T) / gamma(t/T),   where before the first step gamma is 1

    kept within [1e-12, 0.999]: above 0, because every step must add some noise, also where gamma is flat; below 1,
    because with alpha_bar = 0 a predicted eps does not tell x_0 (Nichol & Dhariwal 2021). gamma itself is kept from 0
    by 1e-9 (Chen 2023). So alpha_bar is always computed from beta, not read off gamma. Raises ValueError if gamma is
    flat at most of the steps, and warns if it is at some.
    """
    gamma = np.append(1.0, np.maximum(gamma, 1e-9))
    beta = (1 - gamma[1:] / gamma[:-1]).clip(1e-12, 0.999)
    flat = int((~(beta > 1e-12)).sum())  # nan too
    if flat > len(beta) / 2:
        raise ValueError("gamma: with these parameters it is flat at most of the steps, which add no noise")
    if flat:
        warn(f"gamma: it is flat at {flat} of {len(beta)} steps, which add no noise")
    return beta


def rescale_to_zero_terminal_snr(beta: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alpha_bar) to end at exactly 0 and to begin as before (Lin et al. 2023, algorithm 1):

        sqrt(alpha_bar_t) <- (sqrt(alpha_bar_t) - sqrt(alpha_bar_{T-1})) sqrt(alpha_bar_0)
                             / (sqrt(alpha_bar_0) - sqrt(alpha_bar_{T-1}))

    The last beta is then 1, and the last x_t, from which sampling starts, is nothing but noise; the others are kept
    below 0.999, as by `discretise`. Raises ValueError unless there are 2 steps or more.
    """
    if len(beta) < 2:
        raise ValueError(f"zero_terminal_snr: takes 2 steps or more, got T = {len(beta)}")
    root = np.sqrt(np.cumprod(1 - beta))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root**2
    beta = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    return np.append(beta[:-1].clip(max=0.999), 1.0)


BETA = {"linear": linear, "quadratic": quadratic, "sigmoid_beta": sigmoid_beta}  # functions of T
GAMMA = {
    "cosine": cosine,
    "cosine_logsnr": cosine_logsnr,
    "sigmoid": sigmoid,
    "sigmoid_logsnr": sigmoid_logsnr,
    "linear_gamma": linear_gamma,
}  # functions of u
SCHEDULES = (*BETA, *GAMMA)


def make_schedule(
    name: str = "linear",
    T: int = 1000,
    input_scale: float = 1.0,
    zero_terminal_snr: bool = False,
    **parameters: float,
) -> Schedule:
    """Return the schedule called `name` with T steps.

    Args:
        name: "linear", "quadratic", "cosine", "cosine_logsnr", "sigmoid", "sigmoid_logsnr", "linear_gamma" or
            "sigmoid_beta": the functions of this file.
        T: number of steps, >= 1.
        input_scale: b > 0, which multiplies the images (Chen 2023).
        zero_terminal_snr: rescale so that nothing is left of the image at the end (Lin et al. 2023).
        parameters: of the function: beta_start, beta_end; s, start, end, tau; logsnr_max, logsnr_min, shift.

    Raises ValueError for an unknown name, a T below 1 or a parameter out of range, TypeError for an unknown parameter;
    warns if the last step leaves more than 1 % of the image's variance, b^2 alpha_bar_{T-1} > 0.01, since sampling
    starts from pure noise, or if some steps add no noise.
    """
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ValueError(
            f"name: unknown schedule {name!r}; known: {', '.join(SCHEDULES)} (of your own: Schedule(beta))"
        )
    T, parameters = integer("T", T), {key: number(key, value) for key, value in parameters.items()}
    if name in BETA:
        beta = BETA[name](T, **parameters)
    else:
        beta = discretise(GAMMA[name](np.arange(1, T + 1) / T, **parameters))
    if zero_terminal_snr:
        beta = rescale_to_zero_terminal_snr(beta)
        parameters["zero_terminal_snr"] = True
    schedule = Schedule(beta, input_scale, name, parameters)
    left = schedule.input_scale**2 * schedule.alpha_bar[-1]
    if left > 0.01:
        warn(
            f"schedule {name!r} with T = {T} ends far from pure noise: {left:.3g} of the image's variance is left at "
            "its last step (input_scale^2 alpha_bar), but sampling starts from N(0, I); take more steps or add more "
            "noise in each"
        )
    return schedule
