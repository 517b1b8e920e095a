"""Models from diffusers' folders, and for them.

What names.py says of weights, and diffusers_config.py of configurations, meets files here. What ours cannot be is
refused by name, never passed over.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator

from ..arguments import warn
from ..backend import to_numpy
from ..diffusion.process import Diffusion
from ..files.lock import alone_in
from ..files.mistaken import what_it_is, where_it_is
from ..files.model import unet_from
from ..files.replacing import replacing
from ..files.tensors import Path, Stored, check_finite, stored_tensors, write_tensors
from ..network.unet import UNet
from ..training.optim import EMA
from .diffusers_config import VERSION, diffusion_from, scheduler_config, unet_config, unet_settings
from .names import diffusers_layout, laid_out, with_new_names

WEIGHTS = "diffusion_pytorch_model"  # what diffusers calls the file
PIPELINES = ("DDPMPipeline", "DDIMPipeline")


def load_diffusers(folder: Path, variant: str | None = None) -> tuple[UNet, Diffusion]:
    """Return the U-Net and the diffusion of a local folder of diffusers, such as a copy of google/ddpm-cifar10-32.

    The folder is that of a pipeline (DDPMPipeline, DDIMPipeline: `unet/` and `scheduler/`, or both at its top) or of a
    UNet2DModel alone, for which, unless it is the `unet/` of a pipeline, a warning says that it is taken to be trained
    with diffusers' defaults. Weights may lie in one file, or in shards with an index, which goes first as it does
    there; `variant` names others, such as "fp16". float16 and bfloat16 ones are widened to float32. The loss, which
    diffusers does not store, is "simple", or "hybrid" where the variance is learned. How predicted images are clipped,
    and how fewer steps are spaced, become `diffusion.clip` and `diffusion.spacing`, which `sample` follows. An unknown
    field that is off (null, false, 0 or empty) is taken to change nothing, and a warning names it.

    All T steps of `sample` are those of DDPMPipeline. Two things are otherwise than there in fewer steps: "ddpm" takes
    the small variance where the scheduler has fixed_large (see `diffusion.sample.respace`), and "ddim" derives the
    noise anew once the image is clipped, as theirs does with use_clipped_model_output=True.

    Raises FileNotFoundError for what is not there; ValueError for anything that is not supported, with the field, its
    value and what is, and for weights that do not fit, with every tensor that is missing, unknown or of another shape,
    or are not finite.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        fault = "is a file; load_original and load_model read files" if folder.is_file() else "is not there"
        raise FileNotFoundError(f"folder: expected a local folder, since nothing is downloaded; {folder} {fault}")
    if not any((folder / name).is_file() for name in ("model_index.json", "config.json", "unet/config.json")):
        raise FileNotFoundError(f"{_lacking(folder / 'config.json')}. {where_it_is(folder)}")
    _check_parts(folder / "model_index.json")
    home = folder / "unet" if (folder / "unet").is_dir() else folder
    config = unet_settings(_read_json(home / "config.json"), home / "config.json")
    diffusion = diffusion_from(*_scheduler_of(folder, config["out_channels"] == 2 * config["in_channels"]))
    _check_variance(config, diffusion, f"{home / 'config.json'}: ")
    with _weights(home, variant) as (path, stored):
        try:
            return unet_from(with_new_names(stored), config, diffusers_layout), diffusion
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def save_diffusers(
    folder: Path, unet: UNet | EMA, diffusion: Diffusion, image_size: int | tuple[int, int] | None = None
) -> None:
    """Write `unet` and `diffusion` as a folder that diffusers' DDPMPipeline.from_pretrained loads, weights to the bit.

    Args:
        folder: made if need be; the files of a model that was saved so before are replaced when all new ones are
            complete.
        unet: the network; or the `EMA` of one, such as `state.ema` in training, whose averaged weights are then
            written. What examples/mnist_ddpm.py saves are the averaged ones.
        diffusion: what diffusers has no place for is not written, its loss, or written as `trained_betas`, schedules
            that it does not know by name. Their pipeline takes 1000 steps unless it is told otherwise, so with another
            T call it with num_inference_steps=T.
        image_size: (height, width) of the images that the pipeline makes, or one number for both; None: that of the
            U-Net's configuration, and if it has none, 28, rounded up to what the network halves evenly.

    float64 weights are written as such; diffusers makes them float32 unless it is given torch_dtype. A network with
    classes loads as a UNet2DModel, but their pipeline cannot hand it labels; if it has `label_dropout`, the last class
    there is no label. What samplers do otherwise in diffusers, `load_diffusers` tells.

    Raises TypeError for what is no model; ValueError for what diffusers has not: an input scale, interleaved encodings,
    as many heads at levels of different widths, and for weights that are not finite; FileExistsError if there are other
    files of weights, which diffusers might load instead; OSError if a file cannot be written.
    """
    unet, folder = unet.model if isinstance(unet, EMA) else unet, pathlib.Path(folder)
    for name, value, kind in (("unet", unet, UNet), ("diffusion", diffusion, Diffusion)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
    _check_variance(unet.config, diffusion)
    if folder.is_file():
        raise NotADirectoryError(f"folder: expected a folder, or a name for a new one, but {folder} is a file")
    own = (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.safetensors.part")  # the second may be left of a run that was killed
    others = [path for path in (folder / "unet").glob(f"{WEIGHTS}*") if path.name not in own]
    others += [*folder.glob(f"{WEIGHTS}*"), *folder.glob("config.json")]  # of a model at the top of the folder
    if others:
        raise FileExistsError(
            f"folder: {', '.join(map(str, others))} would stay beside the new weights; remove it or save elsewhere"
        )
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
    weights = {name: to_numpy(p.data) for name, p in unet.named_parameters().items()}
    check_finite(weights)  # before there are folders
    for name in ("unet", "scheduler"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    files_there = (folder / f"unet/{WEIGHTS}.safetensors", *(folder / name for name in files))
    with alone_in(folder, wait=60), replacing(*files_there) as (first, *others):  # so that all four are of one model
        # diffusers wants to know that the axes are PyTorch's
        write_tensors(first, laid_out(weights, diffusers_layout), {"format": "pt"})
        for part, content in zip(others, files.values()):
            part.write_text(json.dumps(content, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------- a folder's files


def _check_parts(path: pathlib.Path) -> None:
    """Raise ValueError if the folder is a pipeline of more than a U-Net and a scheduler."""
    parts = _read_json(path) if path.is_file() else {}
    if (kind := parts.get("_class_name", PIPELINES[0])) not in PIPELINES:
        raise ValueError(
            f"{path}: _class_name = {json.dumps(kind)} is not supported; supported: {' or '.join(PIPELINES)}"
        )
    own = lambda name: name[:1] == "_" or name in ("unet", "scheduler")
    others = [name for name, part in parts.items() if not own(name) and part and part != [None, None]]
    if others:
        raise ValueError(
            f"{path}: a pipeline with {', '.join(others)} is not supported; supported: one of unet and scheduler alone"
        )


def _scheduler_of(folder: pathlib.Path, learned: bool) -> tuple[dict, pathlib.Path]:
    """The configuration of the scheduler in `folder`, and where it is; without one, Ho et al.'s, its variance `learned`
    or not."""
    paths = [folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"]
    if folder.name == "unet":  # of a pipeline
        paths.append(folder.parent / "scheduler" / "scheduler_config.json")
    path = next(filter(pathlib.Path.is_file, paths), paths[0])
    if path.is_file() or (folder / "model_index.json").is_file():
        return _read_json(path), path
    warn(
        f"folder: {folder} has no scheduler_config.json, so its network is taken to be trained with the defaults of "
        "diffusers: T = 1000, linear, to predict eps"
    )
    return {"variance_type": "learned_range"} if learned else {}, path


def _check_variance(config: dict, diffusion: Diffusion, where: str = "") -> None:
    """Raise ValueError unless the network returns what the diffusion wants: the prediction, and a learned variance."""
    inputs, outputs = config["in_channels"], config["out_channels"]
    if outputs != inputs * (2 if diffusion.variance == "learned_range" else 1):
        raise ValueError(
            f"{where}out_channels = {outputs} for in_channels = {inputs} is not supported with variance_type "
            f"{diffusion.variance!r}; supported: as many, or twice as many with 'learned_range'"
        )


@contextlib.contextmanager
def _weights(home: pathlib.Path, variant: str | None) -> Iterator[tuple[pathlib.Path, dict[str, Stored]]]:
    """Yield the file of weights in `home`, or the index of their shards, and {name: tensor}, not yet read. Raises
    FileNotFoundError for what is not there, ValueError for shards that are not as their index says."""
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"[\w-]+", variant)):
        raise ValueError(f"variant: expected a word such as 'fp16', got {variant!r}")
    dot = f".{variant}" if variant else ""
    whole, index = home / f"{WEIGHTS}{dot}.safetensors", home / f"{WEIGHTS}.safetensors.index{dot}.json"
    older = home / f"{WEIGHTS}.safetensors{dot}.index.json"  # until diffusers 0.30
    path = next(filter(pathlib.Path.is_file, (index, older, whole)), None)
    if path is None:
        for link in filter(pathlib.Path.is_symlink, (index, older, whole)):  # as the hub's cache has them
            raise FileNotFoundError(f"folder: {link} is a link to {link.readlink()}, which is not there: download it")
        raise FileNotFoundError(
            f"folder: there is no {whole}; there are {', '.join(sorted(path.name for path in home.iterdir()))}. "
            f"Supported: a safetensors file, or shards with their index, {index.name}, or with variant='fp16' those of "
            "that name. Pickles (.bin) are never read, but diffusers converts them: "
            "DDPMPipeline.from_pretrained(folder).save_pretrained(another_folder)"
        )
    if path == whole:
        with stored_tensors(path) as (stored, _):
            yield path, stored
        return
    shard_of = _read_json(path).get("weight_map")
    names = shard_of.values() if isinstance(shard_of, dict) and shard_of else [shard_of]
    for name in names:  # and no path to another folder
        if not (isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", name)):
            raise ValueError(f"{path}: weight_map: expected a safetensors file beside it for each tensor, got {name!r}")
    with contextlib.ExitStack() as files:
        shards = {name: files.enter_context(stored_tensors(home / name))[0] for name in sorted(set(names))}
        there, named = {(tensor, name) for name, stored in shards.items() for tensor in stored}, set(shard_of.items())
        if wrong := [f"{t} is {'in' if (t, f) in there else 'not in'} {f}" for t, f in sorted(there ^ named)]:
            raise ValueError(f"{path}: the tensors are not where it says: {'; '.join(wrong)}")
        yield path, {tensor: shards[name][tensor] for tensor, name in named}


def _lacking(path: pathlib.Path) -> str:
    return f"folder: there is no file {path}, which diffusers saves in a folder with a model"


def _read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file. Raises FileNotFoundError, or ValueError if there is none."""
    if not path.is_file():
        raise FileNotFoundError(_lacking(path))
    text = path.read_bytes()
    whole = lambda digits: int(digits) if len(digits) < 18 else float(digits)  # int(1e400) would overflow as a float
    try:
        content = json.loads(text, parse_int=whole)
    except (ValueError, RecursionError) as error:
        known = "" if text.lstrip()[:1] == b"{" else what_it_is(text[:1000])
        raise ValueError(f"{path} is not a JSON file: {error}{known and '; ' + known}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
