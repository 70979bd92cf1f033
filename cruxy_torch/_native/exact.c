/* Exact functions over float32 arrays on CPU: the same bits as `cruxy_exact`, which says what each
 * of them is; here they are in one pass over memory.
 *
 * Every product is settled before it is added, divisions and roots go through double, and sums are
 * sums of integers: so neither the instruction set nor the number of threads can change a bit. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SERIAL = 16384, SUM_BITS = 30 };

/* The one argument of every function; each says which parts it reads and writes. A matrix is `batch`
 * times `rows` by `columns`, row by row; `along` is 1 where a unit belongs to a row, 0 where it
 * belongs to a column. */
typedef struct {
    int64_t batch, rows, columns, along, bits, threads;
    const void *in[6];
    void *out[6];
    float number[12];
} Exact;

static inline float settle(float x) { return fabsf(x) <= 0x1p-125f ? 0.0f : x; }
static inline float mul(float a, float b) { return settle(a * b); }
static inline float quotient(float a, float b) { return settle((float)((double)a / (double)b)); }
static inline float root(float x) { return settle((float)sqrt((double)x)); }

static inline float from_bits(int32_t word) {
    float x;
    memcpy(&x, &word, 4);
    return x;
}

static inline int32_t to_bits(float x) {
    int32_t word;
    memcpy(&word, &x, 4);
    return word;
}

static inline double power64(int64_t k) {
    int64_t word = (k + 1023) << 52;
    double x;
    memcpy(&x, &word, 8);
    return x;
}

static const float LOG2_E = (float)1.4426950408889634, LN2_HI = 45426 / 65536.0f,
                   LN2_LO = (float)(0.69314718055994530942 - 45426 / 65536.0);

static inline float exponential(float x) {
    float y = x < -86.5f ? -86.5f : (x > 88.5f ? 88.5f : x);
    float n = rintf(y * LOG2_E);
    float r = (y - n * LN2_HI) - mul(n, LN2_LO);
    float p = (float)(1.0 / 5040);
    p = mul(p, r) + (float)(1.0 / 720);
    p = mul(p, r) + (float)(1.0 / 120);
    p = mul(p, r) + (float)(1.0 / 24);
    p = mul(p, r) + (float)(1.0 / 6);
    p = mul(p, r) + 0.5f;
    p = 1.0f + (r + mul(mul(r, r), p));
    int32_t k = (int32_t)(n == n ? n : 0.0f), half = k >> 1;
    float out = (p * from_bits((half + 127) << 23)) * from_bits((k - half + 127) << 23);
    out = x < -86.5f ? 0.0f : out;
    return settle(x > 88.5f ? INFINITY : out);
}

static float logarithm(float x) {
    int32_t word = to_bits(x), k = (word - 0x3F3504F3) >> 23;
    float f = from_bits(word - (int32_t)((uint32_t)k << 23));
    float s = quotient(f - 1.0f, f + 1.0f), z = mul(s, s), p = (float)(1.0 / 9);
    p = mul(p, z) + (float)(1.0 / 7);
    p = mul(p, z) + (float)(1.0 / 5);
    p = mul(p, z) + (float)(1.0 / 3);
    float t = mul(mul(s, z), p), n = (float)k;
    return settle(n * LN2_HI + (2.0f * (s + t) + mul(n, LN2_LO)));
}

/* The exponent field of the largest magnitude; 255 where anything is not finite. */
static inline int32_t largest_field(const float *x, int64_t n) {
    int32_t most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < n; j++) {
        int32_t word = to_bits(x[j]) & 0x7FFFFFFF;
        most = word > most ? word : most;
    }
    return most >> 23;
}

static inline int32_t at_least(int32_t field, int32_t bits) {
    return field > bits - 1 ? field : bits - 1;
}

/* `total` of numbers that lie in a row. */
static float total(const float *x, int64_t n) {
    int32_t e = at_least(largest_field(x, n), SUM_BITS);
    if (e >= 255) return NAN;
    float scale = from_bits((126 + SUM_BITS - e + 127) << 23);
    int64_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += (int32_t)rintf(x[j] * scale);
    return settle((float)((double)sum * power64(e - 126 - SUM_BITS)));
}

static int threads_for(const Exact *a, int64_t elements) {
    return elements < SERIAL ? 1 : (int)a->threads;
}

/* The fields of the columns of a matrix, and columns in strips that stay in a cache. */
enum { STRIP = 256 };

static void column_fields(const float *x, int64_t rows, int64_t columns, int64_t from, int64_t n,
                          int32_t *most) {
    for (int64_t j = 0; j < n; j++) most[j] = 0;
    for (int64_t i = 0; i < rows; i++) {
        const float *row = x + i * columns + from;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
            int32_t word = to_bits(row[j]) & 0x7FFFFFFF;
            most[j] = word > most[j] ? word : most[j];
        }
    }
    for (int64_t j = 0; j < n; j++) most[j] >>= 23;
}

/* in: x. out: whole numbers in double, of the shape of x; units in double, one a row or column. */
int cruxy_exact_quantize(const Exact *a) {
    const int64_t rows = a->rows, columns = a->columns, bits = a->bits;
    const int threads = threads_for(a, a->batch * rows * columns);
    if (a->along) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < a->batch * rows; i++) {
            const float *x = (const float *)a->in[0] + i * columns;
            double *q = (double *)a->out[0] + i * columns;
            int32_t e = at_least(largest_field(x, columns), (int32_t)bits);
            float scale = from_bits((int32_t)(126 + bits - e + 127) << 23);
            ((double *)a->out[1])[i] = e < 255 ? power64(e - 126 - bits) : NAN;
#pragma omp simd
            for (int64_t j = 0; j < columns; j++) q[j] = (double)rintf(x[j] * scale);
        }
        return 0;
    }
    const int64_t strips = (columns + STRIP - 1) / STRIP;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < a->batch * strips; task++) {
        int64_t b = task / strips, from = task % strips * STRIP;
        int64_t n = columns - from < STRIP ? columns - from : STRIP;
        const float *x = (const float *)a->in[0] + b * rows * columns;
        double *q = (double *)a->out[0] + b * rows * columns;
        double *unit = (double *)a->out[1] + b * columns + from;
        int32_t fields[STRIP];
        float scales[STRIP];
        column_fields(x, rows, columns, from, n, fields);
        for (int64_t j = 0; j < n; j++) {
            int32_t e = at_least(fields[j], (int32_t)bits);
            scales[j] = from_bits((int32_t)(126 + bits - e + 127) << 23);
            unit[j] = e < 255 ? power64(e - 126 - bits) : NAN;
        }
        for (int64_t i = 0; i < rows; i++) {
            const float *row = x + i * columns + from;
            double *to = q + i * columns + from;
#pragma omp simd
            for (int64_t j = 0; j < n; j++) to[j] = (double)rintf(row[j] * scales[j]);
        }
    }
    return 0;
}

/* in: sums in double; units of rows; units of columns. out: float32. */
int cruxy_exact_round(const Exact *a) {
    const int64_t rows = a->rows, columns = a->columns;
    const int threads = threads_for(a, a->batch * rows * columns);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < a->batch * rows; i++) {
        const double *s = (const double *)a->in[0] + i * columns;
        const double *right = (const double *)a->in[2] + (a->along ? 0 : i / rows * columns);
        const double left = ((const double *)a->in[1])[i];
        float *y = (float *)a->out[0] + i * columns;
#pragma omp simd
        for (int64_t j = 0; j < columns; j++) y[j] = settle((float)(s[j] * left * right[j]));
    }
    return 0;
}

/* in: x. out: the totals of rows (along 1) or of columns over all rows (along 0). */
int cruxy_exact_total(const Exact *a) {
    const int64_t rows = a->rows, columns = a->columns;
    const int threads = threads_for(a, rows * columns);
    const float *x = a->in[0];
    float *y = a->out[0];
    if (a->along) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < rows; i++) y[i] = total(x + i * columns, columns);
        return 0;
    }
    const int64_t strips = (columns + STRIP - 1) / STRIP;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t strip = 0; strip < strips; strip++) {
        int64_t from = strip * STRIP, n = columns - from < STRIP ? columns - from : STRIP;
        int32_t fields[STRIP];
        float scales[STRIP];
        int64_t sums[STRIP];
        column_fields(x, rows, columns, from, n, fields);
        for (int64_t j = 0; j < n; j++) {
            int32_t e = at_least(fields[j], SUM_BITS);
            scales[j] = e < 255 ? from_bits((126 + SUM_BITS - e + 127) << 23) : 0.0f;
            fields[j] = e;
            sums[j] = 0;
        }
        for (int64_t i = 0; i < rows; i++) {
            const float *row = x + i * columns + from;
#pragma omp simd
            for (int64_t j = 0; j < n; j++) {
                float q = rintf(row[j] * scales[j]);
                sums[j] += (int32_t)(q == q ? q : 0.0f);
            }
        }
        for (int64_t j = 0; j < n; j++) {
            double unit = power64(fields[j] - 126 - SUM_BITS);
            y[from + j] = fields[j] < 255 ? settle((float)((double)sums[j] * unit)) : NAN;
        }
    }
    return 0;
}

/* in: x. out: y; x^2; the sigmoid. number: GELU_0, GELU_1. */
int cruxy_exact_gelu_forward(const Exact *a) {
    const float *x = a->in[0], c0 = a->number[0], c1 = a->number[1];
    float *y = a->out[0], *square = a->out[1], *s = a->out[2];
    const int threads = threads_for(a, a->columns);
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t j = 0; j < a->columns; j++) {
        float v = x[j], v2 = mul(v, v), u = mul(v, mul(v2, c1) + c0);
        float p = quotient(1.0f, 1.0f + exponential(-u));
        square[j] = v2;
        s[j] = p;
        y[j] = mul(v, p);
    }
    return 0;
}

/* in: x; x^2; the sigmoid; g. out: dx. number: GELU_0, GELU_3. */
int cruxy_exact_gelu_backward(const Exact *a) {
    const float *x = a->in[0], *square = a->in[1], *s = a->in[2], *g = a->in[3];
    const float c0 = a->number[0], c3 = a->number[1];
    float *dx = a->out[0];
    const int threads = threads_for(a, a->columns);
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t j = 0; j < a->columns; j++) {
        float slope = mul(mul(x[j], mul(s[j], 1.0f - s[j])), mul(square[j], c3) + c0);
        dx[j] = mul(settle(g[j]), settle(s[j] + slope));
    }
    return 0;
}

/* in: x; w; b. out: y; h; r, one a row. number: 1/columns, eps. */
int cruxy_exact_layer_norm_forward(const Exact *a) {
    const int64_t n = a->columns;
    const float *w = a->in[1], *b = a->in[2], share = a->number[0], eps = a->number[1];
    const int threads = threads_for(a, a->rows * n);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *work = malloc((size_t)n * sizeof(float));
        failed = !work;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a->rows; i++) {
            if (!work) continue;
            const float *x = (const float *)a->in[0] + i * n;
            float *y = (float *)a->out[0] + i * n, *h = (float *)a->out[1] + i * n;
            float mean = mul(total(x, n), share);
#pragma omp simd
            for (int64_t j = 0; j < n; j++) {
                h[j] = settle(x[j] - mean);
                work[j] = mul(h[j], h[j]);
            }
            float r = quotient(1.0f, root(mul(total(work, n), share) + eps));
            ((float *)a->out[2])[i] = r;
#pragma omp simd
            for (int64_t j = 0; j < n; j++) {
                h[j] = mul(h[j], r);
                y[j] = settle(mul(h[j], w[j]) + b[j]);
            }
        }
        free(work);
    }
    return failed;
}

/* in: h; r; w; g. out: dx; g settled; g h. number: 1/columns. */
int cruxy_exact_layer_norm_backward(const Exact *a) {
    const int64_t n = a->columns;
    const float *w = a->in[2], share = a->number[0];
    const int threads = threads_for(a, a->rows * n);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *work = malloc((size_t)n * sizeof(float));
        failed = !work;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a->rows; i++) {
            if (!work) continue;
            const float *h = (const float *)a->in[0] + i * n, r = ((const float *)a->in[1])[i];
            const float *raw = (const float *)a->in[3] + i * n;
            float *dx = (float *)a->out[0] + i * n, *g = (float *)a->out[1] + i * n;
            float *gh = (float *)a->out[2] + i * n;
#pragma omp simd
            for (int64_t j = 0; j < n; j++) {
                g[j] = settle(raw[j]);
                gh[j] = mul(g[j], h[j]);
                dx[j] = mul(g[j], w[j]);
                work[j] = mul(dx[j], h[j]);
            }
            float mean = mul(total(dx, n), share), along = mul(total(work, n), share);
#pragma omp simd
            for (int64_t j = 0; j < n; j++)
                dx[j] = mul(settle(settle(dx[j] - mean) - mul(h[j], along)), r);
        }
        free(work);
    }
    return failed;
}

static float maximum(const float *z, int64_t n) {
    float most = z[0];
    int lost = 0;
#pragma omp simd reduction(max : most) reduction(| : lost)
    for (int64_t j = 0; j < n; j++) {
        most = z[j] > most ? z[j] : most;
        lost |= z[j] != z[j];
    }
    return lost ? NAN : most;
}

/* in: z. out: the softmax. */
int cruxy_exact_softmax_forward(const Exact *a) {
    const int64_t n = a->columns;
    const int threads = threads_for(a, a->rows * n);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < a->rows; i++) {
        const float *z = (const float *)a->in[0] + i * n;
        float *p = (float *)a->out[0] + i * n, most = maximum(z, n);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) p[j] = exponential(settle(z[j] - most));
        float share = quotient(1.0f, total(p, n));
#pragma omp simd
        for (int64_t j = 0; j < n; j++) p[j] = mul(p[j], share);
    }
    return 0;
}

/* in: p; g. out: dz. */
int cruxy_exact_softmax_backward(const Exact *a) {
    const int64_t n = a->columns;
    const int threads = threads_for(a, a->rows * n);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < a->rows; i++) {
        const float *p = (const float *)a->in[0] + i * n, *g = (const float *)a->in[1] + i * n;
        float *dz = (float *)a->out[0] + i * n;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) dz[j] = mul(settle(g[j]), p[j]);
        float along = total(dz, n);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) dz[j] = mul(p[j], settle(settle(g[j]) - along));
    }
    return 0;
}

/* in: logits; labels in int64, which have to be columns. out: losses; the softmax. */
int cruxy_exact_cross_entropy_forward(const Exact *a) {
    const int64_t n = a->columns, *labels = a->in[1];
    const int threads = threads_for(a, a->rows * n);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < a->rows; i++) {
        const float *z = (const float *)a->in[0] + i * n;
        float *p = (float *)a->out[1] + i * n, most = maximum(z, n);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) p[j] = exponential(settle(z[j] - most));
        float t = total(p, n), share = quotient(1.0f, t);
        ((float *)a->out[0])[i] = settle(logarithm(t) - settle(z[labels[i]] - most));
#pragma omp simd
        for (int64_t j = 0; j < n; j++) p[j] = mul(p[j], share);
    }
    return 0;
}

/* in: x. out: y; the mask, a byte each. number: the factor. bits: the key; along: 256ths kept. */
int cruxy_exact_dropout_forward(const Exact *a) {
    const float *x = a->in[0], factor = a->number[0];
    const uint32_t key = (uint32_t)a->bits, keep = (uint32_t)a->along;
    float *y = a->out[0];
    uint8_t *mask = a->out[1];
    const int threads = threads_for(a, a->columns);
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t j = 0; j < a->columns; j++) {
        uint32_t word = ((uint32_t)j ^ key) * 0x9E3779B1u;
        word = (word ^ (word >> 15)) * 0x846CA68Bu;
        int kept = (word >> 24) < keep;
        mask[j] = (uint8_t)kept;
        y[j] = kept ? mul(x[j], factor) : 0.0f;
    }
    return 0;
}

/* in: g. out: p; m; v, in place. number: the two factors, b1, 1-b1, b2, 1-b2, eps, decay, rate. */
int cruxy_exact_adamw(const Exact *a) {
    const float *g = a->in[0], *c = a->number;
    const float k1 = c[0], k2 = c[1], b1 = c[2], a1 = c[3], b2 = c[4], a2 = c[5], eps = c[6];
    const float decay = c[7], rate = c[8];
    float *p = a->out[0], *m = a->out[1], *v = a->out[2];
    const int threads = threads_for(a, a->columns);
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t j = 0; j < a->columns; j++) {
        float x = g[j];
        m[j] = settle(mul(m[j], b1) + mul(x, a1));
        v[j] = settle(mul(v[j], b2) + mul(mul(x, x), a2));
        float u = quotient(mul(m[j], k1), mul(root(v[j]), k2) + eps);
        p[j] = settle(p[j] - mul(settle(u + mul(p[j], decay)), rate));
    }
    return 0;
}
