"""In place of NVRTC: for the emulator, compiles each source with g++."""

import ctypes
import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import building

KERNEL = re.compile(
    r"""extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?
        (?P<name>\w+)\s*\((?P<parameters>[^{;]*)\)\s*\{""",
    re.VERBOSE,
)
NEEDS_FIBERS = re.compile(r"__sync(threads|warp)|__shfl_|_sync\s*\(")
PREFIX = b"cuda_on_cpu image "
_images: list[dict[str, "Kernel"]] = []  # of each compiled source its kernels by name, those that are extern "C"


class Kernel(NamedTuple):
    name: str
    pointers: list[int]  # which of its parameters are
    call: Callable | None  # None for the null device


def compile_source(source: str, options: Sequence[str], numbers: bool) -> bytes:
    """Compile a source and return what CuPy will hand to `load`. Raises RuntimeError with what the compiler says."""
    parameters = {found["name"]: found["parameters"].split(",") for found in KERNEL.finditer(source)}
    library = load_library(source, tuple(options), tuple(parameters)) if numbers else None
    kernel = lambda name, given: Kernel(
        name, [i for i, p in enumerate(given) if "*" in p], library and getattr(library, f"launch_{name}")
    )
    _images.append({name: kernel(name, given) for name, given in parameters.items()})
    return PREFIX + str(len(_images) - 1).encode()


@functools.cache
def load_library(source: str, options: tuple[str, ...], names: tuple[str, ...]) -> ctypes.PyDLL:
    """Compile with g++ and load.

    `ctypes.PyDLL` keeps Python's lock while a kernel runs, whose threadIdx and shared memory are global variables.
    """
    fibers = "true" if NEEDS_FIBERS.search(source) else "false"
    text = ['#include "shim.h"\n#line 1 "kernel"\n', source, "\n"]
    for name in names:
        run = f"return emu_run({name}, sizes, arguments, {fibers});"
        text.append(f'extern "C" int launch_{name}(const unsigned *sizes, void **arguments) {{ {run} }}\n')
    kept = [option for option in options if re.match(r"-[DU]|-I(?!.*(_cccl|/cuda/))", option)]
    flags = *building.CXX_FLAGS, f"-I{building.toolkit() / 'include'}", *kept
    return ctypes.PyDLL(str(building.shared_library("g++", "".join(text), ".cpp", first_flags=flags)))


def load(image: bytes) -> dict[str, Kernel]:
    """Return what `compile_source` made."""
    if not image.startswith(PREFIX):
        raise NotImplementedError("cuda_on_cpu loads only what it has compiled itself, not cubins or PTX")
    return _images[int(image.removeprefix(PREFIX))]
