"""diffusers' configurations, and what they mean here: UNet2DModel's is that of a `UNet`, a scheduler's of `Diffusion`.

Each field has a value for when it is not given (diffusers' own) and says what is supported; all else is refused.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .diffusion import Diffusion
from .schedule import Schedule, make_schedule, rescale_to_zero_terminal_snr
from .unet import UNet, checked_config, checked_size

VERSION = "0.35.0"  # of diffusers, whose format this is


class Field(NamedTuple):
    """A field of a configuration: its value where it is not given, what is supported, and whether a value is that."""

    default: object
    supported: str
    fits: Callable[[object], bool]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 10**6


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _one_of(default: object, *others: object) -> Field:
    known = (default, *others)
    same = lambda a, b: a == b and isinstance(a, bool) == isinstance(b, bool)
    return Field(default, " or ".join(map(json.dumps, known)), lambda value: any(same(value, v) for v in known))


def _or_null(default: object, supported: str, fits: Callable[[object], bool]) -> Field:
    return Field(default, f"null or {supported}", lambda value: value is None or fits(value))


def _list(default: list | None, supported: str, fits: Callable[[object], bool]) -> Field:
    return Field(default, supported, lambda value: isinstance(value, list) and len(value) > 0 and all(map(fits, value)))


def _count(default: int) -> Field:
    return Field(default, "an integer from 1 to a million", _is_count)


def _number(default: float, supported: str, fits: Callable[[float], bool]) -> Field:
    return Field(default, supported, lambda value: _is_number(value) and fits(value))


def _positive(default: float) -> Field:
    return _number(default, "a number > 0", lambda value: value > 0)


# --------------------------------------------------------------------------------------------------------- the network

DOWN = {False: "DownBlock2D", True: "AttnDownBlock2D"}  # by whether the level has attention
UP = {False: "UpBlock2D", True: "AttnUpBlock2D"}
ENCODINGS = {  # by flip_sin_to_cos and freq_shift
    (False, 1): "ddpm",
    (True, 1): "ddpm_flipped",
    (True, 0): "improved",
    (False, 0): "improved_flipped",
}
SAME = {  # the fields that are arguments of UNet by another name
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "block_out_channels": "channels",
    "layers_per_block": "blocks",
    "attention_head_dim": "head_channels",
    "add_attention": "middle_attention",
    "norm_num_groups": "groups",
    "norm_eps": "norm_eps",
    "dropout": "dropout",
    "downsample_padding": "downsample_padding",
    "center_input_sample": "center_input",
    "num_class_embeds": "classes",
    "sample_size": "image_size",
}
UNET_FIELDS = {
    "in_channels": _count(3),
    "out_channels": _count(3),
    "block_out_channels": _list([224, 448, 672, 896], "a list of integers", _is_count),
    "layers_per_block": _count(2),
    "down_block_types": _list([DOWN[i > 0] for i in range(4)], "a list of " + " and ".join(DOWN.values()),
                              lambda kind: kind in list(DOWN.values())),
    "up_block_types": _list([UP[i < 3] for i in range(4)], "a list of " + " and ".join(UP.values()),
                            lambda kind: kind in list(UP.values())),
    "attention_head_dim": _or_null(8, "an integer from 1 to a million", _is_count),
    "add_attention": _one_of(True, False),
    "norm_num_groups": _count(32),
    "norm_eps": _positive(1e-5),
    "dropout": _number(0.0, "a number in [0, 1)", lambda value: 0 <= value < 1),
    "downsample_padding": _one_of(1, 0),
    "flip_sin_to_cos": _one_of(True, False),
    "freq_shift": _one_of(0, 1),
    "center_input_sample": _one_of(False, True),
    "num_class_embeds": _or_null(None, "an integer from 1 to a million", _is_count),
    "sample_size": _or_null(None, "an integer or a list of two", lambda value: all(
        map(_is_count, value if isinstance(value, list) else [value]))),
    "act_fn": _one_of("silu", "swish"),
    "mid_block_type": _one_of("UNetMidBlock2D"),
    "mid_block_scale_factor": _one_of(1),
    "downsample_type": _one_of("conv"),
    "upsample_type": _one_of("conv"),
    "time_embedding_type": _one_of("positional"),
    "time_embedding_dim": _one_of(None),
    "resnet_time_scale_shift": _one_of("default"),
    "attn_norm_num_groups": _one_of(None),
    "class_embed_type": _one_of(None),
    "num_train_timesteps": _or_null(None, "an integer", _is_count),  # acts only on embeddings that are learned
}  # fmt: skip
OF_ITS_AVERAGE = {  # what diffusers' EMAModel adds; nothing of it changes the network
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"
}  # fmt: skip


def unet_settings(config: dict, path: pathlib.Path) -> dict:
    """The arguments of `UNet` for a configuration of UNet2DModel, read from `path`. Raises ValueError for a field that
    is unknown or has a value that is not supported."""
    config = {name: value for name, value in config.items() if name not in OF_ITS_AVERAGE}
    c = _complete(config, UNET_FIELDS, ("UNet2DModel",), path)
    levels = len(c["block_out_channels"])
    attention = [kind == DOWN[True] for kind in c["down_block_types"]]
    mirrored = [UP[attends] for attends in reversed(attention)]
    if len(attention) != levels:
        raise _unsupported(path, "down_block_types", c["down_block_types"], f"{levels}, as many as block_out_channels")
    if c["up_block_types"] != mirrored:
        raise _unsupported(path, "up_block_types", c["up_block_types"], f"the mirror image of the way down, {mirrored}")
    encoding = ENCODINGS[c["flip_sin_to_cos"], c["freq_shift"]]
    settings = {ours: c[theirs] for theirs, ours in SAME.items()}
    try:
        return checked_config(settings | {"attention": attention, "encoding": encoding, "heads": 1})
    except ValueError as error:
        raise ValueError(
            f"{path}: {_in_their_words(error, {ours: theirs for theirs, ours in SAME.items()})}"
        ) from error


def unet_config(unet: UNet, image_size: int | tuple[int, int] | None = None) -> dict:
    """The configuration of UNet2DModel for our `unet`; see `tinyddpm.exchange.save_diffusers`."""
    c, levels = unet.config, len(unet.config["channels"])
    size = checked_size(c["image_size"] if image_size is None else image_size, levels)
    if size is None:
        factor = 2 ** (levels - 1)
        size = [math.ceil(28 / factor) * factor] * 2
    if c["encoding"] not in ENCODINGS.values():
        raise ValueError(f"encoding: diffusers has no {c['encoding']!r}; it has {', '.join(ENCODINGS.values())}")
    (flip, shift) = next(key for key, encoding in ENCODINGS.items() if encoding == c["encoding"])
    attention = (*c["attention"], c["middle_attention"])
    widths = {width for width, attends in zip((*c["channels"], c["channels"][-1]), attention) if attends}
    head_channels = c["head_channels"]
    if c["heads"] > 1 and widths:
        if len(widths) > 1:
            raise ValueError(
                f"heads: diffusers has as many channels in every head, not {c['heads']} heads at levels of "
                f"{' and '.join(map(str, sorted(widths)))} channels; UNet(head_channels=...) is what it has"
            )
        head_channels = widths.pop() // c["heads"]
    return {"_class_name": "UNet2DModel", "_diffusers_version": VERSION} | {
        name: field.default for name, field in UNET_FIELDS.items()
    } | {theirs: c[ours] for theirs, ours in SAME.items()} | {
        "attention_head_dim": head_channels,
        "down_block_types": [DOWN[attends] for attends in c["attention"]],
        "up_block_types": [UP[attends] for attends in reversed(c["attention"])],
        "flip_sin_to_cos": flip,
        "freq_shift": shift,
        "sample_size": size[0] if size[0] == size[1] else list(size),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the diffusion

SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid_beta"}
OBJECTIVES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "learned_range": "learned_range",
}
SCHEDULER_FIELDS = {
    "num_train_timesteps": _count(1000),
    "beta_schedule": _one_of(*SCHEDULES),
    "beta_start": _positive(0.0001),
    "beta_end": _positive(0.02),
    "trained_betas": _or_null(None, "a list of numbers", _list(None, "", _is_number).fits),
    "rescale_betas_zero_snr": _one_of(False, True),
    "prediction_type": _one_of(*OBJECTIVES),
    "variance_type": _one_of(*VARIANCES),
    "clip_sample": _one_of(True, False),
    "clip_sample_range": _positive(1.0),
    "thresholding": _one_of(False, True),
    "dynamic_thresholding_ratio": _number(0.995, "a number in [0, 1]", lambda value: 0 <= value <= 1),
    "sample_max_value": _number(1.0, "a number >= 1", lambda value: value >= 1),
    "timestep_spacing": _one_of("leading", "trailing", "linspace"),
    "steps_offset": _one_of(0),
    "set_alpha_to_one": _one_of(True),  # of DDIMScheduler
}
NO_LIMIT = 1e30  # as sample_max_value, since JSON has no infinity


def diffusion_from(config: dict, path: pathlib.Path) -> Diffusion:
    """The `Diffusion` for a configuration of DDPMScheduler or DDIMScheduler, read from `path`. Raises ValueError for a
    field that is unknown or has a value that is not supported."""
    c = _complete(config, SCHEDULER_FIELDS, ("DDPMScheduler", "DDIMScheduler"), path)
    variance, clip = VARIANCES[c["variance_type"]], c["clip_sample_range"] if c["clip_sample"] else False
    if c["thresholding"]:
        most = c["sample_max_value"]
        clip = ("dynamic", c["dynamic_thresholding_ratio"], most if most < NO_LIMIT else math.inf)
    try:
        return Diffusion(
            _schedule(c),
            OBJECTIVES[c["prediction_type"]],
            variance,
            loss_type="hybrid" if variance == "learned_range" else "simple",
            clip={1.0: True, ("dynamic", 0.995, math.inf): "dynamic"}.get(clip, clip),
            spacing=c["timestep_spacing"],
        )
    except ValueError as error:
        theirs = {"beta": "trained_betas", "objective": "prediction_type"}
        raise ValueError(f"{path}: {_in_their_words(error, theirs)}") from error


def _schedule(c: dict) -> Schedule:
    T, zero_snr = c["num_train_timesteps"], c["rescale_betas_zero_snr"]
    if c["trained_betas"] is not None:
        beta = np.array(c["trained_betas"], dtype=np.float64)
        if len(beta) != T:
            raise ValueError(f"trained_betas: expected num_train_timesteps = {T} numbers, got {len(beta)}")
        schedule = Schedule(beta)
        return Schedule(rescale_to_zero_terminal_snr(beta)) if zero_snr else schedule
    name = SCHEDULES[c["beta_schedule"]]
    ends = {} if name == "cosine" else {"beta_start": c["beta_start"], "beta_end": c["beta_end"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether it ends in pure noise: it is too late to choose another
        return make_schedule(name, T, zero_terminal_snr=zero_snr, **ends)


def scheduler_config(diffusion: Diffusion) -> dict:
    """The configuration of DDPMScheduler for our `diffusion`; what its schedules do not do goes as `trained_betas`."""
    s, clip = diffusion.schedule, diffusion.clip
    if s.input_scale != 1:
        raise ValueError(f"input_scale: diffusers has none, which is 1; this schedule has {s.input_scale}")
    inverse = lambda table: {ours: theirs for theirs, ours in reversed(table.items())}
    config = {name: field.default for name, field in SCHEDULER_FIELDS.items() if name != "set_alpha_to_one"}
    config |= {
        "num_train_timesteps": len(s),
        "prediction_type": inverse(OBJECTIVES)[diffusion.objective],
        "variance_type": inverse(VARIANCES)[diffusion.variance],
        "timestep_spacing": diffusion.spacing,
        "clip_sample": clip is not False,
    }
    if isinstance(clip, (int, float)) and not isinstance(clip, bool):
        config["clip_sample_range"] = float(clip)
    elif not isinstance(clip, bool):
        _, ratio, most = ("dynamic", 0.995, math.inf) if clip == "dynamic" else clip
        config |= {
            "thresholding": True,
            "dynamic_thresholding_ratio": ratio,
            "sample_max_value": min(most, NO_LIMIT),
        }
    parameters = dict(s.parameters)
    named = {
        "beta_schedule": inverse(SCHEDULES).get(s.name, "trained"),
        "rescale_betas_zero_snr": parameters.pop("zero_terminal_snr", False),
        **parameters,
    }
    try:
        same = np.array_equal(diffusion_from(config | named, pathlib.Path()).schedule.beta, s.beta)
    except ValueError:
        same = False
    return {"_class_name": "DDPMScheduler", "_diffusers_version": VERSION} | config | (
        named if same else {"trained_betas": s.beta.tolist()}
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- both


def _complete(config: dict, fields: dict[str, Field], classes: tuple[str, ...], path: pathlib.Path) -> dict:
    """`config` with a value for each of `fields`, or ValueError."""
    kind = config.get("_class_name", classes[0])
    if kind not in classes:
        raise _unsupported(path, "_class_name", kind, " and ".join(classes))
    for name, value in config.items():
        if name not in fields and name[:1] != "_" and value is not None and value is not False:
            raise _unsupported(path, name, value, f"the fields {', '.join(fields)}")
        if name in fields and not fields[name].fits(value):
            raise _unsupported(path, name, value, fields[name].supported)
    return {name: config.get(name, field.default) for name, field in fields.items()}


def _unsupported(path: pathlib.Path, field: str, value: object, supported: str) -> ValueError:
    try:
        shown = json.dumps(value)
    except RecursionError:
        shown = "(nested too deep to be shown)"
    shown = shown if len(shown) < 200 else shown[:200] + "..."
    return ValueError(f"{path}: {field} = {shown} is not supported; supported: {supported}")


def _in_their_words(error: Exception, ours: dict[str, str]) -> str:
    """The message of an error about an argument of ours, with diffusers' name for it."""
    return re.sub(r"^\w+(?=:)", lambda name: ours.get(name[0], name[0]), str(error))
