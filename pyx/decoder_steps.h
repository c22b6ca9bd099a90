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

/* Rows of a cache, and the most tokens that share them in attention: 16 KiB of keys of 128 float32 stay in the first-level
 * cache for all of them. */
#define ATTEND_ROWS 32
#define ATTEND_TOKENS 4
/* Floats of scratch that step_attend needs: four heads of scores, queries and sums of each token, and some rows of a cache. */
#define STEP_ATTEND_SCRATCH(tokens, n, d) \
    ((tokens) * (4 * (((n) + 15) / 16 * 16) + 8 * (((d) + 15) / 16 * 16)) + ATTEND_ROWS * (((d) + 15) / 16 * 16))

/* A head of integers: a token as head_prepare leaves it, on whole cache lines. */
#define HEAD_TOKEN_BYTES(k) (((k) / 8 * 11 + 63) / 64 * 64)

/* Pieces of every block, a piece of each of sixteen rows in turn; missing rows are left as they are. */
static inline __attribute__((always_inline)) uint8_t *head_move_pieces(const uint8_t *rows, ptrdiff_t row_bytes,
                                                                       ptrdiff_t count, ptrdiff_t block_bytes,
                                                                       const uint8_t *starts, ptrdiff_t n, ptrdiff_t size,
                                                                       uint8_t *group) {
    for (ptrdiff_t r = 0; r < count; r++) {
        uint8_t *to = group + r * size;
        for (ptrdiff_t b = 0; b < row_bytes; b += block_bytes)
            for (ptrdiff_t i = 0; i < n; i++, to += 16 * size)
                memcpy(to, rows + r * row_bytes + b + starts[i], (size_t)size);
    }
    return group + 16 * (row_bytes / block_bytes) * n * size;
}

/* group_rows of reference/head.py for one group. */
static inline void head_group_rows(const uint8_t *rows, ptrdiff_t row_bytes, ptrdiff_t count, ptrdiff_t block_bytes,
                                   uint8_t *group) {
    uint8_t d = 0, scales[16], quants[48];
    if (block_bytes == 210) { /* Q6_K */
        d = 208;
        for (int i = 0; i < 16; i++) scales[i] = (uint8_t)(192 + i);
        for (int i = 0; i < 48; i++) {
            const int half = i / 24, j = i % 24 / 3 * 4, third = i % 3;
            quants[i] = (uint8_t)(third < 2 ? 64 * half + 32 * third + j : 128 + 32 * half + j);
        }
        group = head_move_pieces(rows, row_bytes, count, block_bytes, &d, 1, 2, group);
        group = head_move_pieces(rows, row_bytes, count, block_bytes, scales, 16, 1, group);
        head_move_pieces(rows, row_bytes, count, block_bytes, quants, 48, 4, group);
    } else {
        for (int i = 0; i < (block_bytes - 2) / 4; i++) quants[i] = (uint8_t)(2 + 4 * i);
        group = head_move_pieces(rows, row_bytes, count, block_bytes, &d, 1, 2, group);
        head_move_pieces(rows, row_bytes, count, block_bytes, quants, (block_bytes - 2) / 4, 4, group);
    }
}

static inline float half_value(const uint8_t *p) {
    uint16_t half;
    memcpy(&half, p, 2);
    const uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    /* The exponent moves up by 112, that of infinity twice. Subnormals are (1 + fraction) 2^-14 - 2^-14. */
    const uint32_t bits = magnitude < 1 << 23 ? magnitude + (113u << 23)
                                              : magnitude + (magnitude < 31u << 23 ? 112u << 23 : 224u << 23);
    float value;
    memcpy(&value, &bits, 4);
    if (magnitude < 1 << 23) value -= 0x1p-14f;
    return half & 0x8000 ? -value : value;
}

/* decode_rows of reference/head.py for one row of a group. */
static inline void head_decode_row(const uint8_t *group, ptrdiff_t row, ptrdiff_t k, int type, float *y) {
    const ptrdiff_t blocks = k / (type == TABLE_Q6_K ? 256 : 32), n = type == TABLE_Q6_K ? 48 : type == TABLE_Q8_0 ? 8 : 4;
    const uint8_t *d = group + 2 * row, *scales = group + 32 * blocks + row;
    const uint8_t *quants = group + (type == TABLE_Q6_K ? 32 + 256 : 32) * blocks + 4 * row;
    for (ptrdiff_t b = 0; b < blocks; b++, d += 32, scales += 256, quants += 64 * n) {
        const float scale = half_value(d);
        if (type == TABLE_Q8_0)
            for (int i = 0; i < 32; i++, y++) *y = scale * (float)(int8_t)quants[64 * (i / 4) + i % 4];
        else if (type == TABLE_Q4_0)
            for (int i = 0; i < 32; i++, y++) *y = scale * (float)((quants[64 * (i % 16 / 4) + i % 4] >> i / 16 * 4 & 15) - 8);
        else
            for (int i = 0; i < 256; i++, y++) { /* pieces as head_group_rows has them */
                const uint8_t *three = quants + 64 * (i / 128 * 24 + i % 32 / 4 * 3) + i % 4;
                const int quarter = i / 32 % 4, low = three[64 * (quarter % 2)] >> quarter / 2 * 4 & 15;
                const int high = three[128] >> 2 * quarter & 3;
                *y = scale * (float)(int8_t)scales[16 * (i / 16)] * (float)((low | high << 4) - 32);
            }
    }
}

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
    void (*attend)(const float *q, ptrdiff_t q_stride, ptrdiff_t tokens, ptrdiff_t heads, const char *k,
                   ptrdiff_t k_stride, const char *v, ptrdiff_t v_stride, ptrdiff_t n, ptrdiff_t d, int half, float scale,
                   float *scratch, float *out);
    void (*head)(const uint8_t *w, ptrdiff_t row_bytes, ptrdiff_t rows, const float *x, ptrdiff_t x_stride,
                 ptrdiff_t tokens, ptrdiff_t k, float *out, ptrdiff_t out_stride, int type);
    int (*head_prepare)(const float *x, ptrdiff_t k, int type, char *token);
    void (*head_integer)(const uint8_t *w, ptrdiff_t group_bytes, ptrdiff_t rows, const char *x, ptrdiff_t tokens,
                         ptrdiff_t k, float *out, ptrdiff_t out_stride, int type);
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
typedef int32_t vec_i32 __attribute__((vector_size(WIDTH)));
typedef float half_f32 __attribute__((vector_size(WIDTH / 2))); /* as many lanes as a vec_f64 */
typedef double vec_f64 __attribute__((vector_size(WIDTH)));

#define STEP_INLINE static inline __attribute__((always_inline))

/* Left alone, gcc makes a load of its own of each use of a loaded vector. */
#if defined(__AVX512F__)
#define KEEP(vector) __asm__("" : "+v"(vector))
#elif defined(__x86_64__)
#define KEEP(vector) __asm__("" : "+x"(vector))
#else
#define KEEP(vector)
#endif

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

#if defined(__AVX512F__)
/* Lane 4 g + r is sum_lanes_f32(lanes[r][g]). Halves of two vectors are added side by side, then of two such, so that a
 * shuffle and an addition serve several sums. */
STEP_INLINE __m512 sum_lanes_of_sixteen(vec_f32 lanes[4][4][NF]) {
    __m512 four[4], two[2];
    for (int r = 0; r < 4; r++) { /* lanes of 128 bits: four sums of each head */
        __m512 eight[2];
        for (int i = 0; i < 2; i++) {
            const __m512 a = (__m512)lanes[r][2 * i][0], b = (__m512)lanes[r][2 * i + 1][0];
            eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        }
        four[r] = _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88),
                                _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
    }
    for (int i = 0; i < 2; i++) /* two sums of row 2 i, two of row 2 i + 1 */
        two[i] = _mm512_add_ps(_mm512_shuffle_ps(four[2 * i], four[2 * i + 1], 0x44),
                               _mm512_shuffle_ps(four[2 * i], four[2 * i + 1], 0xee));
    return _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd));
}
#endif

/* Vector number i of eight floats, widened. */
STEP_INLINE vec_f64 widened(const float *x, int i) {
#if defined(__AVX512F__)
    return (vec_f64)_mm512_cvtps_pd(_mm256_loadu_ps(x + i * 8)); /* of the other way gcc 12 makes five instructions */
#else
    half_f32 a;
    memcpy(&a, x + i * (WIDTH / 8), WIDTH / 2);
    return __builtin_convertvector(a, vec_f64);
#endif
}

/* A vector of float16 as float32, exactly, whether or not the processor takes subnormals for zero: its own instruction
 * never does, and the other way has none for an operand. Infinities and NaN do not occur in a table; a cache refuses them. */
STEP_INLINE vec_f32 halves_widened(const void *p) {
#if defined(__AVX512F__)
    return (vec_f32)_mm512_cvtph_ps(_mm256_loadu_si256(p));
#elif defined(__AVX2__)
    return (vec_f32)_mm256_cvtph_ps(_mm_loadu_si128(p));
#else
    uint16_t halves __attribute__((vector_size(WIDTH / 2)));
    memcpy(&halves, p, WIDTH / 2);
    const vec_i32 bits = __builtin_convertvector(halves, vec_i32), magnitude = (bits & 0x7fff) << 13;
    /* The exponent moves up by 112. Subnormals are (1 + fraction) 2^-14 - 2^-14. */
    const vec_i32 normal = magnitude > 0x7fffff, moved = magnitude + (113 << 23) - (normal & 1 << 23);
    const vec_f32 value = (vec_f32)moved - (vec_f32)(~normal & 113 << 23);
    return (vec_f32)((vec_i32)value | (bits & 0x8000) << 16);
#endif
}

/* exp(x) in float64 for x <= 709: x = n ln 2 + r, a Taylor polynomial of degree 13 on |r| <= ln 2 / 2 (remainder
 * 0.3466^14 / 14! = 4e-18), times 2^n. Relative error below 4e-16. Below -708 the result is 0. */
STEP_INLINE double exp_f64(double x) {
    const double magic = 0x1.8p52; /* added, it leaves the nearest integer in the low bits */
    const double kept = -708.0 > x ? -708.0 : x; /* NaN stays NaN, in this order by one instruction */
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
    return -708.0 > x ? 0.0 : power;
}

/* ---- norm, quantiser, rotation, activation ----------------------------------------------------------------------- */

/* Magnitudes of floats are ordered like their bits. */
STEP_INLINE int32_t magnitude_bits(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7fffffff;
}

/* Returns the magnitude_bits of the largest result. */
STEP_INLINE int32_t norm_row(const float *x, const float *weight, float *y, ptrdiff_t k, float eps, float offset) {
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
    int32_t largest = 0;
    for (i = 0; i < k; i++) {
        y[i] = (x[i] * inverse) * (weight[i] + offset);
        const int32_t magnitude = magnitude_bits(y[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

static void step_norm(const float *x, const float *weight, float *y, ptrdiff_t k, float eps, float offset) {
    norm_row(x, weight, y, k, eps, offset);
}

STEP_INLINE int32_t largest_magnitude(const float *x, ptrdiff_t k) {
    int32_t largest = 0;
    for (ptrdiff_t i = 0; i < k; i++) {
        const int32_t magnitude = magnitude_bits(x[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/* `largest` as largest_magnitude gives it. Returns 0 if a value is not finite. */
STEP_INLINE int quantize_row(const float *x, int32_t largest, int8_t *x_q, float *x_scale, int32_t *x_sum, ptrdiff_t k) {
    int32_t sum = 0;
    *x_sum = 0;
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
        sum += bits - 0x4b400000; /* those of magic */
    }
    *x_sum = sum;
    *x_scale = limit / 127.0f;
    return 1;
}

static int step_quantize(const float *x, int8_t *x_q, float *x_scale, ptrdiff_t k) {
    int32_t x_sum;
    return quantize_row(x, largest_magnitude(x, k), x_q, x_scale, &x_sum, k);
}

static void step_rescale(const int32_t *sums, float *y, ptrdiff_t m, float scale) {
    for (ptrdiff_t i = 0; i < m; i++) y[i] = (float)sums[i] * scale;
}

/* Norm (unless weight is NULL), quantiser, and the sum of the int8 values. Returns 0 if a value is not finite. */
static int step_norm_quantize(const float *x, const float *weight, float *normed, int8_t *x_q, float *x_scale,
                              int32_t *x_sum, ptrdiff_t k, float eps, float offset) {
    if (weight == NULL) return quantize_row(x, largest_magnitude(x, k), x_q, x_scale, x_sum, k);
    const int32_t largest = norm_row(x, weight, normed, k, eps, offset);
    return quantize_row(normed, largest, x_q, x_scale, x_sum, k);
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

/* activation(gate) * up; y may lie where gate does. */
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

/* ---- attention of the query heads that share a key/value head, of one token or of some that follow each other ---------- */

/* Rows of float16 that are asked for before they are needed; measured, as are four rows of float32 keys with AVX-512 and none
 * without it, where the hardware foresees them. */
#define HALVES_AHEAD (WIDTH == 64 ? 8 : 32)

/* `count` rows of a cache with zeros up to a multiple of 16 columns: where they lie if that is so, else in `copy`. With `widen`,
 * float16 as float32, always in `copy`. */
STEP_INLINE const char *cache_rows(const char *rows, ptrdiff_t stride, ptrdiff_t count, ptrdiff_t d, int half, int widen,
                                   char *copy, ptrdiff_t *row_bytes) {
    const ptrdiff_t padded = (d + 15) / 16 * 16, whole = d / 16 * 16, size = half ? 2 : 4;
    *row_bytes = stride;
    if (d == padded && !widen) return rows;
    *row_bytes = padded * (widen ? 4 : size);
    for (ptrdiff_t s = 0; s < count; s++, rows += stride) {
        char *to = copy + s * *row_bytes;
        if (!widen) {
            memcpy(to, rows, (size_t)(d * size));
            memset(to + d * size, 0, (size_t)((padded - d) * size));
            continue;
        }
        char last[32] = {0};
        for (ptrdiff_t b = 0; b < 2 * d; b += 64) __builtin_prefetch(rows + HALVES_AHEAD * stride + b);
        memcpy(last, rows + 2 * whole, (size_t)(2 * (d - whole)));
        for (ptrdiff_t i = 0; i < padded; i += WIDTH / 4) {
            const vec_f32 values = halves_widened(i < whole ? rows + 2 * i : last + 2 * (i - whole));
            memcpy(to + 4 * i, &values, WIDTH);
        }
    }
    return copy;
}

/* Columns i and following of a row of a cache, as many as a vector has. */
STEP_INLINE vec_f32 cache_load(const char *row, ptrdiff_t i, int half) {
    vec_f32 values;
    if (half) return halves_widened(row + 2 * i);
    memcpy(&values, row + 4 * i, WIDTH);
    return values;
}

/* Scores of R keys for each of G queries, at most four: scores[g * stride + r]. Queries come sixteen columns of each of four
 * heads at a time, so that one pointer leads to all. The largest score of query g is the largest of largest[4 g] and the
 * three behind it. */
STEP_INLINE void key_scores(int G, int R, int half, int ahead, const float *q, ptrdiff_t padded, const char *keys,
                            ptrdiff_t row_bytes, float scale, float *scores, ptrdiff_t stride, float *largest) {
    vec_f32 sum[4][4][NF];
    memset(sum, 0, sizeof(sum));
    for (ptrdiff_t i = 0; i < padded; i += 16) {
        if (ahead && (half ? i % 32 == 0 : WIDTH == 64))
            for (int r = 0; r < R; r++)
                __builtin_prefetch(keys + ((half ? HALVES_AHEAD : 4) + r) * row_bytes + (half ? 2 : 4) * i);
        for (int w = 0; w < NF; w++) {
            vec_f32 key[4], a;
            for (int r = 0; r < R; r++) key[r] = cache_load(keys + r * row_bytes, i + w * (WIDTH / 4), half);
            for (int g = 0; g < G; g++) {
                memcpy(&a, q + 4 * i + 16 * g + w * (WIDTH / 4), WIDTH);
                for (int r = 0; r < R; r++) sum[r][g][w] += a * key[r];
            }
        }
    }
#if defined(__AVX512F__)
    if (G == 4 && R == 4) {
        const __m512 scaled = _mm512_mul_ps(sum_lanes_of_sixteen(sum), _mm512_set1_ps(scale));
        _mm_storeu_ps(scores, _mm512_castps512_ps128(scaled));
        _mm_storeu_ps(scores + stride, _mm512_extractf32x4_ps(scaled, 1));
        _mm_storeu_ps(scores + 2 * stride, _mm512_extractf32x4_ps(scaled, 2));
        _mm_storeu_ps(scores + 3 * stride, _mm512_extractf32x4_ps(scaled, 3));
        _mm512_storeu_ps(largest, _mm512_max_ps(_mm512_loadu_ps(largest), scaled)); /* not NaN, but exp is */
        return;
    }
#endif
    for (int g = 0; g < G; g++)
        for (int r = 0; r < R; r++) {
            const float scaled = sum_lanes_f32(sum[r][g]) * scale;
            scores[g * stride + r] = scaled;
            if (!(scaled <= largest[4 * g + r])) largest[4 * g + r] = scaled;
        }
}

/* Sums of G heads for `vectors` vectors of columns, in registers: row after row, with all lines of these columns. Column after
 * column, with a run of 64 bytes in each of the rows, took three times as long. */
STEP_INLINE void add_values(int G, int vectors, int half, int several, const char *values, ptrdiff_t row_bytes, ptrdiff_t count,
                            const float *scores, ptrdiff_t stride, float *sums, ptrdiff_t padded, int ahead) {
    vec_f32 sum[4][8 * NF];
    for (int g = 0; g < G; g++)
        for (int i = 0; i < vectors; i++) memcpy(&sum[g][i], sums + g * padded + i * (WIDTH / 4), WIDTH);
    for (ptrdiff_t s = 0; s < count; s++, values += row_bytes) {
        if (ahead && half)
            for (int b = 0; b < vectors * WIDTH / 2; b += 64) __builtin_prefetch(values + HALVES_AHEAD * row_bytes + b);
        for (int i = 0; i < vectors; i++) {
            if (ahead && !half && i * WIDTH % 64 == 0) __builtin_prefetch(values + 8 * row_bytes + i * WIDTH);
            vec_f32 value = cache_load(values, i * (WIDTH / 4), half);
            if (several) KEEP(value); /* one token, from memory, is faster with a load for each head */
            for (int g = 0; g < G; g++) sum[g][i] += scores[g * stride + s] * value;
        }
    }
    for (int g = 0; g < G; g++)
        for (int i = 0; i < vectors; i++) memcpy(sums + g * padded + i * (WIDTH / 4), &sum[g][i], WIDTH);
}

/* Heads whose sums are in registers together, and vectors of columns: all heads for float16, so that a value is widened once,
 * and as much as possible of a row for float32, of which memory gives fewer a second. */
#if defined(__AVX512F__)
#define VALUE_HEADS(G, half) ((half) || (G) < 2 ? (G) : 2)
#define VALUE_VECTORS(heads) ((heads) == 4 ? 4 : 8)
#else
#define VALUE_HEADS(G, half) ((half) ? (G) : 1)
#define VALUE_VECTORS(heads) (8 / (heads))
#endif

/* G query heads at a time, so that a key or value is loaded, and widened, once for all of them; `sums` and `scores` are G
 * rows of `padded` and `stride` floats, for each token four. Keys and values come some rows at a time, which then stay in the
 * cache, for all tokens if there are several. The last token sees n keys, the one before n - 1, ... */
STEP_INLINE void attend_heads(int G, int half, int several, ptrdiff_t tokens, const float *q, const char *k,
                              ptrdiff_t k_stride, const char *v, ptrdiff_t v_stride, ptrdiff_t n, ptrdiff_t d, float scale,
                              float *scores, ptrdiff_t stride, float *sums, char *copy, float *out, ptrdiff_t out_stride) {
    /* Rows of float16 are widened once for several tokens, otherwise on their way into a register (`narrow`). */
    const int widen = half && several && WIDTH == 64, narrow = half && !widen;
    const ptrdiff_t padded = (d + 15) / 16 * 16, size = narrow ? 2 : 4;
    float largest[ATTEND_TOKENS][16], total[ATTEND_TOKENS][4];
    ptrdiff_t row_bytes;
    if (!several) tokens = 1;
    for (ptrdiff_t t = 0; t < tokens; t++)
        for (int i = 0; i < 16; i++) largest[t][i] = -INFINITY;
    for (ptrdiff_t first = 0; first < n; first += ATTEND_ROWS) {
        const ptrdiff_t count = n - first < ATTEND_ROWS ? n - first : ATTEND_ROWS;
        const char *keys = cache_rows(k + first * k_stride, k_stride, count, d, half, widen, copy, &row_bytes);
        for (ptrdiff_t t = 0; t < tokens; t++) {
            const ptrdiff_t left = n - first - (tokens - 1 - t), seen = left < count ? left : count;
            const int ahead = !several || (t == 0 && !widen);
            ptrdiff_t s = 0;
            /* In registers it is 7 % faster for one token with AVX2, and 15 % slower with AVX-512, both over float32. */
            float held[16], *most = WIDTH == 64 ? largest[t] : held;
            if (WIDTH != 64) memcpy(held, largest[t], sizeof(held));
#define CALL(R)                                                                                                       \
    key_scores(G, R, narrow, ahead, q + 4 * t * padded, padded, keys + s * row_bytes, row_bytes, scale,               \
               scores + 4 * t * stride + first + s, stride, most)
#if defined(__AVX512F__) /* registers for the sums of four keys, which share the loads of the queries */
            if (half || several)
                for (; s + 4 <= seen; s += 4) CALL(4);
#endif
            for (; s < seen; s++) CALL(1);
#undef CALL
            if (WIDTH != 64) memcpy(largest[t], held, sizeof(held));
        }
    }
    for (ptrdiff_t t = 0; t < tokens; t++)
        for (int g = 0; g < G; g++) {
            const ptrdiff_t seen = n - (tokens - 1 - t), filled = (seen + 15) / 16 * 16;
            vec_f64 sum[ND];
            float *row = scores + (4 * t + g) * stride, most = largest[t][4 * g];
            for (int r = 1; r < 4; r++)
                if (!(largest[t][4 * g + r] <= most)) most = largest[t][4 * g + r];
            memset(sum, 0, sizeof(sum));
            for (ptrdiff_t s = seen; s < filled; s++) row[s] = -INFINITY;
            for (ptrdiff_t s = 0; s < filled; s++) row[s] = (float)exp_f64((double)row[s] - (double)most);
            for (ptrdiff_t s = 0; s < filled; s += 8)
                for (int w = 0; w < ND; w++) sum[w] += widened(row + s, w);
            total[t][g] = (float)sum_lanes_f64(sum);
        }
    memset(sums, 0, 16 * (size_t)(tokens * padded));
    for (ptrdiff_t first = 0; first < n; first += ATTEND_ROWS) {
        const ptrdiff_t count = n - first < ATTEND_ROWS ? n - first : ATTEND_ROWS;
        const char *values = cache_rows(v + first * v_stride, v_stride, count, d, half, widen, copy, &row_bytes);
        const int heads = VALUE_HEADS(G, half || several);
        const ptrdiff_t whole = VALUE_VECTORS(heads) * (WIDTH / 4);
        for (ptrdiff_t t = 0; t < tokens; t++) {
            const ptrdiff_t left = n - first - (tokens - 1 - t), seen = left < count ? left : count;
            const int ahead = !several || (t == 0 && !widen);
            for (int g = 0; g < G; g += heads)
                for (ptrdiff_t i = 0, width; i < padded; i += width) {
                    const ptrdiff_t rest = padded - i;
                    width = rest >= whole ? whole : whole > 64 && rest >= 64 ? 64 : 16;
#define CALL(VECTORS)                                                                                                 \
    add_values(heads, VECTORS, narrow, several, values + size * i, row_bytes, seen,                                   \
               scores + (4 * t + g) * stride + first, stride, sums + (4 * t + g) * padded + i, padded,                \
               ahead && g == 0 && size * i % 64 == 0)
                    if (width == whole) CALL(VALUE_VECTORS(heads));
                    else if (width == 64) CALL(4 * NF);
                    else CALL(NF);
#undef CALL
                }
        }
    }
    for (ptrdiff_t t = 0; t < tokens; t++)
        for (int g = 0; g < G; g++)
            for (ptrdiff_t i = 0; i < d; i++)
                out[t * out_stride + g * d + i] = sums[(4 * t + g) * padded + i] / total[t][g];
}

/* q and out have q_stride floats from one token to the next; at most ATTEND_TOKENS. */
static void step_attend(const float *q, ptrdiff_t q_stride, ptrdiff_t tokens, ptrdiff_t heads, const char *k,
                        ptrdiff_t k_stride, const char *v, ptrdiff_t v_stride, ptrdiff_t n, ptrdiff_t d, int half,
                        float scale, float *scratch, float *out) {
    const ptrdiff_t padded = (d + 15) / 16 * 16, stride = (n + 15) / 16 * 16;
    float *queries = scratch + 4 * tokens * stride, *sums = queries + 4 * tokens * padded;
    char *copy = (char *)(sums + 4 * tokens * padded);
    while (heads > 0) {
        const ptrdiff_t count = heads >= 4 ? 4 : heads >= 2 ? 2 : 1;
        for (ptrdiff_t t = 0; t < tokens; t++)
            for (ptrdiff_t g = 0; g < count; g++)
                for (ptrdiff_t i = 0; i < padded; i++)
                    queries[4 * t * padded + i / 16 * 64 + 16 * g + i % 16] = i < d ? q[t * q_stride + g * d + i] : 0.0f;
#define CALL(G, HALF, SEVERAL)                                                                                        \
    attend_heads(G, HALF, SEVERAL, tokens, queries, k, k_stride, v, v_stride, n, d, scale, scratch, stride, sums, copy, \
                 out, q_stride)
#define CALLS(G)                                                                                                      \
    if (tokens > 1) {                                                                                                 \
        if (half) CALL(G, 1, 1);                                                                                      \
        else CALL(G, 0, 1);                                                                                           \
    } else if (half) CALL(G, 1, 0);                                                                                   \
    else CALL(G, 0, 0)
        if (count == 4) {
            CALLS(4);
        } else if (count == 2) {
            CALLS(2);
        } else {
            CALLS(1);
        }
#undef CALLS
#undef CALL
        heads -= count;
        q += count * d;
        out += count * d;
    }
}

/* ---- head ---------------------------------------------------------------------------------------------------------- */

#define TABLE_CHUNK 256 /* columns decoded at a time */
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
    for (ptrdiff_t i = n; i % 16; i++) bits[i] = 0;
    if (type == TABLE_F16)
        for (ptrdiff_t i = 0; i < n; i += WIDTH / 4) {
            const vec_f32 values = halves_widened(bits + i);
            memcpy(w + i, &values, WIDTH);
        }
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

/* Sixteen rows at a time, one in each lane (reference/head.py, group_rows), so that no sum goes across lanes and scales come
 * in vectors. Codes are unsigned, q + zero, and sums begin at -zero * (sum of the activations). Only Q8_0 has signed ones
 * where no instruction wants them otherwise. */
#if defined(__AVX512VNNI__)
#define CODE_ZERO(type) ((type) == TABLE_Q8_0 ? 128 : (type) == TABLE_Q6_K ? 32 : 8)
#else
#define CODE_ZERO(type) ((type) == TABLE_Q8_0 ? 0 : (type) == TABLE_Q6_K ? 32 : 8)
#endif
#define HEAD_TOKENS 2 /* that share the decoded codes */
#define TABLE_BLOCK(type) ((type) == TABLE_Q6_K ? 256 : 32)
/* Lines that are read 8 KiB later: the hardware alone reaches three fifths of the memory's rate, since a group is read in two
 * or three places, and so do requests for a whole piece at once, which fill the queue of misses. */
#define HEAD_AHEAD(p, lines) do { for (int i = 0; i < (lines); i++) __builtin_prefetch((p) + 8192 + 64 * i); } while (0)

/* A token: int8 x_q, float scales of 32 columns, int32 offsets of 16. */
static int step_head_prepare(const float *x, ptrdiff_t k, int type, char *token) {
    int8_t *x_q = (int8_t *)token;
    float *scales = (float *)(token + k);
    int32_t *offsets = (int32_t *)(token + k / 8 * 9);
    for (ptrdiff_t b = 0; b < k / 32; b++)
        if (!step_quantize(x + 32 * b, x_q + 32 * b, scales + b, 32)) return 0;
    for (ptrdiff_t g = 0; g < k / 16; g++) {
        int32_t sum = 0;
        for (int i = 0; i < 16; i++) sum += x_q[16 * g + i];
        offsets[g] = -CODE_ZERO(type) * sum;
    }
    return 1;
}

STEP_INLINE const int8_t *head_columns(const char *tokens, int t, ptrdiff_t k) {
    return (const int8_t *)(tokens + t * HEAD_TOKEN_BYTES(k));
}
STEP_INLINE float head_scale(const char *tokens, int t, ptrdiff_t k, ptrdiff_t block) {
    return ((const float *)(tokens + t * HEAD_TOKEN_BYTES(k) + k))[block];
}
STEP_INLINE int32_t head_offset(const char *tokens, int t, ptrdiff_t k, ptrdiff_t group) {
    return ((const int32_t *)(tokens + t * HEAD_TOKEN_BYTES(k) + k / 8 * 9))[group];
}

/* Four bytes of each row; a sum, or a float, of each row. */
#if defined(__AVX512VNNI__)
typedef __m512i row_codes, row_sums;
typedef __m512 row_values;
STEP_INLINE row_codes codes_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
/* (a & mask) | (b & other) with shifts of 64-bit lanes: bits that cross bytes are masked away. */
STEP_INLINE row_codes codes_left(row_codes a, int bits) { return _mm512_slli_epi64(a, (unsigned)bits); }
STEP_INLINE row_codes codes_right(row_codes a, int bits) { return _mm512_srli_epi64(a, (unsigned)bits); }
STEP_INLINE row_codes codes_low(row_codes a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
/* The low four bits of a and the next two of b: a where the first mask is 1, else b, and that within the second. */
STEP_INLINE row_codes codes_join(row_codes a, row_codes b) {
    const __m512i both = _mm512_ternarylogic_epi64(_mm512_set1_epi8(15), a, b, 0xca);
    return _mm512_and_si512(both, _mm512_set1_epi8(63));
}
STEP_INLINE row_sums sums_of(int32_t value) { return _mm512_set1_epi32(value); }
STEP_INLINE row_sums codes_dot(row_sums sums, row_codes codes, const int8_t *x, int type) {
    int32_t four;
    memcpy(&four, x, 4);
    if (type == TABLE_Q8_0) codes = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
    return _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(four));
}
STEP_INLINE row_sums scales_load(const uint8_t *p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
}
STEP_INLINE row_sums sums_add_product(row_sums a, row_sums b, row_sums c) {
    return _mm512_add_epi32(a, _mm512_mullo_epi32(b, c));
}
STEP_INLINE row_values halves_load(const uint8_t *p) { return (row_values)halves_widened(p); }
/* a + sums * (d * scale) */
STEP_INLINE row_values floats_add(row_values a, row_sums sums, row_values d, float scale) {
    return _mm512_add_ps(a, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(d, _mm512_set1_ps(scale))));
}
STEP_INLINE row_values floats_zero(void) { return _mm512_setzero_ps(); }
STEP_INLINE void floats_store(float *p, row_values a) { _mm512_storeu_ps(p, a); }
#elif defined(__AVX2__)
typedef struct {
    __m256i v[2];
} row_codes;
typedef row_codes row_sums;
typedef struct {
    __m256 v[2];
} row_values;
#define BOTH(expression) {{({ enum { h = 0 }; expression; }), ({ enum { h = 1 }; expression; })}}
STEP_INLINE row_codes codes_load(const uint8_t *p) {
    return (row_codes)BOTH(_mm256_loadu_si256((const __m256i *)(p + 32 * h)));
}
STEP_INLINE row_codes codes_left(row_codes a, int bits) { return (row_codes)BOTH(_mm256_slli_epi64(a.v[h], bits)); }
STEP_INLINE row_codes codes_right(row_codes a, int bits) { return (row_codes)BOTH(_mm256_srli_epi64(a.v[h], bits)); }
STEP_INLINE row_codes codes_low(row_codes a) { return (row_codes)BOTH(_mm256_and_si256(a.v[h], _mm256_set1_epi8(15))); }
STEP_INLINE row_codes codes_join(row_codes a, row_codes b) {
    return (row_codes)BOTH(_mm256_or_si256(_mm256_and_si256(a.v[h], _mm256_set1_epi8(15)),
                                           _mm256_and_si256(b.v[h], _mm256_set1_epi8(48))));
}
STEP_INLINE row_sums sums_of(int32_t value) { return (row_sums)BOTH(_mm256_set1_epi32(value)); }
/* The sum of two products stays inside int16: 2 * 127 * 63, and 2 * 127 * 128 for Q8_0. */
STEP_INLINE row_sums codes_dot(row_sums sums, row_codes codes, const int8_t *x, int type) {
    int32_t four;
    memcpy(&four, x, 4);
    const __m256i a = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
    if (type == TABLE_Q8_0)
        return (row_sums)BOTH(_mm256_add_epi32(
            sums.v[h], _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(codes.v[h]), _mm256_sign_epi8(a, codes.v[h])),
                                         ones)));
    return (row_sums)BOTH(
        _mm256_add_epi32(sums.v[h], _mm256_madd_epi16(_mm256_maddubs_epi16(codes.v[h], a), ones)));
}
STEP_INLINE row_sums scales_load(const uint8_t *p) {
    return (row_sums)BOTH(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8 * h))));
}
STEP_INLINE row_sums sums_add_product(row_sums a, row_sums b, row_sums c) {
    return (row_sums)BOTH(_mm256_add_epi32(a.v[h], _mm256_mullo_epi32(b.v[h], c.v[h])));
}
STEP_INLINE row_values halves_load(const uint8_t *p) { return (row_values)BOTH((__m256)halves_widened(p + 16 * h)); }
STEP_INLINE row_values floats_add(row_values a, row_sums sums, row_values d, float scale) {
    return (row_values)BOTH(_mm256_add_ps(
        a.v[h], _mm256_mul_ps(_mm256_cvtepi32_ps(sums.v[h]), _mm256_mul_ps(d.v[h], _mm256_set1_ps(scale)))));
}
STEP_INLINE row_values floats_zero(void) { return (row_values)BOTH(_mm256_setzero_ps()); }
STEP_INLINE void floats_store(float *p, row_values a) {
    _mm256_storeu_ps(p, a.v[0]);
    _mm256_storeu_ps(p + 8, a.v[1]);
}
#undef BOTH
#else
typedef struct {
    uint8_t v[64];
} row_codes;
typedef struct {
    int32_t v[16];
} row_sums;
typedef struct {
    float v[16];
} row_values;
STEP_INLINE row_codes codes_load(const uint8_t *p) {
    row_codes a;
    memcpy(a.v, p, 64);
    return a;
}
STEP_INLINE row_codes codes_left(row_codes a, int bits) {
    for (int i = 0; i < 64; i++) a.v[i] = (uint8_t)(a.v[i] << bits);
    return a;
}
STEP_INLINE row_codes codes_right(row_codes a, int bits) {
    for (int i = 0; i < 64; i++) a.v[i] = (uint8_t)(a.v[i] >> bits);
    return a;
}
STEP_INLINE row_codes codes_low(row_codes a) {
    for (int i = 0; i < 64; i++) a.v[i] &= 15;
    return a;
}
STEP_INLINE row_codes codes_join(row_codes a, row_codes b) {
    for (int i = 0; i < 64; i++) a.v[i] = (uint8_t)((a.v[i] & 15) | (b.v[i] & 48));
    return a;
}
STEP_INLINE row_sums sums_of(int32_t value) {
    row_sums a;
    for (int r = 0; r < 16; r++) a.v[r] = value;
    return a;
}
STEP_INLINE row_sums codes_dot(row_sums sums, row_codes codes, const int8_t *x, int type) {
    for (int r = 0; r < 16; r++)
        for (int i = 0; i < 4; i++)
            sums.v[r] += x[i] * (type == TABLE_Q8_0 ? (int8_t)codes.v[4 * r + i] : codes.v[4 * r + i]);
    return sums;
}
STEP_INLINE row_sums scales_load(const uint8_t *p) {
    row_sums a;
    for (int r = 0; r < 16; r++) a.v[r] = (int8_t)p[r];
    return a;
}
STEP_INLINE row_sums sums_add_product(row_sums a, row_sums b, row_sums c) {
    for (int r = 0; r < 16; r++) a.v[r] += b.v[r] * c.v[r];
    return a;
}
STEP_INLINE row_values halves_load(const uint8_t *p) {
    row_values a;
    for (int w = 0; w < NF; w++) {
        const vec_f32 values = halves_widened(p + w * (WIDTH / 2));
        memcpy(a.v + w * (WIDTH / 4), &values, WIDTH);
    }
    return a;
}
STEP_INLINE row_values floats_add(row_values a, row_sums sums, row_values d, float scale) {
    for (int r = 0; r < 16; r++) a.v[r] += (float)sums.v[r] * (d.v[r] * scale);
    return a;
}
STEP_INLINE row_values floats_zero(void) {
    const row_values a = {{0}};
    return a;
}
STEP_INLINE void floats_store(float *p, row_values a) { memcpy(p, a.v, 64); }
#endif

/* A group of rows times n tokens: sixteen logits of each. */
STEP_INLINE void group_dot(int n, const uint8_t *w, ptrdiff_t k, int type, const char *tokens, float (*out)[16]) {
    const ptrdiff_t blocks = k / TABLE_BLOCK(type);
    row_values y[HEAD_TOKENS];
    for (int t = 0; t < n; t++) y[t] = floats_zero();
    if (type == TABLE_Q6_K) {
        const uint8_t *scales = w + 32 * blocks, *codes = scales + 256 * blocks;
        for (ptrdiff_t b = 0; b < 2 * blocks; b++) { /* halves of blocks: 128 columns, 1680 bytes */
            const row_values d = halves_load(w + b / 2 * 32);
            row_sums total[HEAD_TOKENS][4];
            for (int t = 0; t < n; t++)
                for (int j = 0; j < 4; j++) total[t][j] = sums_of(0);
            for (int h = 0; h < 2; h++, scales += 16) { /* columns 0-15 and 16-31 of each 32 */
                row_sums sums[HEAD_TOKENS][4];
                for (int t = 0; t < n; t++)
                    for (int j = 0; j < 4; j++) sums[t][j] = sums_of(head_offset(tokens, t, k, 8 * b + 2 * j + h));
                for (int q = 4 * h; q < 4 * h + 4; q++, codes += 192) {
                    HEAD_AHEAD(w + 1680 * b + 210 * q, 4);
                    const row_codes even = codes_load(codes), odd = codes_load(codes + 64), top = codes_load(codes + 128);
                    const row_codes four[4] = {codes_join(even, codes_left(top, 4)), codes_join(odd, codes_left(top, 2)),
                                               codes_join(codes_right(even, 4), top),
                                               codes_join(codes_right(odd, 4), codes_right(top, 2))};
                    for (int t = 0; t < n; t++)
                        for (int j = 0; j < 4; j++)
                            sums[t][j] = codes_dot(sums[t][j], four[j],
                                                   head_columns(tokens, t, k) + 128 * b + 32 * j + 4 * q, type);
                }
                for (int j = 0; j < 4; j++)
                    for (int t = 0; t < n; t++)
                        total[t][j] = sums_add_product(total[t][j], sums[t][j], scales_load(scales + 32 * j));
            }
            scales += 96;
            for (int t = 0; t < n; t++)
                for (int j = 0; j < 4; j++) y[t] = floats_add(y[t], total[t][j], d, head_scale(tokens, t, k, 4 * b + j));
        }
    } else {
        const int quads = type == TABLE_Q8_0 ? 8 : 4, piece = 64 * quads + 32;
        const uint8_t *codes = w + 32 * blocks;
        for (ptrdiff_t b = 0; b < blocks; b++) {
            const row_values d = halves_load(w + 32 * b);
            row_sums sums[HEAD_TOKENS];
            for (int t = 0; t < n; t++)
                sums[t] = sums_of(head_offset(tokens, t, k, 2 * b) + head_offset(tokens, t, k, 2 * b + 1));
            for (int q = 0; q < quads; q++, codes += 64) {
                HEAD_AHEAD(w + piece * b + piece / quads * q, q == quads - 1 ? 2 : 1);
                const row_codes both = codes_load(codes), low = codes_low(both), high = codes_low(codes_right(both, 4));
                for (int t = 0; t < n; t++) {
                    const int8_t *x = head_columns(tokens, t, k) + 32 * b + 4 * q;
                    if (type == TABLE_Q8_0) sums[t] = codes_dot(sums[t], both, x, type);
                    else sums[t] = codes_dot(codes_dot(sums[t], low, x, type), high, x + 16, type);
                }
            }
            for (int t = 0; t < n; t++) y[t] = floats_add(y[t], sums[t], d, head_scale(tokens, t, k, b));
        }
    }
    for (int t = 0; t < n; t++) floats_store(out[t], y[t]);
}

/* out[t * out_stride + r] for `rows` rows in groups and the tokens of x. */
STEP_INLINE void integer_head_of_type(const uint8_t *w, ptrdiff_t group_bytes, ptrdiff_t rows, const char *x,
                                      ptrdiff_t tokens, ptrdiff_t k, float *out, ptrdiff_t out_stride, int type) {
    float logits[HEAD_TOKENS][16];
    for (ptrdiff_t first = 0; first < rows; first += 16, w += group_bytes) {
        const size_t count = (size_t)(rows - first < 16 ? rows - first : 16);
        for (ptrdiff_t t = 0; t < tokens; t += HEAD_TOKENS) {
            const ptrdiff_t n = tokens - t < HEAD_TOKENS ? tokens - t : HEAD_TOKENS;
            if (n == 1) group_dot(1, w, k, type, x + t * HEAD_TOKEN_BYTES(k), logits);
            else group_dot(2, w, k, type, x + t * HEAD_TOKEN_BYTES(k), logits);
            for (ptrdiff_t i = 0; i < n; i++) memcpy(out + (t + i) * out_stride + first, logits[i], 4 * count);
        }
    }
}

static void step_head_integer(const uint8_t *w, ptrdiff_t group_bytes, ptrdiff_t rows, const char *x, ptrdiff_t tokens,
                              ptrdiff_t k, float *out, ptrdiff_t out_stride, int type) {
#define CASE(TYPE)                                                                                                    \
    case TYPE: integer_head_of_type(w, group_bytes, rows, x, tokens, k, out, out_stride, TYPE); break;
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
