// A 16-bit float of CUDA's: storage and conversions, by the functions of small_floats.h; arithmetic goes by float.
#pragma once
#include "small_floats.h"

template <class Raw, uint16_t bits_of(float), float float_of(uint16_t)>
struct narrow_float {
    unsigned short bits;

    narrow_float() = default;
    narrow_float(float value) : bits(bits_of(value)) {}
    narrow_float(const Raw &raw) : bits(raw.x) {}
    explicit narrow_float(double value) : narrow_float((float)value) {}
    explicit narrow_float(bool value) : narrow_float((float)value) {}
    explicit narrow_float(int value) : narrow_float((float)value) {}
    explicit narrow_float(unsigned value) : narrow_float((float)value) {}
    explicit narrow_float(long value) : narrow_float((float)value) {}
    explicit narrow_float(unsigned long value) : narrow_float((float)value) {}
    explicit narrow_float(long long value) : narrow_float((float)value) {}
    explicit narrow_float(unsigned long long value) : narrow_float((float)value) {}

    operator float() const { return float_of(bits); }
    explicit operator Raw() const { return {bits}; }
};
