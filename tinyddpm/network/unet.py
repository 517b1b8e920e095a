"""The U-Net of Ho, Jain & Abbeel 2020 ("Denoising Diffusion Probabilistic Models", appendix B): eps_theta(x_t, t).

    x_t -> conv -> [blocks, halve] per level -> middle -> [blocks, double] per level -> norm, SiLU, conv -> eps
                       |____________________ skip connections _____________________|

It is a U-Net (Ronneberger et al. 2015) of residual blocks (He et al. 2015) with group norm; attention follows the
blocks of chosen levels, and stands in the middle. On the way down, what the first convolution, every block and every
halving returns is laid aside; on the way up, each block takes the latest of these, so that a level has one block more.
The timestep t reaches every residual block through a sinusoidal encoding (Vaswani et al. 2017) and two dense layers.
Next: diffusion/schedule.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..arguments import check_instance, generator
from ..autograd.conv import upsample
from ..autograd.functional import concat, dropout, silu
from ..autograd.tensor import Tensor, as_array
from ..backend import Array, like
from .checks import ENCODINGS, NO_LABEL, check_input, checked_config
from .nn import Attention, Conv2d, Embedding, GroupNorm, Linear, Module


def timestep_encoding(t: np.ndarray, channels: int, form: str = "ddpm") -> np.ndarray:
    """Sinusoidal encoding P(k, .) of each timestep k in t (N,) -> (N, channels), float64; d = channels is even.

    The position encoding of Vaswani et al. 2017, with n = 10000 and i = 0 ... d/2 - 1, is "interleaved":

        P(k, 2i) = sin(k / n^(2i/d)),  P(k, 2i+1) = cos(k / n^(2i/d))

    A dense layer follows, so neither their order nor the exact frequencies matter much, and two other forms became
    customary: "ddpm" of Ho et al.'s code,

        P(k, i) = sin(k / n^(i/(d/2 - 1))),  P(k, d/2 + i) = cos(k / n^(i/(d/2 - 1)))

    and "improved" of Nichol & Dhariwal's 2021, P(k, i) = cos(k / n^(2i/d)), P(k, d/2 + i) = sin(k / n^(2i/d)). The
    "_flipped" forms of these have the two halves exchanged.
    Raises ValueError for another form or an odd number of channels.
    """
    if form not in ENCODINGS or channels % 2:
        raise ValueError(
            f"form, channels: expected one of {', '.join(ENCODINGS)} and an even number, got {form!r}, {channels}"
        )
    half = channels // 2
    longest = half - 1 if form.startswith("ddpm") else half
    angle = t[:, None] * np.exp(-math.log(10000) * np.arange(half) / longest)
    if form == "interleaved":
        return np.stack([np.sin(angle), np.cos(angle)], axis=2).reshape(-1, channels)
    first, second = (np.cos, np.sin) if form in ("ddpm_flipped", "improved") else (np.sin, np.cos)
    return np.concatenate([first(angle), second(angle)], axis=1)


def to_patches(x: Tensor | Array, p: int) -> Tensor | Array:
    """Squares of p x p pixels as one position (space to depth): images (N, H, W, C) -> (N, H/p, W/p, p p C)."""
    if p == 1:
        return x
    N, H, W, C = x.shape
    return x.reshape(N, H // p, p, W // p, p, C).transpose(0, 1, 3, 2, 4, 5).reshape(N, H // p, W // p, p * p * C)


def from_patches(x: Tensor | Array, p: int) -> Tensor | Array:
    """And back: (N, h, w, p p C) -> (N, p h, p w, C)."""
    if p == 1:
        return x
    N, h, w, C = x.shape
    return x.reshape(N, h, w, p, p, C // p**2).transpose(0, 1, 3, 2, 4, 5).reshape(N, h * p, w * p, C // p**2)


class ResBlock(Module):
    """Residual block: h = conv(SiLU(norm(x))) + dense(temb);  y = x + conv(dropout(SiLU(norm(h)))).

    The timestep's term is the same at every pixel; `temb` (N, temb_channels) comes with its SiLU already taken. Where
    the channels change, x passes a 1x1 convolution. `p` is the probability of dropout.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        temb_channels: int,
        groups: int,
        p: float,
        rng: np.random.Generator,
        eps: float = 1e-6,
    ):
        self.norm1 = GroupNorm(inputs, groups, eps)
        self.conv1 = Conv2d(inputs, outputs, 3, rng, padding=1)
        self.time = Linear(temb_channels, outputs, rng)
        self.norm2 = GroupNorm(outputs, groups, eps)
        self.conv2 = Conv2d(outputs, outputs, 3, rng, padding=1, scale=0.0)
        self.shortcut = Conv2d(inputs, outputs, 1, rng) if inputs != outputs else None
        self.p = p

    def __call__(self, x: Tensor, temb: Tensor, rng: np.random.Generator | None) -> Tensor:
        h = self.conv1(self.norm1(x, silu=True))
        h = h + self.time(temb).reshape(h.shape[0], 1, 1, -1)  # (N, 1, 1, C) over (N, H, W, C)
        h = self.conv2(dropout(self.norm2(h, silu=True), self.p, rng))
        return h + (self.shortcut(x) if self.shortcut else x)


class AttentionBlock(Module):
    """y = x + attention(norm(x)) over the H W pixels of an image."""

    def __init__(self, channels: int, heads: int, groups: int, rng: np.random.Generator, eps: float = 1e-6):
        self.norm = GroupNorm(channels, groups, eps)
        self.attention = Attention(channels, heads, rng)

    def __call__(self, x: Tensor) -> Tensor:
        N, H, W, C = x.shape
        return x + self.attention(self.norm(x).reshape(N, H * W, C)).reshape(N, H, W, C)


class Level(Module):
    """The residual blocks at one resolution, each followed by attention if the level has it, and what changes the size.

    Going down, `resize` is a convolution with stride 2, in Ho et al. padded on the right and at the bottom only; going
    up, a convolution after nearest-neighbour upsampling; at the end of either path there is none.
    """

    def __init__(self, res: list[ResBlock], attention: list[AttentionBlock], resize: Conv2d | None):
        self.res, self.attention, self.resize = res, attention, resize

    def block(self, i: int, x: Tensor, temb: Tensor, rng: np.random.Generator | None) -> Tensor:
        x = self.res[i](x, temb, rng)
        return self.attention[i](x) if self.attention else x


class UNet(Module):
    """The network eps_theta(x_t, t) of Ho et al. 2020.

    Args:
        in_channels: of the images: 1 for grey, 3 for RGB.
        out_channels: the same, or twice as many if the variance is learned too (see `Diffusion`).
        channels: of each level, from full resolution down; every level but the last halves height and width.
        blocks: residual blocks per level, on the way down (one more on the way up).
        attention: for each level, whether its blocks are followed by attention.
        heads: attention heads. groups: of the group norms. Both must divide the channels they meet.
        dropout: probability in each residual block; acts only in calls that are handed a generator.
        encoding: of the timesteps: "ddpm", "improved" or "interleaved"; see `timestep_encoding`.
        rng: seed or generator of the initial weights; None: others every time.
        head_channels: of each attention head, instead of `heads`: wider levels have more of them.
        middle_attention: whether the middle has attention.
        norm_eps: what the group norms add to the variance.
        downsample_padding: of the convolutions that halve: 0, on the right and at the bottom (Ho et al.); 1, all round.
        center_input: images come in [0, 1], and x_t is taken as 2 x_t - 1.
        classes: number of classes of images; the network then has a vector for each and is told the `labels`.
        label_dropout: probability with which an image's label is dropped in calls that are handed a generator. If it is
            not 0, the network has one more vector, for "no label", and so is an unconditional model as well, which
            classifier-free guidance needs (Ho & Salimans 2022, algorithm 1).
        image_size: (height, width) of the images it is for, or one number for both. The network takes other sizes too;
            this is for those who get it in a file and want to sample.
        patch: the network takes a square of patch x patch pixels for one position with patch^2 times the channels, and
            gives back as many. Its first level is then that of the squares: images of few details lose nothing and
            cost a fraction (Hoogeboom et al. 2023, "simple diffusion", after the vision transformer's patches).

    Raises ValueError if an argument is out of range or does not fit the others.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128),
        blocks: int = 2,
        attention: Sequence[bool] = (False, False, True),
        heads: int = 1,
        groups: int = 8,
        dropout: float = 0.0,
        encoding: str = "ddpm",
        rng: int | np.random.Generator | None = 0,
        head_channels: int | None = None,
        middle_attention: bool = True,
        norm_eps: float = 1e-6,
        downsample_padding: int = 0,
        center_input: bool = False,
        classes: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        label_dropout: float = 0.0,
        patch: int = 1,
    ):
        arguments = locals()  # before there are other names
        self.config = checked_config({name: arguments[name] for name in arguments if name not in ("self", "rng")})
        channels, attention, blocks, patch = map(self.config.get, ("channels", "attention", "blocks", "patch"))
        rng = generator(rng)
        temb_channels = 4 * channels[0]
        last = len(channels) - 1
        halving = 1 if downsample_padding else ((0, 1), (0, 1))

        def res_block(inputs: int, outputs: int) -> ResBlock:
            return ResBlock(inputs, outputs, temb_channels, groups, dropout, rng, norm_eps)

        def attention_block(c: int) -> AttentionBlock:
            return AttentionBlock(c, c // head_channels if head_channels else heads, groups, rng, norm_eps)

        def level(widths: list[tuple[int, int]], i: int, resize: Conv2d | None) -> Level:
            res = [res_block(inputs, outputs) for inputs, outputs in widths]
            attend = [attention_block(channels[i]) for _ in widths if attention[i]]
            return Level(res, attend, resize)

        self.time1 = Linear(channels[0], temb_channels, rng)
        self.time2 = Linear(temb_channels, temb_channels, rng)
        if classes:
            self.class_embedding = Embedding(classes + (label_dropout > 0), temb_channels, rng)
        self.conv_in = Conv2d(in_channels * patch**2, channels[0], 3, rng, padding=1)
        width, skips = channels[0], [channels[0]]  # of the activation, and of what has been laid aside

        self.down = []
        for i, c in enumerate(channels):
            resize = Conv2d(c, c, 3, rng, stride=2, padding=halving) if i < last else None
            self.down.append(level([(width, c)] + [(c, c)] * (blocks - 1), i, resize))
            width, skips = c, skips + [c] * (blocks + (i < last))

        self.middle1 = res_block(width, width)
        self.middle_attention = attention_block(width) if middle_attention else None
        self.middle2 = res_block(width, width)

        self.up = []
        for i, c in reversed(list(enumerate(channels))):
            widths = [(before + skips.pop(), c) for before in [width] + [c] * blocks]
            self.up.append(level(widths, i, Conv2d(c, c, 3, rng, padding=1) if i > 0 else None))
            width = c

        self.norm_out = GroupNorm(width, groups, norm_eps)
        self.conv_out = Conv2d(width, out_channels * patch**2, 3, rng, padding=1, scale=0.0)

    @property
    def dropout(self) -> float:
        """Its probability in each residual block; like that of labels, it is chosen when the network is made."""
        return self.config["dropout"]

    @property
    def label_dropout(self) -> float:
        """The probability with which an image's label is dropped."""
        return self.config["label_dropout"]

    def __call__(
        self,
        x: Tensor | Array,
        t: np.ndarray,
        rng: np.random.Generator | None = None,
        labels: np.ndarray | None = None,
    ) -> Tensor:
        """Return eps_theta(x_t, t).

        Args:
            x: (N, H, W, in_channels) noisy images of the parameters' dtype, H and W divisible by patch 2^(levels - 1).
            t: (N,) integer timesteps, counted from 0.
            rng: generator for dropout, of labels too; none, no dropout.
            labels: (N,) integers, the class of each image, counted from 0; for a network made for `classes`. If it has
                `label_dropout`, -1 is no label, and None is none for any image.

        Returns (N, H, W, out_channels). Raises ValueError if the shapes do not fit, TypeError if a dtype does not.
        """
        if labels is None and self.label_dropout:
            labels = np.full(np.shape(t), NO_LABEL)
        check_input(self.config, self.dtype, as_array(x), t, labels)
        check_instance("rng", rng, np.random.Generator | None, "a generator from numpy.random.default_rng, or None")
        encoding = like(timestep_encoding(t, self.config["channels"][0], self.config["encoding"]), self.time1.w.data)
        temb = self.time2(silu(self.time1(encoding)))
        if labels is not None:
            labels = labels.astype(int)
            if rng is not None and self.label_dropout:
                labels[rng.random(len(labels)) < self.label_dropout] = NO_LABEL
            temb = temb + self.class_embedding(labels % len(self.class_embedding.w.data))  # -1, "no label", is the last
        temb = silu(temb)  # every block takes SiLU of the embedding: once is enough
        h = self.conv_in(to_patches(2 * x - 1 if self.config["center_input"] else x, self.config["patch"]))
        skips = [h]
        for level in self.down:
            for i in range(len(level.res)):
                h = level.block(i, h, temb, rng)
                skips.append(h)
            if level.resize:
                h = level.resize(h)
                skips.append(h)
        h = self.middle1(h, temb, rng)
        if self.middle_attention:
            h = self.middle_attention(h)
        h = self.middle2(h, temb, rng)
        for level in self.up:
            for i in range(len(level.res)):
                h = level.block(i, concat(h, skips.pop()), temb, rng)
            if level.resize:
                h = level.resize(upsample(h))
        assert not skips
        return from_patches(self.conv_out(self.norm_out(h, silu=True)), self.config["patch"])
