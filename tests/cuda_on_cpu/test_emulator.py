"""The emulator refuses what a GPU refuses: `pytest --cuda emulated tests/cuda_on_cpu`. That it computes what a GPU
computes, all tests that run on it say, and what it counts, speed/test_cuda_counts.py."""

import numpy as np
import pytest

import cuda_on_cpu

if not cuda_on_cpu.counts.of_the_emulator:
    pytest.skip("tests the emulator: --cuda emulated", allow_module_level=True)
import cupy  # noqa: E402  not where it is another one
from cupy_backends.cuda.libs import cublas  # noqa: E402

RNG = np.random.default_rng(0)
R_32F, COMPUTE_32F = 0, 68


def run(name, parameters, body, blocks, threads, *arguments):
    """Run a kernel of one's own."""
    code = f'extern "C" __global__ void {name}({parameters}) {{ {body} }}'
    cupy.RawKernel(code, name)((blocks,), (threads,), arguments)


def test_every_float16_survives_the_way_to_float32_and_back():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = cupy.asarray(every).astype(np.float32)
    np.testing.assert_array_equal(values.get(), every.astype(np.float32))
    np.testing.assert_array_equal(values.astype(np.float16).get(), every)
    between = RNG.standard_normal(10000).astype(np.float32) * np.float32(10.0) ** RNG.integers(-9, 5, 10000)
    np.testing.assert_array_equal(cupy.asarray(between).astype(np.float16).get(), between.astype(np.float16))


def test_fresh_memory_is_not_zero():
    assert cupy.isnan(cupy.empty(1 << 20, np.float32)).all()
    x = cupy.zeros(32, np.float32)
    run("peek", "float *x", "__shared__ float s[32]; x[threadIdx.x] = s[threadIdx.x];", 1, 32, x)
    assert cupy.isnan(x).all()


def test_what_can_not_run_says_why():
    x = cupy.zeros(1, np.float32)
    for body in ("extern __shared__ float s[]; x[0] = s[0];", "x[0] = nonsense;"):
        with pytest.raises(cupy.cuda.compiler.CompileException, match="error: .*(conflicting|nonsense)"):
            run("broken", "float *x", body, 1, 1, x)
    with pytest.raises(RuntimeError, match="stuck: .* different barriers"):
        run("stuck", "", "if (threadIdx.x) __syncthreads(); else __shfl_sync(~0u, 1, 0);", 1, 2)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="INVALID_VALUE"):
        run("too_many", "", "", 1, 2048)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="NOT_FOUND"):
        cupy.RawKernel('extern "C" __global__ void here() {}', "there")((1,), (1,), ())


def test_a_product_is_written_where_it_belongs_and_refused_as_by_cublas():
    """Of matrices in a larger one, stored by columns: x^T y + z / 2."""
    (x, y, z), handle = RNG.standard_normal((3, 6, 4)).astype(np.float32), cupy.cuda.device.get_cublas_handle()
    sent, (one, half) = [cupy.asarray(a) for a in (x, y, z)], np.float32([[1], [0.5]])

    def product(lda, compute=COMPUTE_32F):
        X, Y, Z = ((a.data.ptr, R_32F) for a in sent)
        scalars = one.ctypes.data, half.ctypes.data
        cublas.gemmEx(handle, 1, 0, 2, 5, 3, scalars[0], *X, lda, *Y, 4, scalars[1], *Z, 4, compute, -1)

    product(4)
    expected = z.copy()
    expected[:5, :2] = y[:5, :3] @ x[:2, :3].T + z[:5, :2] / 2
    np.testing.assert_allclose(sent[2].get(), expected, rtol=1e-5)
    with pytest.raises(cublas.CUBLASError, match="INVALID_VALUE"):
        product(2)
    with pytest.raises(cublas.CUBLASError, match="NOT_SUPPORTED"):
        product(4, compute=64)


def test_what_is_not_emulated_raises(capfd):
    with pytest.raises(Exception, match="CURAND_STATUS"):
        cupy.random.rand(3)
    assert "curandCreateGenerator is not emulated" in capfd.readouterr().err
    with pytest.raises(NotImplementedError, match="cuda_on_cpu does not imitate memGetInfo"):
        cupy.cuda.runtime.memGetInfo()


def test_two_devices():
    assert cupy.cuda.runtime.getDeviceCount() == 2
    kernel = cupy.RawKernel('extern "C" __global__ void one(float *x) { x[0] = 1; }', "one")
    with cupy.cuda.Device(1):
        x = cupy.arange(6, dtype=np.float32)
        assert (x * 2).sum().item() == 30
        kernel((1,), (1,), (x,))
        assert x.tolist() == [1, 1, 2, 3, 4, 5]
    assert x.device.id == 1
    with pytest.raises(ValueError, match=r"array resides \(1\) is different from the current device \(0\)"):
        x + 1
    with pytest.raises(RuntimeError, match="argument 0 is on device 1, but device 0 is current"):
        kernel((1,), (1,), (x,))
    with pytest.raises(RuntimeError, match="gemmEx: argument 7 is on device 1, but device 0 is current"):
        cublas.gemmEx(*[0] * 7, x.data.ptr)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="InvalidDevice"):
        cupy.cuda.Device(2).use()
    cuda_on_cpu.counts.reset()
    assert cupy.asarray(x).device.id == 0
    assert cuda_on_cpu.counts.copies == {"between devices": 1}


def test_it_can_not_be_installed_twice():
    with pytest.raises(RuntimeError, match="cuda_on_cpu: cupy has been imported already"):
        cuda_on_cpu.install(numbers=True)
