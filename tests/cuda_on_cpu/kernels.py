"""In place of NVRTC: for the emulator, compiles each source with g++."""

import ctypes
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import building

KERNEL = re.compile(
    r"""extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?
        (?P<name>\w+)\s*\((?P<parameters>[^{;]*)\)\s*\{""",
    re.VERBOSE,
)
NEEDS_FIBERS = re.compile(r"__sync(threads|warp)|__shfl_|_sync\s*\(")
PREFIX = b"cuda_on_cpu image "
_images: list["Image"] = []


class Image(NamedTuple):
    """One compiled source."""

    compiled: ctypes.PyDLL | None  # None for the null device
    pointers: dict[str, tuple[int, ...]]  # of each kernel: which of its parameters are pointers


class Function(NamedTuple):
    """A kernel ready to be launched on one device."""

    name: str
    device: int
    pointers: tuple[int, ...]
    call: Callable[[Any, int], int] | None


def compile_source(source: str, options: Sequence[str], numbers: bool) -> bytes:
    """Compile a source and return what CuPy will hand to `load`. Raises RuntimeError with what the compiler says."""
    of_pointers = lambda parameters: tuple(i for i, p in enumerate(parameters.split(",")) if "*" in p)
    pointers = {kernel["name"]: of_pointers(kernel["parameters"]) for kernel in KERNEL.finditer(source)}
    library = load_library(source, tuple(options), tuple(pointers)) if numbers else None
    _images.append(Image(library, pointers))
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


def load(image: bytes) -> Image:
    """Return what `compile_source` made."""
    if not image.startswith(PREFIX):
        raise NotImplementedError("cuda_on_cpu loads only what it has compiled itself, not cubins or PTX")
    return _images[int(image.removeprefix(PREFIX))]


def get_function(image: Image, name: str, device: int) -> Function:
    """Return a kernel by its name. Raises KeyError where there is none, as for one that is not extern "C"."""
    pointers, call = image.pointers[name], None
    if image.compiled is not None:
        call = getattr(image.compiled, f"launch_{name}")
        call.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return Function(name, device, pointers, call)
