/* How moments are kept between steps: float32, bfloat16, or low-bit codes of blocks with a scale. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 256 }; /* elements that share a scale, and that are worked on together */

#define ONE 0x3f800000U     /* the bits of 1.0f */
#define TWO 0x40000000U     /* the bits of 2.0f */
#define LARGEST 0x1.fep127f /* the largest bfloat16 */

/* How a moment is kept between steps; float32 is worked on where it lies. */
enum { FLOAT32, BFLOAT16, BYTE, NIBBLE };

/* One moment of every tensor. `scales`, `shift`, `top` and `least` belong to codes: see BlockCode,
 * whose levels, rounding and scale these are. */
typedef struct {
    void *const *values;
    uint16_t *const *scales;
    int32_t format, stochastic, is_signed, shift;
    float top, least;
} Moments;

static float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* The random bits of an element: cruxy_exact.random_bits. */
static uint32_t random_bits(uint32_t key, uint32_t number) {
    uint32_t x = (number ^ key) * 0x9e3779b1U;
    return (x ^ (x >> 15)) * 0x846ca68bU;
}

static void draw(uint32_t key, uint32_t number, uint32_t *restrict bits) {
#pragma omp simd
    for (uint32_t j = 0; j < BLOCK; j++) bits[j] = random_bits(key, number + j);
}

static void widen(int64_t n, const uint16_t *restrict from, float *restrict to) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) to[j] = as_float((uint32_t)from[j] << 16);
}

/* bfloat16 is the upper half of a float32: to nearest, ties to even. */
static void narrow(int64_t n, const float *restrict from, uint16_t *restrict to) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        uint32_t bits = as_bits(from[j]);
        to[j] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}

/* Up with the odds that the lower half stands for. */
static void narrow_by_chance(int64_t n, const float *restrict from, uint16_t *restrict to,
                             const uint32_t *restrict random) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        uint32_t bits = as_bits(from[j]), noise = random[j] >> 16;
        to[j] = (uint16_t)((bits + (fabsf(from[j]) < INFINITY ? noise : 0)) >> 16);
    }
}

/* What a level stands for. */
static inline float value_of(int is_signed, int shift, float unit, int32_t level) {
    uint32_t sign = is_signed ? (uint32_t)level & 0x80000000U : 0;
    uint32_t number = (uint32_t)(is_signed ? abs(level) : level) << shift;
    float size = is_signed ? as_float(number + TWO) - 2 : as_float(number + ONE);
    return as_float(as_bits(size * unit) ^ sign);
}

static inline int32_t level_of(int is_signed, int shift, float top, float factor, float x,
                               uint32_t random) {
    float size = (is_signed ? fabsf(x) : x) * factor;
    size = size < top ? size : top;
    uint32_t number = is_signed ? as_bits(size + 2) - TWO : as_bits(size > 1 ? size : 1) - ONE;
    int32_t level = (int32_t)((number + (random >> (32 - shift))) >> shift);
    int32_t sign = is_signed ? (int32_t)as_bits(x) >> 31 : 0;
    return (level ^ sign) - sign;
}

static inline void decode_as(int nibble, int is_signed, int shift, float unit,
                             const uint8_t *restrict codes, float *restrict to) {
    const int8_t *signed_codes = (const int8_t *)codes;
    if (nibble) {
        const int32_t sign = is_signed ? 8 : 0;
#pragma omp simd
        for (int j = 0; j < BLOCK / 2; j++) {
            int32_t low = ((codes[j] & 15) ^ sign) - sign, high = ((codes[j] >> 4) ^ sign) - sign;
            to[j] = value_of(is_signed, shift, unit, low);
            to[j + BLOCK / 2] = value_of(is_signed, shift, unit, high);
        }
    } else {
#pragma omp simd
        for (int j = 0; j < BLOCK; j++)
            to[j] = value_of(is_signed, shift, unit, is_signed ? signed_codes[j] : codes[j]);
    }
}

static inline void encode_as(int nibble, int is_signed, int shift, float top, float factor,
                             const float *restrict from, const uint32_t *restrict random,
                             uint8_t *restrict codes) {
    if (nibble) {
#pragma omp simd
        for (int j = 0; j < BLOCK / 2; j++) {
            const int i = j + BLOCK / 2;
            int32_t low = level_of(is_signed, shift, top, factor, from[j], random[j]);
            int32_t high = level_of(is_signed, shift, top, factor, from[i], random[i]);
            codes[j] = (uint8_t)((low & 15) | (high & 15) << 4);
        }
    } else {
#pragma omp simd
        for (int j = 0; j < BLOCK; j++)
            codes[j] = (uint8_t)level_of(is_signed, shift, top, factor, from[j], random[j]);
    }
}

static void decode(const Moments *k, const void *codes, float scale, float *to) {
    const float unit = scale * (float)(1.0 / k->top);
    const int nibble = k->format == NIBBLE;
    if (nibble && k->is_signed) decode_as(1, 1, k->shift, unit, codes, to);
    else if (nibble) decode_as(1, 0, k->shift, unit, codes, to);
    else if (k->is_signed) decode_as(0, 1, k->shift, unit, codes, to);
    else decode_as(0, 0, k->shift, unit, codes, to);
}

/* Codes a block and returns its scale, a bfloat16. */
static uint16_t encode(const Moments *k, const float *from, const uint32_t *random, void *codes) {
    uint32_t largest = 0; /* the bits of positive floats are in their order, NaN last */
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < BLOCK; j++) {
        uint32_t size = as_bits(from[j]) & 0x7fffffffU;
        largest = size > largest ? size : largest;
    }
    const int finite = largest < 0x7f800000U;
    float scale = as_float(largest);
    if (scale < 0x1p-126f) {
        scale = 0;
    } else if (finite) {
        scale = scale < k->least ? k->least : scale > LARGEST ? LARGEST : scale;
        scale = as_float((as_bits(scale) + 0xffffU) & 0xffff0000U);
    }
    const float top = k->top, factor = scale > 0 && finite ? top / scale : 0;
    const int nibble = k->format == NIBBLE;
    if (nibble && k->is_signed) encode_as(1, 1, k->shift, top, factor, from, random, codes);
    else if (nibble) encode_as(1, 0, k->shift, top, factor, from, random, codes);
    else if (k->is_signed) encode_as(0, 1, k->shift, top, factor, from, random, codes);
    else encode_as(0, 0, k->shift, top, factor, from, random, codes);
    return (uint16_t)(as_bits(scale) >> 16);
}

/* Up to a block of elements from `at` of tensor `index` as float32: where they lie, or in `wide`,
 * filled up with zeros. */
static float *load(const Moments *k, int64_t index, int64_t at, int64_t n, float *wide) {
    const char *values = k->values[index];
    if (k->format == FLOAT32) return (float *)values + at;
    if (k->format == BFLOAT16) {
        widen(n, (const uint16_t *)values + at, wide);
        return wide;
    }
    const float scale = as_float((uint32_t)k->scales[index][at / BLOCK] << 16);
    decode(k, values + (k->format == BYTE ? at : at / 2), scale, wide);
    for (int64_t j = n; j < BLOCK; j++) wide[j] = 0;
    return wide;
}

static void store(const Moments *k, int64_t index, int64_t at, int64_t n, const float *wide,
                  const uint32_t *random) {
    char *values = k->values[index];
    if (k->format == BFLOAT16) {
        uint16_t *to = (uint16_t *)values + at;
        if (k->stochastic) narrow_by_chance(n, wide, to, random);
        else narrow(n, wide, to);
    } else if (k->format != FLOAT32) {
        k->scales[index][at / BLOCK] =
            encode(k, wide, random, values + (k->format == BYTE ? at : at / 2));
    }
}
