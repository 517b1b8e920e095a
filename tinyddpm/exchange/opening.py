"""A model at a path, whoever wrote it; and one made to fit other images than those that it has learned from."""

from __future__ import annotations

import numpy as np

from ..diffusion.process import Diffusion
from ..files.model import load_model
from ..files.run_folder import model_in
from ..files.tensors import Path, stored_tensors
from ..network.unet import UNet
from .diffusers import load_diffusers
from .original import load_original


def opened(path: Path, variant: str | None = None) -> tuple[UNet, Diffusion]:
    """The network and the diffusion at a path, whoever wrote them. Of the folder of a training, what it has learned so
    far. Raises FileNotFoundError or ValueError as those do that read it, see load_model."""
    if (path := model_in(path)).is_dir():
        return load_diffusers(path, variant)
    if variant is not None:
        raise ValueError(f"--variant: only a folder of diffusers has variants, and {path} is none")
    with stored_tensors(path) as (_, metadata):
        ours = "tinyddpm" in metadata
    return load_model(path) if ours else load_original(path)


def fitted(unet: UNet, image_size: tuple[int, int], classes: int | None, seed: int = 0) -> UNet:
    """A network with the weights of `unet`, for images of this size and so many classes. Unless it knew as many, each
    begins as if it had not been told: with the vector of "no label", the mean of all if there was none."""
    config, state = unet.config | {"image_size": image_size}, unet.state_dict()
    if classes != config["classes"]:
        vectors = state.pop("class_embedding.w", np.zeros((1, state["time2.b"].size)))
        untold = vectors[-1] if config["label_dropout"] else vectors.mean(axis=0)
        config |= {"classes": classes, "label_dropout": 0.1 if classes else 0.0}
        if classes:
            state["class_embedding.w"] = np.tile(untold, (classes + 1, 1))
        else:
            state["time2.b"] += untold  # to which a class's vector is added
    new = UNet(**config, rng=seed)
    new.load_state_dict(state)
    return new
