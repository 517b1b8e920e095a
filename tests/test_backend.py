"""The array module without a GPU: what passes through, what asking for CUDA says where there is none, and which of a
paired function and its twins runs."""

import contextlib
import importlib.util
import re
import subprocess
import sys
import types

import numpy as np
import pytest

from tinyddpm import backend
from tinyddpm.backend import array_module, device_of, is_array, like, on_device, to_device, to_numpy


def test_numpy_arrays_pass_through():
    x = np.ones(3, np.float32)
    assert array_module(x) is np and is_array(x) and device_of(x) == "cpu"
    assert to_numpy(x) is x and to_device(x, "cpu") is x
    assert like(x, x) is x
    assert like(np.arange(3), x).dtype == np.float32


@pytest.mark.parametrize("bad", [1.0, [1.0], None, "x"])
def test_what_is_no_array(bad):
    assert not is_array(bad)
    with pytest.raises(TypeError, match="expected a NumPy or CuPy array, got"):
        array_module(bad)


@pytest.mark.parametrize(
    "device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "", "cpu:0", "cuda:1\n", "cuda:\u0663"]
)
def test_unknown_devices(device):
    with pytest.raises(ValueError, match=re.escape(f"device: {device!r} is unknown; use 'cpu', 'cuda' or 'cuda:N'")):
        to_device(np.ones(3), device)


@pytest.mark.parametrize("device", [None, 0, b"cuda"])
def test_devices_are_named(device):
    with pytest.raises(ValueError, match="is unknown; use 'cpu'"):
        to_device(np.ones(3), device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cupy_says_how_to_get_it(device, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # makes `import cupy` fail, as where it is not installed
    with pytest.raises(RuntimeError, match=f"device: '{device}' needs CuPy.*pip install 'tinyddpm.cuda12.'"):
        to_device(np.ones(3), device)


class FakeCuPy:
    """As much of CuPy as is asked whether a GPU works."""

    float32, error = np.float32, None

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, gpus=1, no_driver=False, no_library=None):
        self.gpus, self.no_driver, self.no_library = gpus, no_driver, no_library
        self.cuda = self.runtime = self
        self.asked = 0

    def getDeviceCount(self):
        self.asked += 1
        if self.no_driver:
            raise self.CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
        return self.gpus

    def Device(self, index):
        return contextlib.nullcontext(index)

    def ones(self, shape, dtype):
        if isinstance(self.no_library, RuntimeError):
            raise self.no_library
        return self

    def __add__(self, other):
        return self

    def __matmul__(self, other):
        if self.no_library:
            raise self.no_library


@pytest.fixture
def install(monkeypatch):
    """Have `import cupy` find this."""
    backend._gpu.cache_clear()
    yield lambda cupy: monkeypatch.setitem(sys.modules, "cupy", cupy)
    backend._gpu.cache_clear()


def test_a_gpu_that_works_is_asked_once(install):
    install(cupy := FakeCuPy(gpus=3))
    for _ in range(2):
        with on_device("cuda:2") as gpu:
            assert gpu == 2
    assert cupy.asked == 1
    with on_device("cpu"):
        pass
    assert cupy.asked == 1


def test_cuda_without_a_driver_says_what_cuda_says(install):
    install(FakeCuPy(no_driver=True))
    with pytest.raises(
        RuntimeError, match="device: 'cuda:1' needs an NVIDIA GPU and a recent driver.*CUDA says: cudaErrorInsu"
    ):
        on_device("cuda:1")


def test_a_number_too_high_says_what_is_there(install):
    install(FakeCuPy(gpus=2))
    with pytest.raises(RuntimeError, match="device: 'cuda:2' is not there; this machine has cuda:0, cuda:1$"):
        on_device("cuda:2")


@pytest.mark.parametrize("error", [ImportError("libcublas.so.13"), RuntimeError("CuPy failed to load libnvrtc.so.12")])
def test_cuda_without_its_libraries_says_which(install, error):
    install(FakeCuPy(no_library=error))
    with pytest.raises(RuntimeError, match=f"library of the CUDA toolkit is missing: pip install.*cuda12.*{error}"):
        on_device("cuda")


def test_cupy_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path / "cupy.py").write_text("raise ImportError('numpy is too old')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    backend._gpu.cache_clear()
    with pytest.raises(RuntimeError, match="is installed but cannot be imported: numpy is too old"):
        on_device("cuda")


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_with_the_real_cupy():
    """In a process of its own, where nothing is imitated: where there is no GPU, the message says so."""
    code = "from tinyddpm.backend import to_device; import numpy; print(to_device(numpy.ones(1), 'cuda'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        result.stdout == "[1.]\n"
        or "RuntimeError: device: 'cuda' needs an NVIDIA GPU and a recent driver" in result.stderr
    )


class TestPaired:
    @pytest.fixture
    def double(self, install, monkeypatch):
        """A function with a twin for each kind of array."""
        install(cupy := FakeCuPy())
        cupy.ndarray = type("ndarray", (), {})
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

    def test_by_the_first_argument_an_array(self, double):
        assert double(np.ones(2)) == ("cpu", 2) and double(np.ones(()), times=3) == ("cpu", 3)
        assert double(np.float32(1), 4) == ("cpu", 4)  # what NumPy's sums may return
        assert double(sys.modules["cupy"].ndarray(), times=5) == ("cuda", 5)

    def test_or_a_model_by_its_device(self, double):
        for device, kind in (("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda")):
            model = lambda x, t: x
            model.device = device
            assert double(model) == (kind, 2)
        assert double(lambda x, t: x) == ("cpu", 2)  # any function is one

    @pytest.mark.parametrize("x", [3.0, [1.0], "cpu", None])
    def test_nothing_else(self, double, x):
        with pytest.raises(TypeError, match="expected a NumPy or CuPy array, got"):
            double(x)

    def test_a_function_without_a_twin_is_itself(self, double):
        single = backend.paired(lambda x: x)
        for x in (np.ones(2), sys.modules["cupy"].ndarray(), lambda x, t: x):
            assert single(x) is x

    def test_the_plain_way_is_at_hand(self, double):
        assert double.__doc__ == "Times two." and double.__name__ == "double"
        for x in (np.ones(2), sys.modules["cupy"].ndarray()):
            assert double.plain(x, times=6) == ("plain", 6)
            with backend.plain():
                assert double(x, times=7) == ("plain", 7)
            assert double(x)[0] != "plain"


def test_twins_are_imported_when_they_are_needed_and_not_before():
    """Those for a CPU are not needed to import the package, those for a GPU not without one."""
    code = """
import sys
import numpy as np
from tinyddpm.autograd.functional import column_sums
seen = lambda: [name for name in ("cpu", "cuda") if f"tinyddpm.speed.{name}" in sys.modules]
print(seen(), column_sums(np.ones((3, 1))), seen())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[] [3.] ['cpu']\n"
