"""A trained model in one safetensors file: the weights, and as JSON metadata what is needed to build it again.

Nothing is ever unpickled, and the file appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .diffusion import Diffusion
from .schedule import Schedule
from .unet import UNet


def save_model(path: str | pathlib.Path, unet: UNet, diffusion: Diffusion) -> None:
    """Write the weights of `unet` and the configuration of both to `path`, replacing it in one move.

    Raises FileNotFoundError if the folder does not exist, OSError if it cannot be written.
    """
    path, schedule = pathlib.Path(path), diffusion.schedule
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {path.parent}")
    config = {
        "unet": unet.config,
        "schedule": {
            "name": schedule.name,
            "input_scale": schedule.input_scale,
            "parameters": dict(schedule.parameters),
        },
        "diffusion": {
            field.name: getattr(diffusion, field.name)
            for field in dataclasses.fields(diffusion)
            if field.name != "schedule"
        },
    }
    tensors = {**unet.state_dict(), "schedule.beta": schedule.beta}
    unfinished = path.with_name(path.name + ".part")
    try:
        save_file(tensors, unfinished, metadata={"tinyddpm": json.dumps(config)})
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"path: cannot write {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def load_model(path: str | pathlib.Path) -> tuple[UNet, Diffusion]:
    """Return the U-Net and the diffusion that `save_model` wrote to `path`.

    Raises FileNotFoundError, or ValueError if it is not such a file or its weights do not fit its configuration.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"path: there is no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"path: {path} is not a readable safetensors file: {error}") from error
    if "tinyddpm" not in metadata:
        raise ValueError(f"path: {path} was not written by save_model: its metadata has no entry 'tinyddpm'")
    try:
        config = json.loads(metadata["tinyddpm"])
        schedule = Schedule(state.pop("schedule.beta"), **config["schedule"])
        (dtype,) = {value.dtype for value in state.values()}
        unet = UNet(**config["unet"]).to(dtype=dtype)
        unet.load_state_dict(state)
        return unet, Diffusion(schedule, **config["diffusion"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"path: {path} holds no model that can be built: {error}") from error
