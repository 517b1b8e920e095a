// __nv_bfloat16: storage and conversions; arithmetic goes by float.
#pragma once
#include "small_floats.h"

struct __nv_bfloat16_raw {
    unsigned short x;
};

struct __nv_bfloat16 {
    unsigned short bits;

    __nv_bfloat16() = default;
    __nv_bfloat16(float value) : bits(bfloat16_bits_of_float(value)) {}
    __nv_bfloat16(const __nv_bfloat16_raw &raw) : bits(raw.x) {}
    explicit __nv_bfloat16(double value) : __nv_bfloat16((float)value) {}
    explicit __nv_bfloat16(bool value) : __nv_bfloat16((float)value) {}
    explicit __nv_bfloat16(int value) : __nv_bfloat16((float)value) {}
    explicit __nv_bfloat16(unsigned value) : __nv_bfloat16((float)value) {}
    explicit __nv_bfloat16(long value) : __nv_bfloat16((float)value) {}
    explicit __nv_bfloat16(unsigned long value) : __nv_bfloat16((float)value) {}
    explicit __nv_bfloat16(long long value) : __nv_bfloat16((float)value) {}
    explicit __nv_bfloat16(unsigned long long value) : __nv_bfloat16((float)value) {}

    operator float() const { return float_of_bfloat16_bits(bits); }
    explicit operator __nv_bfloat16_raw() const { return {bits}; }
};

static inline float __bfloat162float(__nv_bfloat16 value) { return value; }
static inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
static inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16(__nv_bfloat16_raw{bits}); }
