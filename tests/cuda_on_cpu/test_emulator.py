"""The emulator itself, against NumPy: `pytest --cuda emulated tests/cuda_on_cpu`. What it counts, see
speed/test_cuda_counts.py."""

import itertools

import numpy as np
import pytest
from reference import rounded

import cuda_on_cpu

if not cuda_on_cpu.counts.of_the_emulator:
    pytest.skip("tests the emulator: --cuda emulated", allow_module_level=True)
import cupy  # noqa: E402  not where it is another one
from cupy_backends.cuda.libs import cublas  # noqa: E402

counts = cuda_on_cpu.counts
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 4, 8, 8)).astype(np.float32)
W = RNG.standard_normal((5, 36)).astype(np.float32)
R_32F, R_64F, R_16F, R_16BF = 0, 1, 2, 14
COMPUTE_32F, COMPUTE_64F, COMPUTE_TF32 = 68, 70, 77
CENTRE = r"""
extern "C" __global__ void __launch_bounds__(128) centre(const float *__restrict__ x, float *y, int n) {
    __shared__ float sums[128];
    int thread = threadIdx.x;
    float sum = 0;
    for (int i = thread; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
    sums[thread] = sum;
    __syncthreads();
    for (int half = 64; half > 0; half /= 2) {
        if (thread < half) sums[thread] += sums[thread + half];
        __syncthreads();
    }
    for (int i = thread; i < n; i += blockDim.x) y[blockIdx.x * n + i] = x[blockIdx.x * n + i] - sums[0] / n;
}
"""

OPERATIONS = {  # one of each way of computing; the tests of the package's own ops go through the emulator as well
    "exp": lambda xp, x, w: xp.exp(x),
    "where": lambda xp, x, w: xp.where(x > 0, x, 0.0),
    "variance": lambda xp, x, w: x.var((2, 3)),
    "argmax": lambda xp, x, w: x.argmax(1),
    "cumulative sum": lambda xp, x, w: xp.cumsum(x.reshape(-1)),
    "quantile": lambda xp, x, w: xp.quantile(xp.abs(x).reshape(2, -1), 0.9, axis=1),
    "pad": lambda xp, x, w: xp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))),
    "boolean mask": lambda xp, x, w: x[x > 0],
    "float16": lambda xp, x, w: x.astype(np.float16) * 2,
    "silu": lambda xp, x, w: SILU(x) if xp is cupy else x / (1 + np.exp(-x)),
    "length": lambda xp, x, w: LENGTH(x, axis=(2, 3)) if xp is cupy else np.sqrt((x**2).sum((2, 3))),
    "batched product": lambda xp, x, w: x @ x.swapaxes(2, 3),
    "broadcast product": lambda xp, x, w: x @ x[:1, :1],
    "dot of vectors": lambda xp, x, w: w[0] @ w[1],
}
SILU = cupy.ElementwiseKernel("T x", "T y", "y = x / (1 + exp(-x))", "silu")
LENGTH = cupy.ReductionKernel("T x", "T y", "x * x", "a + b", "y = sqrt(a)", "0", "length")


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_agree_with_numpy(name):
    expected = np.asarray(OPERATIONS[name](np, X, W))
    result = cupy.asnumpy(OPERATIONS[name](cupy, cupy.asarray(X), cupy.asarray(W)))
    assert result.dtype == expected.dtype
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=2e-5)


def run(name, parameters, body, blocks, threads, *arguments, before=""):
    """Run a kernel of one's own."""
    code = f'{before} extern "C" __global__ void {name}({parameters}) {{ {body} }}'
    cupy.RawKernel(code, name)((blocks,), (threads,), arguments)


def test_raw_kernels_with_shared_memory_barriers_and_shuffles():
    x, y = cupy.asarray(X), cupy.empty(X.shape, np.float32)
    cupy.RawKernel(CENTRE, "centre")((8,), (128,), (x, y, np.int32(64)))
    np.testing.assert_allclose(y.get(), X - X.mean((2, 3), keepdims=True), atol=1e-6)
    sums = """float sum = x[blockIdx.x * 32 + threadIdx.x];
              for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
              y[blockIdx.x * 32 + threadIdx.x] = sum;"""
    run("warp_sum", "const float *x, float *y", sums, 16, 32, x, y)
    np.testing.assert_allclose(
        y.reshape(16, 32).get(), X.reshape(16, 32).sum(1, keepdims=True) + np.zeros(32), atol=1e-5
    )


def test_bfloat16_is_rounded_to_nearest_even():
    x = cupy.asarray(np.float32([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.14159, np.inf]))
    body = "x[threadIdx.x] = __bfloat162float(__float2bfloat16_rn(x[threadIdx.x]));"
    run("to_bfloat16", "float *x", body, 1, 6, x, before="#include <cuda_bf16.h>\n")
    assert x.tolist() == [1, 1, 1 + 2**-6, 1 + 2**-7, -3.140625, np.inf]


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
        cupy.RawKernel(CENTRE, "centre")((1,), (2048,), (x, x, np.int32(1)))
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="NOT_FOUND"):
        cupy.RawKernel(CENTRE, "center")((1,), (1,), ())


def store(x, kind):
    """Return `x` as the type `kind`, and the numbers that this leaves."""
    if kind == R_16BF:
        x = rounded(x.astype(np.float32), 7)
        return (x.view(np.uint32) >> 16).astype(np.uint16), x.astype(np.float64)
    stored = x.astype({R_32F: np.float32, R_64F: np.float64, R_16F: np.float16}[kind])
    return stored, stored.astype(np.float64)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("kind", "result_kind", "compute", "tolerance"), [
    (R_32F, R_32F, COMPUTE_32F, 1e-5),
    (R_64F, R_64F, COMPUTE_64F, 1e-13),
    (R_16F, R_16F, COMPUTE_32F, 2e-2),
    (R_16F, R_32F, COMPUTE_32F, 1e-5),
    (R_16BF, R_32F, COMPUTE_32F, 1e-5),
    (R_32F, R_32F, COMPUTE_TF32, 1e-5),
])  # fmt: skip
def test_gemm(kind, result_kind, compute, tolerance, batched):
    """Of a batch, the first b is for all: a stride of 0."""
    m, n, k, spare = 70, 7, 21, 2  # rows beyond the matrix, which must stay as they are
    handle, scalar, count = cupy.cuda.device.get_cublas_handle(), "d" if kind == R_64F else "f", 3 if batched else 1
    for ta, tb, beta in itertools.product((0, 1), (0, 1), (0.0, 1.0, -0.5)):
        # as CuPy sees it each matrix is stored by rows and transposed: columns first, then rows
        a_stored, a = store(RNG.standard_normal((count, m if ta else k, (k if ta else m) + spare)), kind)
        b_stored, b = store(RNG.standard_normal((count, k if tb else n, (n if tb else k) + spare)), kind)
        c_stored, c = store(RNG.standard_normal((count, n, m + spare)), result_kind)
        if beta == 0:
            c_stored[:, :, :m] = np.nan  # is not read
        if compute == COMPUTE_TF32:
            a, b = rounded(a, 10), rounded(b, 10)
        left, right = a[:, :, :-spare], b[:1, :, :-spare]
        product = (right.swapaxes(1, 2) if tb else right) @ (left.swapaxes(1, 2) if ta else left)
        expected = c.copy()
        expected[:, :, :m] = 2 * product + (beta * c[:, :, :m] if beta else 0)

        alpha, beta_scalar = np.array(2, scalar), np.array(beta, scalar)
        arrays = [cupy.asarray(x) for x in (a_stored, b_stored, c_stored)]
        strides = (arrays[0][0].size,), (0,), (arrays[2][0].size,)
        A, B, C = ((x.data.ptr, kind_of, x.shape[2], *(stride if batched else ()))
                   for x, kind_of, stride in zip(arrays, (kind, kind, result_kind), strides))  # fmt: skip
        start = handle, ta, tb, m, n, k, alpha.ctypes.data, *A, *B, beta_scalar.ctypes.data, *C
        if batched:
            cublas.gemmStridedBatchedEx(*start, count, compute, -1)
        else:
            cublas.gemmEx(*start, compute, -1)
        got = arrays[2].get().astype(np.float64)
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * 10, err_msg=f"{ta} {tb} {beta}")


def test_gemm_refuses_what_cublas_refuses():
    x, one = cupy.zeros((4, 4), np.float32), np.array(1, np.float32).ctypes.data
    handle, X = cupy.cuda.device.get_cublas_handle(), (x.data.ptr, R_32F)

    def product(lda, compute=COMPUTE_32F):
        cublas.gemmEx(handle, 0, 0, 4, 4, 4, one, *X, lda, *X, 4, one, *X, 4, compute, -1)

    product(4)
    with pytest.raises(cublas.CUBLASError, match="INVALID_VALUE"):
        product(3)
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
    counts.reset()
    assert cupy.asarray(x).device.id == 0
    assert counts.copies == {"between devices": 1}


def test_it_can_not_be_installed_twice():
    assert cuda_on_cpu.reason_why_not() == "cupy has been imported already"
    with pytest.raises(RuntimeError, match="imported already"):
        cuda_on_cpu.install(numbers=True)
