"""What the diffusion side takes, and says of anything else: schedules, names, images, labels, timesteps."""

from __future__ import annotations

import numpy as np

from ..arguments import check_floats, check_instance, one_of, warn
from ..backend import Array, is_array, to_numpy
from .schedule import Schedule

OBJECTIVES = ("eps", "x0", "v")
VARIANCES = ("small", "large", "learned_range")
LOSSES = ("simple", "weighted_eps", "weighted_mu", "min_snr", "vlb", "hybrid")
SPACINGS = ("trailing", "leading", "linspace")


def check_diffusion(diffusion) -> None:
    """Raise TypeError or ValueError unless the arguments of a `Diffusion` fit each other, as it says there."""
    schedule, variance, loss_type = diffusion.schedule, diffusion.variance, diffusion.loss_type
    check_instance("schedule", schedule, Schedule, "a Schedule from make_schedule")
    for name, known in (
        ("objective", OBJECTIVES), ("variance", VARIANCES), ("loss_type", LOSSES), ("spacing", SPACINGS)
    ):  # fmt: skip
        one_of(name, getattr(diffusion, name), known)
    if variance == "learned_range" and loss_type not in ("vlb", "hybrid"):
        raise ValueError(f"loss_type: {loss_type!r} cannot train variance 'learned_range'; take 'hybrid' or 'vlb'")
    if variance != "learned_range" and loss_type == "hybrid":
        raise ValueError(f"loss_type: 'hybrid' trains variance 'learned_range', but variance is {variance!r}")
    if schedule.alpha_bar[-1] == 0:
        ends = "the schedule ends with alpha_bar = 0 (zero terminal SNR), where"
        if diffusion.objective == "eps":
            raise ValueError(f"objective: {ends} the noise does not tell the image; take 'v' or 'x0', not 'eps'")
        if loss_type == "weighted_eps":
            raise ValueError(f"loss_type: {ends} the weight is infinite; take another than 'weighted_eps'")
        if loss_type == "min_snr":
            raise ValueError(
                f"loss_type: {ends} the weight is 0, so that the step from which sampling starts would not be "
                "trained; take another than 'min_snr'"
            )


def check_shape(name: str, value: Array, x: Array) -> None:
    """Raise TypeError or ValueError unless `value`, an array or a tensor, has the shape of the images x."""
    check_floats("images", x, "floats in [-1, 1]")
    if (got := getattr(value, "shape", type(value).__name__)) != x.shape:
        raise ValueError(f"{name}: expected the shape of the images, {x.shape}, got {got}")


def check_output(output: Array, x_t: Array, learned: bool) -> None:
    """Raise ValueError unless a model's output for x_t has its shape, or twice its channels if the variance is learned
    too, and TypeError unless it is of its dtype."""
    channels, shape = x_t.shape[-1], getattr(output, "shape", type(output).__name__)
    if not learned and shape != x_t.shape:
        raise ValueError(f"model: expected it to return the shape of x_t, {x_t.shape}, got {shape}")
    if learned and shape != (*x_t.shape[:-1], 2 * channels):
        raise ValueError(
            f"model: with variance 'learned_range' it must return {2 * channels} channels for images of {channels} "
            f"(a U-Net with out_channels={2 * channels}), got shape {shape} for x_t of {x_t.shape}"
        )
    if isinstance(output.dtype, np.dtype) and output.dtype != x_t.dtype:  # other frameworks have types of their own
        raise TypeError(f"model: expected it to return {x_t.dtype}, as x_t is, got {output.dtype}")


def check_images(x0: Array) -> None:
    """Raise unless x0 is a batch of float images."""
    if not is_array(x0):
        raise TypeError(f"x0: expected an array of images, got {type(x0).__name__}")
    if x0.ndim != 4 or x0.size == 0:
        raise ValueError(f"x0: expected one or more images (N, H, W, C), got shape {x0.shape}")
    if x0.dtype not in (np.float32, np.float64):
        raise TypeError(f"x0: expected float32 or float64 images in [-1, 1], got {x0.dtype}")


def check_levels(x0: np.ndarray) -> None:
    """Raise unless x0 is a batch of the levels k / 127.5 - 1 of 8-bit images."""
    check_images(x0)
    levels = 127.5 * (x0 + 1)
    if not (np.all(np.abs(levels - np.round(levels)) < 0.01) and -0.01 < levels.min() and levels.max() < 255.01):
        raise ValueError(
            "x0: expected the levels k / 127.5 - 1 of 8-bit images, for others have no bits per dimension; got "
            f"values from {x0.min():.3g} to {x0.max():.3g}"
        )


def check_timesteps(t: np.ndarray, x: Array, T: int) -> None:
    """Raise unless t (N,) are timesteps 0 ... T-1, one for each of the images x, which are floats."""
    check_floats("images", x, "floats in [-1, 1]")
    if not isinstance(t, np.ndarray) or t.dtype.kind not in "iu":
        raise TypeError(f"t: expected a NumPy array of integers, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t: expected {x.shape[0]} timesteps, one for each image, got shape {t.shape}")
    if t.size and not (0 <= t.min() and t.max() < T):
        raise ValueError(f"t: timesteps run from 0 to {T - 1}, got {t.min()} ... {t.max()}")


def checked_labels(labels: np.ndarray | None, count: int) -> np.ndarray | None:
    """`labels` as an array of NumPy, wherever they are, if there is one for each of `count` images, or ValueError;
    TypeError unless they are integers."""
    if labels is None:
        return None
    labels = to_numpy(labels) if is_array(labels) else np.asarray(labels)
    if labels.shape != (count,):
        raise ValueError(f"labels: expected {count}, one for each image, got shape {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels: expected integers, the class of each image, got {labels.dtype}")
    return labels


def look_at_scale(diffusion: object, name: str, images: Array) -> None:
    """`warn_of_scale` of what a diffusion is given, until it has warned once. After the first images, only of numbers
    that are beyond all reason, for some images are light; and not on a GPU, where it would wait for all under way."""
    seen = getattr(diffusion, "_scale", "new")
    if seen == "told" or (seen == "fine" and not isinstance(images, np.ndarray)):
        return
    if (outcome := warn_of_scale(name, images, first=seen == "new")) is not None:
        note_scale(diffusion, outcome)


def note_scale(diffusion: object, told: bool) -> None:
    """Note on a diffusion, for `look_at_scale`, that its images have been looked at, and if there was a warning."""
    object.__setattr__(diffusion, "_scale", "told" if told else "fine")


def warn_of_scale(name: str, images: Array, first: bool = True) -> bool | None:
    """Warn, naming the range seen and what to do, if images that should fill [-1, 1] seem to be on another scale, and
    return whether; None if nobody can tell, of few numbers. `first`: also if there is no number below 0, or all are
    near it."""
    low, high = float(images.min()), float(images.max())
    if -2 <= low and high <= 2 and (low == high or images.size < 1000):
        return None
    if -2 <= low and high <= 2 and not (first and (low >= 0 or max(-low, high) <= 0.5)):
        return False
    white = next((white for white in (1, 255, 65535) if 0 <= low and high <= white), None)
    remedy = f"; if black is 0 and white is {white}, take {name} / {white / 2:g} - 1" if white else ""
    warn(f"{name}: expected images in [-1, 1], got values from {low:.3g} to {high:.3g}{remedy}")
    return True
