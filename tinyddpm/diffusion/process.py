"""The diffusion process of Ho, Jain & Abbeel 2020: what is known (q), what is learned (p), and the loss between them.

    forward    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)         adds a little noise, T times
    reverse    p(x_{t-1} | x_t) = N(mu_theta(x_t, t), sigma_t^2 I)              takes it away again, learned

Images are (N, H, W, C) floats in [-1, 1]; t is (N,), one timestep per image. The network is any callable model(x_t, t).

Timesteps are array indices: t = 0 ... T-1 here is t = 1 ... T in the paper, so the noisy image of index t = 0 is the
paper's x_1, and x_{t-1} at t = 0 is the image before the first step. "x_0" always is that clean image. Before this
file: schedule.py; next: sample.py, or losses.py and bound.py.

    in the papers               here, with s = diffusion.schedule
    beta_t, alpha_t             s.beta[t], s.alpha[t]
    alpha_bar_t, of t-1         s.alpha_bar[t], s.alpha_bar_prev[t]
    1 - alpha_bar_t, of t-1     s.one_minus_alpha_bar[t], s.one_minus_alpha_bar_prev[t]
    mu_tilde_t, beta_tilde_t    posterior_mean(x0, x_t, t), s.posterior_variance[t]
    mu_theta, ln sigma_t^2      p_mean_variance(model, x_t, t)
    b (Chen 2023)               s.input_scale

On a first reading take b as 1. Otherwise x_t is made from b x_0, and the network, as Chen has it, is not given x_t but
x_t / sqrt(b^2 alpha_bar_t + 1 - alpha_bar_t), which has variance 1 if the images have. Nothing else changes: whatever
is called x_0 is the image as it came, and b appears where it meets x_t. Equations are numbered as in Ho et al. 2020
unless another paper is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ..arguments import check_instance, number
from ..autograd.functional import mse
from ..autograd.tensor import Tensor, as_array, no_grad
from ..backend import Array, like
from . import bound, losses
from .checks import check_diffusion, check_images, check_output, check_shape, check_timesteps, look_at_scale
from .clipping import Clip, checked_clip, limit
from .schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """A noise schedule, what the network predicts, and what it is trained for.

    Args:
        schedule: from `make_schedule`.
        objective: what the model returns: "eps", the noise in x_t (Ho et al.), "x0", the image, or "v", a blend of both
            (Salimans & Ho 2022, section 4). In terms of x_0, the squared error is then weighted by SNR, 1 or 1 + SNR
            (if b is 1): with eps, the noisiest steps, where a picture takes shape, hardly count.
        variance: sigma_t^2 of the reverse step: "small", beta_tilde_t, or "large", beta_t (Ho et al., section 3.2), or
            "learned_range", between the two: the model then returns twice the channels, the second half, the
            "spread", saying where (Nichol & Dhariwal 2021, section 3.1). Its U-Net has out_channels = 2 in_channels.
            Of the samplers only "ddpm" uses the variance, and so does the variational bound.
        loss_type: what `loss` computes: "simple", "weighted_eps", "weighted_mu", "min_snr", "vlb" or "hybrid", see
            losses.py.
        min_snr_gamma: where "min_snr" cuts the signal-to-noise ratio off; inf: nowhere.
        clip: how sampling keeps the predicted x_0 where images are, unless told otherwise; see `limit` in clipping.py.
        spacing: which timesteps sampling visits if it takes fewer than T, unless told otherwise: "trailing",
            "leading" or "linspace"; see `timesteps` in sample.py.

    Raises TypeError if `schedule` is not one, ValueError for an unknown name, for a loss that cannot train the variance
    or has none to train, and, where the schedule ends with no signal, for what divides by it or weights with it.
    """

    schedule: Schedule
    objective: str = "eps"
    variance: str = "small"
    loss_type: str = "simple"
    min_snr_gamma: float = 5.0
    clip: Clip = True
    spacing: str = "trailing"

    def __post_init__(self):
        check_diffusion(self)
        object.__setattr__(self, "min_snr_gamma", number("min_snr_gamma", self.min_snr_gamma, "(0, inf]"))
        object.__setattr__(self, "clip", checked_clip(self.clip))

    @property
    def T(self) -> int:
        """The number of steps."""
        return len(self.schedule)

    def gather(self, table: np.ndarray, t: np.ndarray, x: Array) -> Array:
        """table[t] as (N, 1, 1, 1), of the dtype and on the device of the images x; of n tables (n, T), which reach the
        device together, (n, N, 1, 1, 1). Raises TypeError or ValueError if t does not fit x or T."""
        check_timesteps(t, x, self.T)
        return like(table[..., t].reshape(*table.shape[:-1], -1, *[1] * (x.ndim - 1)), x)

    def signal_and_noise(self, t: np.ndarray, x: Array) -> tuple[Array, Array]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), what x_t has of b x_0 and of noise; each (N, 1, 1, 1)."""
        signal, noise = self.gather(np.sqrt([self.schedule.alpha_bar, self.schedule.one_minus_alpha_bar]), t, x)
        return signal, noise

    # ------------------------------------------------------------------------------------------- the forward process

    def q_step(self, x_prev: Array, t: np.ndarray, eps: Array) -> Array:
        """One step of noise, a sample of q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (equation 2):

            x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps

        The variance of x_{t-1} is multiplied by 1 - beta_t, and beta_t is added, so that 1 stays 1. Args: x_prev, eps:
        (N, H, W, C). t: (N,). Returns (N, H, W, C).
        """
        check_shape("eps", eps, x_prev)
        beta = self.schedule.beta
        return self.gather(np.sqrt(1 - beta), t, x_prev) * x_prev + self.gather(np.sqrt(beta), t, x_prev) * eps

    def q_sample(self, x0: Array, t: np.ndarray, eps: Array) -> Array:
        """Noise x_0 to step t in one jump, a sample of q(x_t | x_0) = N(sqrt(alpha_bar_t) b x_0, (1 - alpha_bar_t) I)
        (equation 4; with b, Chen 2023, section 2.2):

            x_t = sqrt(alpha_bar_t) b x_0 + sqrt(1 - alpha_bar_t) eps

        Args: x0, eps: (N, H, W, C). t: (N,) integers in 0 ... T-1. Raises ValueError or TypeError if they do not fit.
        """
        check_shape("eps", eps, x0)
        signal, noise = self.signal_and_noise(t, x0)
        return self.schedule.input_scale * signal * x0 + noise * eps

    # ------------------------------------------------------------------------------------ what the network predicts

    def target(self, x0: Array, t: np.ndarray, eps: Array) -> Array:
        """What the model should return for x_t = `q_sample(x0, t, eps)`: the noise eps, the image x_0, or

            v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) b x_0

        Args: x0, eps: (N, H, W, C). t: (N,). Returns (N, H, W, C).
        """
        check_shape("eps", eps, x0)
        check_timesteps(t, x0, self.T)
        if self.objective == "eps":
            return eps
        if self.objective == "x0":
            return x0
        signal, noise = self.signal_and_noise(t, x0)
        return signal * eps - self.schedule.input_scale * noise * x0

    def predict_x0(self, x_t: Array, t: np.ndarray, prediction: Array | Tensor) -> Array | Tensor:
        """The x_0 that the model's prediction, eps, x_0 or v, implies:

            eps:    b x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)
            v:      b x_0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v

        Args: x_t, prediction: (N, H, W, C). t: (N,). Returns (N, H, W, C).
        """
        check_shape("prediction", prediction, x_t)
        check_timesteps(t, x_t, self.T)
        if self.objective == "x0":
            return prediction
        signal, noise = self.signal_and_noise(t, x_t)
        if self.objective == "eps":
            return (x_t - noise * prediction) / (self.schedule.input_scale * signal)
        return (signal * x_t - noise * prediction) / self.schedule.input_scale

    def predict_eps(self, x_t: Array, t: np.ndarray, prediction: Array | Tensor) -> Array | Tensor:
        """The noise that the model's prediction, eps, x_0 or v, implies:

            x_0:    eps = (x_t - sqrt(alpha_bar_t) b x_0) / sqrt(1 - alpha_bar_t)
            v:      eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t

        Args: x_t, prediction: (N, H, W, C). t: (N,). Returns (N, H, W, C).
        """
        check_shape("prediction", prediction, x_t)
        check_timesteps(t, x_t, self.T)
        if self.objective == "x0":
            return self.eps_from_x0(x_t, t, prediction)
        if self.objective == "eps":
            return prediction
        signal, noise = self.signal_and_noise(t, x_t)
        return signal * prediction + noise * x_t

    def eps_from_x0(self, x_t: Array, t: np.ndarray, x0: Array | Tensor) -> Array | Tensor:
        """The noise that is left of x_t if its image is x_0: (x_t - sqrt(alpha_bar_t) b x_0) / sqrt(1 -
        alpha_bar_t)."""
        check_shape("x0", x0, x_t)
        signal, noise = self.signal_and_noise(t, x_t)
        return (x_t - self.schedule.input_scale * signal * x0) / noise

    def predict(self, model: Callable, x_t: Array, t: np.ndarray) -> tuple[Array | Tensor, Array | Tensor | None]:
        """Call the model on x_t, scaled to variance 1 if b is not 1 (Chen 2023, section 2.2); return its prediction
        and, if the variance is learned, the spread, or None."""
        check_instance("model", model, Callable, "a function (x_t, t) -> prediction")
        check_timesteps(t, x_t, self.T)
        s, x, channels, learned = self.schedule, x_t, x_t.shape[-1], self.variance == "learned_range"
        if s.input_scale != 1:
            x = x_t / self.gather(np.sqrt((s.input_scale**2 - 1) * s.alpha_bar + 1), t, x_t)
        output = model(x, t)
        check_output(output, x_t, learned)
        return (output[..., :channels], output[..., channels:]) if learned else (output, None)

    # ------------------------------------------------------------------------------------------- the reverse process

    def posterior_mean(self, x0: Array | Tensor, x_t: Array, t: np.ndarray) -> Array | Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) = N(mu_tilde_t, beta_tilde_t I), the step back if x_0 were known (equation 7):

            mu_tilde_t = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) b x_0
                         + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t

        With the x_0 that a predicted eps implies, it is equation 11, (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) /
        sqrt(alpha_t). Args: x0, x_t: (N, H, W, C). t: (N,). Returns (N, H, W, C).
        """
        check_shape("x0", x0, x_t)
        s = self.schedule
        weights = np.stack([s.input_scale * s.posterior_mean_coef_x0, s.posterior_mean_coef_xt])
        x0_weight, xt_weight = self.gather(weights, t, x_t)
        return x0_weight * x0 + xt_weight * x_t

    def log_variance(self, x_t: Array, t: np.ndarray, spread: Array | Tensor | None = None) -> Array | Tensor:
        """ln sigma_t^2 of the reverse step: ln beta_tilde_t ("small"), ln beta_t ("large"), or, for the model's spread,

            w ln beta_t + (1 - w) ln beta_tilde_t,   w = (spread + 1) / 2     (Nichol & Dhariwal 2021, equation 15)

        At t = 0, beta_tilde_1 stands in for beta_tilde_0 = 0, and for "large", as in Ho et al.'s code, for beta_0 too.
        Args: x_t: (N, H, W, C). t: (N,). spread: (N, H, W, C), nominally in [-1, 1]. Returns (N, 1, 1, 1), or the
        shape of spread.
        """
        if self.variance != "learned_range":
            return self.gather(self.fixed_log_variance(), t, x_t)
        if spread is None:
            raise ValueError(
                "spread: with variance 'learned_range' it is needed, the second half of the model's output"
            )
        check_shape("spread", spread, x_t)
        w, s = 0.5 * (spread + 1), self.schedule
        small, large = self.gather(np.stack([s.posterior_log_variance, np.log(s.beta)]), t, x_t)
        return w * large + (1 - w) * small

    def fixed_log_variance(self) -> np.ndarray:
        """ln sigma_t^2, (T,), where it is not learned."""
        small = self.schedule.posterior_log_variance
        return small if self.variance == "small" else np.append(small[0], np.log(self.schedule.beta[1:]))

    def denoise(
        self, model: Callable, x_t: Array, t: np.ndarray, clip: Clip | None = None
    ) -> tuple[Array, Array | None]:
        """What the model makes of x_t, without gradients: the predicted x_0, `limit`ed by `clip` (None: by that of this
        diffusion), and the spread or None.

        Args: x_t: (N, H, W, C). t: (N,). Raises ValueError if the model's output is of another shape.
        """
        with no_grad():
            prediction, spread = self.predict(model, x_t, t)
        clip = self.clip if clip is None else clip
        return limit(self.predict_x0(x_t, t, as_array(prediction)), clip), as_array(spread)

    def p_mean_variance(
        self, model: Callable, x_t: Array, t: np.ndarray, clip: Clip | None = None
    ) -> tuple[Array, Array, Array]:
        """Mean and log-variance of p_theta(x_{t-1} | x_t) = N(mu_theta(x_t, t), sigma_t^2 I) (equation 1), and the
        predicted x_0 on which the mean rests: mu_theta = mu_tilde(x_0, x_t), see `denoise`.

        Args: x_t: (N, H, W, C). t: (N,). Returns (N, H, W, C), (N, 1, 1, 1) or with a learned variance (N, H, W, C),
        and (N, H, W, C).
        """
        x0, spread = self.denoise(model, x_t, t, clip)
        return self.posterior_mean(x0, x_t, t), self.log_variance(x_t, t, spread), x0

    # ------------------------------------------------------------------------------------------------------ the loss

    def loss(self, model: Callable, x0: Array, rng: np.random.Generator) -> Tensor:
        """The loss of `loss_type` on a batch, each image with its own t ~ Uniform{0 ... T-1} and eps ~ N(0, I). That is
        the simple loss (equation 14)

            E ||eps - eps_theta(sqrt(alpha_bar_t) b x_0 + sqrt(1 - alpha_bar_t) eps, t)||^2

        with another objective the same of x_0 or v; or one of losses.py, which says where this one comes from.
        ||.||^2 is a mean over all elements.

        Args: model: callable (x_t, t) -> (N, H, W, C), or with 2 C channels if the variance is learned. x0: (N, H, W,
        C) in [-1, 1]. Returns a scalar tensor. Raises ValueError for an empty batch or a model output of another
        shape, TypeError for anything but floats; warns, the first time, of images that seem to be on another scale.
        """
        check_images(x0)
        look_at_scale(self, "x0", x0)
        check_instance("rng", rng, np.random.Generator, "a generator from numpy.random.default_rng")
        t = rng.integers(0, self.T, size=len(x0))
        eps = like(rng.standard_normal(x0.shape, dtype=x0.dtype), x0)
        return self.loss_at(model, x0, t, eps)

    def loss_at(self, model: Callable, x0: Array, t: np.ndarray, eps: Array) -> Tensor:
        """The `loss` at given timesteps t (N,) with given noise eps (N, H, W, C): to follow it with the same noise, or
        t by t. Returns a scalar tensor."""
        x_t = self.q_sample(x0, t, eps)
        prediction, spread = self.predict(model, x_t, t)
        if self.loss_type == "simple":
            return mse(prediction, self.target(x0, t, eps))
        return losses.OTHERS[self.loss_type](self, x0, x_t, t, eps, prediction, spread)

    # the variational bound, as methods
    vlb_terms, prior_terms, bits_per_dim = bound.vlb_terms, bound.prior_terms, bound.bits_per_dim
