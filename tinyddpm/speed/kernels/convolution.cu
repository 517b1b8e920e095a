// Convolution as one matrix product: `gather` lays out the columns that are multiplied, `add_up` is its transpose.
// Images are (N, H, W, C), outputs (N, OH, OW, O), columns (N OH OW, K) with k = (u, v, c); see conv.py.

// A thread stays with one k, for PIXELS outputs one after the other, since to take k apart it must divide, which is slow.
// On its way the block sets y, of O channels, to the bias; the product is then added to that.
extern "C" __global__ void gather(const REAL* __restrict__ x, REAL* columns, const SUM* __restrict__ bias, SUM* y,
                                  long long pixels, long long H, long long W, long long C, long long OH, long long OW,
                                  long long kw, long long K, long long O, long long stride, long long top,
                                  long long left) {
    unsigned first = blockIdx.x * PIXELS;  // there are fewer than 2^32 pixels, and numbers in dx
    int count = min((long long)PIXELS, pixels - first);
    for (int k = threadIdx.x; k < K; k += blockDim.x) {
        int c = k % (int)C, v = k / (int)C % (int)kw, u = k / (int)C / (int)kw;
        int j = first % (unsigned)OW, i = first / (unsigned)OW % (unsigned)OH;
        size_t n = first / (unsigned)OW / (unsigned)OH;
        for (int p = 0; p < count; p++) {
            int h = i * (int)stride + u - (int)top, w = j * (int)stride + v - (int)left;
            bool inside = h >= 0 && h < H && w >= 0 && w < W;
            columns[(size_t)(first + p) * K + k] = inside ? x[((n * H + h) * W + w) * C + c] : (REAL)0;
            if (++j == OW) {
                j = 0;
                if (++i == OH) {
                    i = 0;
                    n++;
                }
            }
        }
    }
    for (int o = threadIdx.x; o < O; o += blockDim.x)
        for (int p = 0; p < count; p++) y[(size_t)(first + p) * O + o] = bias[o];
}

// A thread adds up what all outputs owe to one number of dx, so that no two threads write to the same place.
extern "C" __global__ void add_up(const SUM* __restrict__ owed, SUM* dx, long long size, long long H, long long W,
                                  long long C, long long OH, long long OW, long long kh, long long kw,
                                  long long stride, long long top, long long left) {
    unsigned index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= size) return;
    unsigned pixel = index / (unsigned)C, c = index % (unsigned)C;
    int w = pixel % (unsigned)W, h = pixel / (unsigned)W % (unsigned)H;
    size_t n = pixel / (unsigned)W / (unsigned)H;
    SUM sum = 0;
    for (int u = 0; u < kh; u++) {
        int i = h + (int)top - u;  // i stride + u - top = h
        if (stride > 1) {
            if (i % (int)stride) continue;
            i /= (int)stride;
        }
        if (i < 0 || i >= OH) continue;
        for (int v = 0; v < kw; v++) {
            int j = w + (int)left - v;
            if (stride > 1) {
                if (j % (int)stride) continue;
                j /= (int)stride;
            }
            if (j >= 0 && j < OW) sum += owed[(((n * OH + i) * OW + j) * kh * kw + u * kw + v) * C + c];
        }
    }
    dx[index] = sum;
}
