"""What starts from pictures instead of noise. All of it is `sample`, begun half way, run backwards, or held in places:

    denoise         a picture with noise of a known strength    ->  the picture
    sdedit          a picture, a sketch                         ->  pictures like it: noise is added, and taken away
    invert          a picture                                   ->  the noise of which `ddim` makes it
    interpolate     two pictures                                ->  those between them, by way of their noise
    inpaint         a picture of which only a part is known     ->  the whole

Pictures are (N, H, W, C) floats in [-1, 1]. `settings` are those of `sample` that a function does not set itself: rng,
labels, guidance, clip, workers, progress ... What comes out is of the model's dtype, on its device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from ..arguments import check_floats, check_instance, generator, integer, number, warn
from ..backend import Array, array_module, device_of, is_array, like, on_device, to_device, to_numpy
from .checks import warn_of_scale
from .clipping import Clip
from .process import Diffusion
from .sample import Steps, sample, timesteps


def by_sampling(*own: str) -> Callable:
    """Decorate a function (diffusion, model, ...) that calls `sample`: it computes where the model is, and refuses the
    settings `own`, for these it sets itself."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def where_the_model_is(diffusion: Diffusion, model: Callable, *arguments: object, **settings: object) -> Array:
            check_instance("diffusion", diffusion, Diffusion, "a Diffusion")
            if chosen := [name for name in own if name in settings]:
                raise TypeError(f"settings: {function.__name__} sets {', '.join(chosen)} itself")
            with on_device(getattr(model, "device", "cpu")):
                return function(diffusion, model, *arguments, **settings)

        return where_the_model_is

    return decorate


# ----------------------------------------------------------------------------------------------- begun half way


@by_sampling("start", "spacing")
def denoise(
    diffusion: Diffusion,
    model: Callable,
    noisy: Array,
    sigma: float,
    method: str | Callable = "ddim",
    steps: int | None = None,
    **settings: object,
) -> Array:
    """Take Gaussian noise out of pictures: noisy = x_0 + sigma eps is x_t but for a factor (Song et al. 2021, section
    4.3), at the t where

        sqrt(1 - alpha_bar_t) / (b sqrt(alpha_bar_t)) = sigma,    x_t = b sqrt(alpha_bar_t) noisy

    so that sampling starts there. How it goes on is a matter of taste: one step gives E[x_0 | x_t], which has the least
    squared error and is blurred where the picture cannot be known; more steps, a sharp picture that might have been it.

    Args:
        noisy: (N, H, W, C), images in [-1, 1] with noise added, not clipped.
        sigma: the standard deviation of the noise, in the same scale; the nearest t is taken, and t = 0 for less noise
            than the schedule knows.
        method: see `sample`.
        steps: how many, evenly spaced up to t, or all t + 1 if it is more than those; None for all.

    Returns (N, H, W, C). Raises ValueError if sigma is not > 0, or more than the schedule has at the end, or the values
    of `noisy` are out of the range that it leads to, and as `sample` does.
    """
    s = diffusion.schedule
    sigma = number("sigma", sigma, "(0, inf)")
    noisy = _checked("noisy", noisy, model, 1 + 10 * sigma)
    signal = s.alpha_bar > 0  # without, nothing would be left of the pictures
    sigmas = np.sqrt(s.one_minus_alpha_bar[signal] / s.alpha_bar[signal]) / s.input_scale
    if sigma > 1.01 * sigmas.max(initial=0):
        raise ValueError(f"sigma: {sigma} is more noise than this schedule knows, {sigmas.max(initial=0):.4g}")
    t = int(np.abs(np.log(sigmas / sigma)).argmin())
    x_t = float(s.input_scale * np.sqrt(s.alpha_bar[t])) * noisy
    return sample(diffusion, model, noisy.shape, method, _until(t, steps, diffusion), start=x_t, **settings)


@by_sampling("start", "spacing")
def sdedit(
    diffusion: Diffusion,
    model: Callable,
    images: Array,
    strength: float,
    method: str | Callable = "ddpm",
    steps: int | None = None,
    rng: int | np.random.Generator | None = 0,
    **settings: object,
) -> Array:
    """Make pictures that are like `images`: noise them to t = strength T, sample from there (Meng et al. 2022, SDEdit,
    algorithm 1). What a sketch lacks is made up; the greater the strength, the more.

    Args:
        images: (N, H, W, C) in [-1, 1].
        strength: in (0, 1].
        method, rng: see `sample`. steps: see `denoise`.

    Returns (N, H, W, C). Raises ValueError if images or strength are out of range, and as `sample` does.
    """
    images = _checked("images", images, model)
    strength = number("strength", strength, "(0, 1]")
    t = max(1, round(strength * diffusion.T)) - 1
    of_start, rng = generator(rng).spawn(2)
    eps = np.stack([stream.standard_normal(images.shape[1:], images.dtype) for stream in of_start.spawn(len(images))])
    x_t = diffusion.q_sample(images, np.full(len(images), t), like(eps, images))
    return sample(diffusion, model, images.shape, method, _until(t, steps, diffusion), rng, start=x_t, **settings)


def _until(t: int, steps: int | None, diffusion: Diffusion) -> np.ndarray:
    """So many timesteps within 0 ... t, the last of them t, or all if there are fewer. Raises ValueError as `timesteps`
    does, or for a list."""
    if np.ndim(steps) > 0:
        raise ValueError(f"steps: expected how many, since which they are depends on where to begin, got {steps}")
    steps = diffusion.T if steps is None else len(timesteps(diffusion.T, steps))
    return timesteps(t + 1, min(steps, t + 1))


# ----------------------------------------------------------------------------------------------- run backwards


def ddim_inversion(
    diffusion: Diffusion, model: Callable, x: Array, noise: Callable, clip: Clip | None = None, iterations: int = 1
) -> Steps:
    """`ddim` with eta = 0 the other way round, from the image to x_{T-1} (Song et al. 2021, section 4.3):

        x_t = sqrt(alpha_bar_t / alpha_bar_{t-1}) (x_{t-1} - sqrt(1 - alpha_bar_{t-1}) eps) + sqrt(1 - alpha_bar_t) eps

    where eps should be what the model finds in x_t, which is not there yet. In the first iteration x_{t-1} stands in
    for it, and each further one takes what came out before, until nothing changes (Pan et al. 2023). If the schedule
    ends with no signal, all of x_t is noise there, which is that of x_{t-1} and not to be asked of the model:

        x_t = (x_{t-1} - sqrt(alpha_bar_{t-1}) b x0hat) / sqrt(1 - alpha_bar_{t-1})

    Warns if at some step the last iteration still changed x_t by what is 0.3 (root mean square) in x_{t-1} / b: `ddim`
    will then not come back; with the bundled model it ended with an error of 1.2 or more. (Less, at many steps, adds up
    too, and is not warned of: see `invert`.)
    """
    s, off = diffusion.schedule, []
    for t in range(diffusion.T):
        ts, x_t = np.full(len(x), t), x
        signal, noise_before = (math.sqrt(table[t]) for table in (s.alpha_bar_prev, s.one_minus_alpha_bar_prev))
        ratio = math.sqrt(s.alpha_bar[t]) / signal
        for _ in range(iterations):
            before = x_t
            x0, _ = diffusion.denoise(model, x_t, ts, clip)
            if s.alpha_bar[t] == 0 < t:
                x_t = (x - signal * s.input_scale * x0) / noise_before
            else:
                eps = diffusion.eps_from_x0(x_t, ts, x0)
                x_t = ratio * x + (math.sqrt(s.one_minus_alpha_bar[t]) - ratio * noise_before) * eps
        if ratio > 0:
            off.append(np.sqrt(((x_t - before) ** 2).mean()) / (ratio * s.input_scale))
        x = x_t
        yield t, x, x0
    if (most := max(map(float, off), default=0)) > 0.3:
        what = f"x_t are off by as much as {most:.2g} in the image, so that `ddim` will not remake it; take more"
        warn(f"steps, iterations: of so few, {what}")


@by_sampling("method", "start", "eta")
def invert(
    diffusion: Diffusion,
    model: Callable,
    images: Array,
    steps: int | None = None,
    iterations: int = 3,
    clip: Clip = False,
    **settings: object,
) -> Array:
    """The noise x_T of which `ddim` makes `images`, to be handed to `sample` as `start`, with as many steps and clip
    False: see `ddim_inversion`. The more steps or iterations, the closer it comes: the bundled model remakes digits
    with an error (root mean square) of 0.08 in 10 steps, 0.04 in 20 and 0.02 in 50, but with a single iteration of 1.2,
    0.4 and 0.1.

    Args:
        images: (N, H, W, C) in [-1, 1].
        steps: see `sample`.
        iterations: evaluations of the model for each of them.

    Returns (N, H, W, C). Raises ValueError for images out of range, iterations that are not an integer >= 1, and as
    `sample` does; warns if steps or iterations are so few that the images are lost.
    """
    images = _checked("images", images, model)
    integer("iterations", iterations)
    b = diffusion.schedule.input_scale
    settings |= {"clip": clip, "start": b * images, "iterations": iterations}
    return b * sample(diffusion, model, images.shape, ddim_inversion, steps, **settings)


@by_sampling("method", "start", "eta", "clip", "trajectory")
def interpolate(
    diffusion: Diffusion,
    model: Callable,
    first: Array,
    last: Array,
    count: int = 8,
    steps: int | None = None,
    iterations: int = 2,
    labels: np.ndarray | None = None,
    **settings: object,
) -> Array:
    """`count` pictures from each of `first` to that of `last`, evenly spaced (Song et al. 2021, section 5.3): the noise
    of which `ddim` makes one is turned into that of the other, along the sphere on which noise lies, see `slerp`.

    Args:
        first, last: (N, H, W, C) in [-1, 1].
        count: at least 2; at the ends are the two as `ddim` remakes them.
        steps, iterations: see `invert`. More of these remake the two more closely, but what lies between is then less
            like the data.
        labels: (N,) integers, the class of both pictures of a pair and of all between them.

    Returns (N, count, H, W, C). Raises ValueError if the shapes differ or an argument is out of range, and as `sample`
    does.
    """
    first, last = _checked("first", first, model), _checked("last", last, model)
    if first.shape != last.shape:
        raise ValueError(f"first, last: expected two arrays of one shape, got {first.shape} and {last.shape}")
    count = integer("count", count, 2)
    N, *image = first.shape
    of_ends = of_all = None
    if labels is not None:
        if np.shape(labels) != (N,):
            raise ValueError(f"labels: expected {N}, one for each pair, got shape {np.shape(labels)}")
        of_ends, of_all = np.tile(labels, 2), np.repeat(labels, count)
    both = array_module(first).concatenate([first, last])
    ends = invert(diffusion, model, both, steps, iterations, labels=of_ends, **settings)
    between = slerp(ends[:N], ends[N:], np.linspace(0, 1, count)).reshape(N * count, *image)
    settings |= {"clip": False, "start": between, "labels": of_all}
    pictures = sample(diffusion, model, between.shape, "ddim", steps, **settings)
    return pictures.clip(-1, 1).reshape(N, count, *image)


def slerp(a: Array, b: Array, fractions: np.ndarray) -> Array:
    """Spherical interpolation (Shoemake 1985): of vectors at an angle w to each other,

        sin((1 - f) w) / sin(w) a + sin(f w) / sin(w) b

    which keeps their length, as a straight line between two samples of noise does not. Args: a, b: (N, ...) floats.
    fractions: (M,) in [0, 1]. Returns (N, M, ...). Raises TypeError or ValueError for others, and where there is no one
    way along the sphere: from or to 0, or to the opposite.
    """
    check_floats("a", a)
    check_floats("b", b)
    if a.shape != b.shape or a.ndim < 2 or not a.size:
        raise ValueError(f"a, b: expected two arrays (N, ...) of one shape, got {a.shape} and {b.shape}")
    fractions = np.array([number("fractions", f, "[0, 1]") for f in np.atleast_1d(fractions).tolist()])
    flat = [to_numpy(x).reshape(len(x), -1).astype(float) for x in (a, b)]
    with np.errstate(all="ignore"):  # what comes of 0 or infinity is refused
        lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in flat]
        unit_a, unit_b = (x / length for x, length in zip(flat, lengths))
        w = np.arccos((unit_a * unit_b).sum(1, keepdims=True).clip(-1, 1))
    if not all(((n > 0) & (n < math.inf)).all() for n in lengths) or w.max() > math.pi - 1e-6:
        raise ValueError(
            "a, b: expected finite vectors, not 0 nor opposite to each other, for then no one way leads on"
        )
    w = np.maximum(w, 1e-6)  # where they are parallel, all but the straight line

    def weight(f: np.ndarray) -> Array:
        return like((np.sin(f * w) / np.sin(w)).reshape(len(a), -1, *[1] * (a.ndim - 1)), a)

    return weight(1 - fractions) * a[:, None] + weight(fractions) * b[:, None]


# ----------------------------------------------------------------------------------------------- held in places


def repaint(
    diffusion: Diffusion,
    model: Callable,
    x: Array,
    noise: Callable,
    clip: Clip | None = None,
    *,
    images: Array,
    mask: Array,
    jump: int,
    resamplings: int,
) -> Steps:
    """`ddpm` where `mask` (N, H, W, 1) is False, the forward process of `images` where it is True (Lugmayr et al. 2022,
    RePaint, algorithm 1):

        x_{t-1} = m (sqrt(alpha_bar_{t-1}) b x_0 + sqrt(1 - alpha_bar_{t-1}) eps) + (1 - m) (mu_theta + sigma_t z)

    So that what is made up has time to fit what is known, `jump` steps at a time are undone by as many of the forward
    process and taken again, until they were taken `resamplings` times (section 4.2 there); all but the last step.
    """
    xp, s = array_module(x), diffusion.schedule
    tops = [*range(diffusion.T, 1, -jump), 1]
    for top, bottom in zip(tops, [*tops[1:], 0]):
        rounds = resamplings if bottom > 0 else 1
        for n in range(rounds):
            last = n == rounds - 1
            for t in reversed(range(bottom, top)):
                mean, log_variance, x0 = diffusion.p_mean_variance(model, x, np.full(len(x), t), clip)
                x, known = mean, s.input_scale * images
                if t > 0:
                    x = mean + np.exp(0.5 * log_variance) * noise()
                    known = diffusion.q_sample(images, np.full(len(x), t - 1), noise())
                x = xp.where(mask, known, x)
                if last:
                    yield t, x, x0
            if not last:
                for t in range(bottom, top):
                    x = diffusion.q_step(x, np.full(len(x), t), noise())


@by_sampling("method")
def inpaint(
    diffusion: Diffusion,
    model: Callable,
    images: Array,
    mask: np.ndarray,
    steps: int | None = None,
    jump: int = 5,
    resamplings: int = 5,
    **settings: object,
) -> Array:
    """Make up the pixels that are not known, to fit those that are, which stay as they are to the bit: see `repaint`.

    Args:
        images: (N, H, W, C) in [-1, 1]; what they are where the mask is False does not matter.
        mask: (H, W) or (N, H, W) booleans, True where pixels are known.
        steps: see `sample`. The model is evaluated `resamplings` times for each but the last.
        jump, resamplings: integers >= 1, see `repaint`; `resamplings` 1 is the quick way, with poorer seams.

    Returns (N, H, W, C). Raises ValueError for images out of range, a mask of another shape, and as `sample` does;
    TypeError unless the mask is of booleans.
    """
    _check_kind("images", images)
    N, H, W, _ = images.shape
    mask = to_numpy(mask) if is_array(mask) else np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"mask: expected booleans, True where pixels are known, got {mask.dtype}")
    if mask.shape not in ((H, W), (N, H, W)):
        raise ValueError(f"mask: expected shape {(H, W)} or {(N, H, W)}, as the images have, got {mask.shape}")
    jump, resamplings = integer("jump", jump), integer("resamplings", resamplings)
    images = to_device(images, getattr(model, "device", "cpu"))
    mask = to_device(np.broadcast_to(mask[..., None], (N, H, W, 1)), device_of(images))
    xp = array_module(images)
    images = _checked("images", xp.where(mask, images, 0), model, known=xp.broadcast_to(mask, images.shape))
    settings |= {"images": images, "mask": mask, "jump": jump, "resamplings": resamplings}
    made = sample(diffusion, model, images.shape, repaint, steps, **settings)
    last = made[-1] if settings.get("trajectory") else made
    last[...] = array_module(last).where(mask, images, last)  # b x / b need not be x
    return made


def _checked(name: str, images: Array, model: Callable, most: float = 1.0, known: Array | None = None) -> Array:
    """`images` of the model's dtype and on its device, or an error unless they are a batch within [-most, most]; a
    warning if they, as far as they are `known`, seem to be in [0, 1]."""
    _check_kind(name, images)
    images = to_device(images, getattr(model, "device", "cpu"))
    low, high = float(images.min()), float(images.max())
    if not (-most - 0.01 <= low and high <= most + 0.01):
        raise ValueError(
            f"{name}: expected values within [{-most:g}, {most:g}], got {low:.4g} to {high:.4g}; of 8-bit levels k, "
            "images are k / 127.5 - 1"
        )
    shown = images if known is None else images[known]
    if most == 1 and shown.size:  # without noise
        warn_of_scale(name, shown)
    return images.astype(getattr(model, "dtype", np.dtype("float32")), copy=False)


def _check_kind(name: str, images: Array) -> None:
    """Raise unless `images` is a batch of floats."""
    check_floats(name, images, "an array of floats, images in [-1, 1]")
    if images.ndim != 4 or images.size == 0:
        raise ValueError(f"{name}: expected one or more images (N, H, W, C), got shape {images.shape}")
