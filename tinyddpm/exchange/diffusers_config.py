"""diffusers' configurations, and what they mean here: UNet2DModel's is that of a `UNet`, a scheduler's of `Diffusion`.

A field that is not given has diffusers' default. One that has a value that is not supported is refused, and an unknown
one too, unless it is off. The tables give the defaults; of the fields for which only some values are supported, all of
these, the default first; and the fields that change nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import re

import numpy as np

from ..arguments import warn
from ..diffusion.clipping import DYNAMIC
from ..diffusion.process import Diffusion
from ..diffusion.schedule import Schedule, make_schedule, rescale_to_zero_terminal_snr
from ..files.quiet import without_warnings
from ..network.checks import checked_config, checked_size
from ..network.unet import UNet

VERSION = "0.35.0"  # of diffusers, whose format this is

# --------------------------------------------------------------------------------------------------------- the network

ARGUMENTS = {  # the fields that are arguments of UNet by another name, and their values where they are not given
    "in_channels": ("in_channels", 3),
    "out_channels": ("out_channels", 3),
    "block_out_channels": ("channels", [224, 448, 672, 896]),
    "layers_per_block": ("blocks", 2),
    "attention_head_dim": ("head_channels", 8),
    "add_attention": ("middle_attention", True),
    "norm_num_groups": ("groups", 32),
    "norm_eps": ("norm_eps", 1e-5),
    "dropout": ("dropout", 0.0),
    "downsample_padding": ("downsample_padding", 1),
    "center_input_sample": ("center_input", False),
    "num_class_embeds": ("classes", None),
    "sample_size": ("image_size", None),
}
UNET_DEFAULTS = {theirs: default for theirs, (_, default) in ARGUMENTS.items()} | {
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "time_embedding_dim": None,
    "attn_norm_num_groups": None,
}
UNET_CHOICES = {  # what is supported, the default first
    "flip_sin_to_cos": [True, False],
    "freq_shift": [0, 1],
    "act_fn": ["silu", "swish"],
    "mid_block_type": ["UNetMidBlock2D"],
    "mid_block_scale_factor": [1],
    "downsample_type": ["conv"],
    "upsample_type": ["conv"],
    "time_embedding_type": ["positional"],
    "resnet_time_scale_shift": ["default"],
    "class_embed_type": [None],
}
UNET_IGNORED = [  # acts only on embeddings that are learned; what EMAModel adds
    "num_train_timesteps",
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
]  # fmt: skip
DOWN = {False: "DownBlock2D", True: "AttnDownBlock2D"}  # by whether the level has attention
UP = {False: "UpBlock2D", True: "AttnUpBlock2D"}
ENCODING_OF = {  # by flip_sin_to_cos and freq_shift
    (False, 1): "ddpm",
    (True, 1): "ddpm_flipped",
    (True, 0): "improved",
    (False, 0): "improved_flipped",
}


def unet_settings(config: dict, path: pathlib.Path) -> dict:
    """The configuration of our `UNet` for one of UNet2DModel, read from `path`. Raises ValueError for a field that is
    unknown or has a value that is not supported."""
    c = _complete(config, ["UNet2DModel"], UNET_DEFAULTS, UNET_CHOICES, UNET_IGNORED, path)
    down, up, channels = c["down_block_types"], c["up_block_types"], c["block_out_channels"]
    if not isinstance(down, list) or not all(kind in list(DOWN.values()) for kind in down):
        raise _unsupported(path, "down_block_types", down, "a list of DownBlock2D and AttnDownBlock2D")
    if isinstance(channels, list) and channels and len(down) != len(channels):
        raise _unsupported(path, "down_block_types", down, f"{len(channels)} of them, as many as block_out_channels")
    attention = [kind == DOWN[True] for kind in down]
    mirrored = [UP[attends] for attends in reversed(attention)]
    if up != mirrored:
        raise _unsupported(path, "up_block_types", up, f"the mirror image of the way down, {json.dumps(mirrored)}")
    settings = {ours: c[theirs] for theirs, (ours, _) in ARGUMENTS.items()} | {
        "attention": attention,
        "heads": 1,
        "label_dropout": 0.0,  # that the last of their embeddings is of no label, nothing says
        "patch": 1,
        "encoding": ENCODING_OF[c["flip_sin_to_cos"], c["freq_shift"]],
    }
    try:
        settings = checked_config(settings)
    except ValueError as error:
        theirs = {ours: theirs for theirs, (ours, _) in ARGUMENTS.items()}
        raise ValueError(f"{path}: {_in_their_words(error, theirs)}") from error
    same = {"time_embedding_dim": 4 * settings["channels"][0], "attn_norm_num_groups": settings["groups"]}
    for name, value in same.items():
        if c[name] not in (None, value):
            raise _unsupported(path, name, c[name], f"null or {value}")
    return settings


def unet_config(unet: UNet, image_size: int | tuple[int, int] | None = None) -> dict:
    """The configuration of UNet2DModel for our `unet`; see `save_diffusers`."""
    c = unet.config
    if c["patch"] > 1:
        raise ValueError(f"patch: diffusers' U-Nets have none, which is 1; this one has {c['patch']}")
    factor = 2 ** (len(c["channels"]) - 1)
    size = c["image_size"] if image_size is None else checked_size(image_size, len(c["channels"]))
    height, width = size or [math.ceil(28 / factor) * factor] * 2
    if c["encoding"] not in ENCODING_OF.values():
        raise ValueError(f"encoding: diffusers has no {c['encoding']!r}; it has {', '.join(ENCODING_OF.values())}")
    flip, shift = _inverse(ENCODING_OF)[c["encoding"]]

    # they give every head as many channels, null for one head alone
    attention = (*c["attention"], c["middle_attention"])
    widths = {width for width, attends in zip((*c["channels"], c["channels"][-1]), attention) if attends}
    head_channels = c["head_channels"]
    if c["heads"] > 1 and len(widths) > 1:
        raise ValueError(
            f"heads: diffusers has as many channels in every head, not {c['heads']} heads at levels of "
            f"{' and '.join(map(str, sorted(widths)))} channels; UNet(head_channels=...) is what it has"
        )
    if c["heads"] > 1 and widths:
        head_channels = widths.pop() // c["heads"]

    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        **{theirs: c[ours] for theirs, (ours, _) in ARGUMENTS.items()},
        **{name: values[0] for name, values in UNET_CHOICES.items()},
        "attention_head_dim": head_channels,
        "num_class_embeds": c["classes"] and c["classes"] + (c["label_dropout"] > 0),  # the last: no label
        "down_block_types": [DOWN[attends] for attends in c["attention"]],
        "up_block_types": [UP[attends] for attends in reversed(c["attention"])],
        "flip_sin_to_cos": flip,
        "freq_shift": shift,
        "sample_size": height if height == width else [height, width],
    }


# ------------------------------------------------------------------------------------------------------- the diffusion

NO_LIMIT = 1e30  # what no number in an image reaches, since JSON has no infinity
SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid_beta"}
OBJECTIVES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "learned_range": "learned_range",
    None: "small",  # as DPMSolverMultistepScheduler leaves it
}
SCHEDULER_NUMBERS = {  # the default, and the least and most that is supported
    "num_train_timesteps": (1000, 1, 10**6),
    "beta_start": (0.0001, 0, 1),
    "beta_end": (0.02, 0, 1),
    "clip_sample_range": (1.0, 1e-6, NO_LIMIT),
    "dynamic_thresholding_ratio": (0.995, 0, 1),
    "sample_max_value": (1.0, 1, NO_LIMIT),
}
SCHEDULER_DEFAULTS = {name: default for name, (default, _, _) in SCHEDULER_NUMBERS.items()} | {"trained_betas": None}
SCHEDULER_CHOICES = {  # what is supported, the default first
    "beta_schedule": list(SCHEDULES),
    "rescale_betas_zero_snr": [False, True],
    "prediction_type": list(OBJECTIVES),
    "variance_type": list(VARIANCES),
    "clip_sample": [True, False],
    "thresholding": [False, True],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "steps_offset": [0],
}
SCHEDULER_IGNORED = [
    "set_alpha_to_one",  # of DDIMScheduler, see diffusion_from
    "predict_epsilon",  # until diffusers 0.9, see diffusion_from
    "tensor_format",  # of its first versions
    "timestep_values",
    # of other schedulers, whose fields `from_config` leaves in the configuration
    *"""algorithm_type disable_corrector euler_at_final final_sigmas_type flow_shift interpolation_type
    lambda_min_clipped lower_order_final predict_x0 shift_terminal sigma_max sigma_min skip_prk_steps solver_order
    solver_p solver_type time_shift_type timestep_type use_beta_sigmas use_dynamic_shifting use_exponential_sigmas
    use_flow_sigmas use_karras_sigmas use_lu_lambdas""".split(),
]
SCHEDULER_CLASSES = ["DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler"]


def diffusion_from(config: dict, path: pathlib.Path) -> Diffusion:
    """The `Diffusion` for a configuration of DDPMScheduler or DDIMScheduler, read from `path`. Raises ValueError for a
    field that is unknown or has a value that is not supported."""
    if "predict_epsilon" in config and "prediction_type" not in config:  # before diffusers 0.9
        config = config | {"prediction_type": "epsilon" if config["predict_epsilon"] else "sample"}
    choices = dict(SCHEDULER_CHOICES)
    if config.get("_class_name") in ("DDIMScheduler", "DDIMParallelScheduler"):
        choices["set_alpha_to_one"] = [True]
    if config.get("timestep_spacing") in ("trailing", "linspace"):  # which it does not shift
        choices["steps_offset"] = [config.get("steps_offset", 0)]
    c = _complete(config, SCHEDULER_CLASSES, SCHEDULER_DEFAULTS, choices, SCHEDULER_IGNORED, path)
    for name, (_, least, most) in SCHEDULER_NUMBERS.items():
        number = isinstance(c[name], (int, float)) and not isinstance(c[name], bool)
        if not (number and least <= c[name] <= most):
            raise _unsupported(path, name, c[name], f"a number from {least:g} to {most:g}")
    variance, clip = VARIANCES[c["variance_type"]], c["clip_sample_range"] if c["clip_sample"] else False
    if c["thresholding"]:  # which diffusers asks for first
        most = c["sample_max_value"]
        clip = ("dynamic", c["dynamic_thresholding_ratio"], most if most < NO_LIMIT else math.inf)
    try:
        return Diffusion(
            _schedule(c),
            OBJECTIVES[c["prediction_type"]],
            variance,
            loss_type="hybrid" if variance == "learned_range" else "simple",
            clip={1.0: True, DYNAMIC: "dynamic"}.get(clip, clip),
            spacing=c["timestep_spacing"],
        )
    except (ValueError, TypeError) as error:
        theirs = {"T": "num_train_timesteps", "beta": "trained_betas", "objective": "prediction_type"}
        raise ValueError(f"{path}: {_in_their_words(error, theirs)}") from error


def _schedule(c: dict) -> Schedule:
    T, zero_snr = c["num_train_timesteps"], c["rescale_betas_zero_snr"]
    if c["trained_betas"] is not None:
        schedule = Schedule(np.array(c["trained_betas"], dtype=np.float64))
        if len(schedule) != T:
            raise ValueError(f"trained_betas: expected num_train_timesteps = {T} numbers, got {len(schedule)}")
        return Schedule(rescale_to_zero_terminal_snr(schedule.beta)) if zero_snr else schedule
    name = SCHEDULES[c["beta_schedule"]]
    ends = {} if name == "cosine" else {"beta_start": c["beta_start"], "beta_end": c["beta_end"]}
    with without_warnings():  # whether it ends in pure noise: it is too late to choose another
        return make_schedule(name, T, zero_terminal_snr=zero_snr, **ends)


def scheduler_config(diffusion: Diffusion) -> dict:
    """The configuration of DDPMScheduler for our `diffusion`; what its schedules do not do goes as `trained_betas`."""
    s, clip = diffusion.schedule, diffusion.clip
    if s.input_scale != 1:
        raise ValueError(f"input_scale: diffusers has none, which is 1; this schedule has {s.input_scale}")
    config = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        **SCHEDULER_DEFAULTS,
        **{name: values[0] for name, values in SCHEDULER_CHOICES.items()},
        "num_train_timesteps": len(s),
        "prediction_type": _inverse(OBJECTIVES)[diffusion.objective],
        "variance_type": _inverse(VARIANCES)[diffusion.variance],
        "timestep_spacing": diffusion.spacing,
        "clip_sample": clip is not False,
    }
    if clip == "dynamic":
        clip = DYNAMIC
    if isinstance(clip, tuple):
        _, ratio, most = clip
        config |= {
            "thresholding": True,
            "dynamic_thresholding_ratio": ratio,
            "sample_max_value": min(most, NO_LIMIT),
        }
    elif clip is not False:
        config["clip_sample_range"] = float(clip)  # True: 1
    for name, (_, least, most) in SCHEDULER_NUMBERS.items():
        if not least <= config[name] <= most:
            raise ValueError(f"diffusion: {name} would be {config[name]:g}, expected {least:g} to {most:g}")
    parameters, name = dict(s.parameters), _inverse(SCHEDULES).get(s.name)
    if name and parameters.keys() <= {"beta_start", "beta_end", "zero_terminal_snr"}:
        named = {
            "beta_schedule": name,
            "rescale_betas_zero_snr": parameters.pop("zero_terminal_snr", False),
            **parameters,
        }
        with contextlib.suppress(ValueError):  # its name may have been given by hand
            if np.array_equal(_schedule(config | named).beta, s.beta):
                return config | named
    return config | {"trained_betas": s.beta.tolist()}


# --------------------------------------------------------------------------------------------------------------- both


def _inverse(table: dict) -> dict:
    """{ours: theirs} of {theirs: ours}, where of several that mean the same the first is taken."""
    return {ours: theirs for theirs, ours in reversed(table.items())}


def _complete(
    config: dict, classes: list[str], defaults: dict, choices: dict, ignored: list[str], path: pathlib.Path
) -> dict:
    """`config` with a value for each field, or ValueError for an unknown class, field or choice; a warning for unknown
    fields that are off."""
    kind = config.get("_class_name", classes[0])
    if kind not in classes:
        raise _unsupported(path, "_class_name", kind, " or ".join(classes))
    off = []
    for name, value in config.items():
        if name in choices:
            if not any(v == value and isinstance(v, bool) == isinstance(value, bool) for v in choices[name]):
                raise _unsupported(path, name, value, " or ".join(map(json.dumps, choices[name])))
        elif not (name in defaults or name in ignored or name[:1] == "_"):
            if value:
                raise _unsupported(path, name, value, f"the fields {', '.join([*defaults, *choices])}")
            off.append(f"{name} = {json.dumps(value)}")
    if off:
        warn(f"{path}: unknown fields that are off are passed over: {', '.join(off)}")
    return defaults | {name: values[0] for name, values in choices.items()} | config


def _unsupported(path: pathlib.Path, field: str, value: object, supported: str) -> ValueError:
    try:
        shown = json.dumps(value)
    except RecursionError:
        shown = "(nested too deep to be shown)"
    shown = shown if len(shown) < 200 else shown[:200] + "..."
    return ValueError(f"{path}: {field} = {shown} is not supported; supported: {supported}")


def _in_their_words(error: Exception, theirs: dict[str, str]) -> str:
    """The message of an error, with their names for our arguments, which it has as "name:" or "name = "."""
    return re.sub(r"^\w+(?=:)|\w+(?= = )", lambda word: theirs.get(word[0], word[0]), str(error))
