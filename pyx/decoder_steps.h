/* Inner loops of the element-wise steps of a decoder, compiled once for each instruction set from this one source.
 *
 * Same bits everywhere: every sum has a fixed number of lanes (eight doubles, sixteen floats) and a fixed order, whatever
 * the width of the registers that hold them. Nothing is contracted (-ffp-contract=off) and nothing is reordered;
 * exponentials are computed here and not by the C library, whose last bit depends on the processor.
 *
 * The definitions are those of bitnet_ref/reference/{norm,rope,mlp,attention,quantize,head}.py.
 */
#ifndef BITNET_REF_DECODER_STEPS_H
#define BITNET_REF_DECODER_STEPS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(DECODER_STEPS_LOOPS) && defined(__AVX2__)
#include <immintrin.h>
#endif

/* ---- interface: what callers and modules share ------------------------------------------------------------------- */

enum { ACTIVATE_RELU2, ACTIVATE_SILU, ACTIVATE_GELU_TANH };
enum { TABLE_F32, TABLE_F16, TABLE_BF16, TABLE_Q8_0, TABLE_Q6_K, TABLE_Q4_0 };

/* Floats of scratch that step_attend needs: four heads of scores, queries and sums, and some rows of a cache. */
#define ATTEND_ROWS 32
#define STEP_ATTEND_SCRATCH(n, d) (4 * (((n) + 15) / 16 * 16) + (8 + ATTEND_ROWS) * (((d) + 15) / 16 * 16))

/* A head of integers: a token as head_prepare leaves it, and four decoded rows of the table. K is filled up with zeros to
 * a multiple of 512, so that scales come in whole vectors. */
#define HEAD_COLUMNS(k) (((k) + 511) / 512 * 512)
/* int8 x_q, int32 offsets of 4 columns, float scales of 4 columns (eight alike) and of 32 */
#define HEAD_TOKEN_BYTES(k) (HEAD_COLUMNS(k) / 8 * 25)
#define HEAD_ROW_BYTES(k) (HEAD_COLUMNS(k) / 8 * 11)   /* int8 codes, float scales of 32, int16 pairs of 16 */
#define HEAD_SCRATCH_BYTES(k) (4 * HEAD_ROW_BYTES(k))

typedef struct {
    void (*norm)(const float *x, const float *weight, float *y, ptrdiff_t k, float eps, float offset);
    int (*quantize)(const float *x, int8_t *x_q, float *x_scale, ptrdiff_t k);
    void (*rescale)(const int32_t *sums, float *y, ptrdiff_t m, float scale);
    int (*norm_quantize)(const float *x, const float *weight, float *normed, int8_t *x_q, float *x_scale, int32_t *x_sum,
                         ptrdiff_t k, float eps, float offset);
    void (*rescale_add)(const int32_t *sums, const float *x, float *y, ptrdiff_t m, float scale);
    void (*gate)(const int32_t *gate, const int32_t *up, float *y, ptrdiff_t m, float gate_scale, float up_scale, int kind);
    void (*rotate)(const float *x, const float *cosine, const float *sine, float *y, ptrdiff_t heads, ptrdiff_t half);
    void (*activate)(const float *x, float *y, ptrdiff_t n, int kind);
    void (*attend)(const float *q, ptrdiff_t heads, const char *k, ptrdiff_t k_stride, const char *v,
                   ptrdiff_t v_stride, ptrdiff_t n, ptrdiff_t d, int half, float scale, float *scratch, float *out);
    void (*head)(const uint8_t *w, ptrdiff_t row_bytes, ptrdiff_t rows, const float *x, ptrdiff_t x_stride,
                 ptrdiff_t tokens, ptrdiff_t k, float *out, ptrdiff_t out_stride, int type);
    int (*head_prepare)(const float *x, ptrdiff_t k, int type, char *token);
    void (*head_integer)(const uint8_t *w, ptrdiff_t row_bytes, ptrdiff_t rows, const char *x, ptrdiff_t tokens, ptrdiff_t k,
                         float *out, ptrdiff_t out_stride, int type, char *scratch);
} decoder_steps;

#ifdef DECODER_STEPS_LOOPS

/* Vectors as wide as the registers; sixteen float lanes and eight double lanes are NF and ND of them. */
#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX2__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#define NF (64 / WIDTH)
#define ND (64 / WIDTH)
typedef float vec_f32 __attribute__((vector_size(WIDTH)));
typedef float half_f32 __attribute__((vector_size(WIDTH / 2))); /* as many lanes as a vec_f64 */
typedef double vec_f64 __attribute__((vector_size(WIDTH)));

#define STEP_INLINE static inline __attribute__((always_inline))

/* ---- small parts ------------------------------------------------------------------------------------------------- */

STEP_INLINE double sum_lanes_f64(const vec_f64 *lanes) {
    double v[8];
    memcpy(v, lanes, 64);
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

STEP_INLINE float sum_lanes_f32(const vec_f32 *lanes) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const __m256 low = _mm512_castps512_ps256((__m512)lanes[0]);
    const __m256 high = _mm512_extractf32x8_ps((__m512)lanes[0], 1);
#else
    const __m256 low = (__m256)lanes[0], high = (__m256)lanes[1];
#endif
    const __m256 eight = _mm256_add_ps(low, high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    float v[16], half[8], quarter[4];
    memcpy(v, lanes, 64);
    for (int i = 0; i < 8; i++) half[i] = v[i] + v[i + 8];
    for (int i = 0; i < 4; i++) quarter[i] = half[i] + half[i + 4];
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
#endif
}

/* Vector number i of eight floats, widened. */
STEP_INLINE vec_f64 widened(const float *x, int i) {
    half_f32 a;
    memcpy(&a, x + i * (WIDTH / 8), WIDTH / 2);
    return __builtin_convertvector(a, vec_f64);
}

/* float16 bits to float32, exactly: the exponent is moved up by 112 with a product, which also takes in subnormals.
 * Infinities and NaN do not occur in a table; a cache refuses them. */
STEP_INLINE float half_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    float value;
    memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    memcpy(&bits, &value, 4);
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

/* exp(x) in float64 for x <= 709: x = n ln 2 + r, a Taylor polynomial of degree 13 on |r| <= ln 2 / 2 (remainder
 * 0.3466^14 / 14! = 4e-18), times 2^n. Relative error below 4e-16. Below -708 the result is 0. */
STEP_INLINE double exp_f64(double x) {
    const double magic = 0x1.8p52; /* added, it leaves the nearest integer in the low bits */
    const double kept = x > -708.0 ? x : -708.0;
    const double shifted = kept * 0x1.71547652b82fep0 + magic, n = shifted - magic;
    /* The first constant is the first 33 bits of ln 2: an exact product for |n| < 2^20. */
    const double r = (kept - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
    double p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0, power;
    uint64_t bits;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    memcpy(&bits, &shifted, 8);
    bits = (bits + 1023) << 52; /* 2^n; the bits of magic leave at the top */
    memcpy(&power, &bits, 8);
    power *= p;
    return x > -708.0 ? power : 0.0;
}

/* ---- norm, quantiser, rotation, activation ----------------------------------------------------------------------- */

static void step_norm(const float *x, const float *weight, float *y, ptrdiff_t k, float eps, float offset) {
    vec_f64 lanes[2][ND];
    memset(lanes, 0, sizeof(lanes));
    double sum, rest = 0;
    ptrdiff_t i = 0;
    for (; i + 16 <= k; i += 16)
        for (int j = 0; j < 2; j++)
            for (int v = 0; v < ND; v++) {
                vec_f64 a = widened(x + i + 8 * j, v);
                lanes[j][v] += a * a;
            }
    for (int v = 0; v < ND; v++) lanes[0][v] += lanes[1][v];
    for (; i < k; i++) rest += (double)x[i] * (double)x[i];
    sum = sum_lanes_f64(lanes[0]) + rest;
    float inverse = 1.0f / sqrtf((float)(sum / (double)k) + eps);
    for (i = 0; i < k; i++) y[i] = (x[i] * inverse) * (weight[i] + offset);
}

/* Returns 0 if a value is not finite. */
static int step_quantize(const float *x, int8_t *x_q, float *x_scale, ptrdiff_t k) {
    int32_t largest = 0; /* magnitudes of floats are ordered like their bits */
    for (ptrdiff_t i = 0; i < k; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    if (largest >= 0x7f800000) return 0;
    float limit;
    memcpy(&limit, &largest, 4);
    if (limit < 1e-5f) limit = 1e-5f;
    const float inverse = 127.0f / limit, magic = 0x1.8p23f;
    /* |x * inverse| <= 127 (1 + 2^-22), so the sum with magic rounds to the nearest integer, halves to even. */
    for (ptrdiff_t i = 0; i < k; i++) {
        float shifted = x[i] * inverse + magic;
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        x_q[i] = (int8_t)(bits & 0xff);
    }
    *x_scale = limit / 127.0f;
    return 1;
}

static void step_rescale(const int32_t *sums, float *y, ptrdiff_t m, float scale) {
    for (ptrdiff_t i = 0; i < m; i++) y[i] = (float)sums[i] * scale;
}

/* Norm (unless weight is NULL), quantiser, and the sum of the int8 values. Returns 0 if a value is not finite. */
static int step_norm_quantize(const float *x, const float *weight, float *normed, int8_t *x_q, float *x_scale,
                              int32_t *x_sum, ptrdiff_t k, float eps, float offset) {
    if (weight != NULL) {
        step_norm(x, weight, normed, k, eps, offset);
        x = normed;
    }
    int32_t sum = 0;
    const int finite = step_quantize(x, x_q, x_scale, k);
    if (finite)
        for (ptrdiff_t i = 0; i < k; i++) sum += x_q[i];
    *x_sum = sum;
    return finite;
}

static void step_rescale_add(const int32_t *sums, const float *x, float *y, ptrdiff_t m, float scale) {
    for (ptrdiff_t i = 0; i < m; i++) y[i] = x[i] + (float)sums[i] * scale;
}

static void step_rotate(const float *x, const float *cosine, const float *sine, float *y, ptrdiff_t heads,
                        ptrdiff_t half) {
    for (ptrdiff_t h = 0; h < heads; h++, x += 2 * half, y += 2 * half)
        for (ptrdiff_t i = 0; i < half; i++) {
            float a = x[i], b = x[half + i];
            y[i] = a * cosine[i] - b * sine[i];
            y[half + i] = b * cosine[i] + a * sine[i];
        }
}

/* x / (1 + exp(-u)), with u = x for silu. For gelu_tanh u = 2 sqrt(2 / pi) (x + 0.044715 x^3): this is
 * x (1 + tanh(u / 2)) / 2 without the cancellation at negative u. */
STEP_INLINE float gated(float value, int gelu) {
    const double x = value, u = gelu ? 0x1.9884533d43651p0 * (x + 0.044715 * (x * x * x)) : x;
    return (float)(x / (1.0 + exp_f64(u > -709.0 ? -u : 709.0)));
}

static void step_activate(const float *x, float *y, ptrdiff_t n, int kind) {
    if (kind == ACTIVATE_RELU2)
        for (ptrdiff_t i = 0; i < n; i++) {
            float positive = x[i] <= 0 ? 0 : x[i]; /* NaN stays NaN */
            y[i] = positive * positive;
        }
    else if (kind == ACTIVATE_SILU)
        for (ptrdiff_t i = 0; i < n; i++) y[i] = gated(x[i], 0);
    else
        for (ptrdiff_t i = 0; i < n; i++) y[i] = gated(x[i], 1);
}

/* activation(gate) * up */
static void step_gate(const int32_t *gate, const int32_t *up, float *y, ptrdiff_t m, float gate_scale, float up_scale,
                      int kind) {
    float part[256];
    for (ptrdiff_t i = 0; i < m; i += 256) {
        const ptrdiff_t n = m - i < 256 ? m - i : 256;
        step_rescale(gate + i, part, n, gate_scale);
        step_activate(part, y + i, n, kind);
        for (ptrdiff_t j = 0; j < n; j++) y[i + j] *= (float)up[i + j] * up_scale;
    }
}

/* ---- attention of one token's query heads that share a key/value head ---------------------------------------------- */

/* `count` rows of a cache as floats, zeros up to a multiple of 16 columns: where they lie if that is so, else in `copy`. */
STEP_INLINE const float *cache_rows(const char *rows, ptrdiff_t stride, ptrdiff_t count, ptrdiff_t d, int half, float *copy,
                                    ptrdiff_t *row_floats) {
    const ptrdiff_t padded = (d + 15) / 16 * 16;
    if (!half && d == padded && stride % 4 == 0) {
        *row_floats = stride / 4;
        return (const float *)rows;
    }
    *row_floats = padded;
    for (ptrdiff_t s = 0; s < count; s++) {
        float *to = copy + s * padded;
        const char *row = rows + s * stride;
        if (half) {
            uint16_t bits[16];
            for (ptrdiff_t i = 0; i < padded; i += 16) {
                const ptrdiff_t n = d - i < 16 ? d - i : 16;
                if (n < 16) memset(bits, 0, sizeof(bits));
                memcpy(bits, row + 2 * i, n == 16 ? 32 : 2 * (size_t)n);
                for (int j = 0; j < 16; j++) to[i + j] = half_to_float(bits[j]);
            }
        } else {
            memcpy(to, row, 4 * (size_t)d);
            memset(to + d, 0, 4 * (size_t)(padded - d));
        }
    }
    return copy;
}

/* G query heads at a time, so that a key or value is loaded once for all of them; `q`, `sums` and `scores` are G rows of
 * `padded`, `padded` and `stride` floats. Keys and values come some rows at a time, which then stay in the cache. */
STEP_INLINE void attend_heads(int G, int half, const float *q, const char *k, ptrdiff_t k_stride, const char *v,
                              ptrdiff_t v_stride, ptrdiff_t n, ptrdiff_t d, float scale, float *scores, ptrdiff_t stride,
                              float *sums, float *copy, float *out) {
    const ptrdiff_t padded = (d + 15) / 16 * 16;
    float largest[4], total[4];
    ptrdiff_t row_floats;
    for (int g = 0; g < G; g++) largest[g] = -INFINITY;
    for (ptrdiff_t first = 0; first < n; first += ATTEND_ROWS) {
        const ptrdiff_t count = n - first < ATTEND_ROWS ? n - first : ATTEND_ROWS;
        const float *keys = cache_rows(k + first * k_stride, k_stride, count, d, half, copy, &row_floats);
        for (ptrdiff_t s = 0; s < count; s++, keys += row_floats) {
            vec_f32 sum[4][NF];
            memset(sum, 0, sizeof(sum));
            for (ptrdiff_t i = 0; i < padded; i += 16)
                for (int w = 0; w < NF; w++) {
                    vec_f32 key, a;
                    memcpy(&key, keys + i + w * (WIDTH / 4), WIDTH);
                    for (int g = 0; g < G; g++) {
                        memcpy(&a, q + g * padded + i + w * (WIDTH / 4), WIDTH);
                        sum[g][w] += a * key;
                    }
                }
            for (int g = 0; g < G; g++) {
                const float score = sum_lanes_f32(sum[g]) * scale;
                scores[g * stride + first + s] = score;
                if (!(score <= largest[g])) largest[g] = score;
            }
        }
    }
    for (int g = 0; g < G; g++) {
        vec_f64 sum[ND];
        float *row = scores + g * stride;
        memset(sum, 0, sizeof(sum));
        for (ptrdiff_t s = n; s < stride; s++) row[s] = -INFINITY;
        for (ptrdiff_t s = 0; s < stride; s++) row[s] = (float)exp_f64((double)row[s] - (double)largest[g]);
        for (ptrdiff_t s = 0; s < stride; s += 8)
            for (int w = 0; w < ND; w++) sum[w] += widened(row + s, w);
        total[g] = (float)sum_lanes_f64(sum);
    }
    memset(sums, 0, 4 * (size_t)(G * padded));
    for (ptrdiff_t first = 0; first < n; first += ATTEND_ROWS) {
        const ptrdiff_t count = n - first < ATTEND_ROWS ? n - first : ATTEND_ROWS;
        const float *values = cache_rows(v + first * v_stride, v_stride, count, d, half, copy, &row_floats);
        for (ptrdiff_t i = 0; i < padded; i += 16) {
            vec_f32 sum[4][NF];
            for (int g = 0; g < G; g++) memcpy(sum[g], sums + g * padded + i, 64);
            /* These short runs, a row apart, are more than the hardware foresees: ask for a share of the next rows. */
            if (!half)
                for (ptrdiff_t line = i * ATTEND_ROWS * 4; line < (i + 16) * ATTEND_ROWS * 4; line += 64)
                    __builtin_prefetch((const char *)values + ATTEND_ROWS * v_stride + line);
            for (ptrdiff_t s = 0; s < count; s++)
                for (int w = 0; w < NF; w++) {
                    vec_f32 value;
                    memcpy(&value, values + s * row_floats + i + w * (WIDTH / 4), WIDTH);
                    for (int g = 0; g < G; g++) sum[g][w] += scores[g * stride + first + s] * value;
                }
            for (int g = 0; g < G; g++) memcpy(sums + g * padded + i, sum[g], 64);
        }
    }
    for (int g = 0; g < G; g++)
        for (ptrdiff_t i = 0; i < d; i++) out[g * d + i] = sums[g * padded + i] / total[g];
}

static void step_attend(const float *q, ptrdiff_t heads, const char *k, ptrdiff_t k_stride, const char *v,
                        ptrdiff_t v_stride, ptrdiff_t n, ptrdiff_t d, int half, float scale, float *scratch, float *out) {
    const ptrdiff_t padded = (d + 15) / 16 * 16, stride = (n + 15) / 16 * 16;
    float *queries = scratch + 4 * stride, *sums = queries + 4 * padded, *copy = sums + 4 * padded;
    while (heads > 0) {
        const ptrdiff_t count = heads >= 4 ? 4 : heads >= 2 ? 2 : 1;
        for (ptrdiff_t g = 0; g < count; g++)
            for (ptrdiff_t i = 0; i < padded; i++) queries[g * padded + i] = i < d ? q[g * d + i] : 0.0f;
#define CALL(G, HALF)                                                                                                 \
    attend_heads(G, HALF, queries, k, k_stride, v, v_stride, n, d, scale, scratch, stride, sums, copy, out)
        if (half) {
            if (count == 4) CALL(4, 1);
            else if (count == 2) CALL(2, 1);
            else CALL(1, 1);
        } else {
            if (count == 4) CALL(4, 0);
            else if (count == 2) CALL(2, 0);
            else CALL(1, 0);
        }
#undef CALL
        heads -= count;
        q += count * d;
        out += count * d;
    }
}

/* ---- head ---------------------------------------------------------------------------------------------------------- */

#define TABLE_CHUNK 256 /* columns decoded at a time; every type has whole blocks of them */
#define TABLE_TOKENS 16 /* tokens that share a decoded chunk */

static ptrdiff_t table_bytes(int type, ptrdiff_t columns) { return (type == TABLE_F32 ? 4 : 2) * columns; }

/* n values of a row, n <= TABLE_CHUNK, as float32; zeros up to the next multiple of 16. */
STEP_INLINE void table_decode(const uint8_t *row, float *w, ptrdiff_t n, int type) {
    if (type == TABLE_F32) {
        memcpy(w, row, 4 * (size_t)n);
        for (ptrdiff_t i = n; i % 16; i++) w[i] = 0;
        return;
    }
    uint16_t bits[TABLE_CHUNK];
    memcpy(bits, row, 2 * (size_t)n);
    if (type == TABLE_F16)
        for (ptrdiff_t i = 0; i < n; i++) w[i] = half_to_float(bits[i]);
    else
        for (ptrdiff_t i = 0; i < n; i++) {
            uint32_t wide = (uint32_t)bits[i] << 16;
            memcpy(w + i, &wide, 4);
        }
    for (ptrdiff_t i = n; i % 16; i++) w[i] = 0;
}

/* out[t * out_stride + r] = sum over k of row r [k] * x[t, k] for `rows` rows. Sixteen lanes, lane l takes columns
 * l, l + 16, ...; x is padded with zeros to x_stride, a multiple of 16. */
STEP_INLINE void head_of_type(const uint8_t *w, ptrdiff_t row_bytes, ptrdiff_t rows, const float *x, ptrdiff_t x_stride,
                              ptrdiff_t tokens, ptrdiff_t k, float *out, ptrdiff_t out_stride, int type) {
    float decoded[4][TABLE_CHUNK] __attribute__((aligned(64)));
    vec_f32 sums[TABLE_TOKENS][4][NF];
    for (ptrdiff_t first = 0; first < rows; first += 4) {
        const ptrdiff_t count = rows - first < 4 ? rows - first : 4;
        for (ptrdiff_t start = 0; start < tokens; start += TABLE_TOKENS) {
            const ptrdiff_t n_tokens = tokens - start < TABLE_TOKENS ? tokens - start : TABLE_TOKENS;
            memset(sums, 0, sizeof(sums[0]) * (size_t)n_tokens);
            for (ptrdiff_t i = 0; i < k; i += TABLE_CHUNK) {
                const ptrdiff_t n = k - i < TABLE_CHUNK ? k - i : TABLE_CHUNK;
                /* The next four rows lie behind these; short runs in four places are more than the hardware foresees. */
                if (start == 0)
                    for (ptrdiff_t j = 4 * table_bytes(type, i); j < 4 * table_bytes(type, i + n); j += 64)
                        __builtin_prefetch(w + (first + 8) * row_bytes + j);
                for (ptrdiff_t r = 0; r < 4; r++) /* a missing row repeats the last; its sum is not stored */
                    table_decode(w + (first + (r < count ? r : count - 1)) * row_bytes + table_bytes(type, i), decoded[r],
                                 n, type);
                for (ptrdiff_t t = 0; t < n_tokens; t++) {
                    const float *token = x + (start + t) * x_stride + i;
                    vec_f32 sum[4][NF];
                    memcpy(sum, sums[t], sizeof(sum));
                    for (ptrdiff_t j = 0; j < n; j += 16)
                        for (int v = 0; v < NF; v++) {
                            vec_f32 a, b;
                            memcpy(&a, token + j + v * (WIDTH / 4), WIDTH);
                            for (int r = 0; r < 4; r++) {
                                memcpy(&b, decoded[r] + j + v * (WIDTH / 4), WIDTH);
                                sum[r][v] += b * a;
                            }
                        }
                    memcpy(sums[t], sum, sizeof(sum));
                }
            }
            for (ptrdiff_t t = 0; t < n_tokens; t++)
                for (ptrdiff_t r = 0; r < count; r++) out[(start + t) * out_stride + first + r] = sum_lanes_f32(sums[t][r]);
        }
    }
}

static void step_head(const uint8_t *w, ptrdiff_t row_bytes, ptrdiff_t rows, const float *x, ptrdiff_t x_stride,
                      ptrdiff_t tokens, ptrdiff_t k, float *out, ptrdiff_t out_stride, int type) {
#define CASE(TYPE)                                                                                                    \
    case TYPE: head_of_type(w, row_bytes, rows, x, x_stride, tokens, k, out, out_stride, TYPE); break;
    switch (type) {
        CASE(TABLE_F32)
        CASE(TABLE_F16)
        CASE(TABLE_BF16)
    }
#undef CASE
}

/* ---- head of integers ------------------------------------------------------------------------------------------------ */

/* A row is decoded to one byte a column, which every token then multiplies. With vpdpbusd the bytes are codes c = q + zero,
 * unsigned, and -zero * (sum of four activations) is where its sums begin; without, they are q, signed. */
#if defined(__AVX512VNNI__)
#define CODE_ZERO(type) ((type) == TABLE_Q8_0 ? 128 : (type) == TABLE_Q6_K ? 32 : 8)
/* vpmaddwd by (scale, 0): the sum of four products, at most 4 * 32 * 127, fits the low half. */
#define CODE_PAIR(scale) ((uint32_t)(uint16_t)(int16_t)(scale))
#else
#define CODE_ZERO(type) 0
#define CODE_PAIR(scale) ((uint32_t)(uint16_t)(int16_t)(scale) * 0x10001u)
#endif

typedef uint64_t half_u64 __attribute__((vector_size(16)));
typedef uint64_t vec_u64 __attribute__((vector_size(32)));
typedef int8_t vec_i8 __attribute__((vector_size(32)));

typedef struct {
    uint8_t *codes;
    float *scales;   /* of 32 columns */
    uint32_t *pairs; /* of 16 columns: the int8 scale of Q6_K in one or both halves */
} head_row;

static int step_head_prepare(const float *x, ptrdiff_t k, int type, char *token) {
    const ptrdiff_t padded = HEAD_COLUMNS(k);
    int8_t *x_q = (int8_t *)token;
    int32_t *offsets = (int32_t *)(token + padded);
    float *lanes = (float *)(token + 2 * padded), *scales = (float *)(token + 3 * padded);
    memset(token, 0, HEAD_TOKEN_BYTES(k));
    for (ptrdiff_t b = 0; b < k / 32; b++) {
        if (!step_quantize(x + 32 * b, x_q + 32 * b, scales + b, 32)) return 0;
        for (int l = 0; l < 8; l++) lanes[8 * b + l] = scales[b];
    }
    for (ptrdiff_t i = 0; i < k / 4; i++)
        offsets[i] = -CODE_ZERO(type) * (x_q[4 * i] + x_q[4 * i + 1] + x_q[4 * i + 2] + x_q[4 * i + 3]);
    return 1;
}

/* 32 columns from their low bits. */
#define STORE_CODES(codes, bits, zero)                                                                                \
    do {                                                                                                               \
        const vec_i8 moved = (vec_i8)(bits) - (int8_t)(zero);                                                          \
        memcpy(codes, &moved, 32);                                                                                     \
    } while (0)

STEP_INLINE void row_decode(const uint8_t *w, ptrdiff_t k, int type, head_row row) {
    const uint64_t fours = 0x0f0f0f0f0f0f0f0f, twos = 0x3030303030303030;
    uint8_t *c = row.codes;
    uint16_t half;
    if (type == TABLE_Q6_K) {
        const int zero = 32 - CODE_ZERO(type);
        for (ptrdiff_t b = 0; b < k / 256; b++, w += 210) {
            memcpy(&half, w + 208, 2);
            const float d = half_to_float(half);
            for (int i = 0; i < 8; i++) row.scales[8 * b + i] = d;
            for (int i = 0; i < 16; i++) row.pairs[16 * b + i] = CODE_PAIR((int8_t)w[192 + i]);
            for (int side = 0; side < 2; side++, c += 128) {
                vec_u64 low, next, high;
                memcpy(&low, w + 64 * side, 32);
                memcpy(&next, w + 64 * side + 32, 32);
                memcpy(&high, w + 128 + 32 * side, 32);
                STORE_CODES(c, (low & fours) | (high << 4 & twos), zero);
                STORE_CODES(c + 32, (next & fours) | (high << 2 & twos), zero);
                STORE_CODES(c + 64, (low >> 4 & fours) | (high & twos), zero);
                STORE_CODES(c + 96, (next >> 4 & fours) | (high >> 2 & twos), zero);
            }
        }
        return;
    }
    const ptrdiff_t block_bytes = type == TABLE_Q8_0 ? 34 : 18;
    for (ptrdiff_t b = 0; b < k / 32; b++) {
        memcpy(&half, w + b * block_bytes, 2);
        row.pairs[b] = half;
    }
    for (ptrdiff_t b = 0; b < k / 32; b++) row.scales[b] = half_to_float((uint16_t)row.pairs[b]);
    w += 2;
    for (ptrdiff_t b = 0; b < k / 32; b++, w += block_bytes, c += 32) {
        vec_u64 bits;
        if (type == TABLE_Q8_0) {
            memcpy(&bits, w, 32);
            STORE_CODES(c, bits, -CODE_ZERO(type));
        } else {
            const vec_u64 shift = {0, 0, 4, 4};
            half_u64 low;
            memcpy(&low, w, 16);
            bits = __builtin_shufflevector(low, low, 0, 1, 0, 1);
            STORE_CODES(c, bits >> shift & fours, 8 - CODE_ZERO(type));
        }
    }
}

/* Four rows times a token. The sixteen sums of a row: lane l takes columns 4 l .. 4 l + 3 of each 64. */
STEP_INLINE void rows_dot(const head_row *rows, const char *token, ptrdiff_t padded, int grouped, float *out,
                          ptrdiff_t count) {
    const int8_t *x_q = (const int8_t *)token;
    const int32_t *offsets = (const int32_t *)(token + padded);
    const float *x_scales = (const float *)(token + 3 * padded);
    vec_f32 sums[4][NF];
    memset(sums, 0, sizeof(sums));
#if defined(__AVX512VNNI__)
    /* Which scale a lane takes; the permutations look at the last four bits only. */
    __m512i two = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    __m512i four = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    for (ptrdiff_t i = 0; i < padded / 512; i++) {
        __m512 scale[4];
        for (int r = 0; r < 4; r++)
            scale[r] = _mm512_mul_ps(_mm512_loadu_ps(rows[r].scales + 16 * i), _mm512_loadu_ps(x_scales + 16 * i));
#pragma GCC unroll 1 /* unrolled, it spills its sums */
        for (ptrdiff_t at = 8 * i; at < 8 * i + 8; at++) {
            const __m512i x = _mm512_loadu_si512(x_q + 64 * at), offset = _mm512_loadu_si512(offsets + 16 * at);
            for (int r = 0; r < 4; r++) {
                __m512i sum = _mm512_dpbusd_epi32(offset, _mm512_loadu_si512(rows[r].codes + 64 * at), x);
                if (grouped) {
                    const __m512i pairs = _mm512_loadu_si512(rows[r].pairs + 16 * (at / 4));
                    sum = _mm512_madd_epi16(sum, _mm512_permutexvar_epi32(four, pairs));
                }
                sums[r][0] += (vec_f32)_mm512_cvtepi32_ps(sum) * (vec_f32)_mm512_permutexvar_ps(two, scale[r]);
            }
            two = _mm512_add_epi32(two, _mm512_set1_epi32(2));
            four = _mm512_add_epi32(four, _mm512_set1_epi32(4));
        }
    }
#elif defined(__AVX2__)
    (void)offsets;
    const __m256i halves = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
    for (ptrdiff_t i = 0; i < padded / 256; i++) {
        float scale[4][8];
        for (int r = 0; r < 4; r++)
            for (int j = 0; j < 8; j++) scale[r][j] = rows[r].scales[8 * i + j] * x_scales[8 * i + j];
        for (int j = 0; j < 8; j++) {
            const __m256i x = _mm256_loadu_si256((const __m256i *)(x_q + 256 * i + 32 * j));
            for (int r = 0; r < 4; r++) {
                const __m256i q = _mm256_loadu_si256((const __m256i *)(rows[r].codes + 256 * i + 32 * j));
                __m256i pair = _mm256_set1_epi16(1);
                if (grouped) {
                    const __m256i eight = _mm256_loadu_si256((const __m256i *)(rows[r].pairs + 16 * i + 8 * (j / 4)));
                    pair = _mm256_permutevar8x32_epi32(eight, _mm256_add_epi32(halves, _mm256_set1_epi32(2 * (j % 4))));
                }
                /* |q| <= 128 and |x| <= 127: the sum of two products stays inside int16. */
                const __m256i sum =
                    _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q)), pair);
                sums[r][j & 1] += (vec_f32)_mm256_cvtepi32_ps(sum) * (vec_f32)_mm256_set1_ps(scale[r][j]);
            }
        }
    }
#else
    (void)offsets;
    for (int r = 0; r < 4; r++)
        for (ptrdiff_t b = 0; b < padded / 32; b++) {
            const int8_t *q = (const int8_t *)rows[r].codes + 32 * b, *x = x_q + 32 * b;
            const float scale = rows[r].scales[b] * x_scales[b];
            float term[8];
            for (int l = 0; l < 8; l++, q += 4, x += 4) {
                const int32_t sum = q[0] * x[0] + q[1] * x[1] + q[2] * x[2] + q[3] * x[3];
                term[l] = (float)(grouped ? sum * (int16_t)rows[r].pairs[2 * b + l / 4] : sum) * scale;
            }
            for (int v = 0; v < NF / 2; v++) {
                vec_f32 a;
                memcpy(&a, term + v * (WIDTH / 4), WIDTH);
                sums[r][(b & 1) * (NF / 2) + v] += a;
            }
        }
#endif
    for (ptrdiff_t r = 0; r < count; r++) out[r] = sum_lanes_f32(sums[r]);
}

#if defined(__AVX512VNNI__)
/* A row times a token, from the stored bytes to the sum in registers: the same sums as rows_dot. */
STEP_INLINE float row_dot(const uint8_t *w, ptrdiff_t k, int type, const char *token, ptrdiff_t padded) {
    const __m512i fours = _mm512_set1_epi8(15), twos = _mm512_set1_epi8(0x30), sign = _mm512_set1_epi8(-128);
    __m512 sums = _mm512_setzero_ps();
/* 64 columns of the token that x points at, whose scales are multiplied with `scale`. */
#define ADD(codes, group, scale)                                                                                      \
    do {                                                                                                               \
        __m512i sum = _mm512_dpbusd_epi32(_mm512_loadu_si512(x + padded), codes, _mm512_loadu_si512(x));               \
        if (type == TABLE_Q6_K) sum = _mm512_madd_epi16(sum, group);                                                   \
        const __m512 both = _mm512_mul_ps(scale, _mm512_loadu_ps((const float *)(x + 2 * padded)));                    \
        sums = _mm512_add_ps(sums, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), both));                                      \
    } while (0)
    const char *x = token;
    if (type == TABLE_Q6_K) {
        const __m512i four = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        const __m512i left = _mm512_set_epi64(2, 2, 2, 2, 4, 4, 4, 4), right = _mm512_set_epi64(2, 2, 2, 2, 0, 0, 0, 0);
        for (const char *end = token + k; x < end; w += 210) {
            uint16_t half;
            memcpy(&half, w + 208, 2);
            const __m512 d = _mm512_cvtph_ps(_mm256_set1_epi16((short)half));
            /* vpmaddwd by (scale, 0): the sum of four products, at most 4 * 32 * 127, fits the low half. */
            const __m512i pairs = _mm512_and_si512(
                _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(w + 192))), _mm512_set1_epi32(0xffff));
            for (int side = 0; side < 2; side++) {
                const __m512i low = _mm512_loadu_si512(w + 64 * side);
                const __m512i high =
                    _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(w + 128 + 32 * side)));
                for (int part = 0; part < 2; part++, x += 64) {
                    const __m512i nibbles = part ? _mm512_srli_epi64(low, 4) : low;
                    const __m512i upper = part ? _mm512_srlv_epi64(high, right) : _mm512_sllv_epi64(high, left);
                    const __m512i index = _mm512_add_epi32(four, _mm512_set1_epi32(8 * side + 4 * part));
                    ADD(_mm512_or_si512(_mm512_and_si512(nibbles, fours), _mm512_and_si512(upper, twos)),
                        _mm512_permutexvar_epi32(index, pairs), d);
                }
            }
        }
    } else {
        const ptrdiff_t block_bytes = type == TABLE_Q8_0 ? 34 : 18;
        const __m512i shift = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
/* Two blocks; their halves are read where they lie. */
#define ADD_BLOCKS(first, second)                                                                                     \
    do {                                                                                                               \
        int16_t d, e;                                                                                                  \
        memcpy(&d, first, 2);                                                                                          \
        memcpy(&e, second, 2);                                                                                         \
        const __m512 scale = _mm512_cvtph_ps(_mm256_mask_set1_epi16(_mm256_set1_epi16(d), 0xff00, e));                 \
        if (type == TABLE_Q8_0) {                                                                                      \
            const __m512i a = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)((first) + 2)));              \
            const __m256i b = _mm256_loadu_si256((const __m256i *)((second) + 2));                                     \
            ADD(_mm512_xor_si512(_mm512_inserti64x4(a, b, 1), sign), sign, scale);                                     \
        } else {                                                                                                       \
            const __m512i a = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)((first) + 2)));                 \
            const __m128i b = _mm_loadu_si128((const __m128i *)((second) + 2));                                        \
            const __m512i both = _mm512_mask_broadcast_i32x4(a, 0xff00, b);                                            \
            ADD(_mm512_and_si512(_mm512_srlv_epi64(both, shift), fours), sign, scale);                                 \
        }                                                                                                              \
    } while (0)
        for (const char *end = token + k / 64 * 64; x < end; x += 64, w += 2 * block_bytes)
            ADD_BLOCKS(w, w + block_bytes);
        if (k % 64) ADD_BLOCKS(w, w); /* the second time it meets zeros */
#undef ADD_BLOCKS
    }
#undef ADD
    const vec_f32 all[1] = {(vec_f32)sums};
    return sum_lanes_f32(all);
}
#elif defined(__AVX2__)
/* A row times a token, from the stored bytes to the sum in registers: the same sums as rows_dot. */
STEP_INLINE float row_dot(const uint8_t *w, ptrdiff_t k, int type, const char *token, ptrdiff_t padded) {
    const uint64_t fours = 0x0f0f0f0f0f0f0f0f, twos = 0x3030303030303030;
    const __m256i ones = _mm256_set1_epi16(1), index = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
    const int8_t *x_q = (const int8_t *)token;
    const float *x_scales = (const float *)(token + 3 * padded);
    vec_f32 even = {0}, odd = {0};
/* Block i of the token. |q| <= 128 and |x| <= 127: the sum of two products stays inside int16. */
#define ADD(to, codes, i, pair, scale)                                                                                \
    do {                                                                                                               \
        const __m256i q = (__m256i)(codes), x = _mm256_loadu_si256((const __m256i *)(x_q + 32 * (i)));                 \
        const __m256i sum = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q));                          \
        to += (vec_f32)_mm256_cvtepi32_ps(_mm256_madd_epi16(sum, pair)) * (vec_f32)_mm256_set1_ps(scale);              \
    } while (0)
    if (type == TABLE_Q6_K) {
        for (ptrdiff_t b = 0; b < k / 256; b++, w += 210, x_q += 256, x_scales += 8) {
            uint16_t half;
            float scale[8] __attribute__((aligned(32)));
            memcpy(&half, w + 208, 2);
            _mm256_store_ps(scale, _mm256_mul_ps(_mm256_set1_ps(half_to_float(half)), _mm256_loadu_ps(x_scales)));
            const __m256i scales = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + 192)));
            for (int side = 0; side < 2; side++) {
                /* Eight scales, each twice: a pair for a lane of 32 bits. */
                const __m128i eight = side ? _mm256_extracti128_si256(scales, 1) : _mm256_castsi256_si128(scales);
                const __m256i pairs =
                    _mm256_set_m128i(_mm_unpackhi_epi16(eight, eight), _mm_unpacklo_epi16(eight, eight));
                vec_u64 low, next, high;
                memcpy(&low, w + 64 * side, 32);
                memcpy(&next, w + 64 * side + 32, 32);
                memcpy(&high, w + 128 + 32 * side, 32);
#define QUARTER(to, nibbles, upper, j)                                                                                \
    ADD(to, (vec_i8)(((nibbles) & fours) | ((upper) & twos)) - (int8_t)32, 4 * side + j,                               \
        _mm256_permutevar8x32_epi32(pairs, _mm256_add_epi32(index, _mm256_set1_epi32(2 * j))), scale[4 * side + j])
                QUARTER(even, low, high << 4, 0);
                QUARTER(odd, next, high << 2, 1);
                QUARTER(even, low >> 4, high, 2);
                QUARTER(odd, next >> 4, high >> 2, 3);
#undef QUARTER
            }
        }
    } else {
        const ptrdiff_t block_bytes = type == TABLE_Q8_0 ? 34 : 18;
/* Block i of those at w, with the scale of both. */
#define ADD_BLOCK(to, i, scale)                                                                                       \
    do {                                                                                                               \
        vec_u64 bits;                                                                                                  \
        if (type == TABLE_Q8_0)                                                                                        \
            memcpy(&bits, w + (i) * block_bytes + 2, 32);                                                              \
        else {                                                                                                         \
            const vec_u64 shift = {0, 0, 4, 4};                                                                        \
            half_u64 low;                                                                                              \
            memcpy(&low, w + (i) * block_bytes + 2, 16);                                                               \
            bits = __builtin_shufflevector(low, low, 0, 1, 0, 1) >> shift & fours;                                     \
            bits = (vec_u64)((vec_i8)bits - (int8_t)8);                                                                \
        }                                                                                                              \
        ADD(to, bits, i, ones, scale);                                                                                 \
    } while (0)
        ptrdiff_t left = k / 32;
        for (; left >= 8; left -= 8, w += 8 * block_bytes, x_q += 256, x_scales += 8) {
            float scale[8] __attribute__((aligned(32)));
            uint16_t half[8];
            for (int i = 0; i < 8; i++) memcpy(half + i, w + i * block_bytes, 2);
            /* half_to_float, eight at a time */
            const __m256i bits = _mm256_cvtepu16_epi32(
                _mm_setr_epi16((short)half[0], (short)half[1], (short)half[2], (short)half[3], (short)half[4],
                               (short)half[5], (short)half[6], (short)half[7]));
            const __m256i low = _mm256_slli_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fff)), 13);
            const __m256i minus = _mm256_slli_epi32(_mm256_srli_epi32(bits, 15), 31);
            const __m256 d = _mm256_or_ps(_mm256_mul_ps(_mm256_castsi256_ps(low), _mm256_set1_ps(0x1p112f)),
                                          _mm256_castsi256_ps(minus));
            _mm256_store_ps(scale, _mm256_mul_ps(d, _mm256_loadu_ps(x_scales)));
            for (int i = 0; i < 8; i += 2) {
                ADD_BLOCK(even, i, scale[i]);
                ADD_BLOCK(odd, i + 1, scale[i + 1]);
            }
        }
        for (ptrdiff_t i = 0; i < left; i++) {
            uint16_t half;
            memcpy(&half, w + i * block_bytes, 2);
            const float scale = half_to_float(half) * x_scales[i];
            if (i & 1) ADD_BLOCK(odd, i, scale);
            else ADD_BLOCK(even, i, scale);
        }
#undef ADD_BLOCK
    }
#undef ADD
    const vec_f32 all[2] = {even, odd};
    return sum_lanes_f32(all);
}
#endif

STEP_INLINE void integer_head_of_type(const uint8_t *w, ptrdiff_t row_bytes, ptrdiff_t rows, const char *x,
                                      ptrdiff_t tokens, ptrdiff_t k, float *out, ptrdiff_t out_stride, int type,
                                      char *scratch) {
    const ptrdiff_t padded = HEAD_COLUMNS(k);
#if defined(__AVX2__)
    if (tokens == 1) {
        for (ptrdiff_t r = 0; r < rows; r++) out[r] = row_dot(w + r * row_bytes, k, type, x, padded);
        return;
    }
#endif
    head_row row[4];
    memset(scratch, 0, HEAD_SCRATCH_BYTES(k));
    for (int r = 0; r < 4; r++, scratch += HEAD_ROW_BYTES(k))
        row[r] = (head_row){(uint8_t *)scratch, (float *)(scratch + padded), (uint32_t *)(scratch + padded / 8 * 9)};
    for (ptrdiff_t first = 0; first < rows; first += 4) {
        const ptrdiff_t count = rows - first < 4 ? rows - first : 4;
        for (ptrdiff_t r = 0; r < count; r++) row_decode(w + (first + r) * row_bytes, k, type, row[r]);
        for (ptrdiff_t t = 0; t < tokens; t++)
            rows_dot(row, x + t * HEAD_TOKEN_BYTES(k), padded, type == TABLE_Q6_K, out + t * out_stride + first, count);
    }
}

/* out[t * out_stride + r] for `rows` rows and the tokens of x; `scratch` has HEAD_SCRATCH_BYTES(k), aligned to 64. */
static void step_head_integer(const uint8_t *w, ptrdiff_t row_bytes, ptrdiff_t rows, const char *x, ptrdiff_t tokens,
                              ptrdiff_t k, float *out, ptrdiff_t out_stride, int type, char *scratch) {
#define CASE(TYPE)                                                                                                    \
    case TYPE: integer_head_of_type(w, row_bytes, rows, x, tokens, k, out, out_stride, TYPE, scratch); break;
    switch (type) {
        CASE(TABLE_Q8_0)
        CASE(TABLE_Q6_K)
        CASE(TABLE_Q4_0)
    }
#undef CASE
}

/* ---- what a module exports ------------------------------------------------------------------------------------------ */

static const decoder_steps the_decoder_steps = {
    step_norm,   step_quantize, step_rescale, step_norm_quantize, step_rescale_add,  step_gate,
    step_rotate, step_activate, step_attend,  step_head,          step_head_prepare, step_head_integer,
};

#endif /* DECODER_STEPS_LOOPS */
#endif
