"""Samplers: from noise to images. Each is one flat generator to read beside its paper (Ho et al. 2020; Song et al.
2021; Lu et al. 2022); `sample` runs them. Before this file: process.py.

A sampler works on plain arrays and on the whole batch. `sample` hands it a model without gradients, which may be
evaluated in parts, and noise in which every image has a random stream of its own: the same seed gives the same image i,
to the bit for any number of threads, up to rounding for any number of other images. Next: editing.py, which starts from
pictures instead of noise.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..arguments import check_instance, generator, is_integer, number, one_of, warn
from ..autograd.tensor import as_array
from ..backend import Array, array_module, is_array, on_device, to_device
from ..bar import progress_bar
from .checks import SPACINGS, checked_labels
from .clipping import Clip
from .evaluation import in_parts
from .process import Diffusion
from .schedule import Schedule

Steps = Iterator[tuple[int, Array, Array]]  # (t, x_{t-1}, predicted x_0) after each step, t = T-1 ... 0


def ddpm(diffusion: Diffusion, model: Callable, x: Array, noise: Callable, clip: Clip | None = None) -> Steps:
    """Ancestral sampling (Ho et al. 2020, algorithm 2): a sample of p_theta(x_{t-1} | x_t) at every step,

        x_{t-1} = mu_tilde(x0hat, x_t) + sigma_t z,   z ~ N(0, I) for t > 0, else 0

    where x0hat is what the predicted noise leaves of x_t, clipped to [-1, 1]. The clipping is not in algorithm 2 but in
    the paper's code; without it the mean is that of algorithm 2, (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_theta) /
    sqrt(alpha_t).
    """
    for t in reversed(range(diffusion.T)):
        mean, log_variance, x0 = diffusion.p_mean_variance(model, x, np.full(len(x), t), clip)
        x = (mean + np.exp(0.5 * log_variance) * noise()) if t > 0 else mean
        yield t, x, x0


def ddim(
    diffusion: Diffusion, model: Callable, x: Array, noise: Callable, clip: Clip | None = None, eta: float = 0.0
) -> Steps:
    """Denoising diffusion implicit models (Song et al. 2021, equations 12 and 16): straight towards x0hat, in few
    steps,

        x_{t-1} = sqrt(alpha_bar_{t-1}) b x0hat + sqrt(1 - alpha_bar_{t-1} - s^2) epshat + s z,   z ~ N(0, I)
        s = eta sqrt(beta_tilde_t) = eta sqrt((1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t /
            alpha_bar_{t-1})

    where epshat is what x0hat, once clipped, leaves of x_t. With eta = 0 nothing is random but the start; eta = 1 is
    `ddpm` with the small variance. (The paper writes alpha for alpha_bar, and sigma for s.)
    """
    schedule, eta = diffusion.schedule, number("eta", eta, "[0, 1]")
    for t in reversed(range(diffusion.T)):
        ts = np.full(len(x), t)
        x0, _ = diffusion.denoise(model, x, ts, clip)
        eps = diffusion.eps_from_x0(x, ts, x0)
        s = eta * math.sqrt(schedule.posterior_variance[t])
        signal = math.sqrt(schedule.alpha_bar_prev[t]) * schedule.input_scale
        # 1 - alpha_bar_{t-1} - s^2, without the digits that are lost where the two are nearly the same
        rest = schedule.one_minus_alpha_bar_prev[t] * (1 - eta**2 * schedule.beta[t] / schedule.one_minus_alpha_bar[t])
        x = signal * x0 + math.sqrt(max(rest, 0)) * eps
        if s > 0:
            x = x + s * noise()
        yield t, x, x0


def dpm_solver(diffusion: Diffusion, model: Callable, x: Array, noise: Callable, clip: Clip | None = None) -> Steps:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): the same path as `ddim`'s, by a second-order multistep method.

    With alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), l = ln(alpha / sigma) and m = b x0hat at each step, the
    step from s to t, where h = l_t - l_s and r = h_before / h, is

        x_t = sigma_t / sigma_s x_s - alpha_t (e^-h - 1) (m_s + (m_s - m_before) / (2 r))

    The first step has no m_before and is of first order; the last ends where sigma = 0 and takes x = m.
    """
    alpha = np.sqrt(np.append(1.0, diffusion.schedule.alpha_bar))  # [t + 1] is that of x_t, [t] that of x_{t-1}
    sigma = np.sqrt(np.append(0.0, diffusion.schedule.one_minus_alpha_bar))
    with np.errstate(divide="ignore"):  # no noise: infinity; no signal: minus infinity
        l = np.log(alpha) - np.log(sigma)
    m_before = None
    for t in reversed(range(diffusion.T)):
        x0, _ = diffusion.denoise(model, x, np.full(len(x), t), clip)
        m = D = diffusion.schedule.input_scale * x0
        if m_before is not None and t > 0:
            r = (l[t + 1] - l[t + 2]) / (l[t] - l[t + 1])
            D = m + float(1 / (2 * r)) * (m - m_before)
        x = float(sigma[t] / sigma[t + 1]) * x - float(alpha[t] * np.expm1(l[t + 1] - l[t])) * D
        m_before = m
        yield t, x, x0


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm_solver}


def timesteps(T: int, steps: int | Sequence[int], spacing: str = "trailing") -> np.ndarray:
    """Which `steps` of T timesteps to visit, ascending (Lin et al. 2023, table 2; i = 0 ... steps - 1):

        "trailing"    round((i + 1) T / steps) - 1      ends at T-1, so that sampling starts from nothing but noise
        "leading"     i floor(T / steps)                begins at 0
        "linspace"    round(i (T - 1) / (steps - 1))    begins at 0 and ends at T-1; a single step is t = 0

    Instead of how many, `steps` may say which, in either direction.
    Raises ValueError for another spacing, or unless 1 <= steps <= T, or they are timesteps in order, each once.
    """
    one_of("spacing", spacing, SPACINGS)
    if np.ndim(steps) > 0:
        ts = np.asarray(steps)
        if ts.ndim == 1 and ts.size and ts.dtype.kind in "iu":
            ts = ts[::-1] if ts[0] > ts[-1] else ts
            if 0 <= ts[0] and ts[-1] < T and np.all(ts[:-1] < ts[1:]):
                return ts.astype(int)
        raise ValueError(f"steps: expected timesteps within 0 ... {T - 1} in order, each once, got {steps}")
    if isinstance(steps, bool) or not (is_integer(steps) and 1 <= steps <= T):
        raise ValueError(f"steps: expected an integer from 1 to {T}, the steps of the schedule, got {steps!r}")
    i = np.arange(steps)
    if spacing == "leading":
        return i * (T // steps)
    if spacing == "linspace":
        return np.round(np.linspace(0, T - 1, steps)).astype(int)
    return np.round((i + 1) * T / steps).astype(int) - 1


def respace(diffusion: Diffusion, ts: np.ndarray) -> Diffusion:
    """The same process in fewer, longer steps that visit only the timesteps `ts`, ascending: a `Diffusion` with len(ts)
    steps (Nichol & Dhariwal 2021, section 4).

    alpha_bar is what it was at those timesteps, so that beta = 1 - alpha_bar_t / alpha_bar_{the one before, at first
    1}. Of long steps only the small variance gives good pictures, so "large" becomes "small". The network must still
    be given the timesteps it knows, ts[t], as `sample` does. Raises ValueError unless ts ascends within 0 ... T-1.
    """
    s = diffusion.schedule
    if not (len(ts) and ts[0] >= 0 and ts[-1] < len(s) and np.all(np.diff(ts) > 0)):
        raise ValueError(f"ts: expected ascending timesteps within 0 ... {len(s) - 1}, got {ts}")
    alpha_bar = s.alpha_bar[ts]
    short = Schedule(1 - alpha_bar / np.append(1.0, alpha_bar[:-1]), s.input_scale)
    variance = "small" if diffusion.variance == "large" else diffusion.variance
    return dataclasses.replace(diffusion, schedule=short, variance=variance)


def guided(unconditional: Callable, conditional: Callable, scale: float) -> Callable:
    """Classifier-free guidance (Ho & Salimans 2022, whose w is scale - 1): a model that predicts, be it eps, x_0 or v,

        prediction_u + scale (prediction_c - prediction_u)

    0 is the unconditional model, 1 the conditional one, and more exaggerates what sets them apart. Of a learned
    variance, the conditional model's is taken as it is. The dtype and device are those of the conditional model, and it
    alone is handed labels. A U-Net with `label_dropout` is both at once, and is asked for both in one call, in which -1
    is no label; `sample` then takes `guidance`. One to which no label is a number like others, often the last, as with
    those that come from diffusers, is guided so:

        guided(lambda x, t: unet(x, t, labels=np.full(len(t), 10)), unet, scale)

    Raises ValueError unless the scale is a number.
    """
    scale = number("guidance", scale)
    if scale == 1:
        return conditional
    both = unconditional is conditional and getattr(conditional, "label_dropout", 0)

    def model(x_t: Array, t: np.ndarray, labels: np.ndarray | None = None) -> Array:
        xp, channels = array_module(x_t), x_t.shape[-1]
        if both and labels is not None:  # in one call
            twice = np.append(np.full(len(t), -1), np.asarray(labels).astype(int))
            u, c = xp.split(as_array(conditional(xp.concatenate([x_t, x_t]), np.append(t, t), labels=twice)), 2)
        else:
            of_class = {} if labels is None else {"labels": labels}
            u, c = as_array(unconditional(x_t, t)), as_array(conditional(x_t, t, **of_class))
        prediction = u[..., :channels] + scale * (c[..., :channels] - u[..., :channels])
        return xp.concatenate([prediction, c[..., channels:]], axis=-1)

    vars(model).update({name: getattr(conditional, name) for name in ("dtype", "device") if hasattr(conditional, name)})
    return model


def sample(
    diffusion: Diffusion,
    model: Callable,
    shape: tuple[int, int, int, int],
    method: str | Callable = "ddpm",
    steps: int | Sequence[int] | None = None,
    rng: int | np.random.Generator | None = 0,
    clip: Clip | None = None,
    spacing: str | None = None,
    callback: Callable[[int, Array, Array], None] | None = None,
    workers: int | None = None,
    labels: np.ndarray | None = None,
    guidance: float | None = None,
    start: Array | None = None,
    trajectory: bool = False,
    progress: bool = False,
    **settings: object,
) -> Array:
    """Draw images from the model.

    Args:
        diffusion: the process the model was trained for.
        model: callable (x_t, t) -> prediction, see `Diffusion`; its `dtype` and `device`, if any, are those of the
            images.
        shape: (N, H, W, C) of the images to make.
        method: "ddpm", "ddim" or "dpm++": the functions of this file; or another function that is called as they are.
        steps: how many steps to take; None for all T. Which these are, `timesteps` tells, and `respace` what becomes of
            the diffusion. Or the timesteps themselves, which should begin near T-1 unless `start` is given.
        rng: seed or generator; the same seed gives the same images, whatever N and the number of workers. With the
            default a second call repeats the first; None draws other images every time.
        clip: how to keep the predicted x_0 where images are, at every step, see `limit` in clipping.py; None: as
            `diffusion.clip` says, which by default is within [-1, 1].
        spacing: of the steps, see `timesteps`; None: as `diffusion.spacing` says, by default "trailing".
        callback: called as callback(t, x_{t-1}, predicted x_0) after every step; x_{t-1} is still b times as large.
        workers: threads; None for one per CPU. A GPU has one.
        labels: (N,) integers, the class of each image, for a model that takes them: it is called (x_t, t, labels=...).
            To a U-Net with `label_dropout`, -1 is no label.
        guidance: how much more like its label than like any image each is to be, see `guided`: from 1, by the model
            alone, to 2 or 4; beyond that clip="dynamic" helps. It takes twice the time, and on a GPU twice the
            memory, and a model that can be called without labels too.
        start: (N, H, W, C), what to start from in place of standard normal noise: x_t of the first timestep visited.
        trajectory: return every x_t on the way as well. They are divided by b, as the images are, so that sampling goes
            on from one of them with start = b x_t.
        progress: show a bar.
        settings: of the method: "ddim" takes eta, 0 ... 1, how much of `ddpm`'s noise it adds.

    Returns (N, H, W, C), within [-1, 1] if clipped; with `trajectory`, (steps + 1, N, H, W, C), from the start to the
    images. Raises ValueError for an unknown method, a shape, steps, labels, guidance or start that do not fit,
    TypeError for an unknown setting, FloatingPointError if what comes out is not finite; warns if no start is given and
    at the first timestep a tenth more of the variance should be the image's than at T-1.
    """
    sampler = checked_sampler(diffusion, method, settings)
    check_instance("model", model, Callable, "a function (x_t, t) -> prediction")
    check_instance("callback", callback, Callable | None, "a function (t, x, x0)")
    labels = checked_request(shape, labels, guidance, start)
    T = diffusion.T
    ts = timesteps(T, T if steps is None else steps, diffusion.spacing if spacing is None else spacing)
    s = diffusion.schedule  # at whose end something may be left too, but of that `make_schedule` has warned
    if start is None and (left := s.input_scale**2 * (s.alpha_bar[ts[-1]] - s.alpha_bar[-1])) > 0.1:
        warn(f"steps: the first, t = {ts[-1]}, is {left:.3g} image, but starts as noise; take spacing 'trailing'")
    if len(ts) < T:
        diffusion = respace(diffusion, ts)
    dtype, device = getattr(model, "dtype", np.dtype("float32")), getattr(model, "device", "cpu")
    predictor = model if guidance is None else guided(model, model, guidance)
    streams = generator(rng).spawn(shape[0])

    def noise() -> Array:
        return to_device(np.stack([stream.standard_normal(shape[1:], dtype=dtype) for stream in streams]), device)

    def predict(x: Array, t: np.ndarray, labels: np.ndarray | None) -> Array:
        of_class = {} if labels is None else {"labels": labels}
        return array_module(x).asarray(as_array(predictor(x, ts[t], **of_class)), x.dtype)  # it may be of PyTorch, say

    with on_device(device), in_parts(model, shape, workers) as run:
        x = noise()  # whether needed or not: the numbers drawn later are the same
        if start is not None:
            x = to_device(start, device).astype(dtype)
        path, of_images = [x], lambda x, t: run(predict, x, t, labels)
        taken = sampler(diffusion, of_images, x, noise, clip=clip, **settings)
        for t, x, x0 in progress_bar(taken, "sampling", len(ts), unit="step", disable=not progress):
            if callback:
                callback(int(ts[t]), x, x0)
            if trajectory:
                path.append(x)
        if not array_module(x).isfinite(x).all():  # only here is a GPU waited for
            what = "are its weights?" if start is None else "are its weights, and the start?"
            raise FloatingPointError(f"model: it led to images that are not finite; {what}")
        return (array_module(x).stack(path) if trajectory else x) / diffusion.schedule.input_scale


def checked_sampler(diffusion: Diffusion, method: str | Callable, settings: dict) -> Callable:
    """The sampler that `method` is, if it takes these settings, or TypeError or ValueError."""
    check_instance("diffusion", diffusion, Diffusion, "a Diffusion")
    sampler = SAMPLERS.get(method) if isinstance(method, str) else method
    if not callable(sampler):
        raise ValueError(f"method: unknown sampler {method!r}; known: {', '.join(SAMPLERS)}")
    takes = list(inspect.signature(sampler).parameters)[5:]  # after diffusion, model, x, noise, clip
    if unknown := [name for name in settings if name not in takes]:
        name = method if isinstance(method, str) else getattr(method, "__name__", "this method")
        raise TypeError(f"settings: {name!r} takes {', '.join(takes) or 'none'}, got {', '.join(unknown)}")
    return sampler


def checked_request(
    shape: Sequence[int], labels: np.ndarray | None, guidance: float | None, start: Array | None
) -> np.ndarray | None:
    """The labels as an array of NumPy, if all that is said of the images to make fits, or ValueError."""
    sizes = list(shape) if isinstance(shape, list | tuple | np.ndarray) else []
    if len(sizes) != 4 or not all(is_integer(n) and n >= 1 and n is not True for n in sizes):
        raise ValueError(f"shape: expected (N, H, W, C), each at least 1, got {shape!r}")
    labels = checked_labels(labels, shape[0])
    if guidance is not None and labels is None:
        raise ValueError(f"guidance: {guidance!r} towards which labels? Give labels too")
    if start is not None and not (is_array(start) and start.dtype.kind == "f" and start.shape == tuple(shape)):
        got = f"{start.dtype} {start.shape}" if is_array(start) else type(start).__name__
        raise ValueError(f"start: expected an array of floats of the shape of the images, {tuple(shape)}, got {got}")
    return labels
