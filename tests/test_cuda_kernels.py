"""Every kernel of kernels/*.cu compiles for every GPU from Volta to Hopper, as far as a compiler is at hand: NVRTC from
the wheel nvidia-cuda-nvrtc-cu12, which needs no GPU. (CUDA 13 no longer knows Volta.)"""

import ctypes
import importlib.util
import pathlib
import re

import pytest

import tinyddpm

KERNELS = sorted((pathlib.Path(tinyddpm.__file__).parent / "kernels").glob("*.cu"))
CUDA_PY = (pathlib.Path(tinyddpm.__file__).parent / "cuda.py").read_text()
ARCHITECTURES = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90"]
REALS = {"convolution": ["float", "double", "unsigned short"]}


@pytest.fixture(scope="module")
def nvrtc():
    found = importlib.util.find_spec("nvidia.cuda_nvrtc") if importlib.util.find_spec("nvidia") else None
    libraries = (
        [p for folder in found.submodule_search_locations for p in pathlib.Path(folder).glob("lib/libnvrtc.so.12")]
        if found
        else []
    )
    if not libraries:
        pytest.skip("needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")
    return ctypes.CDLL(str(libraries[0]))


def compiled(nvrtc, source, architecture):
    """What NVRTC makes of a source: the machine code, and what it has to say."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    options = [b"--std=c++17", f"--gpu-architecture={architecture}".encode()]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    assert nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)) == 0
    log = ctypes.create_string_buffer(size.value)
    assert nvrtc.nvrtcGetProgramLog(program, log) == 0
    code = b""
    if status == 0:
        assert nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
        buffer = ctypes.create_string_buffer(size.value)
        assert nvrtc.nvrtcGetCUBIN(program, buffer) == 0
        code = buffer.raw
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code, log.value.decode()


def with_macros(file, real):
    """As cuda.py writes it."""
    constants = {name: re.search(rf"^{name} = (\d+)", CUDA_PY, re.MULTILINE)[1] for name in ("THREADS", "PIXELS")}
    macros = {"REAL": real, "SUM": "double" if real == "double" else "float", **constants}
    return "".join(f"#define {key} {value}\n" for key, value in macros.items()) + file.read_text()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("file", "real"), [
    (file, real) for file in KERNELS for real in REALS.get(file.stem, ["float", "double"])
], ids=lambda value: getattr(value, "stem", value))  # fmt: skip
def test_it_compiles(nvrtc, file, real, architecture):
    code, log = compiled(nvrtc, with_macros(file, real), architecture)
    complaints = [line for line in log.splitlines() if "_75' are deprecated" not in line]
    assert code.startswith(b"\x7fELF") and not complaints, log
    names = re.findall(r"__global__ void (\w+)", file.read_text())
    assert names and all(name.encode() in code for name in names)


def test_the_compiler_says_no(nvrtc):
    code, log = compiled(nvrtc, 'extern "C" __global__ void k(float* x) { x[0] = y; }', "sm_80")
    assert not code and 'identifier "y" is undefined' in log


def test_there_are_kernels():
    assert [file.stem for file in KERNELS] == ["convolution", "group_norm", "softmax"]
