// Softmax along the rows of a matrix, and its gradient; see functional.py. A warp, 32 threads, has a row. Its threads
// exchange registers, with those whose number differs in one bit, until each has the sum, or maximum, of all.

__device__ REAL warp_sum(REAL value) {
    for (int bit = 16; bit > 0; bit /= 2) value += __shfl_xor_sync(0xffffffff, value, bit);
    return value;
}

__device__ REAL warp_max(REAL value) {
    for (int bit = 16; bit > 0; bit /= 2) value = max(value, __shfl_xor_sync(0xffffffff, value, bit));
    return value;
}

extern "C" __global__ void softmax_rows(const REAL* x, REAL* y, long long rows, long long size) {
    size_t row = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    x += row * size;
    y += row * size;
    int lane = threadIdx.x % 32;
    REAL most = x[0], sum = 0;
    for (long long i = lane; i < size; i += 32) most = max(most, x[i]);
    most = warp_max(most);
    for (long long i = lane; i < size; i += 32) sum += y[i] = exp(x[i] - most);
    sum = warp_sum(sum);
    for (long long i = lane; i < size; i += 32) y[i] /= sum;
}

extern "C" __global__ void softmax_rows_grad(const REAL* y, const REAL* g, REAL* dx, long long rows, long long size) {
    size_t row = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    y += row * size;
    g += row * size;
    dx += row * size;
    REAL dot = 0;
    for (long long i = threadIdx.x % 32; i < size; i += 32) dot += y[i] * g[i];
    dot = warp_sum(dot);
    for (long long i = threadIdx.x % 32; i < size; i += 32) dx[i] = y[i] * (g[i] - dot);
}
