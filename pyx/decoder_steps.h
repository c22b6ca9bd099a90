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

/* ---- interface: what callers and modules share ------------------------------------------------------------------- */

enum { ACTIVATE_RELU2, ACTIVATE_SILU, ACTIVATE_GELU_TANH };
enum { TABLE_F32, TABLE_F16, TABLE_BF16, TABLE_Q8_0, TABLE_Q6_K };

/* Doubles of scratch that step_attend needs: four heads of scores and four padded queries. */
#define STEP_ATTEND_SCRATCH(n, d) (4 * (((n) + 7) / 8 * 8 + ((d) + 15) / 16 * 16))

typedef struct {
    void (*norm)(const float *x, const float *weight, float *y, ptrdiff_t k, float eps, float offset);
    int (*quantize)(const float *x, int8_t *x_q, float *x_scale, ptrdiff_t k);
    void (*rescale)(const int32_t *sums, float *y, ptrdiff_t m, float scale);
    void (*rotate)(const float *x, const float *cosine, const float *sine, float *y, ptrdiff_t heads, ptrdiff_t half);
    void (*activate)(const float *x, float *y, ptrdiff_t n, int kind);
    void (*attend)(const float *q, ptrdiff_t heads, const char *k, ptrdiff_t k_stride, const char *v,
                   ptrdiff_t v_stride, ptrdiff_t n, ptrdiff_t d, int half, double scale, double *scratch, float *out);
    void (*head)(const uint8_t *w, ptrdiff_t row_bytes, ptrdiff_t rows, const float *x, ptrdiff_t x_stride,
                 ptrdiff_t tokens, ptrdiff_t k, float *out, ptrdiff_t out_stride, int type);
} decoder_steps;

#ifdef DECODER_STEPS_LOOPS

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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
    float v[16], half[8], quarter[4];
    memcpy(v, lanes, 64);
    for (int i = 0; i < 8; i++) half[i] = v[i] + v[i + 8];
    for (int i = 0; i < 4; i++) quarter[i] = half[i] + half[i + 4];
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
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

/* ---- attention of one token's query heads that share a key/value head ---------------------------------------------- */

/* n <= 16 values of a cache row from column i on as floats, zeros behind them. */
STEP_INLINE const float *cache_values(const char *row, ptrdiff_t i, ptrdiff_t n, int half, float *copy) {
    if (half) {
        uint16_t bits[16];
        if (n < 16) memset(bits, 0, sizeof(bits));
        memcpy(bits, row + 2 * i, n == 16 ? 32 : 2 * (size_t)n);
        for (int j = 0; j < 16; j++) copy[j] = half_to_float(bits[j]);
        return copy;
    }
    if (n == 16) return (const float *)row + i;
    memset(copy, 0, 64);
    memcpy(copy, row + 4 * i, 4 * (size_t)n);
    return copy;
}

/* G query heads at a time, so that a key or value is loaded and widened once for all of them. `q` and `scores` are G rows
 * of `padded` and `stride` doubles. Columns go in blocks of sixteen, whose two halves share the eight lanes of a dot
 * product; for the values, a block is the outer loop and its sums stay in registers. */
#define DEFINE_ATTEND(G, HALF)                                                                                        \
    static void attend_##G##_##HALF(const double *q, const char *k, ptrdiff_t k_stride, const char *v,                 \
                                    ptrdiff_t v_stride, ptrdiff_t n, ptrdiff_t d, double scale, double *scores,        \
                                    ptrdiff_t stride, float *out) {                                                    \
        const ptrdiff_t padded = (d + 15) / 16 * 16;                                                                   \
        double largest[G], total[G];                                                                                   \
        float copy[16] __attribute__((aligned(64)));                                                                   \
        for (int g = 0; g < G; g++) largest[g] = -INFINITY;                                                            \
        for (ptrdiff_t s = 0; s < n; s++) {                                                                            \
            vec_f64 sum[G][ND];                                                                                        \
            memset(sum, 0, sizeof(sum));                                                                               \
            for (ptrdiff_t i = 0; i < padded; i += 16) {                                                               \
                const float *keys = cache_values(k + s * k_stride, i, d - i < 16 ? d - i : 16, HALF, copy);        \
                for (int j = 0; j < 2; j++)                                                                            \
                    for (int w = 0; w < ND; w++) {                                                                     \
                        const vec_f64 key = widened(keys + 8 * j, w);                                                  \
                        for (int g = 0; g < G; g++) {                                                                  \
                            vec_f64 a;                                                                                 \
                            memcpy(&a, q + g * padded + i + 8 * j + w * (WIDTH / 8), WIDTH);                           \
                            sum[g][w] += a * key;                                                                      \
                        }                                                                                              \
                    }                                                                                                  \
            }                                                                                                          \
            for (int g = 0; g < G; g++) {                                                                              \
                const double score = sum_lanes_f64(sum[g]) * scale;                                                    \
                scores[g * stride + s] = score;                                                                        \
                if (!(score <= largest[g])) largest[g] = score;                                                        \
            }                                                                                                          \
        }                                                                                                              \
        for (int g = 0; g < G; g++) {                                                                                  \
            vec_f64 sum[ND];                                                                                           \
            double *row = scores + g * stride;                                                                         \
            memset(sum, 0, sizeof(sum));                                                                               \
            for (ptrdiff_t s = n; s < stride; s++) row[s] = -INFINITY;                                                 \
            for (ptrdiff_t s = 0; s < stride; s++) row[s] = exp_f64(row[s] - largest[g]);                              \
            for (ptrdiff_t s = 0; s < stride; s += 8)                                                                  \
                for (int w = 0; w < ND; w++) {                                                                         \
                    vec_f64 a;                                                                                         \
                    memcpy(&a, row + s + w * (WIDTH / 8), WIDTH);                                                      \
                    sum[w] += a;                                                                                       \
                }                                                                                                      \
            total[g] = sum_lanes_f64(sum);                                                                             \
        }                                                                                                              \
        for (ptrdiff_t i = 0; i < padded; i += 16) {                                                                   \
            vec_f64 sum[G][2 * ND];                                                                                    \
            double block[16];                                                                                          \
            memset(sum, 0, sizeof(sum));                                                                               \
            for (ptrdiff_t s = 0; s < n; s++) {                                                                        \
                const float *values = cache_values(v + s * v_stride, i, d - i < 16 ? d - i : 16, HALF, copy);      \
                for (int w = 0; w < 2 * ND; w++) {                                                                     \
                    const vec_f64 value = widened(values, w);                                                          \
                    for (int g = 0; g < G; g++) sum[g][w] += scores[g * stride + s] * value;                           \
                }                                                                                                      \
            }                                                                                                          \
            for (int g = 0; g < G; g++) {                                                                              \
                memcpy(block, sum[g], sizeof(block));                                                                  \
                for (ptrdiff_t j = i; j < i + 16 && j < d; j++) out[g * d + j] = (float)(block[j - i] / total[g]);     \
            }                                                                                                          \
        }                                                                                                              \
    }
DEFINE_ATTEND(1, 0)
DEFINE_ATTEND(2, 0)
DEFINE_ATTEND(4, 0)
DEFINE_ATTEND(1, 1)
DEFINE_ATTEND(2, 1)
DEFINE_ATTEND(4, 1)

static void step_attend(const float *q, ptrdiff_t heads, const char *k, ptrdiff_t k_stride, const char *v,
                        ptrdiff_t v_stride, ptrdiff_t n, ptrdiff_t d, int half, double scale, double *scratch,
                        float *out) {
    const ptrdiff_t padded = (d + 15) / 16 * 16, stride = (n + 7) / 8 * 8;
    double *wide = scratch + 4 * stride;
    while (heads > 0) {
        ptrdiff_t count = heads >= 4 ? 4 : heads >= 2 ? 2 : 1;
        for (ptrdiff_t g = 0; g < count; g++)
            for (ptrdiff_t i = 0; i < padded; i++) wide[g * padded + i] = i < d ? (double)q[g * d + i] : 0.0;
#define CALL(G, HALF) attend_##G##_##HALF(wide, k, k_stride, v, v_stride, n, d, scale, scratch, stride, out)
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

static ptrdiff_t table_bytes(int type, ptrdiff_t columns) {
    switch (type) {
    case TABLE_F32: return 4 * columns;
    case TABLE_Q8_0: return columns / 32 * 34;
    case TABLE_Q6_K: return columns / 256 * 210;
    default: return 2 * columns;
    }
}

/* n values of a row, n <= TABLE_CHUNK, as float32; zeros up to the next multiple of 16. */
STEP_INLINE void table_decode(const uint8_t *row, float *w, ptrdiff_t n, int type) {
    if (type == TABLE_F32) {
        memcpy(w, row, 4 * (size_t)n);
        for (ptrdiff_t i = n; i % 16; i++) w[i] = 0;
        return;
    }
    if (type == TABLE_F16 || type == TABLE_BF16) {
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
        return;
    }
    if (type == TABLE_Q8_0) { /* blocks of 32: float16 d, int8 q; w = d q, exact */
        for (ptrdiff_t i = 0; i < n; i += 32, row += 34) {
            uint16_t bits;
            memcpy(&bits, row, 2);
            const float d = half_to_float(bits);
            for (int j = 0; j < 32; j++) w[i + j] = (float)(int8_t)row[2 + j] * d;
        }
        return;
    }
    /* Q6_K, one block of 256: 128 bytes of low fours, 64 of high twos, 16 int8 scales, float16 d; w = (d scale) q */
    for (ptrdiff_t i = 0; i < n; i += 256, row += 210) {
        uint16_t bits;
        memcpy(&bits, row + 208, 2);
        const float d = half_to_float(bits);
        for (int side = 0; side < 2; side++)
            for (int quarter = 0; quarter < 4; quarter++)
                for (int part = 0; part < 2; part++) { /* groups of 16 weights with one scale */
                    const uint8_t *low = row + 64 * side + quarter % 2 * 32 + 16 * part;
                    const uint8_t *high = row + 128 + 32 * side + 16 * part;
                    const float scale = d * (float)(int8_t)row[192 + 8 * side + 2 * quarter + part];
                    float *target = w + i + 128 * side + 32 * quarter + 16 * part;
                    for (int j = 0; j < 16; j++) {
                        int code = (quarter < 2 ? low[j] & 15 : low[j] >> 4) | (high[j] >> (2 * quarter) & 3) << 4;
                        target[j] = (float)(code - 32) * scale;
                    }
                }
    }
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

#if defined(__AVX2__)

/* As many int8 as a vector has floats, widened; of the vector conversion compilers make one byte at a time. */
STEP_INLINE vec_f32 int8_to_float(const uint8_t *q) {
#if defined(__AVX512F__)
    return (vec_f32)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)q)));
#else
    return (vec_f32)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)q)));
#endif
}

/* One token and Q8_0, the head of a decode step: as head_of_type, lane for lane, but weights go from the bytes to the sums in
 * registers. Four rows share x and are four chains of additions, which alone would wait for each other. */
STEP_INLINE void head_of_one_token_q8_0(const uint8_t *w, ptrdiff_t row_bytes, ptrdiff_t rows, const float *x, ptrdiff_t k,
                                        float *out) {
    for (ptrdiff_t first = 0; first < rows; first += 4) {
        const ptrdiff_t count = rows - first < 4 ? rows - first : 4;
        const uint8_t *row[4];
        for (ptrdiff_t r = 0; r < 4; r++) /* a missing row repeats the last; its sum is not stored */
            row[r] = w + (first + (r < count ? r : count - 1)) * row_bytes;
        vec_f32 sum[4][NF];
        memset(sum, 0, sizeof(sum));
        for (ptrdiff_t i = 0; i < k; i += 32) {
            const ptrdiff_t at = i / 32 * 34;
            /* Two groups of four rows ahead, at the same place: every line of them is asked for at least once. */
            for (int r = 0; r < 4; r++) __builtin_prefetch(row[r] + 8 * row_bytes + at);
            for (int r = 0; r < 4; r++) {
                uint16_t bits;
                memcpy(&bits, row[r] + at, 2);
#if defined(__AVX512VL__)
                const float d = _mm_cvtss_f32(_mm_maskz_cvtph_ps(1, _mm_cvtsi32_si128(bits)));
#else
                const float d = half_to_float(bits);
#endif
                for (int part = 0; part < 2; part++)
                    for (int v = 0; v < NF; v++) {
                        vec_f32 a;
                        memcpy(&a, x + i + 16 * part + v * (WIDTH / 4), WIDTH);
                        sum[r][v] += int8_to_float(row[r] + at + 2 + 16 * part + v * (WIDTH / 4)) * d * a;
                    }
            }
        }
        for (ptrdiff_t r = 0; r < count; r++) out[first + r] = sum_lanes_f32(sum[r]);
    }
}

#endif

static void step_head(const uint8_t *w, ptrdiff_t row_bytes, ptrdiff_t rows, const float *x, ptrdiff_t x_stride,
                      ptrdiff_t tokens, ptrdiff_t k, float *out, ptrdiff_t out_stride, int type) {
#define CASE(TYPE)                                                                                                    \
    case TYPE: head_of_type(w, row_bytes, rows, x, x_stride, tokens, k, out, out_stride, TYPE); break;
#if defined(__AVX2__)
    if (tokens == 1 && type == TABLE_Q8_0) {
        head_of_one_token_q8_0(w, row_bytes, rows, x, k, out);
        return;
    }
#endif
    switch (type) {
        CASE(TABLE_F32)
        CASE(TABLE_F16)
        CASE(TABLE_BF16)
        CASE(TABLE_Q8_0)
        CASE(TABLE_Q6_K)
    }
#undef CASE
}

/* ---- what a module exports ------------------------------------------------------------------------------------------ */

static const decoder_steps the_decoder_steps = {
    step_norm, step_quantize, step_rescale, step_rotate, step_activate, step_attend, step_head,
};

#endif /* DECODER_STEPS_LOOPS */
#endif
