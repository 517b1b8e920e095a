// Group normalisation, with SiLU if asked: xhat = (x - mean) rstd, z = gamma xhat + beta, y = z or z sigma(z); fused.py.
// x is (N, L, C). A block has one group of one image, L positions of D = C / groups channels.

// Which numbers of its group a thread works on: those of one channel (or of each `columns`-th, should there be more
// channels than threads) at every `rows`-th position.
struct Group {
    long long D, columns, rows;  // the block takes `columns` channels of `rows` positions at a time
    size_t start, C;
    int row, column;  // of this thread
    bool works;       // a few threads may be left over

    __device__ Group(long long L, long long C, long long groups) : D(C / groups), C(C) {
        columns = min(D, (long long)THREADS);
        rows = THREADS / columns;
        start = blockIdx.x / groups * L * C + blockIdx.x % groups * D;
        row = threadIdx.x / columns;
        column = threadIdx.x % columns;
        works = row < rows;
    }
    __device__ size_t at(long long l, long long d) const { return start + l * C + d; }
    __device__ size_t channel(long long d) const { return (start + d) % C; }
};

__device__ REAL block_sum(REAL value) {  // over the threads of the block; all of them get it
    __shared__ REAL sums[THREADS];
    sums[threadIdx.x] = value;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    value = sums[0];
    __syncthreads();  // or another call would overwrite it
    return value;
}

extern "C" __global__ void normalise(const REAL* __restrict__ x, const REAL* __restrict__ gamma,
                                     const REAL* __restrict__ beta, REAL* y, REAL* means, REAL* rstds, long long L,
                                     long long C, long long groups, double eps, long long silu) {
    Group group(L, C, groups);
    REAL sum = 0, squares = 0, size = L * group.D;
    if (group.works)
        for (long long d = group.column; d < group.D; d += group.columns)
            for (long long l = group.row; l < L; l += group.rows) sum += x[group.at(l, d)];
    REAL mean = block_sum(sum) / size;
    if (group.works)
        for (long long d = group.column; d < group.D; d += group.columns)
            for (long long l = group.row; l < L; l += group.rows) {
                REAL centred = x[group.at(l, d)] - mean;
                squares += centred * centred;
            }
    REAL rstd = 1 / sqrt(block_sum(squares) / size + (REAL)eps);
    if (threadIdx.x == 0) {
        means[blockIdx.x] = mean;
        rstds[blockIdx.x] = rstd;
    }
    if (!group.works) return;
    for (long long d = group.column; d < group.D; d += group.columns) {
        REAL a = gamma[group.channel(d)] * rstd, b = beta[group.channel(d)];
        for (long long l = group.row; l < L; l += group.rows) {
            REAL z = a * (x[group.at(l, d)] - mean) + b;
            y[group.at(l, d)] = silu ? z / (1 + exp(-z)) : z;
        }
    }
}

// dz = dL/dz is summed over the positions of each channel, for beta, and times xhat, for gamma; both (N, C). Mean and
// variance depend on x too, so dx loses its mean and its projection on xhat, over the group.
extern "C" __global__ void normalise_grad(const REAL* __restrict__ x, const REAL* __restrict__ g,
                                          const REAL* __restrict__ gamma, const REAL* __restrict__ beta,
                                          const REAL* __restrict__ means, const REAL* __restrict__ rstds, REAL* dx,
                                          REAL* dgamma, REAL* dbeta, long long L, long long C, long long groups,
                                          long long silu) {
    __shared__ REAL alone[THREADS], times_xhat[THREADS];
    Group group(L, C, groups);
    REAL mean = means[blockIdx.x], rstd = rstds[blockIdx.x], size = L * group.D;

    auto dz = [&](size_t at, size_t channel, REAL xhat) {
        if (!silu) return g[at];
        REAL z = gamma[channel] * xhat + beta[channel], s = 1 / (1 + exp(-z));
        return g[at] * s * (1 + z * (1 - s));
    };

    REAL of_mean = 0, of_projection = 0;
    for (long long first = 0; first < group.D; first += group.columns) {
        long long d = first + group.column;
        bool works = group.works && d < group.D;
        size_t channel = group.channel(d);
        REAL a = 0, t = 0;
        for (long long l = group.row; works && l < L; l += group.rows) {
            size_t at = group.at(l, d);
            REAL xhat = (x[at] - mean) * rstd, here = dz(at, channel, xhat);
            a += here;
            t += here * xhat;
        }
        alone[threadIdx.x] = a;
        times_xhat[threadIdx.x] = t;
        __syncthreads();
        if (works && group.row == 0) {
            for (int row = 1; row < group.rows; row++) {
                a += alone[row * group.columns + group.column];
                t += times_xhat[row * group.columns + group.column];
            }
            dbeta[blockIdx.x / groups * C + channel] = a;
            dgamma[blockIdx.x / groups * C + channel] = t;
            of_mean += gamma[channel] * a;
            of_projection += gamma[channel] * t;
        }
        __syncthreads();
    }
    of_mean = block_sum(of_mean) / size;
    of_projection = block_sum(of_projection) / size;
    if (!group.works) return;
    for (long long d = group.column; d < group.D; d += group.columns) {
        size_t channel = group.channel(d);
        for (long long l = group.row; l < L; l += group.rows) {
            size_t at = group.at(l, d);
            REAL xhat = (x[at] - mean) * rstd;
            dx[at] = rstd * (gamma[channel] * dz(at, channel, xhat) - of_mean - xhat * of_projection);
        }
    }
}
