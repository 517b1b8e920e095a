"""Every kernel of speed/kernels/*.cu compiles for every GPU from Volta to Hopper, as far as a compiler is at hand:
NVRTC from the wheel nvidia-cuda-nvrtc-cu12, which needs no GPU. (CUDA 13 no longer knows Volta.)"""

import ctypes
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from test_twins import PACKAGE, cuda_without_cupy

FOLDER = PACKAGE / "speed" / "kernels"
ARCHITECTURES = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90"]
KERNELS = [("convolution", "int16")]  # int16: the numbers of a narrow precision
KERNELS += [(file, dtype) for file in ("convolution", "group_norm", "softmax") for dtype in ("float32", "float64")]


@pytest.fixture(scope="module")
def nvrtc():
    for folder in sys.path:
        for library in Path(folder).glob("nvidia/cuda_nvrtc/lib/libnvrtc.so.12"):
            return ctypes.CDLL(str(library))
    pytest.skip("needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")


@pytest.fixture(scope="module")
def source():
    """The function that returns what cuda.py gives CuPy to compile."""
    cuda = cuda_without_cupy()
    cuda.cupy.RawKernel = lambda source, name: source
    return lambda file, name, dtype: cuda.kernel(file, name, np.dtype(dtype))


def compiled(nvrtc, source, architecture):
    """What NVRTC makes of a source: the machine code, and what it has to say."""
    program = ctypes.c_void_p()

    def text(kind):
        size = ctypes.c_size_t()
        assert getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)) == 0
        buffer = ctypes.create_string_buffer(size.value)
        assert getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer) == 0
        return buffer.raw

    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    options = [b"--std=c++17", f"--gpu-architecture={architecture}".encode()]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    code, log = text("CUBIN") if status == 0 else b"", text("ProgramLog").rstrip(b"\0").decode()
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code, log


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("file", "dtype"), KERNELS)
def test_it_compiles(nvrtc, source, file, dtype, architecture):
    names = re.findall(r"__global__ void (\w+)", (FOLDER / f"{file}.cu").read_text())
    code, log = compiled(nvrtc, source(file, names[0], dtype), architecture)
    complaints = [line for line in log.splitlines() if "_75' are deprecated" not in line]
    assert code.startswith(b"\x7fELF") and not complaints, log
    assert names and all(name.encode() in code for name in names)


def test_the_compiler_says_no_and_all_files_are_compiled(nvrtc):
    code, log = compiled(nvrtc, 'extern "C" __global__ void k(float* x) { x[0] = y; }', "sm_80")
    assert not code and 'identifier "y" is undefined' in log
    assert {path.stem for path in FOLDER.glob("*.cu")} == {file for file, _ in KERNELS}
