"""How a predicted x_0 is kept where images are, [-1, 1]: a network's guess from much noise can lie anywhere.

Ho et al.'s code calls this clip_denoised, diffusers clip_sample and thresholding. process.py calls it.
"""

from __future__ import annotations

import math
import numbers

import numpy as np

from ..arguments import check_floats
from ..backend import Array, array_module

Clip = bool | float | str | tuple[str, float, float]  # see `limit`
DYNAMIC = ("dynamic", 0.995, math.inf)  # what "dynamic" is short for


def limit(x0: Array, clip: Clip) -> Array:
    """Bring a predicted x_0 back to where images are.

        True, or a number r       clip it to [-1, 1], or [-r, r]
        "dynamic"                 `dynamic_threshold`; ("dynamic", quantile, most) with these settings
        False                     leave it as it is

    Raises ValueError for anything else, TypeError for a tensor that is to be clipped, for that has no derivative here.
    """
    clip = checked_clip(clip)
    if clip is False:
        return x0
    check_floats("x0", x0, f"an array of floats, since clip is {clip!r}")
    if clip == "dynamic":
        clip = DYNAMIC
    if isinstance(clip, tuple):
        return dynamic_threshold(x0, *clip[1:])
    return x0.clip(-float(clip), float(clip))


def checked_clip(clip: object) -> Clip:
    """`clip` (a list, as JSON has it, made a tuple), if `limit` takes it, or ValueError."""
    if isinstance(clip, (list, tuple)) and len(clip) == 3 and clip[0] == "dynamic":
        quantile, most = clip[1:]
        if all(isinstance(n, numbers.Real) for n in (quantile, most)) and 0 <= quantile <= 1 <= most:
            return ("dynamic", float(quantile), float(most))
    elif isinstance(clip, (bool, str)) and clip in (True, False, "dynamic"):
        return clip
    elif isinstance(clip, numbers.Real) and 0 < clip < math.inf:
        return float(clip)
    raise ValueError(
        "clip: expected True, False, a number > 0, 'dynamic' or ('dynamic', quantile, most) with 0 <= quantile <= 1 "
        f"<= most, got {clip!r}"
    )


def dynamic_threshold(x0: Array, quantile: float = DYNAMIC[1], most: float = DYNAMIC[2]) -> Array:
    """Clip each image to [-s, s] and divide it by s = its quantile of |x_0|, but at least 1 and at most `most`, so that
    strong guidance does not saturate it (Saharia et al. 2022, Imagen, section 2.3)."""
    s = array_module(x0).quantile(np.abs(x0), quantile, axis=tuple(range(1, x0.ndim)), keepdims=True)
    s = s.clip(1, most).astype(x0.dtype)  # CuPy's quantiles are float64
    return np.clip(x0, -s, s) / s
