"""The losses besides the simple one: the variational bound, or parts of it, with the weights that papers give them.

The bound (Ho et al. 2020, equation 5) asks that mu_theta be close to mu_tilde, the mean of the step back, at every t
(equation 8): `weighted_mu`. Substituting mu_theta = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_theta) / sqrt(alpha_t)
(equation 11), and the same of eps for mu_tilde, leaves the noise (equation 12): `weighted_eps`, the same number.
Without its weight, which is greatest where there is least noise, the pictures are better: that is the simple loss
(equation 14), `Diffusion.loss`.

Each is a function of the diffusion, the images x0 and x_t (N, H, W, C), t (N,), the noise eps, and what the network
made of x_t: its prediction and, if the variance is learned, the spread (else None). ||.||^2 is a mean over all
elements. `Diffusion.loss_at` calls the one that is its `loss_type`. Before this file: process.py; next: bound.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..autograd.functional import mse
from ..autograd.tensor import Tensor, as_array, reduce_mean
from .bound import vlb_terms

if TYPE_CHECKING:
    from .process import Diffusion


def weighted_mu(diffusion: Diffusion, x0, x_t, t, eps, prediction, spread) -> Tensor:
    """E [1 / (2 sigma_t^2) ||mu_tilde_t(x_t, x_0) - mu_theta(x_t, t)||^2] (equation 8). For sigma_t at t = 0 see
    `Diffusion.log_variance`."""
    weight = 1 / (2 * np.exp(diffusion.fixed_log_variance()))
    mu_tilde = diffusion.posterior_mean(x0, x_t, t)
    error = diffusion.posterior_mean(diffusion.predict_x0(x_t, t, prediction), x_t, t) - mu_tilde
    return reduce_mean(diffusion.gather(weight, t, x0) * (error * error))


def weighted_eps(diffusion: Diffusion, x0, x_t, t, eps, prediction, spread) -> Tensor:
    """E [beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)) ||eps - eps_theta(x_t, t)||^2] (equation 12)."""
    s, sigma2 = diffusion.schedule, np.exp(diffusion.fixed_log_variance())
    weight = s.beta**2 / (2 * sigma2 * s.alpha * s.one_minus_alpha_bar)
    error = diffusion.predict_eps(x_t, t, prediction) - eps
    return reduce_mean(diffusion.gather(weight, t, x0) * (error * error))


def min_snr(diffusion: Diffusion, x0, x_t, t, eps, prediction, spread) -> Tensor:
    """Errors in x_0 count min(SNR_t, g) times, g = `Diffusion.min_snr_gamma` (Hang et al. 2023). The weights, of

    eps: min(SNR, g) / SNR     x_0: min(SNR, g)     v: min(SNR, g) / (SNR + 1), if b = 1
    """
    error = prediction - diffusion.target(x0, t, eps)
    return reduce_mean(diffusion.gather(min_snr_weight(diffusion), t, x0) * (error * error))


def min_snr_weight(diffusion: Diffusion) -> np.ndarray:
    """What `min_snr` multiplies the squared error of the prediction with, (T,). For v that is alpha_bar times the
    weight for eps, since an error in v is one of sqrt(alpha_bar) times as much in eps."""
    snr, gamma = diffusion.schedule.snr, diffusion.min_snr_gamma
    if diffusion.objective == "x0":
        return np.minimum(snr, gamma)
    weight = np.minimum(snr, gamma) / snr
    return weight if diffusion.objective == "eps" else weight * diffusion.schedule.alpha_bar


def vlb(diffusion: Diffusion, x0, x_t, t, eps, prediction, spread) -> Tensor:
    """The bound itself, but for its constant L_T: T times `vlb_terms`, in bits per dimension. It is noisy, since t is
    drawn evenly (Nichol & Dhariwal 2021, section 3.3)."""
    return diffusion.T * vlb_terms(diffusion, x0, x_t, t, prediction, spread).mean()


def hybrid(diffusion: Diffusion, x0, x_t, t, eps, prediction, spread) -> Tensor:
    """Simple + 0.001 vlb, where of the latter only the variance learns (Nichol & Dhariwal 2021, equation 16)."""
    terms = vlb_terms(diffusion, x0, x_t, t, as_array(prediction), spread)  # as_array: no gradient through the mean
    return mse(prediction, diffusion.target(x0, t, eps)) + 0.001 * diffusion.T * terms.mean()


OTHERS = {"weighted_eps": weighted_eps, "weighted_mu": weighted_mu, "min_snr": min_snr, "vlb": vlb, "hybrid": hybrid}
