// __nv_bfloat16 as far as plain RawKernels use it.
#pragma once
#include "narrow_float.h"

struct __nv_bfloat16_raw {
    unsigned short x;
};
typedef narrow_float<__nv_bfloat16_raw, bfloat16_bits_of_float, float_of_bfloat16_bits> __nv_bfloat16;

static inline float __bfloat162float(__nv_bfloat16 value) { return value; }
static inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
static inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16(__nv_bfloat16_raw{bits}); }
