"""Models from checkpoints with the names of Ho et al.'s own code."""

from __future__ import annotations

import itertools

from ..diffusion.process import Diffusion
from ..diffusion.schedule import make_schedule
from ..files.mistaken import ORIGINAL, who_reads
from ..files.model import unet_from
from ..files.tensors import Path, stored_tensors
from ..network.unet import UNet
from .names import original_layout


def load_original(path: Path, variance: str | None = None) -> tuple[UNet, Diffusion]:
    """Return the U-Net and the diffusion of a checkpoint with the names of Ho et al.'s code, as safetensors.

    They are `temb.dense.0`, `down.0.block.0.conv1`, `nin_shortcut` and so on, as in the PyTorch versions of that code
    by which its weights circulate, pesser/pytorch_diffusion and ermongroup/ddim. The configuration follows from the
    shapes and, where these do not tell, from the paper and its code: one head, 32 groups, T = 1000, linear; four levels
    are for the 32 x 32 pixels of CIFAR-10 with the large variance, six for 256 x 256 with the small one.

    Args:
        path: the file. variance: "large" or "small"; None: as said, and large for other numbers of levels.

    Raises FileNotFoundError, or ValueError if it is not such a file.
    """
    if variance not in (None, "small", "large"):
        raise ValueError(f"variance: expected 'small', 'large' or None, got {variance!r}")
    with stored_tensors(path) as (stored, metadata):
        if all(name.startswith("module.") for name in stored):  # of PyTorch's DataParallel
            stored = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
        if not ORIGINAL <= set(stored):
            raise ValueError(
                f"path: {path} does not have the names of Ho et al.'s code: expected {', '.join(sorted(ORIGINAL))} and "
                f"so on, but {who_reads(path, stored, metadata)}"
            )
        levels, blocks = (
            next(n for n in itertools.count() if name.format(n) not in stored)
            for name in ("down.{}.block.0.conv1.weight", "down.0.block.{}.conv1.weight")
        )
        try:
            config = {
                "in_channels": stored["conv_in.weight"].shape[1],
                "out_channels": stored["conv_out.weight"].shape[0],
                "channels": [stored[f"down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)],
                "blocks": blocks,
                "attention": [f"down.{i}.attn.0.norm.weight" in stored for i in range(levels)],
                "middle_attention": "mid.attn_1.norm.weight" in stored,
                "groups": 32,
                "image_size": {4: 32, 6: 256}.get(levels),
            }
            unet = unet_from(stored, config, lambda name, ndim: original_layout(name, ndim, levels))
        except (ValueError, IndexError) as error:
            raise ValueError(f"path: {path} is no checkpoint of Ho et al.'s network: {error}") from error
    variance = variance or ("small" if levels == 6 else "large")
    return unet, Diffusion(make_schedule("linear", 1000), variance=variance)
