"""The array module without a GPU: what passes through, what asking for CUDA says where there is none, and which of a
paired function and its twins runs."""

import contextlib
import importlib.util
import re
import subprocess
import sys
import types
from unittest.mock import MagicMock

import numpy as np
import pytest

from tinyddpm import backend
from tinyddpm.backend import array_module, device_of, is_array, like, on_device, to_device, to_numpy


def test_numpy_arrays_pass_through():
    x = np.ones(3, np.float32)
    assert array_module(x) is np and is_array(x) and device_of(x) == "cpu"
    assert to_numpy(x) is x and to_device(x, "cpu") is x and like(x, x) is x
    assert like(np.arange(3), x).dtype == np.float32


@pytest.mark.parametrize("bad", [1.0, [1.0], None, "x"])
def test_what_is_no_array(bad):
    assert not is_array(bad)
    for function in (array_module, backend.paired(abs)):
        with pytest.raises(TypeError, match="expected a NumPy or CuPy array, got"):
            function(bad)


NDArray, CUDAError = type("ndarray", (), {}), type("CUDARuntimeError", (RuntimeError,), {})


def fake_cupy(gpus=1, driver=None, library=None):
    """As much of CuPy as is asked whether a GPU works, and the errors of what is missing."""
    cupy = MagicMock(float32=np.float32, ndarray=NDArray)
    cupy.cuda.Device = contextlib.nullcontext
    cupy.cuda.runtime.CUDARuntimeError = CUDAError
    cupy.cuda.runtime.getDeviceCount = MagicMock(return_value=gpus, side_effect=driver)
    cupy.ones.side_effect = library if isinstance(library, RuntimeError) else None
    (cupy.ones.return_value + 1).__matmul__.side_effect = library
    return cupy


@pytest.fixture
def install(monkeypatch):
    """Have `import cupy` find this."""
    backend._gpu.cache_clear()
    yield lambda cupy: monkeypatch.setitem(sys.modules, "cupy", cupy)
    backend._gpu.cache_clear()


UNKNOWN = ["gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "", "cpu:0", "cuda:1\n", "cuda:\u0663", None, 0, b"cuda"]
NO_CUPY = "needs CuPy, which is not installed; pip install 'tinyddpm.cuda12.'"
NO_DRIVER = "'cuda(:1)?' needs an NVIDIA GPU and a recent driver"
NO_LIBRARY = "library of the CUDA toolkit is missing: pip install.*cuda12.*"
BAD = [  # None makes `import cupy` fail, as where it is not installed
    *[(None, bad, f"{re.escape(repr(bad))} is unknown; use 'cpu', 'cuda' or 'cuda:N'", ValueError) for bad in UNKNOWN],
    (None, "cuda", f"'cuda' {NO_CUPY}"),
    (None, "cuda:1", f"'cuda:1' {NO_CUPY}"),
    (fake_cupy(driver=CUDAError("what it says")), "cuda:1", f"{NO_DRIVER}; CUDA says: what it says"),
    (fake_cupy(gpus=2), "cuda:2", "'cuda:2' is not there; this machine has cuda:0, cuda:1$"),
    (fake_cupy(library=ImportError("libcublas.so.13")), "cuda", f"'cuda' is there, .*{NO_LIBRARY}libcublas.so.13"),
    (fake_cupy(library=RuntimeError("no libnvrtc.so.12")), "cuda", f"'cuda' is there, .*{NO_LIBRARY}no libnvrtc.so.12"),
]


@pytest.mark.parametrize(("cupy", "device", "message", "error"), [(*row, RuntimeError)[:4] for row in BAD])
def test_a_device_that_cannot_be_used_says_why_and_what_to_do(install, cupy, device, message, error):
    install(cupy)
    for ask in (on_device, lambda device: to_device(np.ones(3), device)):
        with pytest.raises(error, match=f"^device: {message}"):
            ask(device)


def test_a_gpu_that_works_is_asked_once(install):
    install(cupy := fake_cupy(gpus=3))
    for device, index in [("cuda:2", 2), ("cuda:2", 2), ("cpu", None)]:
        with on_device(device) as gpu:
            assert gpu == index and cupy.cuda.runtime.getDeviceCount.call_count == 1


def test_cupy_that_cannot_be_imported_says_why(install, tmp_path, monkeypatch):
    (tmp_path / "cupy.py").write_text("raise ImportError('numpy is too old')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with pytest.raises(RuntimeError, match="is installed but cannot be imported: numpy is too old"):
        on_device("cuda")


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_with_the_real_cupy():
    """In a process of its own, where nothing is imitated: where there is no GPU, the message says so."""
    code = "from tinyddpm.backend import to_device; import numpy; print(to_device(numpy.ones(1), 'cuda'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[1.]\n" or re.search(f"RuntimeError: device: {NO_DRIVER}", result.stderr)


@pytest.fixture
def double(install, monkeypatch):
    """A function with a twin for each kind of array."""
    install(fake_cupy())
    for kind in ("cpu", "cuda"):
        module = types.ModuleType(f"tinyddpm.speed.{kind}")
        module.TWINS = {"double": lambda x, times=2, kind=kind: (kind, times)}
        monkeypatch.setitem(sys.modules, module.__name__, module)
    backend._twins.cache_clear()

    @backend.paired
    def double(x, times=2):
        """Times two."""
        return "plain", times

    yield double
    backend._twins.cache_clear()


@pytest.mark.parametrize(("x", "kind"), [
    (np.ones(2), "cpu"), (np.float32(1), "cpu"),  # what NumPy's sums may return
    (NDArray(), "cuda"), *((MagicMock(device=on), on.partition(":")[0]) for on in ("cpu", "cuda", "cuda:1")),
    (lambda x, t: x, "cpu"),  # any function is a model
])  # fmt: skip
def test_a_twin_is_chosen_by_the_first_argument_an_array_or_a_model(double, x, kind):
    assert double(x) == (kind, 2) and double(x, 3) == double(x, times=3) == (kind, 3)
    assert backend.paired(lambda x: x)(x) is x  # a function without a twin is itself
    assert double.plain(x, times=6) == ("plain", 6)
    with backend.plain():
        assert double(x, times=7) == ("plain", 7)
    assert double(x) == (kind, 2)
    assert double.__doc__ == "Times two." and double.__name__ == "double"
