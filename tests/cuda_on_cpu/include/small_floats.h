// Conversions between float and the 16-bit floats, by bits: g++ before 12 has no _Float16 on x86, and none has
// bfloat16. Plain C, since both cublas.c and the headers of the kernels include it. All round to nearest, ties to
// even.
#pragma once
#include <stdint.h>
#include <string.h>

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float float_of_half_bits(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 0x3ffu;
    if (exponent == 31) return float_of_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) {  // zero or subnormal: the mantissa counts units of 2^-24
        float magnitude = (float)mantissa * 5.9604644775390625e-8f;
        return sign ? -magnitude : magnitude;
    }
    return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

static inline uint16_t half_bits_of_float(float value) {
    uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);   // not a number
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // 65520 and more round to infinity
    if (magnitude < 0x38800000u) {                                    // below 2^-14: subnormal
        float units = float_of_bits(magnitude) + 0.5f;  // 0.5's last bit is 2^-24, the unit: this addition rounds
        return (uint16_t)(sign | (bits_of_float(units) - 0x3f000000u));
    }
    uint32_t odd = magnitude >> 13 & 1u;
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

static inline float float_of_bfloat16_bits(uint16_t bits) { return float_of_bits((uint32_t)bits << 16); }

static inline uint16_t bfloat16_bits_of_float(float value) {
    uint32_t bits = bits_of_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// What the tensor cores see of a float32: 10 bits of mantissa
static inline float tf32_of_float(float value) {
    uint32_t bits = bits_of_float(value);
    if ((bits & 0x7f800000u) == 0x7f800000u) return value;
    return float_of_bits((bits + 0xfffu + (bits >> 13 & 1u)) & 0xffffe000u);
}
