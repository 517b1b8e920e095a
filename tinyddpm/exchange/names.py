"""How others name the parameters of the U-Net, and in which order they have the axes.

PyTorch's filters are (O, C, kh, kw), where ours are (kh, kw, C, O), and its dense layers (O, C) instead of (C, O). A
layout takes our name of a parameter and how many axes it has, and returns (their name, axes), such that

    theirs = ours.transpose(axes)
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from ..files.model import Layout

AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # PyTorch's, by how many there are


def _rules(table: str) -> list[list[str]]:
    """Pairs (ours, theirs), to be applied in this order, each to what the one before left."""
    return [line.split() for line in table.strip().splitlines()]


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
    """That of diffusers' UNet2DModel."""
    return _renamed(name, DIFFUSERS), (0, 1) if name == "class_embedding.w" else AXES[ndim]


def original_layout(name: str, ndim: int, levels: int) -> tuple[str, tuple[int, ...]]:
    """That of Ho et al.'s code in PyTorch, which numbers the levels of the way up as on the way down."""
    name = re.sub(r"^up\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    return _renamed(name, ORIGINAL), AXES[ndim]


def laid_out(arrays: Mapping[str, np.ndarray], layout: Layout) -> dict[str, np.ndarray]:
    """{their name: array with their axes} for {our name: array}."""
    there = {}
    for ours, x in arrays.items():
        theirs, axes = layout(ours, x.ndim)
        there[theirs] = x.transpose(axes)
    return there


def with_new_names(tensors: Mapping[str, object]) -> dict[str, object]:
    """{name: tensor} with the attention's parameters as diffusers names them now. Where both names are there, the old
    one stays, to be refused."""
    renamed = {}
    for name, tensor in tensors.items():
        new = re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.\w+$)", lambda m: OLD_ATTENTION[m[0]], name)
        renamed[name if new in tensors else new] = tensor
    return renamed
