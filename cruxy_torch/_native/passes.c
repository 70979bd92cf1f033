/* The passes over float32 tensors on CPU: all that is measured of the gradients in one, the sizes of
 * the parameters in another, the whole update in the last.
 *
 * Plain C without torch's headers: it builds in about a second. Work is cut into chunks of a few
 * pages that know their tensor, so that many small tensors and one large one load all threads
 * alike. Results do not depend on the number of threads. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Waking other threads takes longer than the work on fewer than SERIAL elements. */
enum { CHUNK = 16384, SERIAL = 32768, BLOCK = 256 };

#define ONE 0x3f800000U     /* the bits of 1.0f */
#define TWO 0x40000000U     /* the bits of 2.0f */
#define LARGEST 0x1.fep127f /* the largest bfloat16 */

/* What a chunk is: `numel` elements from `offset` of tensor `index`; `row` is the length of the
 * rows that are centralized, 0 for none. */
typedef struct {
    int64_t index, offset, numel, row;
} Chunk;

/* Elements of one chunk: whole rows where the tensor is centralized. */
static int64_t chunk_length(int64_t row) {
    if (row <= 0) return CHUNK;
    return row > CHUNK ? row : CHUNK / row * row;
}

static Chunk *cut(int64_t tensors, const int64_t *numel, const int64_t *row, int64_t *count,
                  int *threads) {
    int64_t total = 0, elements = 0;
    for (int64_t i = 0; i < tensors; i++) {
        int64_t length = chunk_length(row ? row[i] : 0);
        total += (numel[i] + length - 1) / length;
        elements += numel[i];
    }
    *count = total;
    if (elements < SERIAL) *threads = 1;
    Chunk *chunks = malloc((size_t)(total ? total : 1) * sizeof(Chunk));
    if (!chunks) return NULL;
    Chunk *next = chunks;
    for (int64_t i = 0; i < tensors; i++) {
        int64_t width = row ? row[i] : 0, length = chunk_length(width);
        for (int64_t at = 0; at < numel[i]; at += length) {
            int64_t left = numel[i] - at;
            *next++ = (Chunk){i, at, left < length ? left : length, width};
        }
    }
    return chunks;
}

static float mean(const float *g, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += g[j];
    return sum / (float)n;
}

typedef struct {
    float rate, beta1, beta2, scale;  /* of this step; `scale` is the factor on the gradient */
    float decay, l2, eps;             /* decoupled decay, coupled decay, eps */
    float from_m, from_g;             /* the numerator is from_m * m + from_g * g */
} Step;

static void adam(int64_t n, float *restrict p, const float *restrict g, float *restrict m,
                 float *restrict v, float shift, float gain, float spread, Step s) {
    const float rest1 = 1 - s.beta1, rest2 = 1 - s.beta2;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        float x = (g[j] - shift) * s.scale + s.l2 * p[j];
        m[j] = s.beta1 * m[j] + rest1 * x;
        v[j] = s.beta2 * v[j] + rest2 * (x * x);
        float u = (s.from_m * m[j] + s.from_g * x) * gain / (sqrtf(v[j] * spread) + s.eps);
        p[j] -= s.rate * (u + s.decay * p[j]);
    }
}

static void lion(int64_t n, float *restrict p, const float *restrict g, float *restrict m,
                 float shift, Step s) {
    const float rest1 = 1 - s.beta1, rest2 = 1 - s.beta2;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        float x = (g[j] - shift) * s.scale;
        float u = s.beta1 * m[j] + rest1 * x;
        m[j] = s.beta2 * m[j] + rest2 * x;
        float sign = (float)(u > 0) - (float)(u < 0);
        p[j] -= s.rate * (sign + s.decay * p[j]);
    }
}

/* Moves the average this share of the way to the parameters: torch's lerp, exact at both ends. */
static void average(int64_t n, const float *restrict p, float *restrict a, float weight) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        float way = p[j] - a[j];
        a[j] = weight < 0.5f ? a[j] + weight * way : p[j] - (1 - weight) * way;
    }
}

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

/* Adds sum (scale g)^2 and sum |scale g|^gamma to the first two sums. */
static void add_powers(int64_t n, const float *g, float scale, double gamma, double *sums) {
    float squares = 0, powers = 0;
    if (gamma == 1.5) {
#pragma omp simd reduction(+ : squares, powers)
        for (int64_t j = 0; j < n; j++) {
            float a = fabsf(g[j] * scale);
            squares += a * a;
            powers += a * sqrtf(a);
        }
    } else {
#pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < n; j++) squares += (g[j] * scale) * (g[j] * scale);
        powers = squares;
        if (gamma != 2.0) {
            powers = 0;
            for (int64_t j = 0; j < n; j++) powers += powf(fabsf(g[j] * scale), (float)gamma);
        }
    }
    sums[0] += squares;
    sums[1] += powers;
}

/* Adds sum scale g m and sum m^2 to the last two sums. */
static void add_products(int64_t n, const float *g, const float *m, float scale, double *sums) {
    float along = 0, squares = 0;
#pragma omp simd reduction(+ : along, squares)
    for (int64_t j = 0; j < n; j++) {
        along += g[j] * scale * m[j];
        squares += m[j] * m[j];
    }
    sums[2] += along;
    sums[3] += squares;
}

/* What `cruxy_sums` takes. `first` is NULL without first moments; `signs` belong to them. */
typedef struct {
    const float *const *grads;
    const Moments *first;
    const float *signs;
    const int64_t *numel;
    double *out;
    int64_t tensors;
    double gamma;
    float scale;
    int32_t threads;
} Sums;

/* out = {sum (scale g)^2, sum |scale g|^gamma, sum sign scale g m, sum m^2} with the first moments
 * m, the last two 0 without them. Returns 0, or 1 without memory. */
int cruxy_sums(const Sums *s) {
    int64_t count;
    int threads = s->threads;
    Chunk *chunks = cut(s->tensors, s->numel, NULL, &count, &threads);
    double *parts = calloc((size_t)(count ? count : 1), 4 * sizeof(double));
    if (!chunks || !parts) {
        free(chunks);
        free(parts);
        return 1;
    }
    const Moments *first = s->first;
    const float factor = s->scale;
    const double gamma = s->gamma;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < count; c++) {
        const Chunk k = chunks[c];
        const int64_t end = k.offset + k.numel;
        double *sums = parts + 4 * c;
        float wide[BLOCK];
        for (int64_t at = k.offset; at < end; at += BLOCK) {
            const int64_t n = end - at < BLOCK ? end - at : BLOCK;
            const float *g = s->grads[k.index] + at;
            add_powers(n, g, factor, gamma, sums);
            if (first) add_products(n, g, load(first, k.index, at, n, wide), factor, sums);
        }
        if (first) sums[2] *= s->signs[k.index];
    }
    memset(s->out, 0, 4 * sizeof(double));
    for (int64_t c = 0; c < 4 * count; c++) s->out[c % 4] += parts[c];
    free(chunks);
    free(parts);
    return 0;
}

/* What `cruxy_mean_squares` takes. */
typedef struct {
    const float *const *params;
    const int64_t *numel, *counts;
    double *out;
    int64_t tensors;
    int32_t threads;
} MeanSquares;

/* out[i] = sum p^2 / counts[i] over tensor i. Returns 0, or 1 without memory. */
int cruxy_mean_squares(const MeanSquares *s) {
    int64_t count;
    int threads = s->threads;
    Chunk *chunks = cut(s->tensors, s->numel, NULL, &count, &threads);
    double *parts = malloc((size_t)(count ? count : 1) * sizeof(double));
    if (!chunks || !parts) {
        free(chunks);
        free(parts);
        return 1;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < count; c++) {
        const float *p = s->params[chunks[c].index] + chunks[c].offset;
        const int64_t n = chunks[c].numel;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < n; j++) squares += p[j] * p[j];
        parts[c] = squares;
    }
    for (int64_t i = 0; i < s->tensors; i++) s->out[i] = 0;
    for (int64_t c = 0; c < count; c++) s->out[chunks[c].index] += parts[c];
    for (int64_t i = 0; i < s->tensors; i++) s->out[i] /= (double)s->counts[i];
    free(chunks);
    free(parts);
    return 0;
}

static float gain_of(float product) { return product < 1 ? 1 / (1 - product) : 1; }

/* What `cruxy_update` takes. `second`, and with it the products, is NULL for Lion; `limits`,
 * `averages` and `row` are NULL for none. */
typedef struct {
    float *const *params;
    const float *const *grads;
    const Moments *first, *second;
    float *const *products1, *const *products2; /* of each tensor's decay rates so far */
    const float *const *limits;                 /* each tensor's largest rate */
    float *const *averages;
    const int64_t *numel;
    const int64_t *row;     /* the length of rows that are centralized, 0 for none */
    const int64_t *numbers; /* of each tensor's first element, for random bits */
    int64_t tensors;
    float rate, beta1, beta2, scale, average_weight, decay, l2, eps;
    int32_t nesterov, key, threads;
} Update;

/* One step of Adam, or of Lion. Coded tensors are not centralized. Returns 0, or 1 without memory.
 */
int cruxy_update(const Update *u) {
    int64_t count;
    int threads = u->threads;
    Chunk *chunks = cut(u->tensors, u->numel, u->row, &count, &threads);
    if (!chunks) return 1;
    const Moments *first = u->first, *second = u->second;
    Step all = {.rate = u->rate, .beta1 = u->beta1, .beta2 = u->beta2, .scale = u->scale,
                .decay = u->decay, .l2 = u->l2, .eps = u->eps, .from_m = 1, .from_g = 0};
    if (u->nesterov) {
        all.from_m = all.beta1;
        all.from_g = 1 - all.beta1;
    }
    for (int64_t i = 0; second && i < u->tensors; i++) {
        *u->products1[i] *= all.beta1;
        *u->products2[i] *= all.beta2;
    }
    const int chance = first->stochastic || (second && second->stochastic);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < count; c++) {
        const Chunk k = chunks[c];
        const int64_t width = k.row > 0 ? k.row : k.numel;
        float gain = 1, spread = 1, wide1[BLOCK], wide2[BLOCK];
        uint32_t random[BLOCK];
        Step s = all;
        if (u->limits && *u->limits[k.index] < s.rate) s.rate = *u->limits[k.index];
        if (second) {
            const float product = *u->products1[k.index];
            gain = gain_of(u->nesterov ? s.beta1 * product : product);
            spread = gain_of(*u->products2[k.index]);
        }
        for (int64_t row_at = k.offset; row_at < k.offset + k.numel; row_at += width) {
            float shift = k.row > 0 ? mean(u->grads[k.index] + row_at, width) : 0;
            for (int64_t at = row_at; at < row_at + width; at += BLOCK) {
                int64_t n = row_at + width - at < BLOCK ? row_at + width - at : BLOCK;
                const float *g = u->grads[k.index] + at;
                float *p = u->params[k.index] + at, *m = load(first, k.index, at, n, wide1);
                if (chance) draw((uint32_t)u->key, (uint32_t)(u->numbers[k.index] + at), random);
                if (second) {
                    float *v = load(second, k.index, at, n, wide2);
                    adam(n, p, g, m, v, shift, gain, spread, s);
                    store(second, k.index, at, n, v, random);
                } else {
                    lion(n, p, g, m, shift, s);
                }
                store(first, k.index, at, n, m, random);
                if (u->averages) average(n, p, u->averages[k.index] + at, u->average_weight);
            }
        }
    }
    free(chunks);
    return 0;
}
