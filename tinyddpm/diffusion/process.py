"""The diffusion process of Ho, Jain & Abbeel 2020: what is known (q), what is learned (p), and the loss between them.

    forward    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)         adds a little noise, T times
    reverse    p(x_{t-1} | x_t) = N(mu_theta(x_t, t), sigma_t^2 I)              takes it away again, learned

Images are (N, H, W, C) floats in [-1, 1]; t is (N,), one timestep per image. The network is any callable model(x_t, t).

Timesteps are array indices: t = 0 ... T-1 here is t = 1 ... T in the paper, so the noisy image of index t = 0 is the
paper's x_1, and x_{t-1} at t = 0 is the image before the first step. "x_0" always is that clean image. Before this
file: schedule.py; next: sample.py.

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
import functools
import math
import warnings
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from .backend import Array, is_array, like, on_device, to_device, to_numpy
from .functional import mse
from .likelihood import discretised_gaussian, gaussian_kl
from .limit import Clip, checked_clip, limit
from .parallel import shards, worker_threads
from .schedule import Schedule
from .tensor import Tensor, as_array, no_grad
from .winograd import ConstantFilters

OBJECTIVES = ("eps", "x0", "v")
VARIANCES = ("small", "large", "learned_range")
LOSSES = ("simple", "weighted_eps", "weighted_mu", "min_snr", "vlb", "hybrid")
SPACINGS = ("trailing", "leading", "linspace")


@dataclasses.dataclass(frozen=True, eq=False)
class BitsPerDim:
    """A bound on what it takes to store a picture, in bits for each number in it, split as in equation 5.

    prior: L_T, what x_{T-1} still knows of the picture. terms: L_t, t = 0 ... T-1, float64 (T,); of these terms[0]
    is for the grey levels once x_0 is all but known, -log2 p(x_0 | x_1) in the paper's numbering, and the others are
    for the steps on the way there.
    """

    prior: float
    terms: np.ndarray

    @property
    def total(self) -> float:
        """prior + the sum of the terms."""
        return self.prior + float(self.terms.sum())


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """A noise schedule, what the network predicts, and what it is trained for.

    Args:
        schedule: from `make_schedule`.
        objective: what the model returns: "eps", the noise in x_t (Ho et al.), "x0", the image, or "v", a blend of both
            (Salimans & Ho 2022, section 4). An error in x_0 then counts SNR, 1 or 1 + SNR times (if b is 1): with eps,
            the noisiest steps, where a picture takes shape, hardly count.
        variance: sigma_t^2 of the reverse step: "small", beta_tilde_t, or "large", beta_t (Ho et al., section 3.2), or
            "learned_range", between the two: the model then returns twice the channels, the second half, the
            "spread", saying where (Nichol & Dhariwal 2021, section 3.1). Its U-Net has out_channels = 2 in_channels.
            Of the samplers only "ddpm" uses the variance, and so does the variational bound.
        loss_type: what `loss` computes: "simple", "weighted_eps", "weighted_mu", "min_snr", "vlb", "hybrid"; see there.
        min_snr_gamma: where "min_snr" cuts the signal-to-noise ratio off.
        clip: how sampling keeps the predicted x_0 where images are, unless told otherwise; see `tinyddpm.limit.limit`.
        spacing: which timesteps sampling visits if it takes fewer than T, unless told otherwise: "trailing",
            "leading" or "linspace"; see `tinyddpm.sample.timesteps`.

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
        schedule, variance, loss_type = self.schedule, self.variance, self.loss_type
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: expected a Schedule from make_schedule, got {type(schedule).__name__}")
        for name, known in (
            ("objective", OBJECTIVES), ("variance", VARIANCES), ("loss_type", LOSSES), ("spacing", SPACINGS)
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: unknown {getattr(self, name)!r}; known: {', '.join(known)}")
        if variance == "learned_range" and loss_type not in ("vlb", "hybrid"):
            raise ValueError(f"loss_type: {loss_type!r} cannot train variance 'learned_range'; take 'hybrid' or 'vlb'")
        if variance != "learned_range" and loss_type == "hybrid":
            raise ValueError(f"loss_type: 'hybrid' trains variance 'learned_range', but variance is {variance!r}")
        if schedule.alpha_bar[-1] == 0:
            ends = "the schedule ends with alpha_bar = 0 (zero terminal SNR), where"
            if self.objective == "eps":
                raise ValueError(f"objective: {ends} the noise does not tell the image; take 'v' or 'x0', not 'eps'")
            if loss_type == "weighted_eps":
                raise ValueError(f"loss_type: {ends} the weight is infinite; take another than 'weighted_eps'")
            if loss_type == "min_snr":
                raise ValueError(
                    f"loss_type: {ends} the weight is 0, so that the step from which sampling starts would not be "
                    "trained; take another than 'min_snr'"
                )
        if not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma: expected a number > 0, got {self.min_snr_gamma}")
        object.__setattr__(self, "clip", checked_clip(self.clip))

    @property
    def T(self) -> int:
        """The number of steps."""
        return len(self.schedule)

    def _at(self, table: np.ndarray, t: np.ndarray, x: Array) -> Array:
        """table[t] as (N, 1, 1, 1), of the dtype and on the device of the images x; of several tables (n, T), n of
        them, which reach the device together. Raises if t does not fit x or T."""
        if not isinstance(t, np.ndarray) or t.dtype.kind not in "iu":
            raise TypeError(f"t: expected a NumPy array of integers, got {getattr(t, 'dtype', type(t).__name__)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t: expected {x.shape[0]} timesteps, one for each image, got shape {t.shape}")
        if t.size and not (0 <= t.min() and t.max() < self.T):
            raise ValueError(f"t: timesteps run from 0 to {self.T - 1}, got {t.min()} ... {t.max()}")
        if x.dtype.kind != "f":
            raise TypeError(f"images: expected floats in [-1, 1], got {x.dtype}")
        return like(table[..., t].reshape(*table.shape[:-1], -1, *[1] * (x.ndim - 1)), x)

    def _signal_and_noise(self, t: np.ndarray, x: Array) -> tuple[Array, Array]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), what x_t has of b x_0 and of noise; each (N, 1, 1, 1)."""
        signal, noise = self._at(np.sqrt([self.schedule.alpha_bar, self.schedule.one_minus_alpha_bar]), t, x)
        return signal, noise

    # ------------------------------------------------------------------------------------------- the forward process

    def q_step(self, x_prev: Array, t: np.ndarray, eps: Array) -> Array:
        """One step of noise, a sample of q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (equation 2):

            x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps

        The variance of x_{t-1} is multiplied by 1 - beta_t, and beta_t is added, so that 1 stays 1. Args: x_prev, eps:
        (N, H, W, C). t: (N,). Returns (N, H, W, C).
        """
        _check_shape("eps", eps, x_prev)
        beta = self.schedule.beta
        return self._at(np.sqrt(1 - beta), t, x_prev) * x_prev + self._at(np.sqrt(beta), t, x_prev) * eps

    def q_sample(self, x0: Array, t: np.ndarray, eps: Array) -> Array:
        """Noise x_0 to step t in one jump, a sample of q(x_t | x_0) = N(sqrt(alpha_bar_t) b x_0, (1 - alpha_bar_t) I)
        (equation 4; with b, Chen 2023, section 2.2):

            x_t = sqrt(alpha_bar_t) b x_0 + sqrt(1 - alpha_bar_t) eps

        Args: x0, eps: (N, H, W, C). t: (N,) integers in 0 ... T-1. Raises ValueError or TypeError if they do not fit.
        """
        _check_shape("eps", eps, x0)
        signal, noise = self._signal_and_noise(t, x0)
        return self.schedule.input_scale * signal * x0 + noise * eps

    # ------------------------------------------------------------------------------------ what the network predicts

    def target(self, x0: Array, t: np.ndarray, eps: Array) -> Array:
        """What the model should return for x_t = `q_sample(x0, t, eps)`: the noise eps, the image x_0, or

            v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) b x_0

        Args: x0, eps: (N, H, W, C). t: (N,). Returns (N, H, W, C).
        """
        _check_shape("eps", eps, x0)
        if self.objective == "eps":
            return eps
        if self.objective == "x0":
            return x0
        signal, noise = self._signal_and_noise(t, x0)
        return signal * eps - self.schedule.input_scale * noise * x0

    def predict_x0(self, x_t: Array, t: np.ndarray, prediction: Array | Tensor) -> Array | Tensor:
        """The x_0 that the model's prediction, eps, x_0 or v, implies:

            eps:    b x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)
            v:      b x_0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v

        Args: x_t, prediction: (N, H, W, C). t: (N,). Returns (N, H, W, C).
        """
        _check_shape("prediction", prediction, x_t)
        signal, noise = self._signal_and_noise(t, x_t)
        if self.objective == "x0":
            return prediction
        if self.objective == "eps":
            return (x_t - noise * prediction) / (self.schedule.input_scale * signal)
        return (signal * x_t - noise * prediction) / self.schedule.input_scale

    def predict_eps(self, x_t: Array, t: np.ndarray, prediction: Array | Tensor) -> Array | Tensor:
        """The noise that the model's prediction, eps, x_0 or v, implies:

            x_0:    eps = (x_t - sqrt(alpha_bar_t) b x_0) / sqrt(1 - alpha_bar_t)
            v:      eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t

        Args: x_t, prediction: (N, H, W, C). t: (N,). Returns (N, H, W, C).
        """
        _check_shape("prediction", prediction, x_t)
        if self.objective == "x0":
            return self.eps_from_x0(x_t, t, prediction)
        signal, noise = self._signal_and_noise(t, x_t)
        if self.objective == "eps":
            return prediction
        return signal * prediction + noise * x_t

    def eps_from_x0(self, x_t: Array, t: np.ndarray, x0: Array | Tensor) -> Array | Tensor:
        """The noise that is left of x_t if its image is x_0: (x_t - sqrt(alpha_bar_t) b x_0) / sqrt(1 -
        alpha_bar_t)."""
        _check_shape("x0", x0, x_t)
        signal, noise = self._signal_and_noise(t, x_t)
        return (x_t - self.schedule.input_scale * signal * x0) / noise

    def _run(self, model: Callable, x_t: Array, t: np.ndarray) -> tuple[Array | Tensor, Array | Tensor | None]:
        """Call the model on x_t, scaled to variance 1 if b is not 1 (Chen 2023, section 2.2); return its prediction
        and, if the variance is learned, the spread, or None."""
        s, x, channels = self.schedule, x_t, x_t.shape[-1]
        if s.input_scale != 1:
            x = x_t / self._at(np.sqrt((s.input_scale**2 - 1) * s.alpha_bar + 1), t, x_t)
        output = model(x, t)
        if self.variance != "learned_range":
            if output.shape != x_t.shape:
                raise ValueError(f"model: expected it to return the shape of x_t, {x_t.shape}, got {output.shape}")
            return output, None
        if output.shape != (*x_t.shape[:-1], 2 * channels):
            raise ValueError(
                f"model: with variance 'learned_range' it must return {2 * channels} channels for images of {channels} "
                f"(a U-Net with out_channels={2 * channels}), got shape {output.shape} for x_t of {x_t.shape}"
            )
        return output[..., :channels], output[..., channels:]

    # ------------------------------------------------------------------------------------------- the reverse process

    def posterior_mean(self, x0: Array | Tensor, x_t: Array, t: np.ndarray) -> Array | Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) = N(mu_tilde_t, beta_tilde_t I), the step back if x_0 were known (equation 7):

            mu_tilde_t = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) b x_0
                         + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t

        With the x_0 that a predicted eps implies, it is equation 11, (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) /
        sqrt(alpha_t). Args: x0, x_t: (N, H, W, C). t: (N,). Returns (N, H, W, C).
        """
        _check_shape("x0", x0, x_t)
        s = self.schedule
        weights = np.stack([s.input_scale * s.posterior_mean_coef_x0, s.posterior_mean_coef_xt])
        x0_weight, xt_weight = self._at(weights, t, x_t)
        return x0_weight * x0 + xt_weight * x_t

    def log_variance(self, x_t: Array, t: np.ndarray, spread: Array | Tensor | None = None) -> Array | Tensor:
        """ln sigma_t^2 of the reverse step: ln beta_tilde_t ("small"), ln beta_t ("large"), or, for the model's spread,

            w ln beta_t + (1 - w) ln beta_tilde_t,   w = (spread + 1) / 2     (Nichol & Dhariwal 2021, equation 15)

        At t = 0, beta_tilde_1 stands in for beta_tilde_0 = 0, and for "large", as in Ho et al.'s code, for beta_0 too.
        Args: x_t: (N, H, W, C). t: (N,). spread: (N, H, W, C), nominally in [-1, 1]. Returns (N, 1, 1, 1), or the
        shape of spread.
        """
        if self.variance != "learned_range":
            return self._at(self._fixed_log_variance(), t, x_t)
        if spread is None:
            raise ValueError(
                "spread: with variance 'learned_range' it is needed, the second half of the model's output"
            )
        w, s = 0.5 * (spread + 1), self.schedule
        small, large = self._at(np.stack([s.posterior_log_variance, np.log(s.beta)]), t, x_t)
        return w * large + (1 - w) * small

    def _fixed_log_variance(self) -> np.ndarray:
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
            prediction, spread = self._run(model, x_t, t)
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

    # --------------------------------------------------------------------------------------------------- the losses

    def loss(self, model: Callable, x0: Array, rng: np.random.Generator) -> Tensor:
        """The loss of `loss_type` on a batch, each image with its own t ~ Uniform{0 ... T-1} and eps ~ N(0, I):

            E ||eps - eps_theta(sqrt(alpha_bar_t) b x_0 + sqrt(1 - alpha_bar_t) eps, t)||^2

        This is "simple" (equation 14); with another objective it is the same of x_0 or v. Where it comes from: the
        variational bound (equation 5) asks that mu_theta be close to mu_tilde, the mean of the step back, at every t
        (equation 8), which is "weighted_mu",

            E [1 / (2 sigma_t^2) ||mu_tilde_t(x_t, x_0) - mu_theta(x_t, t)||^2]

        Substituting mu_theta = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_theta) / sqrt(alpha_t) (equation 11), and the
        same of eps for mu_tilde, leaves the noise (equation 12). This is "weighted_eps", and the same number:

            E [beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)) ||eps - eps_theta(x_t, t)||^2]

        Without its weight, which is greatest where there is least noise, the pictures are better: the simple loss. (For
        sigma_t at t = 0 see `log_variance`.) Later papers:

            "min_snr"   errors in x_0 count min(SNR_t, g) times, g = min_snr_gamma (Hang et al. 2023). The weights, of

                            eps: min(SNR, g) / SNR     x_0: min(SNR, g)     v: min(SNR, g) / (SNR + 1), if b = 1

            "vlb"       the bound itself, but for its constant L_T: T times `vlb_terms`, in bits per dimension. It is
                        noisy, since t is drawn evenly (Nichol & Dhariwal 2021, section 3.3).
            "hybrid"    simple + 0.001 vlb, where of the latter only the variance learns (equation 16 there).

        ||.||^2 is a mean over all elements.

        Args: model: callable (x_t, t) -> (N, H, W, C), or with 2 C channels if the variance is learned. x0: (N, H, W,
        C) in [-1, 1]. Returns a scalar tensor. Raises ValueError for an empty batch or a model output of another
        shape, TypeError for anything but floats; warns if x0 is far outside of [-1, 1].
        """
        _check_images(x0)
        if isinstance(x0, np.ndarray):  # on a GPU the look would wait for all that is under way
            warn_if_out_of_range("x0", x0)
        if not isinstance(rng, np.random.Generator):
            raise TypeError(f"rng: expected a generator from numpy.random.default_rng, got {type(rng).__name__}")
        t = rng.integers(0, self.T, size=len(x0))
        eps = like(rng.standard_normal(x0.shape, dtype=x0.dtype), x0)
        return self.loss_at(model, x0, t, eps)

    def loss_at(self, model: Callable, x0: Array, t: np.ndarray, eps: Array) -> Tensor:
        """The `loss` at given timesteps t (N,) with given noise eps (N, H, W, C): to follow it with the same noise, or
        t by t. Returns a scalar tensor."""
        x_t = self.q_sample(x0, t, eps)
        prediction, spread = self._run(model, x_t, t)
        if self.loss_type == "simple":
            return mse(prediction, self.target(x0, t, eps))
        if self.loss_type == "hybrid":
            bound = self.vlb_terms(x0, x_t, t, as_array(prediction), spread)  # as_array: no gradient through the mean
            return mse(prediction, self.target(x0, t, eps)) + 0.001 * self.T * bound.mean()
        if self.loss_type == "vlb":
            return self.T * self.vlb_terms(x0, x_t, t, prediction, spread).mean()
        if self.loss_type == "min_snr":
            weight, error = self._min_snr_weight(), prediction - self.target(x0, t, eps)
        else:
            s, sigma2 = self.schedule, np.exp(self._fixed_log_variance())
            if self.loss_type == "weighted_eps":
                weight = s.beta**2 / (2 * sigma2 * s.alpha * s.one_minus_alpha_bar)
                error = self.predict_eps(x_t, t, prediction) - eps
            else:
                weight, mu_tilde = 1 / (2 * sigma2), self.posterior_mean(x0, x_t, t)
                error = self.posterior_mean(self.predict_x0(x_t, t, prediction), x_t, t) - mu_tilde
        return (self._at(weight, t, x0) * (error * error)).mean()

    def _min_snr_weight(self) -> np.ndarray:
        """What "min_snr" multiplies the squared error of the prediction with, (T,). For v that is alpha_bar times the
        weight for eps, since an error in v is one of sqrt(alpha_bar) times as much in eps."""
        snr, gamma = self.schedule.snr, self.min_snr_gamma
        if self.objective == "x0":
            return np.minimum(snr, gamma)
        weight = np.minimum(snr, gamma) / snr
        return weight if self.objective == "eps" else weight * self.schedule.alpha_bar

    # ---------------------------------------------------------------------------------------------- the likelihood

    def vlb_terms(
        self,
        x0: Array,
        x_t: Array,
        t: np.ndarray,
        prediction: Array | Tensor,
        spread: Array | Tensor | None = None,
        clip: Clip = False,
    ) -> Tensor:
        """The term of the variational bound that each image's t stands for (equation 5), in bits per dimension, (N,):

            t > 0    L_t = KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t))
            t = 0    L_0 = -ln p_theta(x_0 | x_t), of the grey levels      (see `discretised_gaussian`)

        both over ln 2. (Our t is the paper's t - 1, and so our L_t is its L_{t-1}.) Args: x0, x_t: (N, H, W, C), x0 of
        8-bit levels k as k / 127.5 - 1. t: (N,). prediction, spread: what the model returned for x_t, split in two if
        the variance is learned. clip: see `limit`, which takes arrays only.
        """
        b = self.schedule.input_scale
        mean = self.posterior_mean(limit(self.predict_x0(x_t, t, prediction), clip), x_t, t)
        log_variance = self.log_variance(x_t, t, spread)
        true_mean = self.posterior_mean(x0, x_t, t)
        true_log_variance = self._at(self.schedule.posterior_log_variance, t, x0)
        nats = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        if (t == 0).any():  # there the grey levels of the image itself are scored, so b is taken out again
            first = self._at(np.arange(self.T) == 0, t, x0)
            levels = discretised_gaussian(x0, mean / b, log_variance - 2 * math.log(b))
            nats = (1 - first) * nats - first * levels
        return _bits_per_image(nats)

    def prior_terms(self, x0: Array) -> Tensor:
        """L_T = KL(q(x_{T-1} | x_0) || N(0, I)) of each image, in bits per dimension, (N,); nothing in it is learned.

        Args: x0: (N, H, W, C).
        """
        t = np.full(len(x0), self.T - 1)
        signal, noise = self._signal_and_noise(t, x0)
        zero = np.zeros_like(x0)
        nats = gaussian_kl(self.schedule.input_scale * signal * x0, 2 * np.log(noise), zero, zero)
        return _bits_per_image(nats)

    def bits_per_dim(
        self,
        model: Callable,
        x0: np.ndarray,
        rng: int | np.random.Generator = 0,
        clip: Clip | None = None,
        progress: bool = True,
        workers: int | None = None,
        labels: np.ndarray | None = None,
    ) -> BitsPerDim:
        """How many bits per dimension the model needs at most to store the images x_0, averaged over them (equation 5):

            L_T + L_{T-1} + ... + L_0

        each L_t estimated with one x_t ~ q(x_t | x_0) for each image, as in Nichol & Dhariwal 2021. It takes T forward
        passes of all images.

        Args:
            model: callable (x_t, t) -> prediction; its `dtype` and `device`, if any, are those x_0 is converted to.
            x0: (N, H, W, C) of 8-bit levels k = 0 ... 255, given as k / 127.5 - 1.
            rng: seed or generator; what an image costs does not depend on the others, nor on the workers.
            clip: how to keep the predicted x_0 where images are, see `limit`; None: as this diffusion does.
            progress: show a bar. workers: threads; None for one per CPU.
            labels: (N,) integers, the class of each image, for a model that takes them: what they cost given these.

        Raises ValueError for no images, labels for others, another shape or values between the levels, TypeError for
        anything but floats.
        """
        _check_images(x0)
        levels = 127.5 * (x0 + 1)
        if not (np.all(np.abs(levels - np.round(levels)) < 0.01) and -0.01 < levels.min() and levels.max() < 255.01):
            raise ValueError(
                "x0: expected the levels k / 127.5 - 1 of 8-bit images, for others have no bits per dimension; got "
                f"values from {x0.min():.3g} to {x0.max():.3g}"
            )
        labels = checked_labels(labels, len(x0))
        dtype, device = getattr(model, "dtype", x0.dtype), getattr(model, "device", "cpu")
        clip = self.clip if clip is None else clip
        streams = np.random.default_rng(rng).spawn(len(x0))
        x0, filters = x0.astype(dtype, copy=False), ConstantFilters(model)

        def terms_at(t: int, shard: slice) -> np.ndarray:
            x = x0[shard]
            eps = np.stack([stream.standard_normal(x.shape[1:], dtype) for stream in streams[shard]])
            x, eps, ts = to_device(x, device), to_device(eps, device), np.full(len(x), t)
            net = model if labels is None else functools.partial(model, labels=labels[shard])
            with on_device(device), no_grad(), filters.in_force():
                x_t = self.q_sample(x, ts, eps)
                prediction, spread = map(as_array, self._run(net, x_t, ts))
                return to_numpy(self.vlb_terms(x, x_t, ts, prediction, spread, clip).data)

        terms, cut = np.zeros(self.T), shards(x0.shape, device)
        bar = tqdm(total=self.T, desc="bits/dim", disable=not progress)
        with worker_threads(workers, most=len(cut)) as run, bar:
            for t in reversed(range(self.T)):
                of_images = run(functools.partial(terms_at, t), cut)
                terms[t] = np.concatenate(list(of_images)).mean(dtype=np.float64)
                bar.update()
        return BitsPerDim(self.prior_terms(x0).data.mean(dtype=np.float64).item(), terms)


def _bits_per_image(nats: Tensor) -> Tensor:
    """Nats of every number (N, H, W, C) -> bits per dimension of every image (N,)."""
    return nats.reshape(nats.shape[0], -1).mean(axis=1) * (1 / math.log(2))


def _check_shape(name: str, value: Array | Tensor, x: Array) -> None:
    if value.shape != x.shape:
        raise ValueError(f"{name}: expected the shape of the images, {x.shape}, got {value.shape}")


def _check_images(x0: Array) -> None:
    """Raise unless x0 is a batch of float images."""
    if not is_array(x0):
        raise TypeError(f"x0: expected an array of images, got {type(x0).__name__}")
    if x0.ndim != 4 or x0.size == 0:
        raise ValueError(f"x0: expected one or more images (N, H, W, C), got shape {x0.shape}")
    if x0.dtype not in (np.float32, np.float64):
        raise TypeError(f"x0: expected float32 or float64 images in [-1, 1], got {x0.dtype}")


def checked_labels(labels: np.ndarray | None, count: int) -> np.ndarray | None:
    """`labels` as an array of NumPy, wherever they are, if there is one for each of `count` images, or ValueError."""
    if labels is None:
        return None
    labels = to_numpy(labels) if is_array(labels) else np.asarray(labels)
    if labels.shape != (count,):
        raise ValueError(f"labels: expected {count}, one for each image, got shape {labels.shape}")
    return labels


def warn_if_out_of_range(name: str, images: np.ndarray) -> None:
    """Warn, naming the range seen, if images that should be in [-1, 1] reach beyond twice that."""
    low, high = images.min(), images.max()
    if low < -2 or high > 2:
        warnings.warn(
            f"{name}: images are expected in [-1, 1], but these range from {low:.3g} to {high:.3g}", stacklevel=3
        )
