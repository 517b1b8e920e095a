// Convolution as one matrix product: `gather` lays out the columns that are multiplied, `add_up` is its transpose.
// Images are (N, H, W, C), outputs (N, OH, OW, O), columns (N OH OW, K) with k = (u, v, c); see conv.py.

// A thread stays with one k, for PIXELS outputs one after the other, since to take k apart it must divide, which is slow.
// On its way the block sets y, of O channels, to the bias; the product is then added to that.
extern "C" __global__ void gather(const REAL* x, REAL* columns, const SUM* bias, SUM* y, long long pixels, long long H,
                                  long long W, long long C, long long OH, long long OW, long long kw, long long K,
                                  long long O, long long stride, long long top, long long left) {
    size_t first = (size_t)blockIdx.x * PIXELS;
    int count = min((long long)PIXELS, pixels - (long long)first);
    for (int k = threadIdx.x; k < K; k += blockDim.x) {
        int c = k % (int)C, v = k / (int)C % (int)kw, u = k / (int)C / (int)kw;
        int j = first % OW, i = first / OW % OH;
        size_t n = first / OW / OH;
        for (int p = 0; p < count; p++) {
            int h = i * (int)stride + u - (int)top, w = j * (int)stride + v - (int)left;
            bool inside = h >= 0 && h < H && w >= 0 && w < W;
            columns[(first + p) * K + k] = inside ? x[((n * H + h) * W + w) * C + c] : (REAL)0;
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
        for (int p = 0; p < count; p++) y[(first + p) * O + o] = bias[o];
}

// A thread adds up what all outputs owe to one number of dx, so that no two threads write to the same place.
extern "C" __global__ void add_up(const SUM* owed, SUM* dx, long long size, long long H, long long W, long long C,
                                  long long OH, long long OW, long long kh, long long kw, long long stride,
                                  long long top, long long left) {
    size_t index = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (index >= size) return;
    int c = index % C, w = index / C % W, h = index / C / W % H;
    size_t n = index / C / W / H;
    SUM sum = 0;
    for (int u = 0; u < kh; u++) {
        int i = h + (int)top - u;
        if (i < 0 || i % (int)stride || i / (int)stride >= OH) continue;
        for (int v = 0; v < kw; v++) {
            int j = w + (int)left - v;
            if (j < 0 || j % (int)stride || j / (int)stride >= OW) continue;
            sum += owed[(((n * OH + i / (int)stride) * OW + j / (int)stride) * kh * kw + u * kw + v) * C + c];
        }
    }
    dx[index] = sum;
}
