"""The array module without a GPU: what passes through, and what asking for CUDA says where there is none."""

import importlib.util
import sys

import numpy as np
import pytest

from tinyddpm.backend import array_module, device_of, is_array, like, to_device, to_numpy


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


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "", "cpu:0"])
def test_unknown_devices(device):
    with pytest.raises(ValueError, match=f"device: '{device}' is unknown; use 'cpu', 'cuda' or 'cuda:N'"):
        to_device(np.ones(3), device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cupy_says_how_to_get_it(device, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # makes `import cupy` fail, as where it is not installed
    with pytest.raises(RuntimeError, match=f"device: '{device}' needs CuPy.*pip install 'tinyddpm.cuda12.'"):
        to_device(np.ones(3), device)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_cuda_without_a_driver_says_what_cuda_says():
    import cupy

    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        with pytest.raises(RuntimeError, match="device: 'cuda' cannot be used; CUDA says"):
            to_device(np.ones(3), "cuda")
    else:
        pytest.skip("there is a GPU")
