"""In place of NVRTC: remembers each source and, for the emulator, compiles it with g++."""

import ctypes
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import building

KERNEL = re.compile(
    r"""(?P<extern>extern\s+"C"\s+)?
        (?P<template>template\s*<[^{};]*>\s*)?
        __global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?
        (?P<name>\w+)\s*\((?P<parameters>[^{;]*)\)\s*\{""",
    re.VERBOSE,
)
NEEDS_FIBERS = re.compile(r"__sync(threads|warp)|__shfl_|_sync\s*\(")

sources: list[tuple[str | None, str, tuple[str, ...]]] = []  # (name of the first kernel, source, options) once each
_images: list["Image"] = []


@dataclass(frozen=True)
class Image:
    """One compiled source."""

    shared_object: ctypes.PyDLL | None  # None for the null device
    pointers: dict[str, tuple[int, ...]]  # of each kernel to be had by name: which of its parameters are pointers
    names: dict[str, str]  # what to call the kernels that stand for name expressions


@dataclass(frozen=True)
class Function:
    """A kernel ready to be launched on one device."""

    name: str
    device: int
    pointers: tuple[int, ...]
    call: Callable[[Any, int], int] | None


def compile_source(source: str, options: Sequence[str], name_expressions: Sequence[str], numbers: bool) -> bytes:
    """Compile a source and return what CuPy will hand to `load`. Raises RuntimeError with what the compiler says."""
    found = list(KERNEL.finditer(source))
    remembered = (found[0]["name"] if found else None, source, tuple(options))
    if remembered not in sources:
        sources.append(remembered)
    everything_is_c = re.search(r'extern\s+"C"\s*\{', source) is not None
    pointers = {
        kernel["name"]: tuple(i for i, parameter in enumerate(kernel["parameters"].split(",")) if "*" in parameter)
        for kernel in found
        if not kernel["template"] and (kernel["extern"] or everything_is_c)
    }
    names = {lowered_name(index): expression for index, expression in enumerate(name_expressions)}
    library = None
    if numbers:
        entries = {name: name for name in pointers} | names
        library = load_library(source, tuple(options), tuple(entries.items()))
    _images.append(Image(library, pointers | dict.fromkeys(names, ()), names))
    return f"cuda_on_cpu image {len(_images) - 1}".encode()


def lowered_name(index: int) -> str:
    """Return the name of the kernel that stands for the name expression of that index."""
    return f"name_expression_{index}"


@functools.cache
def load_library(source: str, options: tuple[str, ...], entries: tuple[tuple[str, str], ...]) -> ctypes.PyDLL:
    """Compile with g++ and load.

    `ctypes.PyDLL` keeps Python's lock while a kernel runs, whose threadIdx and shared memory are global variables.
    """
    fibers = "true" if NEEDS_FIBERS.search(source) else "false"
    text = ['#include "shim.h"\n#line 1 "kernel"\n', source, "\n"]
    for name, expression in entries:
        text.append(
            f'extern "C" int launch_{name}(const unsigned *sizes, void **arguments) '
            f"{{ return emu_run({expression}, sizes, arguments, {fibers}); }}\n"
        )
    ours = f"-I{building.toolkit() / 'include'}"
    kept = [option for option in options if re.match(r"-[DU]|-I(?!.*(_cccl|/cuda/))", option)]
    flags = (*building.CXX_FLAGS, ours, *kept)
    return ctypes.PyDLL(str(building.shared_library("g++", "".join(text), ".cpp", (), flags)))


def load(image: bytes) -> Image:
    """Return what `compile_source` made."""
    prefix = b"cuda_on_cpu image "
    if not image.startswith(prefix):
        raise NotImplementedError("cuda_on_cpu loads only what it has compiled itself, not cubins or PTX")
    return _images[int(image.removeprefix(prefix))]


def get_function(image: Image, name: str, device: int) -> Function:
    """Return a kernel by its name. Raises KeyError where there is none, as for one that is not extern "C"."""
    pointers = image.pointers[name]
    call = None
    if image.shared_object is not None:
        call = getattr(image.shared_object, f"launch_{name}")
        call.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        image.shared_object.emu_shared_bytes.restype = ctypes.c_size_t
        if image.shared_object.emu_shared_bytes() > 48 * 1024:
            raise RuntimeError(f"{name} has more static shared memory than the 48 KiB that a block may have")
    return Function(image.names.get(name, name), device, pointers, call)
