"""Layers: the functions of autograd (functional.py, conv.py, fused.py) together with the parameters they use.

A layer is a plain class with `__call__`. `Module` finds the parameters among the attributes, so that a model can be
counted, saved, loaded and moved. Initial weights are those of Ho et al. 2020: uniform with variance
scale * 2 / (fan_in + fan_out) (Glorot & Bengio 2010), biases 0; with scale 0 a layer starts as zero, and so a residual
block that ends with one starts as the identity, or its shortcut. Next: unet.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from ..arguments import check_instance
from ..autograd.conv import Padding, conv2d
from ..autograd.functional import check_precision, embedding, linear
from ..autograd.fused import attention, group_norm
from ..autograd.tensor import Parameter, Tensor
from ..backend import device_of, on_device, to_device, to_numpy


class Module:
    """Something with parameters: `Parameter`s and other `Module`s among its attributes, alone or in lists.

    `precision` is that of its matrix products on a GPU, see `to`.
    """

    precision = "float32"

    def named_parameters(self) -> dict[str, Parameter]:
        """Return {name: parameter} in the order in which they were made; names look like "down.0.res.1.conv1.w".

        A parameter that is used in several places is listed once, under its first name.
        """
        names = {}
        for name, p in _walk(self, Parameter):
            names.setdefault(p, name)
        return {name: p for p, name in names.items()}

    def parameters(self) -> list[Parameter]:
        """Return all parameters, in the order of `named_parameters`."""
        return list(self.named_parameters().values())

    @property
    def size(self) -> int:
        """How many numbers the parameters hold together."""
        return sum(p.data.size for p in self.parameters())

    @property
    def dtype(self) -> np.dtype:
        """The floating-point type of the parameters."""
        return next(_walk(self, Parameter))[1].dtype

    @property
    def device(self) -> str:
        """The name of the device that holds the parameters."""
        return device_of(next(_walk(self, Parameter))[1].data)

    def to(
        self, device: str | None = None, dtype: str | np.dtype | None = None, precision: str | None = None
    ) -> Module:
        """Move the parameters to `device` ("cpu", "cuda", "cuda:N"), convert them to `dtype`, in place; return self.

        `precision`, "float32", "tf32", "bf16" or "fp16", is what a GPU rounds the factors of float32 matrix products
        to, in convolutions, linear layers and attention; a CPU does not. See `functional.product`. bf16 and tf32 take a
        GPU of 2020 or later (Ampere). Checkpoints do not keep it.
        """
        if dtype is not None and dtype not in (np.dtype("float32"), np.dtype("float64")):
            raise ValueError(f"dtype: expected 'float32' or 'float64', got {dtype!r}")
        if precision is not None:
            check_precision(precision)
        for p in self.parameters():
            there = device_of(p.data) if device is None else device
            with on_device(there):
                p.data = to_device(p.data, there).astype(dtype or p.dtype, copy=False)
        for _, module in _walk(self, Module):
            module.precision = precision or module.precision
        return self

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return {name: NumPy array}, copies of all parameters."""
        return {name: np.array(to_numpy(p.data)) for name, p in self.named_parameters().items()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Copy `state` into the parameters. Raises ValueError, and changes nothing, unless names and shapes all fit."""
        check_instance("state", state, Mapping, "a mapping of names to arrays")
        own = self.named_parameters()
        wrong = [f"{name} is missing" for name in own if name not in state]
        wrong += [f"{name} is unknown" for name in state if name not in own]
        wrong += [
            f"{name} has shape {state[name].shape} instead of {p.shape}"
            for name, p in own.items()
            if name in state and state[name].shape != p.shape
        ]
        if wrong:
            raise ValueError(f"state: it does not fit {type(self).__name__}: {'; '.join(wrong)}")
        with on_device(self.device):
            for name, p in own.items():
                p.data[...] = to_device(state[name], self.device)


def _walk(value: object, kind: type, name: str = "") -> Iterator[tuple[str, Parameter | Module]]:
    """Yield what is of this kind in a module, list, tuple or dict, itself included, with the path that leads there."""
    if isinstance(value, kind):
        yield name, value
    inside = vars(value) if isinstance(value, Module) else value
    items = (
        inside.items() if isinstance(inside, dict) else enumerate(inside) if isinstance(inside, (list, tuple)) else ()
    )
    for key, item in items:
        yield from _walk(item, kind, f"{name}.{key}" if name else str(key))


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int, fan_out: int, scale: float) -> Parameter:
    """Glorot's: fan_in is how many inputs an output sums, fan_out how many outputs an input reaches."""
    limit = math.sqrt(3 * scale * 2 / (fan_in + fan_out))  # so that the variance, limit^2 / 3, is as above
    return Parameter(rng.uniform(-limit, limit, shape).astype(np.float32, copy=False))


def _zeros(n: int) -> Parameter:
    return Parameter(np.zeros(n, np.float32))


class Linear(Module):
    """x (..., inputs) -> x w + b (..., outputs)."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator, scale: float = 1.0):
        self.w = _uniform(rng, (inputs, outputs), inputs, outputs, scale)
        self.b = _zeros(outputs)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.w, self.b, precision=self.precision)


class Embedding(Module):
    """A learned vector (channels,) for each of `count` classes: labels (N,) -> (N, channels)."""

    def __init__(self, count: int, channels: int, rng: np.random.Generator):
        self.w = _uniform(rng, (count, channels), 1, 1, scale=1.0)  # of variance 1, like PyTorch's

    def __call__(self, labels: np.ndarray) -> Tensor:
        return embedding(self.w, index=labels)


class Conv2d(Module):
    """Convolution of images (N, H, W, inputs) -> (N, OH, OW, outputs); see `autograd.conv.conv2d`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        rng: np.random.Generator,
        stride: int = 1,
        padding: int | Padding = 0,
        scale: float = 1.0,
    ):
        area = kernel * kernel
        self.w = _uniform(rng, (kernel, kernel, inputs, outputs), area * inputs, area * outputs, scale)
        self.b = _zeros(outputs)
        self.stride, self.padding = stride, padding

    def __call__(self, x: Tensor) -> Tensor:
        return conv2d(x, self.w, self.b, stride=self.stride, padding=self.padding, precision=self.precision)


class GroupNorm(Module):
    """Group normalisation over the last axis, with SiLU if asked; see `autograd.fused.group_norm`."""

    def __init__(self, channels: int, groups: int, eps: float = 1e-6):
        self.gamma = Parameter(np.ones(channels, np.float32))
        self.beta = _zeros(channels)
        self.groups, self.eps = groups, eps

    def __call__(self, x: Tensor, silu: bool = False) -> Tensor:
        return group_norm(x, self.gamma, self.beta, groups=self.groups, eps=self.eps, silu=silu)


class Attention(Module):
    """Self-attention: every position of (N, L, channels) attends to all of its image; `out` starts as zero."""

    def __init__(self, channels: int, heads: int, rng: np.random.Generator):
        self.q, self.k, self.v = (Linear(channels, channels, rng) for _ in range(3))
        self.out = Linear(channels, channels, rng, scale=0.0)
        self.heads = heads

    def __call__(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(attention(q, k, v, heads=self.heads, precision=self.precision))
