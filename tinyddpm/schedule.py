"""Noise schedules: how much noise each step of the forward process adds (Ho et al. 2020, section 2).

A schedule is the array beta (T,); everything else follows from it. Steps are counted t = 0 ... T-1, and alpha_bar
before the first step is 1. All tables are float64, read-only and of length T; whoever uses them casts what is gathered.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import warnings

import numpy as np


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

    Raises ValueError unless beta is a vector of one or more numbers in (0, 1).
    """

    beta: np.ndarray
    name: str = "custom"
    parameters: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        beta = np.array(self.beta, dtype=np.float64)
        if beta.ndim != 1 or len(beta) == 0 or not np.all((beta > 0) & (beta < 1)):
            raise ValueError(f"beta: expected a vector of one or more numbers in (0, 1), got {self.beta}")
        beta.flags.writeable = False
        object.__setattr__(self, "beta", beta)

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
    def snr(self) -> np.ndarray:
        """Signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t)."""
        return self.alpha_bar / (1 - self.alpha_bar)

    @_table
    def posterior_mean_x0(self) -> np.ndarray:
        """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0) (equation 7):

        sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t).
        """
        return np.sqrt(self.alpha_bar_prev) * self.beta / (1 - self.alpha_bar)

    @_table
    def posterior_mean_xt(self) -> np.ndarray:
        """Weight of x_t in that mean: sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)."""
        return np.sqrt(self.alpha) * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)

    @_table
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0), which is 0 at t = 0 (equation 7):

        beta_tilde_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t).
        """
        return self.beta * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)

    @_table
    def posterior_log_variance(self) -> np.ndarray:
        """log beta_tilde_t, where beta_tilde_1 stands in for beta_tilde_0 = 0 (Ho et al.'s code)."""
        variance = self.posterior_variance
        first = variance[1] if len(self) > 1 else self.beta[0]
        return np.log(np.append(first, variance[1:]))


def linear_beta(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """beta rises linearly from beta_start to beta_end (Ho et al. 2020, section 4, whose T is 1000).

    With fewer steps each has to add more noise: scale both ends by 1000 / T to arrive at about the same alpha_bar.
    """
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"beta_start, beta_end: expected 0 < beta_start <= beta_end < 1, got {beta_start}, {beta_end}")
    return np.linspace(beta_start, beta_end, T)


SCHEDULES = {"linear": linear_beta}


def make_schedule(name: str = "linear", T: int = 1000, **parameters: float) -> Schedule:
    """Return the schedule called `name` with T steps.

    Args:
        name: "linear".
        T: number of steps, >= 1.
        parameters: of the schedule: beta_start, beta_end.

    Raises ValueError for an unknown name, a T below 1 or a parameter out of range, TypeError for an unknown parameter;
    warns if the last alpha_bar is not near 0.
    """
    if name not in SCHEDULES:
        raise ValueError(f"name: unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
    if not isinstance(T, numbers.Integral) or T < 1:
        raise ValueError(f"T: expected an integer >= 1, got {T!r}")
    parameters = {key: float(value) for key, value in parameters.items()}
    schedule = Schedule(SCHEDULES[name](int(T), **parameters), name, parameters)
    last = schedule.alpha_bar[-1]
    if last > 0.01:
        warnings.warn(
            f"schedule {name!r} with T = {T} ends far from pure noise: its last alpha_bar is {last:.3g}, but sampling "
            "starts from N(0, I); take more steps or add more noise in each",
            stacklevel=2,
        )
    return schedule
