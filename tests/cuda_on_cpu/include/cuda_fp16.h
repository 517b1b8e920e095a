// __half as far as CuPy's float16.cuh and plain RawKernels use it: storage and conversions; arithmetic goes by float.
#pragma once
#include "small_floats.h"

struct __half_raw {
    unsigned short x;
};

struct __half {
    unsigned short bits;

    __half() = default;
    __half(float value) : bits(half_bits_of_float(value)) {}
    __half(const __half_raw &raw) : bits(raw.x) {}
    explicit __half(double value) : __half((float)value) {}
    explicit __half(bool value) : __half((float)value) {}
    explicit __half(int value) : __half((float)value) {}
    explicit __half(unsigned value) : __half((float)value) {}
    explicit __half(long value) : __half((float)value) {}
    explicit __half(unsigned long value) : __half((float)value) {}
    explicit __half(long long value) : __half((float)value) {}
    explicit __half(unsigned long long value) : __half((float)value) {}

    operator float() const { return float_of_half_bits(bits); }
    explicit operator __half_raw() const { return {bits}; }
};
typedef __half half;

static inline float __half2float(__half value) { return value; }
static inline __half __float2half(float value) { return __half(value); }
static inline __half __float2half_rn(float value) { return __half(value); }
static inline unsigned short __half_as_ushort(__half value) { return value.bits; }
static inline __half __ushort_as_half(unsigned short bits) { return __half(__half_raw{bits}); }
