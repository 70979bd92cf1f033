/* The two passes over float32 tensors on CPU: both norms in one, the whole update in the other.
 *
 * Plain C without torch's headers: it builds in about a second. Work is cut into chunks of a few
 * pages that know their tensor, so that many small tensors and one large one load all threads
 * alike. Results do not depend on the number of threads. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

/* Waking other threads takes longer than the work on fewer than SERIAL elements. */
enum { CHUNK = 16384, STRIP = 1024, SERIAL = 32768 };

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

/* out[0] = sum (scale g)^2, out[1] = sum |scale g|^gamma. Returns 0, or 1 without memory. */
int cruxy_sums(int64_t tensors, const float *const *grads, const int64_t *numel,
               const float *scale, double gamma, int threads, double *out) {
    int64_t count;
    Chunk *chunks = cut(tensors, numel, NULL, &count, &threads);
    double *parts = malloc((size_t)(count ? count : 1) * 2 * sizeof(double));
    if (!chunks || !parts) {
        free(chunks);
        free(parts);
        return 1;
    }
    const float factor = *scale;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < count; c++) {
        const float *g = grads[chunks[c].index] + chunks[c].offset;
        const int64_t n = chunks[c].numel;
        float squares = 0, powers = 0;
        if (gamma == 1.5) {
#pragma omp simd reduction(+ : squares, powers)
            for (int64_t j = 0; j < n; j++) {
                float a = fabsf(g[j] * factor);
                squares += a * a;
                powers += a * sqrtf(a);
            }
        } else {
#pragma omp simd reduction(+ : squares)
            for (int64_t j = 0; j < n; j++) squares += (g[j] * factor) * (g[j] * factor);
            powers = squares;
            if (gamma != 2.0) {
                powers = 0;
                for (int64_t j = 0; j < n; j++) powers += powf(fabsf(g[j] * factor), (float)gamma);
            }
        }
        parts[2 * c] = squares;
        parts[2 * c + 1] = powers;
    }
    out[0] = out[1] = 0;
    for (int64_t c = 0; c < count; c++) {
        out[0] += parts[2 * c];
        out[1] += parts[2 * c + 1];
    }
    free(chunks);
    free(parts);
    return 0;
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

/* bfloat16 is the upper half of a float32; rounded to nearest, ties to even. */
static void widen(int64_t n, const uint16_t *restrict from, float *restrict to) {
    uint32_t *bits = (uint32_t *)to;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) bits[j] = (uint32_t)from[j] << 16;
}

static void narrow(int64_t n, const float *restrict from, uint16_t *restrict to) {
    const uint32_t *bits = (const uint32_t *)from;
#pragma omp simd
    for (int64_t j = 0; j < n; j++)
        to[j] = (uint16_t)((bits[j] + 0x7fff + ((bits[j] >> 16) & 1)) >> 16);
}

static float gain_of(float product) { return product < 1 ? 1 / (1 - product) : 1; }

/* One step of Adam, or of Lion where `seconds` is NULL.
 *
 * `firsts` are float32, or bfloat16 where `half`. control = {rate, beta1, beta2, scale, ok};
 * option = {decay, l2, eps, nesterov}; products1 and products2 point at each tensor's products of
 * the decay rates so far. Where ok is 0 nothing is touched. Returns 0, or 1 without memory. */
int cruxy_update(int64_t tensors, float *const *params, const float *const *grads,
                 void *const *firsts, int half, float *const *seconds, float *const *products1,
                 float *const *products2, const int64_t *numel, const int64_t *row,
                 const float *control, const float *option, int threads) {
    if (control[4] == 0) return 0;
    int64_t count;
    Chunk *chunks = cut(tensors, numel, row, &count, &threads);
    if (!chunks) return 1;
    Step s = {control[0], control[1], control[2], control[3], option[0],
              option[1],  option[2],  1,          0};
    if (option[3] != 0) {
        s.from_m = s.beta1;
        s.from_g = 1 - s.beta1;
    }
    for (int64_t i = 0; seconds && i < tensors; i++) {
        *products1[i] *= s.beta1;
        *products2[i] *= s.beta2;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < count; c++) {
        const Chunk k = chunks[c];
        const int64_t width = k.row > 0 ? k.row : k.numel;
        float gain = 1, spread = 1;
        if (seconds) {
            gain = gain_of(option[3] != 0 ? s.beta1 * *products1[k.index] : *products1[k.index]);
            spread = gain_of(*products2[k.index]);
        }
        for (int64_t row_at = k.offset; row_at < k.offset + k.numel; row_at += width) {
            float shift = k.row > 0 ? mean(grads[k.index] + row_at, width) : 0;
            int64_t strip = half ? STRIP : width;
            for (int64_t at = row_at; at < row_at + width; at += strip) {
                int64_t n = row_at + width - at < strip ? row_at + width - at : strip;
                const float *g = grads[k.index] + at;
                float *p = params[k.index] + at, wide[STRIP];
                uint16_t *narrowed = (uint16_t *)firsts[k.index] + at;
                float *m = half ? wide : (float *)firsts[k.index] + at;
                if (half) widen(n, narrowed, wide);
                if (seconds) adam(n, p, g, m, seconds[k.index] + at, shift, gain, spread, s);
                else lion(n, p, g, m, shift, s);
                if (half) narrow(n, wide, narrowed);
            }
        }
    }
    free(chunks);
    return 0;
}
