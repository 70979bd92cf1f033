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

#include "kept.h"

/* Waking other threads takes longer than the work on fewer than SERIAL elements. */
enum { CHUNK = 16384, SERIAL = 32768 };

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

/* Pulls the parameters on, away from their average. */
static void pull_on(int64_t n, float *restrict p, const float *restrict a, float pull) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) p[j] += pull * (p[j] - a[j]);
}

/* Moves the average this share of the way to the parameters: torch's lerp, exact at both ends. */
static void average(int64_t n, const float *restrict p, float *restrict a, float weight) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        float way = p[j] - a[j];
        a[j] = weight < 0.5f ? a[j] + weight * way : p[j] - (1 - weight) * way;
    }
}

/* Adds sum x^2, sum |x|^1.5 if `usual`, and with moments m sum x m and sum m^2, of x = scale g.
 * Returns the first. In one loop: alone, each sum waits for its own last addition. */
static inline float add_as(int usual, int64_t n, const float *g, const float *m, float scale,
                           double *sums) {
    float squares = 0, powers = 0, along = 0, moments = 0;
#pragma omp simd reduction(+ : squares, powers, along, moments)
    for (int64_t j = 0; j < n; j++) {
        float x = g[j] * scale, a = fabsf(x);
        squares += a * a;
        if (usual) powers += a * sqrtf(a);
        if (m) {
            along += x * m[j];
            moments += m[j] * m[j];
        }
    }
    sums[0] += squares;
    sums[1] += powers;
    sums[2] += along;
    sums[3] += moments;
    return squares;
}

/* Adds all four sums; m is NULL without first moments. */
static void add(int64_t n, const float *g, const float *m, float scale, double gamma,
                double *sums) {
    if (gamma == 1.5) {
        if (m) add_as(1, n, g, m, scale, sums);
        else add_as(1, n, g, NULL, scale, sums);
        return;
    }
    float powers = m ? add_as(0, n, g, m, scale, sums) : add_as(0, n, g, NULL, scale, sums);
    if (gamma != 2.0) {
        powers = 0;
        for (int64_t j = 0; j < n; j++) powers += powf(fabsf(g[j] * scale), (float)gamma);
    }
    sums[1] += powers;
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
            const float *m = first ? load(first, k.index, at, n, wide) : NULL;
            add(n, g, m, factor, gamma, sums);
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
    float rate, beta1, beta2, scale, average_weight, average_pull, decay, l2, eps;
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
                if (!u->averages) continue;
                float *a = u->averages[k.index] + at;
                if (u->average_pull) pull_on(n, p, a, u->average_pull);
                average(n, p, a, u->average_weight);
            }
        }
    }
    free(chunks);
    return 0;
}
