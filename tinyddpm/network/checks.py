"""What a U-Net takes, and says of anything else: the arguments that it is made of, and what it is called with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arguments import integer, is_integer, number, one_of
from ..backend import Array, is_array

ENCODINGS = ("ddpm", "ddpm_flipped", "improved", "improved_flipped", "interleaved")
NO_LABEL = -1  # what a dropped label becomes


def checked_config(config: dict) -> dict:
    """The arguments of `UNet`, all but rng, as plain numbers and tuples, or ValueError."""
    config = dict(config)
    channels, attention, groups, heads = (config[name] for name in ("channels", "attention", "groups", "heads"))
    for name in ("in_channels", "out_channels", "blocks", "heads", "groups", "head_channels", "classes", "patch"):
        value = config[name]
        if value is None and name in ("head_channels", "classes"):
            continue
        config[name] = integer(name, value)
    for name, value in (("channels", channels), ("attention", attention)):
        if np.ndim(value) != 1 or len(value) == 0:
            raise ValueError(f"{name}: expected a sequence with an entry for each level, got {value!r}")
    if not all(is_integer(c) and c > 0 and c % groups == 0 for c in channels):
        raise ValueError(f"channels: expected multiples of groups = {groups}, got {channels}")
    if channels[0] % 2 or channels[0] < 4:
        raise ValueError(
            f"channels: the first must be even and at least 4 for the timestep encoding, got {channels[0]}"
        )
    if len(attention) != len(channels):
        raise ValueError(f"attention: expected {len(channels)} entries, one for each level, got {attention}")
    if heads != 1 and config["head_channels"]:
        raise ValueError(f"heads, head_channels: expected one of them, got {heads} and {config['head_channels']}")
    for name in ("heads", "head_channels"):
        for c, attends in zip((*channels, channels[-1]), (*attention, config["middle_attention"])):
            if attends and c % (config[name] or 1):
                raise ValueError(f"{name}: {config[name]} does not divide the {c} channels of a level with attention")
    for name in ("dropout", "label_dropout"):
        config[name] = number(name, config[name], "[0, 1)")
    if config["label_dropout"] and not config["classes"]:
        raise ValueError(f"label_dropout: {config['label_dropout']} of what labels? Give classes too")
    one_of("encoding", config["encoding"], ENCODINGS)
    config["norm_eps"] = number("norm_eps", config["norm_eps"], "(0, inf)")
    config["downsample_padding"] = integer("downsample_padding", config["downsample_padding"], 0, 1)
    for name in ("middle_attention", "center_input"):
        if not isinstance(config[name], (bool, np.bool_)):
            raise ValueError(f"{name}: expected True or False, got {config[name]!r}")
        config[name] = bool(config[name])
    return config | {
        "channels": tuple(map(int, channels)),
        "attention": tuple(map(bool, attention)),
        "image_size": checked_size(config["image_size"], len(channels), config["patch"]),
    }


def _divisor(levels: int, patch: int) -> int:
    """What height and width of the images must be multiples of."""
    return patch * 2 ** (levels - 1)


def _after(patch: int) -> str:
    return f" after cutting them into squares of {patch} x {patch}" if patch > 1 else ""


def checked_size(size: int | Sequence[int] | None, levels: int, patch: int = 1) -> tuple[int, int] | None:
    """(height, width) of images that so many levels can halve, from one number or both, or ValueError."""
    if size is None:
        return None
    size, factor = (size, size) if is_integer(size) else size, _divisor(levels, patch)
    if np.shape(size) != (2,) or not all(is_integer(n) and n > 0 and n % factor == 0 for n in size):
        raise ValueError(
            f"image_size: expected a height and a width that are multiples of {factor}, since this network halves "
            f"them {levels - 1} times{_after(patch)}, got {size!r}"
        )
    return tuple(map(int, size))


def check_input(config: dict, dtype: np.dtype, x: Array, t: np.ndarray, labels: np.ndarray | None) -> None:
    """Raise TypeError or ValueError unless a `UNet` of this configuration and dtype takes x, t and labels."""
    C, levels, patch = config["in_channels"], len(config["channels"]), config["patch"]
    factor = _divisor(levels, patch)
    if not is_array(x):
        raise TypeError(f"x: expected an array or a Tensor, got {type(x).__name__}")
    if x.ndim != 4 or x.shape[3] != C or x.shape[0] == 0:
        raise ValueError(f"x: expected one or more images (N, H, W, {C}), got shape {x.shape}")
    if x.shape[1] % factor or x.shape[2] % factor or 0 in x.shape:
        raise ValueError(
            f"x: height and width must be multiples of {factor}, since this network halves them "
            f"{levels - 1} times{_after(patch)}; got {x.shape[1]} x {x.shape[2]}"
        )
    if x.dtype != dtype:
        raise TypeError(f"x: expected {dtype}, the dtype of the parameters, got {x.dtype}")
    if not isinstance(t, np.ndarray) or t.dtype.kind not in "iu":
        raise TypeError(f"t: expected a NumPy array of integers, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.shape != x.shape[:1] or t.min() < 0:
        raise ValueError(f"t: expected {x.shape[0]} timesteps >= 0, one for each image, got shape {t.shape}, {t}")
    check_labels(config, labels, len(t))


def check_labels(config: dict, labels: np.ndarray | None, count: int) -> None:
    """Raise TypeError or ValueError unless a `UNet` of this configuration takes these labels of `count` images."""
    classes = config["classes"]
    if classes is None:
        if labels is not None:
            raise ValueError("labels: this network knows no classes; make one with UNet(classes=...)")
        return
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu":
        got = getattr(labels, "dtype", type(labels).__name__)
        raise TypeError(
            f"labels: expected a NumPy array of integers, one of {classes} classes for each image, got {got}; a "
            "network made with label_dropout can do without"
        )
    least = NO_LABEL if config["label_dropout"] else 0
    if labels.shape != (count,) or labels.min() < least or labels.max() >= classes:
        raise ValueError(
            f"labels: expected {count} integers in {least} ... {classes - 1}, one for each image, got shape "
            f"{labels.shape}, {labels.min()} ... {labels.max()}"
        )
