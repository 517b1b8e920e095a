"""Pictures: grids, rows with names, the noising strip, the animated denoising (Pillow), the loss curve (matplotlib,
optional).

Images come as (N, H, W, C) arrays, NumPy's or CuPy's, in [-1, 1] with C = 1 (grey) or 3 (RGB).
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..arguments import array_of_numbers, check_floats, check_instance, generator, integer, number
from ..backend import to_numpy
from .replacing import replacing

Path = str | pathlib.Path
# Of those that Pillow writes, as it is built here: some it reads only, or for another program, or not in any size.
FORMATS = {"AVIF", "BMP", "EPS", "GIF", "JPEG", "JPEG2000", "PDF", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP"}


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] -> 0 ... 255, clipped and rounded. Raises TypeError for anything but floats, ValueError for nan."""
    check_floats("images", images, "an array of floats in [-1, 1]")
    if np.isnan(images := to_numpy(images)).any():
        raise ValueError("images: expected numbers in [-1, 1], got nan")
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def grid(images: np.ndarray, columns: int | None = None, scale: int = 2, gap: int = 2) -> Image.Image:
    """Lay images (N, H, W, C) out row by row, `columns` to a row (None: about a square), each pixel `scale` wide.

    Raises ValueError for any other shape.
    """
    check_floats("images", images, "an array of floats in [-1, 1]")
    if images.ndim != 4 or len(images) == 0 or images.shape[3] not in (1, 3):
        raise ValueError(f"images: expected (N, H, W, 1) or (N, H, W, 3) with N >= 1, got shape {images.shape}")
    N, H, W, C = images.shape
    columns = math.ceil(math.sqrt(N)) if columns is None else integer("columns", columns)
    scale, gap = integer("scale", scale), integer("gap", gap, 0)
    rows = math.ceil(N / columns)
    canvas = np.full((rows, columns, H + gap, W + gap, C), 32, np.uint8)
    canvas.reshape(-1, H + gap, W + gap, C)[:N, gap:, gap:] = to_uint8(images)
    page = canvas.swapaxes(1, 2).reshape(rows * (H + gap), columns * (W + gap), C)
    page = np.pad(page, ((0, gap), (0, gap), (0, 0)), constant_values=32)
    page = page.repeat(scale, axis=0).repeat(scale, axis=1)
    return Image.fromarray(page[:, :, 0] if C == 1 else page)


def page(images: np.ndarray, classes: int | None, **settings: int) -> Image.Image:
    """A `grid` with a column for each of so many classes, unless that would be too few or too many."""
    return grid(images, columns=classes if classes and 5 <= classes <= len(images) else None, **settings)


def rows(named: Mapping[str, np.ndarray], scale: int = 2, gap: int = 2, columns: Sequence[str] = ()) -> Image.Image:
    """A row of images (N, H, W, C) for each name, which is written to the left of it, and over the columns their names,
    if there are any; see `grid`.

    Raises ValueError for no rows, other shapes, or grey and RGB together.
    """
    check_instance("named", named, Mapping, "a mapping of names to images")
    if not isinstance(columns, (list, tuple)) or not all(isinstance(name, str) for name in columns):
        raise TypeError(f"columns: expected a list of names, got {columns!r}")
    for images in named.values():
        check_floats("named", images, "arrays of floats in [-1, 1]")
    if len({images.shape[-1:] for images in named.values()}) != 1:
        raise ValueError(f"named: expected rows that are all grey or all RGB, got {', '.join(named) or 'none'}")
    strips = [grid(images, len(images), scale, gap) for images in named.values()]
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))
    margin, top = 20 + math.ceil(max(pen.textlength(name) for name in named)), 18 if columns else 0
    size = margin + max(strip.width for strip in strips), top + sum(strip.height for strip in strips)
    page = Image.new(strips[0].mode, size, (32,) * len(strips[0].getbands()))
    pen, white = ImageDraw.Draw(page), (224,) * len(page.getbands())
    width = scale * (next(iter(named.values())).shape[2] + gap)  # of a column
    for i, name in enumerate(columns):
        pen.text((margin + (i + 0.5) * width, 4), name, fill=white, anchor="ma")
    for name, strip in zip(named, strips):
        page.paste(strip, (margin, top))
        pen.text((10, top + strip.height // 2 - 6), name, fill=white)
        top += strip.height
    return page


def noising_strip(diffusion, x0: np.ndarray, rng: int | np.random.Generator, columns: int = 10) -> Image.Image:
    """A row for each image of x0 (N, H, W, C): x_0, then x_t / b at evenly spaced t up to T-1, all with the same noise
    (b, the input scale, would darken them all at the first step)."""
    check_floats("x0", x0, "an array of floats in [-1, 1]")
    eps = generator(rng).standard_normal(x0.shape).astype(x0.dtype)
    ts = np.linspace(0, diffusion.T - 1, integer("columns", columns)).round().astype(int)[1:]
    b = diffusion.schedule.input_scale
    steps = [x0] + [diffusion.q_sample(x0, np.full(len(x0), t), eps) / b for t in ts]
    return grid(np.stack(steps, axis=1).reshape(-1, *x0.shape[1:]), columns=len(steps))


def format_of(path: Path) -> str | None:
    """The format in which a grey or an RGB picture can be written, as the suffix of `path` says, or None."""
    check_instance("path", path, str | os.PathLike, "a path")
    kind = Image.registered_extensions().get(pathlib.Path(path).suffix.lower())
    return kind if kind in FORMATS & Image.SAVE.keys() else None


def save_picture(path: Path, picture: Image.Image, **how: object) -> None:
    """Write a picture in the format that the suffix of `path` says, whole or not at all. Raises ValueError for a suffix
    that is none of `FORMATS`, OSError if it cannot be written. how: settings of Pillow's `save`."""
    check_instance("picture", picture, Image.Image, "a picture of Pillow's")
    if (kind := format_of(path)) is None:
        raise ValueError(f"path: expected the name of a picture, such as digits.png, got {path}")
    with replacing(pathlib.Path(path)) as (unfinished,):
        picture.save(unfinished, kind, **how)


def save_gif(path: Path, frames: Sequence[Image.Image], seconds: float = 4.0, hold: float = 2.0) -> None:
    """Write frames as an animated GIF that plays for `seconds`, holds its last frame for `hold` and starts again."""
    check_instance("path", path, str | os.PathLike, "a path")
    if (
        not isinstance(frames, Sequence)
        or not frames
        or not all(getattr(f, "mode", "") in ("L", "RGB") for f in frames)
    ):
        raise ValueError(f"frames: expected at least one image, all of them grey or RGB, got {frames!r}")
    seconds, hold = number("seconds", seconds, "(0, inf)"), number("hold", hold, "[0, inf)")
    # noise does not compress: with 16 greys, or 128 colours, rare ones among them, a frame is half the size and looks
    # the same
    how = {"L": (16, Image.Quantize.MEDIANCUT), "RGB": (128, Image.Quantize.FASTOCTREE)}
    frames = [frame.quantize(*how[frame.mode], dither=Image.Dither.NONE) for frame in frames]
    times = [max(20, round(1000 * seconds / len(frames)))] * (len(frames) - 1) + [round(1000 * hold)]
    save_picture(path, frames[0], save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)


def save_loss_curve(path: Path, losses: Sequence[float], steps: Sequence[int] | None = None) -> None:
    """Draw the loss of every step, and its mean over the last 2 % of the run.

    `steps` are their numbers; None: 1, 2, ... Raises ImportError without matplotlib (the extra `plots`).
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError as error:
        raise ImportError("that needs matplotlib, pip install 'tinyddpm[plots]'") from error

    check_instance("path", path, str | os.PathLike, "a path")
    losses = array_of_numbers("losses", losses)
    steps = np.arange(1, losses.size + 1) if steps is None else array_of_numbers("steps", steps)
    if losses.ndim != 1 or losses.size == 0 or steps.shape != losses.shape:
        raise ValueError(f"losses, steps: expected two vectors of one length, got shapes {losses.shape}, {steps.shape}")
    window = max(1, len(losses) // 50)
    total = np.cumsum(np.append(0.0, losses))
    mean = (total[window:] - total[:-window]) / window
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.75", linewidth=0.7, label="each step")
    axes.plot(steps[window - 1 :], mean, color="tab:blue", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="simple loss", yscale="log", title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(pathlib.Path(path)) as (unfinished,):
        figure.savefig(unfinished, dpi=120, format=pathlib.Path(path).suffix[1:] or "png")
