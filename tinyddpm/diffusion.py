"""The diffusion process of Ho, Jain & Abbeel 2020: what is known (q), what is learned (p), and the loss between them.

    forward    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)         adds a little noise, T times
    reverse    p(x_{t-1} | x_t) = N(mu_theta(x_t, t), sigma_t^2 I)              takes it away again, learned

The network is any callable `model(x_t, t)`. Images are (N, H, W, C) floats in [-1, 1], t is (N,), one timestep per
image.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .backend import Array, like
from .functional import mse
from .schedule import Schedule
from .tensor import Tensor

OBJECTIVES = ("eps", "v")
VARIANCES = ("small", "large")


class Diffusion:
    """A noise schedule, and what the network predicts.

    Args:
        schedule: from `make_schedule`.
        objective: what the model returns: "eps", the noise in x_t (Ho et al.), or "v", a blend of noise and image that
            gives the noisiest steps, where a picture takes shape, more weight (Salimans & Ho 2022, section 4).
        variance: sigma_t^2 of the reverse step: "small", beta_tilde_t, or "large", beta_t (Ho et al., section 3.2).

    Raises TypeError if `schedule` is not one, ValueError for an unknown name.
    """

    def __init__(self, schedule: Schedule, objective: str = "eps", variance: str = "small"):
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: expected a Schedule from make_schedule, got {type(schedule).__name__}")
        if objective not in OBJECTIVES:
            raise ValueError(f"objective: unknown {objective!r}; known: {', '.join(OBJECTIVES)}")
        if variance not in VARIANCES:
            raise ValueError(f"variance: unknown {variance!r}; known: {', '.join(VARIANCES)}")
        self.schedule, self.objective, self.variance = schedule, objective, variance

    @property
    def T(self) -> int:
        """The number of steps."""
        return len(self.schedule)

    def _at(self, table: np.ndarray, t: np.ndarray, x: Array) -> Array:
        """table[t] as (N, 1, 1, 1), of the dtype and on the device of the images x. Raises if t does not fit x or T."""
        if not isinstance(t, np.ndarray) or t.dtype.kind not in "iu":
            raise TypeError(f"t: expected a NumPy array of integers, got {getattr(t, 'dtype', type(t).__name__)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t: expected {x.shape[0]} timesteps, one for each image, got shape {t.shape}")
        if t.size and not (0 <= t.min() and t.max() < self.T):
            raise ValueError(f"t: timesteps run from 0 to {self.T - 1}, got {t.min()} ... {t.max()}")
        if x.dtype.kind != "f":
            raise TypeError(f"images: expected floats in [-1, 1], got {x.dtype}")
        return like(table[t].reshape(-1, *[1] * (x.ndim - 1)), x)

    def _signal_and_noise(self, t: np.ndarray, x: Array) -> tuple[Array, Array]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), what x_t has of image and of noise; each (N, 1, 1, 1)."""
        alpha_bar = self.schedule.alpha_bar
        return self._at(np.sqrt(alpha_bar), t, x), self._at(np.sqrt(1 - alpha_bar), t, x)

    def q_sample(self, x0: Array, t: np.ndarray, eps: Array) -> Array:
        """Noise x_0 to step t in one jump: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (equation 4).

        Args: x0, eps: (N, H, W, C). t: (N,) integers in 0 ... T-1. Raises ValueError or TypeError if they do not fit.
        """
        if x0.shape != eps.shape:
            raise ValueError(f"eps: expected the shape of x0, {x0.shape}, got {eps.shape}")
        signal, noise = self._signal_and_noise(t, x0)
        return signal * x0 + noise * eps

    def target(self, x0: Array, t: np.ndarray, eps: Array) -> Array:
        """What the model should return for x_t = `q_sample(x0, t, eps)`: the noise eps itself, or

            v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0

        Args: x0, eps: (N, H, W, C). t: (N,). Returns (N, H, W, C).
        """
        if self.objective == "eps":
            return eps
        signal, noise = self._signal_and_noise(t, x0)
        return signal * eps - noise * x0

    def predict_x0(self, x_t: Array, t: np.ndarray, prediction: Array) -> Array:
        """The x_0 that the model's prediction, eps or v, implies:

            x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)
            x_0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v

        Args: x_t, prediction: (N, H, W, C). t: (N,). Returns (N, H, W, C).
        """
        signal, noise = self._signal_and_noise(t, x_t)
        if self.objective == "eps":
            return (x_t - noise * prediction) / signal
        return signal * x_t - noise * prediction

    def posterior_mean(self, x0: Array, x_t: Array, t: np.ndarray) -> Array:
        """Mean of q(x_{t-1} | x_t, x_0), the step back if x_0 were known (equation 7):

            sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0
            + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t

        Args: x0, x_t: (N, H, W, C). t: (N,). Returns (N, H, W, C).
        """
        s = self.schedule
        return self._at(s.posterior_mean_x0, t, x0) * x0 + self._at(s.posterior_mean_xt, t, x_t) * x_t

    def log_variance(self) -> np.ndarray:
        """log sigma_t^2 of the reverse step, (T,): of beta_tilde_t or of beta_t, with beta_tilde_1 at t = 0 in both."""
        small = self.schedule.posterior_log_variance
        return small if self.variance == "small" else np.append(small[0], np.log(self.schedule.beta[1:]))

    def loss(self, model: Callable, x0: Array, rng: np.random.Generator) -> Tensor:
        """The simple loss of Ho et al. (equation 14): E ||eps - eps_theta(x_t, t)||^2, a mean over all elements; with
        objective "v", the same for v.

        Each image gets its own t ~ Uniform{0 ... T-1} and eps ~ N(0, I) from `rng`.

        Args: model: callable (x_t, t) -> (N, H, W, C). x0: (N, H, W, C) in [-1, 1]. Returns a scalar tensor.
        Raises ValueError for an empty batch or a model output of another shape, TypeError for anything but floats.
        """
        if x0.ndim != 4 or x0.size == 0:
            raise ValueError(f"x0: expected one or more images (N, H, W, C), got shape {x0.shape}")
        if x0.dtype not in (np.float32, np.float64):
            raise TypeError(f"x0: expected float32 or float64 images in [-1, 1], got {x0.dtype}")
        if not isinstance(rng, np.random.Generator):
            raise TypeError(f"rng: expected a generator from numpy.random.default_rng, got {type(rng).__name__}")
        t = rng.integers(0, self.T, size=len(x0))
        eps = like(rng.standard_normal(x0.shape, dtype=x0.dtype), x0)
        prediction = model(self.q_sample(x0, t, eps), t)
        if prediction.shape != x0.shape:
            raise ValueError(f"model: expected it to return the shape of x0, {x0.shape}, got {prediction.shape}")
        return mse(prediction, self.target(x0, t, eps))
