"""The two parts of the variational bound (Ho et al. 2020, sections 2 and 3.3): the KL divergence of two Gaussians, and
the log-likelihood of 8-bit grey levels.

Both are elementwise and in nats, and made of ops, so that gradients reach a learned variance. diffusion.py calls them.
"""

from __future__ import annotations

from .backend import Array
from .functional import at_least, normal_cdf
from .tensor import Tensor, as_array, exp, log


def gaussian_kl(mean1: Array, log_variance1: Array, mean2: Array, log_variance2: Array) -> Tensor:
    """KL divergence of two Gaussians, elementwise, in nats; arrays or tensors whose shapes broadcast:

        KL(N(m1, s1^2) || N(m2, s2^2)) = 1/2 (-1 + ln s2^2 - ln s1^2 + s1^2 / s2^2 + (m1 - m2)^2 / s2^2)

    with m = mean and s^2 = exp(log_variance).
    """
    log_ratio, gap = log_variance1 - log_variance2, mean1 - mean2
    return 0.5 * (exp(log_ratio) - 1 - log_ratio + gap * gap * exp(-log_variance2))


def discretised_gaussian(x0: Array, mean: Array, log_variance: Array) -> Tensor:
    """Log-probability of the grey level x_0 under N(mean, variance), elementwise, in nats (equation 13):

        p(x_0) = integral of the density from x_0 - 1/255 to x_0 + 1/255

    where the bin of the darkest level, -1, reaches down to -infinity and that of the brightest, 1, up to infinity, so
    that the 256 add up to 1. The logarithm is taken of 1e-12 at least. x0: an array of 8-bit levels k, as k / 127.5 -
    1.
    """
    # Above the mean both values of the distribution function are close to 1, and their difference loses its digits. The
    # curve is symmetric, so such an x0 is mirrored to below the mean, where both are small; white is the bottom then.
    sign = 1 - 2 * (x0 > as_array(mean)).astype(x0.dtype)
    bottom, top = (sign * x0 < -0.999).astype(x0.dtype), (sign * x0 > 0.999).astype(x0.dtype)
    centred, inverse_std = sign * (x0 - mean), exp(-0.5 * log_variance)
    below_upper_edge = top + (1 - top) * normal_cdf(inverse_std * (centred + 1 / 255))
    below_lower_edge = (1 - bottom) * normal_cdf(inverse_std * (centred - 1 / 255))
    return log(at_least(below_upper_edge - below_lower_edge, least=1e-12))
