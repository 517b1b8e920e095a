"""Samplers: from noise to images. Each is one flat generator to read beside its paper; `sample` runs them.

A sampler works on plain arrays and on the whole batch. `sample` hands it a model that cuts the batch into shards and
runs them on worker threads, and noise in which every image has a random stream of its own: the same seed gives the same
image i, to the bit for any number of threads, up to rounding for any number of other images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .backend import Array, array_module, to_device
from .diffusion import Diffusion
from .parallel import worker_threads
from .tensor import as_array, no_grad

SHARD = 8  # images per forward pass: enough for the matrix products, few enough for the cache


def ddpm(
    diffusion: Diffusion, model: Callable, x: Array, noise: Callable, clip: bool = True
) -> Iterator[tuple[int, Array, Array]]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), yielding (t, x_{t-1}, predicted x_0) for t = T-1 ... 0.

        x_{t-1} = mu_tilde(x0hat, x_t) + sigma_t z,   z ~ N(0, I) for t > 0, else 0

    where x0hat is what the predicted noise leaves of x_t, clipped to [-1, 1]; unclipped, the mean is the paper's
    (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_theta) / sqrt(alpha_t).
    """
    sigma = np.exp(0.5 * diffusion.log_variance())
    for t in reversed(range(diffusion.T)):
        ts = np.full(len(x), t)
        x0 = diffusion.predict_x0(x, ts, model(x, ts))
        if clip:
            x0 = x0.clip(-1, 1)
        x = diffusion.posterior_mean(x0, x, ts)
        if t > 0:
            x = x + float(sigma[t]) * noise()
        yield t, x, x0


SAMPLERS = {"ddpm": ddpm}


def sample(
    diffusion: Diffusion,
    model: Callable,
    shape: tuple[int, int, int, int],
    method: str = "ddpm",
    steps: int | None = None,
    rng: int | np.random.Generator = 0,
    clip: bool = True,
    callback: Callable[[int, Array, Array], None] | None = None,
    workers: int | None = None,
) -> Array:
    """Draw images from the model.

    Args:
        diffusion: the process the model was trained for.
        model: callable (x_t, t) -> prediction of the shape of x_t; its `dtype` and `device`, if any, are those of the
            images.
        shape: (N, H, W, C) of the images to make.
        method: "ddpm".
        steps: how many steps to take; None for all T, which is what "ddpm" takes.
        rng: seed or generator; the same seed gives the same images, whatever N and the number of workers.
        clip: keep the predicted x_0 within [-1, 1] at every step.
        callback: called as callback(t, x_{t-1}, predicted x_0) after every step.
        workers: threads; None for one per CPU.

    Returns (N, H, W, C), within [-1, 1] if clipped. Raises ValueError for an unknown method, a shape or steps that do
    not fit, FloatingPointError if what comes out is not finite.
    """
    if method not in SAMPLERS:
        raise ValueError(f"method: unknown sampler {method!r}; known: {', '.join(SAMPLERS)}")
    if np.ndim(shape) != 1 or len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"shape: expected (N, H, W, C), each at least 1, got {shape}")
    if steps not in (None, diffusion.T):
        raise ValueError(
            f"steps: {method!r} takes all {diffusion.T} steps of the schedule; leave steps out, got {steps}"
        )
    dtype, device = getattr(model, "dtype", np.dtype("float32")), getattr(model, "device", "cpu")
    size = SHARD if device == "cpu" else shape[0]
    streams = np.random.default_rng(rng).spawn(shape[0])

    def noise() -> Array:
        return to_device(np.stack([stream.standard_normal(shape[1:], dtype=dtype) for stream in streams]), device)

    with worker_threads(workers) as run:

        def in_shards(x: Array, t: np.ndarray) -> Array:
            def shard(i: int) -> Array:
                with no_grad():
                    return as_array(model(x[i : i + size], t[i : i + size]))

            y = array_module(x).concatenate(list(run(shard, range(0, len(x), size))))
            if y.shape != x.shape:
                raise ValueError(f"model: expected it to return the shape of x_t, {x.shape}, got {y.shape}")
            return y

        for t, x, x0 in SAMPLERS[method](diffusion, in_shards, noise(), noise, clip=clip):
            if callback:
                callback(t, x, x0)
    if not array_module(x).isfinite(x).all():
        raise FloatingPointError("model: it led to images that are not finite; are its weights?")
    return x
