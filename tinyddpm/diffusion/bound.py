"""The variational bound: how probable the model finds a picture, at least (Ho et al. 2020, sections 2 and 3.3).

    -log p(x_0) <= L_T + L_{T-1} + ... + L_0                                                            (equation 5)

L_T is what the last x_t still knows of the picture, L_t how far the model's step back is from the true one, each a KL
divergence of two Gaussians, and L_0 the negative log-likelihood of the 8-bit grey levels. In bits for each number in
the picture it can be compared with other ways of compressing it. Gradients pass, so that a variance can be learned from
it. Before this file: process.py; next: clipping.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..arguments import check_floats, check_instance, generator
from ..autograd.functional import at_least, normal_cdf
from ..autograd.tensor import Tensor, as_array, exp, log
from ..backend import Array, on_device, to_device, to_numpy
from ..bar import progress_bar
from .checks import check_levels, checked_labels
from .clipping import Clip, limit
from .evaluation import in_parts

if TYPE_CHECKING:
    from .process import Diffusion


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


def vlb_terms(
    diffusion: Diffusion,
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

    both over ln 2. (They are numbered as in the paper, which writes L_{t-1} for the term of its x_t, our x_{t-1}.)
    Args: x0, x_t: (N, H, W, C), x0 of 8-bit levels k as k / 127.5 - 1. t: (N,). prediction, spread: what the model
    returned for x_t, split in two if the variance is learned. clip: see `limit`, which takes arrays only.
    """
    b = diffusion.schedule.input_scale
    mean = diffusion.posterior_mean(limit(diffusion.predict_x0(x_t, t, prediction), clip), x_t, t)
    log_variance = diffusion.log_variance(x_t, t, spread)
    true_mean = diffusion.posterior_mean(x0, x_t, t)
    true_log_variance = diffusion.gather(diffusion.schedule.posterior_log_variance, t, x0)
    nats = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    if (t == 0).any():  # there the grey levels of the image itself are scored, so b is taken out again
        first = diffusion.gather(np.arange(diffusion.T) == 0, t, x0)
        log_p = discretised_gaussian(x0, mean / b, log_variance - 2 * math.log(b))
        nats = (1 - first) * nats - first * log_p
    return _bits_per_image(nats)


def prior_terms(diffusion: Diffusion, x0: Array) -> Tensor:
    """L_T = KL(q(x_{T-1} | x_0) || N(0, I)) of each image, in bits per dimension, (N,); nothing in it is learned.

    Args: x0: (N, H, W, C).
    """
    check_floats("x0", x0)
    t = np.full(len(x0), diffusion.T - 1)
    signal, noise = diffusion.signal_and_noise(t, x0)
    zero = np.zeros_like(x0)
    nats = gaussian_kl(diffusion.schedule.input_scale * signal * x0, 2 * np.log(noise), zero, zero)
    return _bits_per_image(nats)


def _bits_per_image(nats: Tensor) -> Tensor:
    """Nats of every number (N, H, W, C) -> bits per dimension of every image (N,)."""
    return nats.reshape(nats.shape[0], -1).mean(axis=1) * (1 / math.log(2))


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


def bits_per_dim(
    diffusion: Diffusion,
    model: Callable,
    x0: np.ndarray,
    rng: int | np.random.Generator | None = 0,
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
        rng: seed or generator, None for others every time; what an image costs does not depend on the others, nor on
            the workers.
        clip: how to keep the predicted x_0 where images are, see `limit`; None: as this diffusion does.
        progress: show a bar. workers: threads; None for one per CPU.
        labels: (N,) integers, the class of each image, for a model that takes them: what they cost given these.

    Raises ValueError for no images, labels for others, another shape or values between the levels, TypeError for
    anything but floats.
    """
    check_instance("model", model, Callable, "a function (x_t, t) -> prediction")
    check_levels(x0)
    labels = checked_labels(labels, len(x0))
    dtype, device = getattr(model, "dtype", x0.dtype), getattr(model, "device", "cpu")
    clip = diffusion.clip if clip is None else clip
    streams = generator(rng).spawn(len(x0))
    x0 = x0.astype(dtype, copy=False)

    def terms_at(t: int, x: Array, streams: list[np.random.Generator], labels: np.ndarray | None) -> np.ndarray:
        eps = np.stack([stream.standard_normal(x.shape[1:], dtype) for stream in streams])
        x, eps, ts = to_device(x, device), to_device(eps, device), np.full(len(x), t)
        net = model if labels is None else functools.partial(model, labels=labels)
        x_t = diffusion.q_sample(x, ts, eps)
        prediction, spread = map(as_array, diffusion.predict(net, x_t, ts))
        return to_numpy(vlb_terms(diffusion, x, x_t, ts, prediction, spread, clip).data)

    terms = np.zeros(diffusion.T)
    bar = progress_bar(total=diffusion.T, desc="bits/dim", disable=not progress)
    with on_device(device), in_parts(model, x0.shape, workers) as run, bar:
        for t in reversed(range(diffusion.T)):
            of_images = run(functools.partial(terms_at, t), x0, streams, labels)
            terms[t] = of_images.mean(dtype=np.float64)
            bar.update()
    return BitsPerDim(prior_terms(diffusion, x0).data.mean(dtype=np.float64).item(), terms)
