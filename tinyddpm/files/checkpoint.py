"""A checkpoint, from which a training goes on as if it had never ended.

It is one file (see model.py): a model that `load_model` reads, with the averaged weights, and beside them what training
needs to go on. Of random generators nothing has to be saved: whatever is drawn for a step comes from
a stream made anew from (seed, step), so the seed and the step are their state.
"""

from __future__ import annotations

import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arguments import warn
from ..backend import to_device, to_numpy
from ..diffusion.process import Diffusion
from ..network.nn import Module
from ..network.unet import UNet
from .model import TRAINING, configuration
from .replacing import previous, replacing
from .tensors import Path, stored_tensors, write_tensors


class OtherRun(ValueError):
    """A checkpoint is of a run with another configuration; `differing` are its fields, as (there, here)."""

    differing: dict[str, tuple[Any, Any]] = {}


def write_checkpoint(
    path: Path, average: Module, diffusion: Any, vectors: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> None:
    """Write a checkpoint in one move, and keep the one before, as run.previous.safetensors for run.safetensors.

    Args: average: the model with the averaged weights. vectors: theta and Adam's m and v, each (P,). facts: all else,
    of JSON's types; facts["config"] is what has to be the same when the run goes on.
    Raises OSError, and leaves the checkpoint that is there, if it cannot be written.
    """
    tensors, metadata = average.state_dict(), {"training": json.dumps(facts)}
    if type(average) is UNet and type(diffusion) is Diffusion:
        tensors["schedule.beta"] = diffusion.schedule.beta
        metadata["tinyddpm"] = json.dumps(configuration(average, diffusion))
    tensors |= {TRAINING + name: to_numpy(vector) for name, vector in vectors.items()}
    path = pathlib.Path(path)
    with replacing(path, keep=True) as (unfinished,):
        write_tensors(unfinished, tensors, metadata)


def read_checkpoint(
    path: Path, average: Module, vectors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Read a checkpoint into `average` and `vectors`, and return its facts; None if there is none.

    If it is damaged, the one before is read, with a warning. Nothing is changed unless all fits. What `config` lacks is
    as it was.
    Raises ValueError or OSError if neither is whole, OtherRun, a ValueError, if it is of a run with another
    configuration; the fields are named.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return None
    try:
        facts, found = _read(path, average.dtype)
    except (ValueError, OSError) as error:  # OSError: of a bad disk
        if not previous(path).exists():
            raise
        warn(f"{error}; going on from the one before it, {previous(path).name}")
        facts, found = _read(previous(path), average.dtype)
    if differing := differences(facts["config"], facts["config"] | config):
        more = f"; and {len(differing) - 8} more" if len(differing) > 8 else ""
        error = OtherRun(f"{path} is of another run: {'; '.join(differing[:8])}{more}")
        error.differing = {k: (v, config.get(k, v)) for k, v in facts["config"].items() if config.get(k, v) != v}
        raise error
    found.pop("schedule.beta", None)
    for name, vector in vectors.items():
        vector[...] = to_device(found.pop(TRAINING + name), average.device)
    average.load_state_dict(found)
    return facts


def _read(path: pathlib.Path, dtype: np.dtype) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The facts and the tensors of a checkpoint."""
    with stored_tensors(path) as (stored, metadata):
        if "training" not in metadata:
            is_model = "; it is a model, and train begins with its weights: train(*load_model(path), ...)"
            raise ValueError(f"path: {path} is no checkpoint of a training{is_model * ('tinyddpm' in metadata)}")
        return json.loads(metadata["training"]), {name: tensor.read(dtype) for name, tensor in stored.items()}


def differences(first: Any, second: Any, name: str = "", where: tuple[str, str] = ("there", "here")) -> list[str]:
    """What differs between two configurations, such as "lr: 0.1 there, 0.2 here", field by field."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = sorted(first.keys() | second.keys())
        parts = [differences(first.get(k), second.get(k), f"{name}.{k}" if name else k, where) for k in keys]
        return [line for part in parts for line in part]
    return [] if first == second else [f"{name}: {_in_words(name, first, second, *where)}"]


def _in_words(name: str, first: Any, second: Any, there: str, here: str) -> str:
    """How a field differs. Of checksums it is said what they mean, for they themselves tell nobody anything."""
    if name == "images":
        (shape, checksum), (other_shape, other_checksum) = first, second
        if shape == other_shape:
            folders = len(checksum) == len(other_checksum) == 16  # of files' names; arrays have 8 digits
            how = "files with other names" if folders else "others, or in another order"
            return f"as many {there} as {here}, but {how}"
        first, second = (f"{n} of {' x '.join(map(str, size))}" for n, *size in (shape, other_shape))
        return f"{first} {there}, {second} {here}"
    if name in ("labels", "beta"):
        if None not in (first, second):
            return f"others {there} than {here}"
        return f"{first and 'some'} {there}, {second and 'some'} {here}"
    return f"{first!r} {there}, {second!r} {here}"


def run_config(
    model: Module,
    diffusion: Any,
    images: Any,
    labels: np.ndarray | None,
    some: np.ndarray | None = None,
    **settings: Any,
) -> dict:
    """What decides about the outcome of a training, and so has to be the same when it goes on, of JSON's types. By
    `some` of the images they are recognised, unless they have a fingerprint."""
    if isinstance(model, UNet) and isinstance(diffusion, Diffusion):
        config = configuration(model, diffusion) | {"T": diffusion.T}
        if diffusion.schedule.name == "custom":  # of others, name, T and parameters tell all
            config["beta"] = checksum(diffusion.schedule.beta)
    else:
        config = {"parameters": {name: list(p.shape) for name, p in model.named_parameters().items()}}
    config |= {
        "types": [type(model).__qualname__, type(diffusion).__qualname__],
        "dtype": str(model.dtype),
        "precision": model.precision,
        "images": [list(images.shape), getattr(images, "fingerprint", None) or checksum(some)],
        "labels": None if labels is None else checksum(labels.astype(np.int64)),
    }
    return json.loads(json.dumps(config | settings, default=_plain))


def _plain(value: Any) -> Any:
    """What stands in a configuration for a value of a type that JSON does not have."""
    if isinstance(value, np.generic):
        return value.item()
    return checksum(value) if isinstance(value, np.ndarray) else type(value).__qualname__


def checksum(x: np.ndarray) -> str:
    """A few digits that recognise an array's values."""
    return f"{zlib.crc32(np.ascontiguousarray(x)):08x}"


def a_hundred(images: Any) -> np.ndarray:
    """A hundred of them, evenly spaced, for all may be more than fit into memory."""
    return images[np.linspace(0, len(images) - 1, 100).astype(int)]
