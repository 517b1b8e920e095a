"""The emulator and the null device themselves: against NumPy, and counts of small programs. Run by selftest.py."""

import ast
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cuda_on_cpu

if os.environ.get("CUDA_ON_CPU_SELFTEST") != "1":
    pytest.skip("needs a process of its own: python tests/cuda_on_cpu/selftest.py", allow_module_level=True)
if cuda_on_cpu.reason_why_not() is not None:
    pytest.skip(cuda_on_cpu.reason_why_not(), allow_module_level=True)
cupy = cuda_on_cpu.install(numbers=True)

from cupy_backends.cuda.libs import cublas  # noqa: E402  after install

counts = cuda_on_cpu.counts
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 4, 8, 8)).astype(np.float32)
W = RNG.standard_normal((5, 36)).astype(np.float32)
R_32F, R_64F, R_16F, R_16BF = 0, 1, 2, 14
COMPUTE_32F, COMPUTE_64F, COMPUTE_TF32 = 68, 70, 77
WARP_SUM = r"""
extern "C" __global__ void warp_sum(const float *x, float *y) {
    float sum = x[blockIdx.x * 32 + threadIdx.x];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    y[blockIdx.x * 32 + threadIdx.x] = sum;
}
"""
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


def im2col(xp, x):
    """Return the 3x3 windows of 2 images of 8x8 with 4 channels as rows."""
    n, c, h, w = x.strides
    windows = xp.lib.stride_tricks.as_strided(x, (2, 6, 6, 4, 3, 3), (n, h, w, c, h, w))
    return windows.reshape(72, 36)


OPERATIONS = {
    "add": lambda xp, x, w: x + 1.0,
    "exp": lambda xp, x, w: xp.exp(x),
    "tanh": lambda xp, x, w: xp.tanh(x),
    "power": lambda xp, x, w: x**2,
    "square root": lambda xp, x, w: xp.sqrt(xp.abs(x)),
    "clip": lambda xp, x, w: xp.clip(x, -1, 1),
    "where": lambda xp, x, w: xp.where(x > 0, x, 0.0),
    "isfinite": lambda xp, x, w: xp.isfinite(x).all(),
    "sum": lambda xp, x, w: x.sum(),
    "sum over axes": lambda xp, x, w: x.sum((2, 3)),
    "mean": lambda xp, x, w: x.mean((1, 2, 3), keepdims=True),
    "variance": lambda xp, x, w: x.var((2, 3)),
    "maximum": lambda xp, x, w: x.max(1),
    "argmax": lambda xp, x, w: x.argmax(1),
    "cumulative sum": lambda xp, x, w: xp.cumsum(x.reshape(-1)),
    "sort": lambda xp, x, w: xp.sort(x, 1),
    "argsort": lambda xp, x, w: xp.argsort(w, 1),
    "quantile": lambda xp, x, w: xp.quantile(xp.abs(x).reshape(2, -1), 0.9, axis=1),
    "transposed copy": lambda xp, x, w: xp.ascontiguousarray(x.transpose(0, 2, 3, 1)),
    "pad": lambda xp, x, w: xp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))),
    "concatenate": lambda xp, x, w: xp.concatenate([x, x], 1),
    "take": lambda xp, x, w: x[xp.asarray([1, 0])],
    "boolean mask": lambda xp, x, w: x[x > 0],
    "float16": lambda xp, x, w: x.astype(np.float16) * 2,
    "arange": lambda xp, x, w: xp.arange(10, dtype=np.float32),
    "convolution": lambda xp, x, w: w @ im2col(xp, x).T,
    "batched product": lambda xp, x, w: x @ x.swapaxes(2, 3),
    "broadcast product": lambda xp, x, w: x @ x[:1, :1],
    "tensordot": lambda xp, x, w: xp.tensordot(w[:, :4], x, axes=([1], [1])),
    "dot of vectors": lambda xp, x, w: w[0] @ w[1],
    "matrix and vector": lambda xp, x, w: w @ w[0],
    "vector and matrix": lambda xp, x, w: w[:, 0] @ w,
    "integer product": lambda xp, x, w: (w * 9).astype(np.int32) @ (w * 9).astype(np.int32).T,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_agree_with_numpy(name):
    operation = OPERATIONS[name]
    expected = np.asarray(operation(np, X, W))
    result = cupy.asnumpy(operation(cupy, cupy.asarray(X), cupy.asarray(W)))
    assert result.dtype == expected.dtype
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=2e-5)


def test_raw_kernel_with_shared_memory_and_barriers():
    x = cupy.asarray(X)
    y = cupy.empty_like(x)
    cupy.RawKernel(CENTRE, "centre")((8,), (128,), (x, y, np.int32(64)))
    np.testing.assert_allclose(cupy.asnumpy(y), X - X.mean((2, 3), keepdims=True), atol=1e-6)
    assert any(name == "centre" and source == CENTRE for name, source, _ in cuda_on_cpu.sources)


def test_raw_kernel_with_shuffles():
    x = cupy.asarray(X.reshape(-1, 32))
    y = cupy.empty_like(x)
    cupy.RawKernel(WARP_SUM, "warp_sum")((16,), (32,), (x, y))
    np.testing.assert_allclose(y.get(), np.repeat(x.get().sum(1, keepdims=True), 32, 1), atol=1e-5)


def test_raw_module_of_templates():
    code = "template<class T, int N> __global__ void scale(T *x) { x[threadIdx.x] *= N; }"
    module = cupy.RawModule(code=code, name_expressions=["scale<float, 2>", "scale<double, 3>"])
    for dtype, expression, factor in (("f", "scale<float, 2>", 2), ("d", "scale<double, 3>", 3)):
        x = cupy.arange(5, dtype=dtype)
        module.get_function(expression)((1,), (5,), (x,))
        assert x.tolist() == [factor * i for i in range(5)]


def test_elementwise_and_reduction_kernels():
    x = cupy.asarray(X)
    silu = cupy.ElementwiseKernel("T x", "T y", "y = x / (1 + exp(-x))", "silu")
    np.testing.assert_allclose(silu(x).get(), X / (1 + np.exp(-X)), atol=1e-6)
    length = cupy.ReductionKernel("T x", "T y", "x * x", "a + b", "y = sqrt(a)", "0", "length")
    np.testing.assert_allclose(length(x, axis=(2, 3)).get(), np.sqrt((X**2).sum((2, 3))), rtol=1e-6)


def test_bfloat16_is_rounded_to_nearest_even():
    code = r"""
    #include <cuda_bf16.h>
    extern "C" __global__ void to_bfloat16(const float *x, float *y) {
        y[threadIdx.x] = __bfloat162float(__float2bfloat16_rn(x[threadIdx.x]));
    }
    """
    x = cupy.asarray(np.float32([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.14159, np.inf]))
    y = cupy.empty_like(x)
    cupy.RawKernel(code, "to_bfloat16")((1,), (6,), (x, y))
    assert y.tolist() == [1, 1, 1 + 2**-6, 1 + 2**-7, -3.140625, np.inf]


def test_every_float16_survives_the_way_to_float32_and_back():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = cupy.asarray(every).astype(np.float32)
    np.testing.assert_array_equal(values.get(), every.astype(np.float32))
    np.testing.assert_array_equal(values.astype(np.float16).get(), every)
    between = RNG.standard_normal(10000).astype(np.float32) * np.float32(10.0) ** RNG.integers(-9, 5, 10000)
    np.testing.assert_array_equal(cupy.asarray(between).astype(np.float16).get(), between.astype(np.float16))


def test_fresh_memory_is_not_zero():
    assert cupy.isnan(cupy.empty(1 << 20, np.float32)).all()
    code = 'extern "C" __global__ void peek(float *x) { __shared__ float s[32]; x[threadIdx.x] = s[threadIdx.x]; }'
    x = cupy.zeros(32, np.float32)
    cupy.RawKernel(code, "peek")((1,), (32,), (x,))
    assert cupy.isnan(x).all()


@pytest.mark.parametrize(
    "body", ["extern __shared__ float s[]; x[0] = s[0];", "x[0] = nonsense;"], ids=["dynamic shared memory", "an error"]
)
def test_what_does_not_compile_raises_with_the_reason(body):
    kernel = cupy.RawKernel(f'extern "C" __global__ void broken(float *x) {{ {body} }}', "broken")
    with pytest.raises(cupy.cuda.compiler.CompileException, match="error: .*(conflicting|nonsense)"):
        kernel((1,), (1,), (cupy.zeros(1, np.float32),))


def test_unequal_barriers_raise():
    code = 'extern "C" __global__ void stuck() { if (threadIdx.x) __syncthreads(); else __shfl_sync(~0u, 1, 0); }'
    with pytest.raises(RuntimeError, match="stuck: .* different barriers"):
        cupy.RawKernel(code, "stuck")((1,), (2,), ())


def test_impossible_launches_raise():
    kernel = cupy.RawKernel(CENTRE, "centre")
    x = cupy.zeros(1, np.float32)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="INVALID_VALUE"):
        kernel((1,), (2048,), (x, x, np.int32(1)))
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="NOT_FOUND"):
        cupy.RawKernel(CENTRE, "center")((1,), (1,), ())


# ---- cuBLAS ----


def tf32(x):
    """Return float32 numbers rounded to 10 bits of mantissa, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & 0xFFFFE000).astype(np.uint32).view(np.float32)


def bfloat16_bits(x):
    """Return float32 numbers as bfloat16's bits, rounded to nearest even."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def of_bfloat16_bits(bits):
    """Return bfloat16's bits as float32 numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def store(x, kind):
    """Return `x` as the type `kind`, and the numbers that this leaves."""
    if kind == R_16BF:
        bits = bfloat16_bits(x.astype(np.float32))
        return bits, of_bfloat16_bits(bits).astype(np.float64)
    stored = x.astype({R_32F: np.float32, R_64F: np.float64, R_16F: np.float16}[kind])
    return stored, stored.astype(np.float64)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("transposes", list(itertools.product((0, 1), (0, 1))), ids=str)
@pytest.mark.parametrize(
    "kind, result_kind, compute, tolerance",
    [
        (R_32F, R_32F, COMPUTE_32F, 1e-5),
        (R_64F, R_64F, COMPUTE_64F, 1e-13),
        (R_16F, R_16F, COMPUTE_32F, 2e-2),
        (R_16F, R_32F, COMPUTE_32F, 1e-5),
        (R_16BF, R_32F, COMPUTE_32F, 1e-5),
        (R_32F, R_32F, COMPUTE_TF32, 1e-5),
    ],
)
@pytest.mark.parametrize("batched", [False, True])
def test_gemm(kind, result_kind, compute, tolerance, transposes, beta, batched):
    batch, m, n, k, spare = 3, 70, 7, 21, 2  # rows beyond the matrix, which must stay as they are
    ta, tb = transposes
    # as CuPy sees it each matrix is stored by rows and transposed: columns first, then rows
    a_stored, a = store(RNG.standard_normal((batch, m if ta else k, (k if ta else m) + spare)), kind)
    b_stored, b = store(RNG.standard_normal((batch, k if tb else n, (n if tb else k) + spare)), kind)
    c_stored, c = store(RNG.standard_normal((batch, n, m + spare)), result_kind)
    if compute == COMPUTE_TF32:
        a, b = tf32(a_stored).astype(np.float64), tf32(b_stored).astype(np.float64)
    lda, ldb, ldc = a.shape[2], b.shape[2], c.shape[2]
    op_a, op_b = a[:, :, :-spare].swapaxes(1, 2), b[:, :, :-spare].swapaxes(1, 2)
    product = (op_a.swapaxes(1, 2) if ta else op_a) @ (op_b.swapaxes(1, 2) if tb else op_b)
    expected = c.copy()
    b0 = 0 if batched else None  # the strided one uses the first b for all: a stride of 0
    if batched:
        one_b = op_b[:1].swapaxes(1, 2) if tb else op_b[:1]
        product = (op_a.swapaxes(1, 2) if ta else op_a) @ one_b
    else:
        product = product[:1]
    count = len(product)
    expected[:count, :, :m] = 2 * product.swapaxes(1, 2) + (beta * c[:count, :, :m] if beta else 0)

    scalar = np.float64 if kind == R_64F else np.float32
    alpha, beta_scalar = np.array(2, scalar), np.array(beta, scalar)
    A, B, C = cupy.asarray(a_stored), cupy.asarray(b_stored), cupy.asarray(c_stored)
    handle = cupy.cuda.device.get_cublas_handle()
    start = (handle, ta, tb, m, n, k, alpha.ctypes.data)
    if batched:
        left, right = (A.data.ptr, kind, lda, A[0].size), (B.data.ptr, kind, ldb, b0)
        end = (C.data.ptr, result_kind, ldc, C[0].size, batch, compute, -1)
        cublas.gemmStridedBatchedEx(*start, *left, *right, beta_scalar.ctypes.data, *end)
    else:
        left, right, end = (A.data.ptr, kind, lda), (B.data.ptr, kind, ldb), (C.data.ptr, result_kind, ldc, compute, -1)
        cublas.gemmEx(*start, *left, *right, beta_scalar.ctypes.data, *end)
    np.testing.assert_allclose(C.get().astype(np.float64), expected, rtol=tolerance, atol=tolerance * 10)


def test_gemm_refuses_what_cublas_refuses():
    x = cupy.zeros((4, 4), np.float32)
    one = np.array(1, np.float32).ctypes.data
    handle = cupy.cuda.device.get_cublas_handle()

    def product(lda, compute=COMPUTE_32F, kind=R_32F):
        x_and_kind = (x.data.ptr, kind)
        cublas.gemmEx(handle, 0, 0, 4, 4, 4, one, *x_and_kind, lda, *x_and_kind, 4, one, *x_and_kind, 4, compute, -1)

    product(4)
    with pytest.raises(cublas.CUBLASError, match="INVALID_VALUE"):
        product(3)
    with pytest.raises(cublas.CUBLASError, match="NOT_SUPPORTED"):
        product(4, compute=64)


def test_zero_beta_does_not_read_the_result():
    x = cupy.ones((3, 3), np.float32)
    out = cupy.full((3, 3), np.nan, np.float32)
    assert cupy.matmul(x, x, out=out).tolist() == [[3.0] * 3] * 3


def test_what_is_not_emulated_raises(capfd):
    with pytest.raises(Exception, match="CURAND_STATUS"):
        cupy.random.rand(3)
    assert "curandCreateGenerator is not emulated" in capfd.readouterr().err
    with pytest.raises(NotImplementedError, match="streamBeginCapture"), cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()


# ---- two devices ----


def test_two_devices():
    assert cupy.cuda.runtime.getDeviceCount() == 2
    with cupy.cuda.Device(1):
        x = cupy.arange(6, dtype=np.float32)
        assert (x * 2).sum().item() == 30
    assert x.device.id == 1
    assert cupy.cuda.runtime.pointerGetAttributes(x.data.ptr + 4).device == 1
    with pytest.raises(ValueError, match=r"array resides \(1\) is different from the current device \(0\)"):
        x + 1
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="InvalidDevice"):
        cupy.cuda.Device(2).use()
    counts.reset()
    assert cupy.asarray(x).device.id == 0
    assert counts.copies == {"between devices": 1}


def test_raw_kernels_on_the_wrong_device_raise():
    kernel = cupy.RawKernel('extern "C" __global__ void one(float *x) { x[0] = 1; }', "one")
    with cupy.cuda.Device(1):
        x = cupy.zeros(1, np.float32)
        kernel((1,), (1,), (x,))
        assert x.item() == 1
        stream = cupy.cuda.Stream()
    with pytest.raises(RuntimeError, match="argument 0 is on device 1, but device 0 is current"):
        kernel((1,), (1,), (x,))
    with pytest.raises(RuntimeError, match="stream of another device"):
        kernel((1,), (1,), (cupy.zeros(1, np.float32),), stream=stream)


# ---- counts ----

PROGRAM = """
x = cupy.asarray(np.ones((4, 256), np.float32))
y = x @ x.T
z = cupy.zeros_like(y)
z[:] = y
float((y * 2).sum())
"""
EXPECTED = {
    "launches": {
        "cublasGemmEx": 1,
        "cupy_multiply__float32_float_float32": 1,
        "cupy_sum": 1,
    },
    "copies": {"host to device": 1, "device to host": 1, "device to device": 1},
    "copied_bytes": {"host to device": 4096, "device to host": 4, "device to device": 64},
    "synchronisations": {"streamSynchronize": 1},
    "memset": 1,
    "peak_in_use": 4096 + 3 * 512 + 512,
}


def counted(cupy, counts):
    """Run PROGRAM once, so that all is compiled, and count a second run."""
    for _ in range(2):
        counts.reset()
        scope = {"cupy": cupy, "np": np}
        before = counts.in_use
        exec(PROGRAM, scope)
        result = {name: getattr(counts, name) for name in EXPECTED}
        result["peak_in_use"] -= before
        del scope
    return {name: value if isinstance(value, int) else dict(value) for name, value in result.items()}


def test_counts_of_the_emulator():
    assert counted(cupy, counts) == EXPECTED


def test_counts_of_the_null_device():
    program = (
        "import cuda_on_cpu\n"
        "cupy = cuda_on_cpu.install(numbers=False)\n"
        f"import numpy as np\nPROGRAM = {PROGRAM!r}\nEXPECTED = {EXPECTED!r}\n"
        "import inspect\n"
    )
    import inspect

    program += inspect.getsource(counted) + "print(counted(cupy, cuda_on_cpu.counts))\n"
    folder = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == EXPECTED


def test_memory():
    cupy.get_default_memory_pool().free_all_blocks()
    counts.reset()
    before, before_in_use = counts.memory, counts.in_use
    x = cupy.empty(1 << 22, np.uint8)
    assert counts.memory - before == 1 << 22
    assert counts.in_use - before_in_use == 1 << 22
    del x
    assert counts.memory - before == 1 << 22  # the pool keeps it
    assert counts.in_use == before_in_use
    cupy.get_default_memory_pool().free_all_blocks()
    assert counts.memory == before
    assert counts.peak_memory - before == counts.peak_in_use - before_in_use == 1 << 22
    assert counts.synchronisations["free"] == 1


def test_too_much_memory_is_refused():
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        cupy.empty(81 << 30, np.uint8)


def test_it_can_not_be_installed_twice():
    assert cuda_on_cpu.reason_why_not() == "cupy has been imported already"
    with pytest.raises(RuntimeError, match="imported already"):
        cuda_on_cpu.install(numbers=True)
