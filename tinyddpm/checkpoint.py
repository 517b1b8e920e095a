"""A trained model in one safetensors file: the weights, and as JSON metadata what is needed to build it again.

Nothing is ever unpickled, and the file appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import pathlib

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .diffusion import Diffusion
from .schedule import make_schedule
from .unet import UNet


def save_model(path: str | pathlib.Path, unet: UNet, diffusion: Diffusion) -> None:
    """Write the weights of `unet` and the configuration of both to `path`, replacing it in one move."""
    schedule = diffusion.schedule
    config = {
        "unet": unet.config,
        "schedule": {"name": schedule.name, "T": len(schedule), **schedule.parameters},
        "diffusion": {"objective": diffusion.objective, "variance": diffusion.variance},
    }
    path = pathlib.Path(path)
    unfinished = path.with_name(path.name + ".part")
    save_file(unet.state_dict(), unfinished, metadata={"tinyddpm": json.dumps(config)})
    os.replace(unfinished, path)


def load_model(path: str | pathlib.Path) -> tuple[UNet, Diffusion]:
    """Return the U-Net and the diffusion that `save_model` wrote to `path`.

    Raises FileNotFoundError, or ValueError if it is not such a file or its weights do not fit its configuration.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"path: no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"path: {path} is not a readable safetensors file: {error}") from error
    if "tinyddpm" not in metadata:
        raise ValueError(f"path: {path} was not written by tinyddpm's save_model: its metadata lacks 'tinyddpm'")
    config = json.loads(metadata["tinyddpm"])
    unet = UNet(**config["unet"]).to(dtype=next(iter(state.values()), np.zeros(0, "f")).dtype)
    unet.load_state_dict(state)
    return unet, Diffusion(make_schedule(**config["schedule"]), **config["diffusion"])
