// __half as far as CuPy's float16.cuh and plain RawKernels use it.
#pragma once
#include "narrow_float.h"

struct __half_raw {
    unsigned short x;
};
typedef narrow_float<__half_raw, half_bits_of_float, float_of_half_bits> __half;
typedef __half half;

static inline float __half2float(__half value) { return value; }
static inline __half __float2half(float value) { return __half(value); }
static inline __half __float2half_rn(float value) { return __half(value); }
static inline unsigned short __half_as_ushort(__half value) { return value.bits; }
static inline __half __ushort_as_half(unsigned short bits) { return __half(__half_raw{bits}); }
