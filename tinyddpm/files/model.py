"""A trained model in one safetensors file: the weights, and as JSON metadata what is needed to build it again.

A training run's checkpoint is such a file with more in it: checkpoint.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from ..arguments import integer
from ..diffusion.process import Diffusion
from ..diffusion.schedule import Schedule
from ..network.unet import UNet
from .mistaken import who_reads
from .replacing import replacing
from .tensors import FORMATS, Path, Stored, stored_tensors, write_tensors

Layout = Callable[[str, int], tuple[str, tuple[int, ...]]]  # our name of a parameter, its axes -> theirs, see exchange
DIGITS_MODEL = pathlib.Path(__file__).parent / "digits" / "model.safetensors"
TRAINING = "training."  # so begin the names of the tensors that only matter for going on with a training
TOO_LARGE = "the configuration is of a network many times as large as the weights that are there"


def save_model(path: Path, unet: UNet, diffusion: Diffusion, dtype: np.dtype | str | None = None) -> None:
    """Write the weights of `unet` and the configuration of both to `path`, replacing it in one move.

    `dtype` is that of the weights in the file: None, as they are; "float16" halves it, for 3 digits will do to draw
    samples. Raises FileNotFoundError if the folder does not exist, OSError if it cannot be written, ValueError for
    another dtype than float16, 32 or 64, weights too large for it, or weights that are not finite.
    """
    path, dtype = pathlib.Path(path), getattr(dtype, "__name__", dtype)
    if dtype is not None and dtype not in ("float16", "float32", "float64"):
        raise ValueError(f"dtype: expected 'float16', 'float32' or 'float64', got {dtype!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {path.parent}")
    tensors = unet.state_dict()
    if dtype is not None:
        tensors = {name: _rounded(name, w, dtype) for name, w in tensors.items()}
    tensors["schedule.beta"] = diffusion.schedule.beta
    with replacing(path) as (unfinished,):
        write_tensors(unfinished, tensors, {"tinyddpm": json.dumps(configuration(unet, diffusion))})


def configuration(unet: UNet, diffusion: Diffusion) -> dict[str, dict]:
    """What `load_model` needs besides the weights and the betas, of JSON's types."""
    schedule = diffusion.schedule
    parts = {"name": schedule.name, "input_scale": schedule.input_scale, "parameters": dict(schedule.parameters)}
    fields = [field.name for field in dataclasses.fields(diffusion) if field.name != "schedule"]
    return {"unet": unet.config, "schedule": parts, "diffusion": {name: getattr(diffusion, name) for name in fields}}


def _rounded(name: str, w: np.ndarray, dtype: np.dtype | str) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = w.astype(dtype)
    if (np.isinf(rounded) & np.isfinite(w)).any():
        raise ValueError(f"dtype: {name} has weights of up to {np.abs(w).max():.3g}, too large for {dtype}")
    return rounded


def load_model(path: Path = DIGITS_MODEL) -> tuple[UNet, Diffusion]:
    """Return the U-Net and the diffusion that `save_model` wrote to `path`; by default those of the digits that come
    with the package, made as digits/README.txt says. Of a training run's checkpoint, those with the averaged weights.

    Raises FileNotFoundError, or ValueError if it is not such a file, has been damaged since it was written, or its
    weights do not fit its configuration or are not finite. The error says what else it is, and what reads it.
    """
    with stored_tensors(path) as (stored, metadata):
        if "tinyddpm" not in metadata:
            raise ValueError(f"path: {path} was not written by save_model; {who_reads(path, stored, metadata)}")
        try:
            config = json.loads(metadata["tinyddpm"])
            stored = {name: tensor for name, tensor in stored.items() if not name.startswith(TRAINING)}
            schedule = Schedule(stored.pop("schedule.beta").read(np.float64), **config["schedule"])
            unet = unet_from(stored, config["unet"])
            return unet, Diffusion(schedule, **config["diffusion"])
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"path: {path} holds no model that can be built: {error}") from error


def own_layout(name: str, ndim: int) -> tuple[str, tuple[int, ...]]:
    """Our own, where nothing changes."""
    return name, tuple(range(ndim))


def unet_from(stored: Mapping[str, Stored], config: Mapping, layout: Layout = own_layout) -> UNet:
    """Build the U-Net of this configuration and read its weights, each straight to where it stays.

    `layout` says how the file has them. A 1x1 filter will do for the weights of a dense layer, 16-bit floats are
    widened, and the network is float64 if any tensor is. Raises ValueError, which lists them all, if tensors are
    missing, unknown, of another shape or not floats; and what `UNet` does of a configuration that makes none.
    """
    if integer("blocks", dict(config).get("blocks", 1)) > 1000 + len(stored):  # before lists of so many fill the memory
        raise ValueError(TOO_LARGE)
    unet = UNet(**config, rng=_NoWeights(stored))
    left, wrong, found = dict(stored), [], []
    for ours, p in unet.named_parameters().items():
        name, axes = layout(ours, p.ndim)
        shape, tensor = tuple(p.shape[axis] for axis in axes), left.pop(name, None)
        if tensor is None:
            wrong.append(f"{name} is missing")
        elif tensor.format not in FORMATS:
            wrong.append(f"{name} is of type {tensor.format} instead of {', '.join(FORMATS)}")
        elif tensor.shape != shape and not (len(shape) == 2 and tensor.shape == (*shape, 1, 1)):
            wrong.append(f"{name} has shape {tensor.shape} instead of {shape}")
        else:
            found.append((p, tensor, shape, np.argsort(axes)))  # which puts the axes back
    wrong += [f"{name} is unknown" for name in left]
    if wrong:
        more = f"; and {len(wrong) - 100} more" if len(wrong) > 100 else ""
        raise ValueError(f"the weights do not fit the configuration: {'; '.join(wrong[:100])}{more}")
    dtype = np.float64 if any(tensor.format == "F64" for tensor in stored.values()) else np.float32
    for p, tensor, shape, back in found:
        p.data = np.ascontiguousarray(tensor.read(dtype).reshape(shape).transpose(back))
    return unet


class _NoWeights(np.random.Generator):
    """What `UNet` draws its initial weights from when they are about to be replaced by those `stored`: it gives zeros
    that take no time and no memory.

    Raises ValueError once a configuration asks for far more than these are, before its network fills the memory.
    """

    def __init__(self, stored: Mapping[str, Stored]):
        super().__init__(np.random.PCG64(0))
        self.arrays = 1000 + 4 * len(stored)
        self.numbers = 10**6 + 10 * sum(math.prod(tensor.shape) for tensor in stored.values())

    def uniform(self, low: float, high: float, size: tuple[int, ...]) -> np.ndarray:
        self.arrays, self.numbers = self.arrays - 1, self.numbers - math.prod(size)
        if self.arrays < 0 or self.numbers < 0:
            raise ValueError(TOO_LARGE)
        return np.broadcast_to(np.float32(0), size)
