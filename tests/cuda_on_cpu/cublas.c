/* cuBLAS for CuPy on the CPU. libraries.py writes what comes before this: `#define NUMBERS 0` or 1, and COUNT(name),
 * which raises the counter of one of the functions that CuPy links.
 *
 * What is here checks its arguments as cuBLAS does and, with NUMBERS, computes. Functions that CuPy links and that are
 * not here are written by libraries.py: they only count, and with NUMBERS they fail and say so.
 * Matrices are stored by columns, as everywhere in cuBLAS; `lda` is the distance from one column to the next. */
#include <stdio.h>
#include <stdlib.h>
#include "small_floats.h"

enum { SUCCESS = 0, ALLOC_FAILED = 3, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum { R_32F = 0, R_64F = 1, R_16F = 2, R_16BF = 14 };
enum { COMPUTE_32F = 68, COMPUTE_32F_PEDANTIC = 69, COMPUTE_32F_FAST_TF32 = 77 };
enum { COMPUTE_64F = 70, COMPUTE_64F_PEDANTIC = 71 };
enum { TF32_TENSOR_OP_MATH = 3 };

/* ---- administration ---- */

typedef struct {
    void *stream;
    int pointer_mode, math_mode;
} Handle;

int cublasCreate_v2(void **handle) {
    COUNT(cublasCreate_v2);
    *handle = calloc(1, sizeof(Handle));
    return *handle ? SUCCESS : ALLOC_FAILED;
}
int cublasDestroy_v2(Handle *handle) {
    COUNT(cublasDestroy_v2);
    free(handle);
    return SUCCESS;
}
#define PROPERTY(GET, SET, TYPE, FIELD) \
    int SET(Handle *handle, TYPE value) { \
        COUNT(SET); \
        handle->FIELD = value; \
        return SUCCESS; \
    } \
    int GET(Handle *handle, TYPE *value) { \
        COUNT(GET); \
        *value = handle->FIELD; \
        return SUCCESS; \
    }
PROPERTY(cublasGetStream_v2, cublasSetStream_v2, void *, stream)
PROPERTY(cublasGetPointerMode_v2, cublasSetPointerMode_v2, int, pointer_mode)
PROPERTY(cublasGetMathMode, cublasSetMathMode, int, math_mode)

/* ---- matrix products ---- */

static int refuse(const char *what, int a, int b, int c, int compute) {
    fprintf(stderr, "cuda_on_cpu: %s is not emulated (types %d, %d, %d, compute type %d)\n", what, a, b, c, compute);
    return NOT_SUPPORTED;
}

static float load_float(const void *data, int type, long index) {
    switch (type) {
        case R_16F: return float_of_half_bits(((const uint16_t *)data)[index]);
        case R_16BF: return float_of_bfloat16_bits(((const uint16_t *)data)[index]);
        default: return ((const float *)data)[index];
    }
}
static void store_float(void *data, int type, long index, float value) {
    switch (type) {
        case R_16F: ((uint16_t *)data)[index] = half_bits_of_float(value); break;
        case R_16BF: ((uint16_t *)data)[index] = bfloat16_bits_of_float(value); break;
        default: ((float *)data)[index] = value;
    }
}
static double load_double(const void *data, int type, long index) { return ((const double *)data)[index]; }
static void store_double(void *data, int type, long index, double value) { ((double *)data)[index] = value; }

/* C = alpha op(A) op(B) + beta C, over copies in T. Rows go in strips of ROWS, of which A is packed one at a time; the
 * sum over k in runs of RUN, so that long sums in float32 keep their digits; four columns at once. */
#define ROWS 64
#define RUN 256
#define GEMM(T) \
    static int gemm_##T(int ta, int tb, long m, long n, long k, T alpha, const void *A, int a_type, long lda, \
                        const void *B, int b_type, long ldb, T beta, void *C, int c_type, long ldc, int tf32) { \
        long columns = (n + 3) / 4 * 4; \
        T *strip = malloc(sizeof(T) * ROWS * (k + 1)), *right = calloc(columns * k + 1, sizeof(T)); \
        T(*sum)[4][ROWS] = malloc(sizeof *sum), (*run)[4][ROWS] = malloc(sizeof *run); \
        if (!strip || !right || !sum || !run) return ALLOC_FAILED; \
        for (long j = 0; j < n && alpha != 0; j++) \
            for (long p = 0; p < k; p++) { \
                T value = load_##T(B, b_type, tb ? j + p * ldb : p + j * ldb); \
                right[(j / 4 * k + p) * 4 + j % 4] = tf32 ? tf32_of_float(value) : value; \
            } \
        for (long first = 0; first < m; first += ROWS) { \
            long rows = m - first < ROWS ? m - first : ROWS; \
            for (long p = 0; p < k && alpha != 0; p++) \
                for (long i = 0; i < ROWS; i++) { \
                    long row = first + i; \
                    T value = i < rows ? load_##T(A, a_type, ta ? p + row * lda : row + p * lda) : 0; \
                    strip[p * ROWS + i] = tf32 ? tf32_of_float(value) : value; \
                } \
            for (long j = 0; j < n; j += 4) { \
                memset(sum, 0, sizeof *sum); \
                for (long start = 0; start < k && alpha != 0; start += RUN) { \
                    memset(run, 0, sizeof *run); \
                    for (long p = start; p < k && p < start + RUN; p++) { \
                        const T *b = right + (j / 4 * k + p) * 4, *a = strip + p * ROWS; \
                        for (int i = 0; i < ROWS; i++) { \
                            (*run)[0][i] += a[i] * b[0]; \
                            (*run)[1][i] += a[i] * b[1]; \
                            (*run)[2][i] += a[i] * b[2]; \
                            (*run)[3][i] += a[i] * b[3]; \
                        } \
                    } \
                    for (int c = 0; c < 4; c++) \
                        for (int i = 0; i < ROWS; i++) (*sum)[c][i] += (*run)[c][i]; \
                } \
                for (long c = 0; c < 4 && j + c < n; c++) \
                    for (long i = 0; i < rows; i++) { \
                        long at = first + i + (j + c) * ldc; \
                        T value = alpha * (*sum)[c][i]; \
                        store_##T(C, c_type, at, beta != 0 ? value + beta * load_##T(C, c_type, at) : value); \
                    } \
            } \
        } \
        free(strip), free(right), free(sum), free(run); \
        return SUCCESS; \
    }
GEMM(float)
GEMM(double)

static int bad_shapes(int ta, int tb, int m, int n, int k, int lda, int ldb, int ldc) {
    int a_rows = ta ? k : m, b_rows = tb ? n : k;
    return ta < 0 || ta > 2 || tb < 0 || tb > 2 || m < 0 || n < 0 || k < 0 || lda < (a_rows > 1 ? a_rows : 1) ||
           ldb < (b_rows > 1 ? b_rows : 1) || ldc < (m > 1 ? m : 1);
}

static int gemm(const char *name, Handle *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *A,
                int a_type, int lda, const void *B, int b_type, int ldb, const void *beta, void *C, int c_type, int ldc,
                int compute) {
    if (bad_shapes(ta, tb, m, n, k, lda, ldb, ldc) || !alpha || !beta) return INVALID_VALUE;
    if (!NUMBERS) return SUCCESS;
    if (m == 0 || n == 0) return SUCCESS;
    int in_double = compute == COMPUTE_64F || compute == COMPUTE_64F_PEDANTIC;
    if (in_double && a_type == R_64F && b_type == R_64F && c_type == R_64F)
        return gemm_double(ta, tb, m, n, k, *(double *)alpha, A, a_type, lda, B, b_type, ldb, *(double *)beta, C,
                           c_type, ldc, 0);
    int small = a_type == R_16F || a_type == R_16BF;
    int known = (a_type == R_32F || small) && (c_type == R_32F || c_type == a_type);
    int in_float = compute == COMPUTE_32F || compute == COMPUTE_32F_PEDANTIC || compute == COMPUTE_32F_FAST_TF32;
    if (!known || !in_float || a_type != b_type) return refuse(name, a_type, b_type, c_type, compute);
    int allowed = compute == COMPUTE_32F && handle->math_mode == TF32_TENSOR_OP_MATH;
    int tf32 = a_type == R_32F && (allowed || compute == COMPUTE_32F_FAST_TF32);
    return gemm_float(ta, tb, m, n, k, *(float *)alpha, A, a_type, lda, B, b_type, ldb, *(float *)beta, C, c_type, ldc,
                      tf32);
}

static long size_of(int type) { return type == R_64F ? 8 : type == R_32F ? 4 : 2; }

static int gemm_strided(const char *name, Handle *handle, int ta, int tb, int m, int n, int k, const void *alpha,
                        const void *A, int a_type, int lda, long long a_stride, const void *B, int b_type, int ldb,
                        long long b_stride, const void *beta, void *C, int c_type, int ldc, long long c_stride, int
                        batch, int compute) {
    if (batch < 0) return INVALID_VALUE;
    int status = bad_shapes(ta, tb, m, n, k, lda, ldb, ldc) ? INVALID_VALUE : SUCCESS;
    for (long i = 0; i < batch && status == SUCCESS; i++)
        status = gemm(name, handle, ta, tb, m, n, k, alpha, (const char *)A + i * a_stride * size_of(a_type), a_type,
                      lda, (const char *)B + i * b_stride * size_of(b_type), b_type, ldb, beta, (char *)C + i *
                      c_stride * size_of(c_type), c_type, ldc, compute);
    return status;
}

int cublasGemmEx(Handle *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *A, int a_type,
                 int lda, const void *B, int b_type, int ldb, const void *beta, void *C, int c_type, int ldc, int
                 compute, int algorithm) {
    COUNT(cublasGemmEx);
    return gemm("cublasGemmEx", handle, ta, tb, m, n, k, alpha, A, a_type, lda, B, b_type, ldb, beta, C, c_type, ldc,
                compute);
}
int cublasGemmStridedBatchedEx(Handle *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *A,
                               int a_type, int lda, long long a_stride, const void *B, int b_type, int ldb, long long
                               b_stride, const void *beta, void *C, int c_type, int ldc, long long c_stride, int
                               batch, int compute, int algorithm) {
    COUNT(cublasGemmStridedBatchedEx);
    return gemm_strided("cublasGemmStridedBatchedEx", handle, ta, tb, m, n, k, alpha, A, a_type, lda, a_stride, B,
                        b_type, ldb, b_stride, beta, C, c_type, ldc, c_stride, batch, compute);
}

#define OF_ONE_TYPE(BATCHED, DOT, T, TYPE, COMPUTE) \
    int BATCHED(Handle *handle, int ta, int tb, int m, int n, int k, const T *alpha, const T **A, int lda, \
                const T **B, int ldb, const T *beta, T **C, int ldc, int batch) { \
        COUNT(BATCHED); \
        if (batch < 0 || bad_shapes(ta, tb, m, n, k, lda, ldb, ldc)) return INVALID_VALUE; \
        int status = SUCCESS; \
        for (int i = 0; NUMBERS && i < batch && status == SUCCESS; i++) \
            status = gemm(#BATCHED, handle, ta, tb, m, n, k, alpha, A[i], TYPE, lda, B[i], TYPE, ldb, beta, C[i], TYPE, \
                          ldc, COMPUTE); \
        return status; \
    } \
    int DOT(Handle *handle, int n, const T *x, int x_step, const T *y, int y_step, T *result) { \
        COUNT(DOT); \
        double sum = 0; \
        for (long i = 0; NUMBERS && i < n; i++) \
            sum += (double)x[FROM_END(i, n, x_step)] * y[FROM_END(i, n, y_step)]; \
        if (NUMBERS) *result = sum; \
        return SUCCESS; \
    }
/* a negative step walks from the other end */
#define FROM_END(index, length, step) (((step) > 0 ? (index) : (index) - (length) + 1) * (long)(step))
OF_ONE_TYPE(cublasSgemmBatched, cublasSdot_v2, float, R_32F, COMPUTE_32F)
OF_ONE_TYPE(cublasDgemmBatched, cublasDdot_v2, double, R_64F, COMPUTE_64F)
