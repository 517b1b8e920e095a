"""Models of others, and models for others: diffusers' folders, and checkpoints with the names of Ho et al.'s code.

Their U-Net is ours with other names, and with PyTorch's order of axes: filters are (O, C, kh, kw) instead of (kh, kw,
C, O), dense layers (O, C) instead of (C, O). What ours cannot be is refused by name, never passed over.
"""

from __future__ import annotations

import json
import pathlib
import re

from .backend import to_numpy
from .checkpoint import Path, Stored, replacing, stored_tensors, unet_from, write_tensors
from .diffusers_config import VERSION, diffusion_from, scheduler_config, unet_config, unet_settings
from .diffusion import Diffusion
from .optim import EMA
from .schedule import make_schedule
from .unet import UNet

WEIGHTS = "diffusion_pytorch_model"  # what diffusers calls the file
EMPTY = (None, [None, None])  # a part that a pipeline could have, and has not


def load_diffusers(folder: Path, variant: str | None = None) -> tuple[UNet, Diffusion]:
    """Return the U-Net and the diffusion of a local folder of diffusers, such as a copy of google/ddpm-cifar10-32.

    The folder is that of a pipeline (DDPMPipeline, DDIMPipeline: `unet/` and `scheduler/`, or both at its top) or of a
    UNet2DModel alone, which then is taken to be trained as Ho et al. did, with diffusers' default scheduler. float16
    and bfloat16 weights are widened to float32; `variant` names another file of weights, such as "fp16". The loss,
    which diffusers does not store, is "simple", or "hybrid" where the variance is learned.

    Raises FileNotFoundError for what is not there; ValueError for anything that is not supported, with the field, its
    value and what is, and for weights that do not fit, with every tensor that is missing, unknown or of another shape.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: there is no folder {folder}")
    if variant is not None and not re.fullmatch(r"[\w-]+", variant):
        raise ValueError(f"variant: expected a word such as 'fp16', got {variant!r}")
    if (folder / "model_index.json").is_file():
        parts = _read_json(folder / "model_index.json")
        ours = ("unet", "scheduler")
        others = [name for name, part in parts.items() if name[:1] != "_" and name not in ours and part not in EMPTY]
        if others:
            raise ValueError(
                f"{folder / 'model_index.json'}: a pipeline with {', '.join(others)} is not supported; supported: one "
                "of a unet and a scheduler alone, DDPMPipeline or DDIMPipeline"
            )
    home = folder / "unet" if (folder / "unet").is_dir() else folder
    path = home / "config.json"
    config = unet_settings(_read_json(path), path)
    learned = config["out_channels"] == 2 * config["in_channels"]
    paths = [folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"]
    path = next(filter(pathlib.Path.is_file, paths), paths[0])
    if path.is_file() or (folder / "model_index.json").is_file():
        diffusion = diffusion_from(_read_json(path), path)
    else:
        diffusion = diffusion_from({"variance_type": "learned_range"} if learned else {}, path)

    path = home / f"{WEIGHTS}{f'.{variant}' if variant else ''}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"folder: there is no {path}; there are {', '.join(sorted(p.name for p in home.iterdir()))}. Supported: "
            "weights in one safetensors file. Pickles (.bin) are never read, but diffusers converts them: "
            "UNet2DModel.from_pretrained(folder).save_pretrained(folder)"
        )
    stored, _ = stored_tensors(path)
    try:
        return unet_from(_with_new_names(stored), config, diffusers_layout), diffusion
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_diffusers(
    folder: Path, unet: UNet | EMA, diffusion: Diffusion, image_size: int | tuple[int, int] | None = None
) -> None:
    """Write `unet` and `diffusion` as a folder that diffusers' DDPMPipeline.from_pretrained loads, weights to the bit.

    Args:
        folder: made if need be; of an earlier model in it, the files are replaced when all new ones are complete.
        unet: the network; or the `EMA` of one, whose averaged weights are then written. What `train` yields as
            `state.ema`, and what the example saves, are the averaged ones.
        diffusion: its loss is not written, for which diffusers has no place.
        image_size: (height, width) of the images that the pipeline makes, or one number for both; None: that of the
            U-Net's configuration, and if it has none, 28, rounded up to what the network halves evenly.

    Raises ValueError for what diffusers has not: an input scale, interleaved encodings, as many heads at levels of
    different widths; OSError if a file cannot be written.
    """
    unet = unet.model if isinstance(unet, EMA) else unet
    folder = pathlib.Path(folder)
    files = {
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": VERSION,
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
        "unet/config.json": unet_config(unet, image_size),
        "scheduler/scheduler_config.json": scheduler_config(diffusion),
    }
    weights = {}
    for name, p in unet.named_parameters().items():
        name, axes = diffusers_layout(name, p.ndim)
        weights[name] = to_numpy(p.data).transpose(axes)
    for name in ("unet", "scheduler"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"unet/{WEIGHTS}.safetensors", *(folder / name for name in files)) as (first, *others):
        write_tensors(first, weights, {"format": "pt"})  # diffusers wants to know that the axes are PyTorch's
        for part, content in zip(others, files.values()):
            part.write_text(json.dumps(content, indent=2) + "\n")


def load_original(path: Path, variance: str = "large") -> tuple[UNet, Diffusion]:
    """Return the U-Net and the diffusion of a checkpoint with the names of Ho et al.'s code, as safetensors.

    They are `temb.dense.0`, `down.0.block.0.conv1`, `nin_shortcut` and so on, as in the PyTorch versions of that code
    by which its weights circulate, pesser/pytorch_diffusion and ermongroup/ddim. The configuration follows from the
    shapes and, where these do not tell, from the paper: one head, 32 groups, T = 1000, linear.

    Args:
        path: the file. variance: "large" for CIFAR-10, "small" for the models of 256 x 256 pixels (Ho et al.'s code).

    Raises FileNotFoundError, or ValueError if it is not such a file.
    """
    stored, _ = stored_tensors(path)
    if all(name.startswith("module.") for name in stored):  # of PyTorch's DataParallel
        stored = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
    channels = []
    while (name := f"down.{len(channels)}.block.0.conv1.weight") in stored:
        channels.append(max(stored[name].shape[:1], default=0))
    if not channels or not {"conv_in.weight", "conv_out.weight"} <= set(stored):
        raise ValueError(
            f"path: {path} has not the names of Ho et al.'s code: expected conv_in.weight, conv_out.weight, "
            f"down.0.block.0.conv1.weight and so on, got {', '.join(sorted(stored)[:10]) or 'no tensors'}"
        )
    try:
        config = {
            "in_channels": stored["conv_in.weight"].shape[1],
            "out_channels": stored["conv_out.weight"].shape[0],
            "channels": channels,
            "blocks": sum(f"down.0.block.{i}.conv1.weight" in stored for i in range(len(stored))),
            "attention": [f"down.{i}.attn.0.norm.weight" in stored for i in range(len(channels))],
            "middle_attention": "mid.attn_1.norm.weight" in stored,
            "groups": 32,
        }
        unet = unet_from(stored, config, lambda name, ndim: original_layout(name, ndim, len(channels)))
    except (ValueError, IndexError) as error:
        raise ValueError(f"path: {path} is no checkpoint of Ho et al.'s network: {error}") from error
    return unet, Diffusion(make_schedule("linear", 1000), variance=variance)


# ------------------------------------------------------------------------------------------------- names and axes


def _rules(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines()]


AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # of ours, in the order in which PyTorch has them
DIFFUSERS = _rules(r"""
    ^time(\d)                      time_embedding.linear_\1
    ^norm_out                      conv_norm_out
    ^(up|down)(.*)resize           \1\2\1samplers.0.conv
    ^(up|down)\.                   \1_blocks.
    ^middle1                       mid_block.resnets.0
    ^middle2                       mid_block.resnets.1
    ^middle_attention              mid_block.attentions.0
    \.res\.                        .resnets.
    \.attention\.(\d)              .attentions.\1
    (attentions\.\d+)\.norm        \1.group_norm
    \.attention\.([qkv])           .to_\1
    \.attention\.out               .to_out.0
    \.time\.                       .time_emb_proj.
    \.shortcut                     .conv_shortcut
    (\bw|gamma)$                   weight
    (\bb|beta)$                    bias
""")
ORIGINAL = _rules(r"""
    ^time1                         temb.dense.0
    ^time2                         temb.dense.1
    ^middle(\d)                    mid.block_\1
    ^middle_attention              mid.attn_1
    ^(up|down)(.*)resize           \1\2\1sample.conv
    \.res\.                        .block.
    \.attention\.(\d)              .attn.\1
    \.attention\.out               .proj_out
    \.attention\.([qkv])           .\1
    \.time\.                       .temb_proj.
    \.shortcut                     .nin_shortcut
    (\bw|gamma)$                   weight
    (\bb|beta)$                    bias
""")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15


def _renamed(name: str, rules: list[list[str]]) -> str:
    for ours, theirs in rules:
        name = re.sub(ours, theirs, name)
    return name


def diffusers_layout(name: str, ndim: int) -> tuple[str, tuple[int, ...]]:
    """What diffusers calls our parameter `name`, and which of its axes are there in which place."""
    return _renamed(name, DIFFUSERS), (0, 1) if name == "class_embedding.w" else AXES[ndim]


def original_layout(name: str, ndim: int, levels: int) -> tuple[str, tuple[int, ...]]:
    """The same for Ho et al.'s code, which numbers the levels of the way up as on the way down."""
    name = re.sub(r"^up\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    return _renamed(name, ORIGINAL), AXES[ndim]


def _with_new_names(stored: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors, with the attention's as diffusers names them now; where both are there, they stay to be refused."""
    renamed = {}
    for name, tensor in stored.items():
        new = re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.\w+$)", lambda m: OLD_ATTENTION[m[0]], name)
        renamed[name if new in stored else new] = tensor
    return renamed


def _read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file. Raises FileNotFoundError, or ValueError if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"folder: there is no file {path}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
