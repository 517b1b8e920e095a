"""Real CuPy on machines without a GPU.

CuPy's own Python and Cython code runs unchanged: its dispatch, promotion, shape checks, memory pool, kernel
sources. What is replaced, before `import cupy`, are the functions of CUDA's runtime and driver (see capsules.py and
devices.py), NVRTC (kernels.py) and cuBLAS (libraries.py and cublas.c). There are two modes:

- The emulator, `install(numbers=True)`, compiles kernels, RawKernels as well, with g++ and runs them: real results.
- The null device, `install(numbers=False)`, compiles and computes nothing: to see what raises and to count.

`counts` counts launches, copies, synchronisations and memory in both.

>>> import cuda_on_cpu
>>> cupy = cuda_on_cpu.install(numbers=True)
>>> cuda_on_cpu.counts.reset()
>>> float((cupy.arange(4.0) + 1).sum())
10.0
>>> cuda_on_cpu.counts.synchronisations
Counter({'streamSynchronize': 1})

Limits. One process is one mode for good. What the package does not use is not imitated, and raises an error that says
so: streams of one's own, cuRAND, cuFFT, cuSOLVER, cuSPARSE, CUB, templates of kernels, dynamic shared memory, complex
products. Not seen: races between threads or streams, since one thing is done after another; alignment; reads past the
end of an array; the rounding of a GPU's exp and fused multiply-add. Small shapes: a GFLOP of matrix product takes a
fraction of a second, and each new kernel a third of a second of compiling, once, as results stay in
~/.cache/tinyddpm-cuda-on-cpu. It replaces parts of CuPy that are nobody's business, so it asks for exactly the version
that it has been tried with.
"""

import ctypes
import importlib.metadata
import math
import os
import shutil
import sys
from types import ModuleType

import numpy as np

from . import building, capsules, devices, kernels, libraries
from .counting import counts

CUPY_VERSION = "14.2.0"
WHEELS = ("cupy-cuda13x", "cupy-cuda12x")
PROGRAMS = ("gcc", "g++", "nm")


def reason_why_not() -> str | None:
    """Return why `install` can't work in this process, None if it can."""
    if "cupy" in sys.modules or "cupy_backends" in sys.modules:
        return "cupy has been imported already"
    if not sys.platform.startswith("linux"):
        return "works on Linux only"
    versions = {wheel.name: wheel.version for wheel in importlib.metadata.distributions() if wheel.name in WHEELS}
    if not versions:
        return f"none of {' or '.join(WHEELS)} is installed"
    if list(versions.values()) != [CUPY_VERSION]:
        return f"made for CuPy {CUPY_VERSION}, not {' and '.join(versions.values())}"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"needs {' and '.join(missing)}" if missing else None


def install(numbers: bool) -> ModuleType:
    """Return `cupy` on two imitated devices: the emulator (`numbers`) or the null device.

    Raises RuntimeError, with `reason_why_not()`, where that can't work.
    """
    reason = reason_why_not()
    if reason is not None:
        raise RuntimeError(f"cuda_on_cpu: {reason}")
    os.environ["CUDA_PATH"] = str(building.toolkit())
    os.environ["CUPY_ACCELERATORS"] = ""  # CUB's kernels are compiled code for a GPU
    os.environ["CUPY_CACHE_IN_MEMORY"] = "1"  # CuPy's cache on disk must not keep what is no cubin

    from cupy_backends.cuda.api import driver, runtime

    imitation = devices.Devices(counts, runtime, driver, numbers)
    capsules.replace([runtime, driver], imitation.handlers())
    counts.calls_of_libraries = libraries.install(numbers)

    import cupy
    from cupy_backends.cuda.libs import cublas

    for name in ("gemmEx", "gemmStridedBatchedEx"):  # as the package calls them
        setattr(cublas, name, imitation.checked(getattr(cublas, name)))
    replace_compiler(numbers)
    replace_sort(numbers)
    pool = cupy.get_default_memory_pool()

    def malloc(size):
        memory = pool.malloc(size)
        counts.peak_in_use = max(counts.peak_in_use, counts.in_use)
        return memory

    counts.pool_in_use, counts.of_the_emulator = pool.used_bytes, numbers
    cupy.cuda.set_allocator(malloc)
    counts.reset()
    return cupy


def replace_compiler(numbers: bool) -> None:
    """Put `kernels` in NVRTC's place."""
    from cupy.cuda import compiler

    def compile_using_nvrtc(source, options=(), arch=None, filename="", *_, **__):
        try:
            return kernels.compile_source(source, options, numbers), {}
        except RuntimeError as error:
            raise compiler.CompileException(str(error), source, filename, options, "g++") from None

    compiler._compile_using_nvrtc_no_warning = compile_using_nvrtc
    compiler._get_nvrtc_version = lambda: (compiler._cuda_hip_version // 1000, 0)
    compiler._preprocess = lambda *_: ""


def replace_sort(numbers: bool) -> None:
    """Put NumPy in Thrust's place, which `cupy.sort` and what uses it call as compiled code for a GPU. It counts as one
    launch, though Thrust takes several."""
    from cupy.cuda import thrust

    def sort(dtype, data, keys, shape):
        counts.kernel_launches["thrust::sort"] += 1
        if numbers:
            size = math.prod(shape) * np.dtype(dtype).itemsize
            np.frombuffer((ctypes.c_char * size).from_address(data), dtype).reshape(shape).sort(axis=-1)

    thrust.sort = sort
