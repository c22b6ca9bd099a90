"""The element-wise steps of decoding and the output head: shapes, memory and threads around the loops of decoder_steps.h.

Arguments are those of bitnet_ref/reference/{norm,rope,mlp,attention,head}.py. Each output value is computed by one
thread, so results do not depend on how many there are. Compiled with baseline flags; the loops come in a capsule.
"""

from cpython.buffer cimport PyBUF_ND, PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.pycapsule cimport PyCapsule_GetPointer
from cython.parallel cimport prange
from libc.math cimport INFINITY, fabsf
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

import numpy as np

from kernel_abi cimport add_rows_t, dot_rows_t, lut_t, matmul_t

cdef extern from "decoder_steps.h" nogil:
    ctypedef struct decoder_steps:
        void (*norm)(const float* x, const float* weight, float* y, Py_ssize_t k, float eps, float offset) noexcept nogil
        int (*quantize)(const float* x, signed char* x_q, float* x_scale, Py_ssize_t k) noexcept nogil
        void (*rescale)(const int* sums, float* y, Py_ssize_t m, float scale) noexcept nogil
        int (*norm_quantize)(const float* x, const float* weight, float* normed, signed char* x_q, float* x_scale,
                  int* x_sum, Py_ssize_t k, float eps, float offset) noexcept nogil
        void (*rescale_add)(const int* sums, const float* x, float* y, Py_ssize_t m, float scale) noexcept nogil
        void (*gate)(const int* gate, const int* up, float* y, Py_ssize_t m, float gate_scale, float up_scale,
                  int kind) noexcept nogil
        void (*rotate)(const float* x, const float* cosine, const float* sine, float* y, Py_ssize_t heads,
                    Py_ssize_t half) noexcept nogil
        void (*activate)(const float* x, float* y, Py_ssize_t n, int kind) noexcept nogil
        void (*attend)(const float* q, Py_ssize_t heads, const char* k, Py_ssize_t k_stride, const char* v,
                    Py_ssize_t v_stride, Py_ssize_t n, Py_ssize_t d, int half, float scale, float* scratch,
                    float* out) noexcept nogil
        void (*head)(const unsigned char* w, Py_ssize_t row_bytes, Py_ssize_t rows, const float* x, Py_ssize_t x_stride,
                  Py_ssize_t tokens, Py_ssize_t k, float* out, Py_ssize_t out_stride, int type) noexcept nogil
        int (*head_prepare)(const float* x, Py_ssize_t k, int type, char* token) noexcept nogil
        void (*head_integer)(const unsigned char* w, Py_ssize_t group_bytes, Py_ssize_t rows, const char* x,
                  Py_ssize_t tokens, Py_ssize_t k, float* out, Py_ssize_t out_stride, int type) noexcept nogil
    Py_ssize_t STEP_ATTEND_SCRATCH(Py_ssize_t n, Py_ssize_t d)
    int ACTIVATE_RELU2, ACTIVATE_SILU, ACTIVATE_GELU_TANH
    Py_ssize_t HEAD_TOKEN_BYTES(Py_ssize_t k)
    void head_group_rows(const unsigned char* rows, Py_ssize_t row_bytes, Py_ssize_t count, Py_ssize_t block_bytes,
                         unsigned char* group)
    int TABLE_F32, TABLE_F16, TABLE_BF16, TABLE_Q8_0, TABLE_Q6_K, TABLE_Q4_0

cdef dict ACTIVATIONS = {"relu2": ACTIVATE_RELU2, "silu": ACTIVATE_SILU, "gelu_tanh": ACTIVATE_GELU_TANH}
# Number of the type, columns and bytes of a block.
cdef dict TABLES = {"F32": (TABLE_F32, 1, 4), "F16": (TABLE_F16, 1, 2), "BF16": (TABLE_BF16, 1, 2),
                    "Q8_0": (TABLE_Q8_0, 32, 34), "Q6_K": (TABLE_Q6_K, 256, 210), "Q4_0": (TABLE_Q4_0, 32, 18)}

float32, float16, int8, int32, uint8 = (np.dtype(t) for t in (np.float32, np.float16, np.int8, np.int32, np.uint8))


cdef class _View:
    """The memory of an array, contiguous unless strides are asked for; released with the object."""

    cdef Py_buffer buffer
    cdef bint held

    def __cinit__(self, array, dtype, str name, int ndim=-1, int flags=PyBUF_ND):
        if array.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {array.dtype}")
        if ndim >= 0 and array.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} axes, got shape {array.shape}")
        PyObject_GetBuffer(array, &self.buffer, flags)
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.buffer)

    cdef inline Py_ssize_t size(self, int axis) noexcept:
        return self.buffer.shape[axis]


cdef _View _contiguous(array, dtype, str name, int ndim=-1):
    return _View(np.ascontiguousarray(array), dtype, name, ndim)


cdef enum:
    MOST_TOGETHER = 3  # matrices that read the same activations: q, k and v
    TABLE_BYTES = 256  # of a block, see matmul.pyx


cdef struct matrix_t:
    matmul_t multiply
    lut_t build
    const unsigned char* w
    Py_ssize_t w_stride, m, k, rows, block, n_blocks, n_tiles
    float scale


cdef class Matrix:
    """A packed ternary matrix and what multiplies it by one token.

    Parameters
    ----------
    kernel, lut : capsules of the gemv variant, as for matmul.matmul
    data : uint8, packed tiles, one a row
    m, k : int
    rows, block : int
        Of a tile.
    scale : float
    """

    cdef matrix_t about
    cdef _View held

    def __init__(self, kernel, lut, data, Py_ssize_t m, Py_ssize_t k, Py_ssize_t rows, Py_ssize_t block, float scale):
        self.held = _contiguous(data, uint8, "data", 2)
        self.about.multiply = <matmul_t>PyCapsule_GetPointer(kernel, b"bitnet_ref.matmul/1")
        self.about.build = NULL
        if lut is not None:
            self.about.build = <lut_t>PyCapsule_GetPointer(lut, b"bitnet_ref.lut/1")
        self.about.w = <const unsigned char*>self.held.buffer.buf
        self.about.w_stride = self.held.size(1)
        self.about.m, self.about.k, self.about.rows, self.about.block = m, k, rows, block
        self.about.n_blocks, self.about.n_tiles = (k + block - 1) // block, (m + rows - 1) // rows
        self.about.scale = scale
        if self.held.size(0) != self.about.n_tiles:
            raise ValueError(f"{m} rows in tiles of {rows} must have {self.about.n_tiles} tiles, got {data.shape}")


cdef enum:
    ROW_BLOCK = 320  # columns of a block of base3r


cdef class ListedRows:
    """W_up and the transpose of W_down of one gated network in the layout base3r, and when their rows are read by lists.

    Parameters
    ----------
    dot, add : capsules of a dotrows and an addrows kernel
    up, down : uint8 (ffn, 64 * blocks)
    k : int
        Columns of a row, the hidden size.
    up_most, down_most : int
        Longest lists for which rows are read singly; with more the dense product is taken.
    """

    cdef dot_rows_t dot
    cdef add_rows_t add
    cdef _View held_up, held_down
    cdef Py_ssize_t ffn, k, n_blocks, stride, up_most, down_most
    cdef long long tokens, up_rows, down_rows, up_listed, down_listed, read_bytes

    def __init__(self, dot, add, up, down, Py_ssize_t k, Py_ssize_t up_most, Py_ssize_t down_most):
        self.dot = <dot_rows_t>PyCapsule_GetPointer(dot, b"bitnet_ref.dotrows/1")
        self.add = <add_rows_t>PyCapsule_GetPointer(add, b"bitnet_ref.addrows/1")
        self.held_up, self.held_down = _contiguous(up, uint8, "up", 2), _contiguous(down, uint8, "down", 2)
        self.ffn, self.k, self.n_blocks = self.held_up.size(0), k, (k + ROW_BLOCK - 1) // ROW_BLOCK
        self.stride = ROW_BLOCK // 5 * self.n_blocks
        self.up_most, self.down_most = up_most, down_most
        for view in (self.held_up, self.held_down):
            if (<_View>view).size(0) != self.ffn or (<_View>view).size(1) != self.stride:
                raise ValueError(f"up and down must have shape ({self.ffn}, {self.stride}), got {up.shape}, {down.shape}")

    def take_counts(self):
        """What happened since this was asked last, as a dict.

        tokens; up_rows, down_rows: rows that counted, of all tokens; up_listed, down_listed: tokens whose rows were read
        singly; read_bytes: their bytes.
        """
        counts = {"tokens": self.tokens, "up_rows": self.up_rows, "down_rows": self.down_rows,
                  "up_listed": self.up_listed, "down_listed": self.down_listed, "read_bytes": self.read_bytes}
        self.tokens = self.up_rows = self.down_rows = self.up_listed = self.down_listed = self.read_bytes = 0
        return counts


cdef Py_ssize_t list_positive(const int* sums, Py_ssize_t n, float scale, int* rows) noexcept nogil:
    # Rows whose float gate is positive. No branch: whether the next one is cannot be predicted.
    cdef Py_ssize_t count = 0, i
    for i in range(n):
        rows[count] = <int>i
        count += <float>sums[i] * scale > 0
    return count


cdef Py_ssize_t list_nonzero(const signed char* x, Py_ssize_t n, int* rows) noexcept nogil:
    cdef Py_ssize_t count = 0, i
    for i in range(n):
        rows[count] = <int>i
        count += x[i] != 0
    return count


cdef struct input_t:
    # One token as kernels read it: int8, or the tables of the schemes that have some.
    const signed char* operand
    const signed char* x_q
    float scale
    int sum


cdef struct cache_t:
    # Keys and values of n tokens: of one layer, `token` and `head` bytes apart.
    char* keys
    char* values
    Py_ssize_t k_token, k_head, v_token, v_head, n, kv_heads, d
    int half


cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    #define FLOAT16_MAX 65504.0f
    /* float32 of at most FLOAT16_MAX to float16, halves to even. */
    static inline uint16_t float_to_half(float value) {
        uint32_t bits, sign;
        memcpy(&bits, &value, 4);
        sign = bits >> 16 & 0x8000;
        bits &= 0x7fffffff;
        if (bits < 113u << 23) { /* subnormal: the sum with 1/2 has its last bit at 2^-24 */
            float magnitude;
            memcpy(&magnitude, &bits, 4);
            magnitude += 0.5f;
            memcpy(&bits, &magnitude, 4);
            return (uint16_t)(sign | (bits - (126u << 23)));
        }
        bits += 0xfff + (bits >> 13 & 1);
        return (uint16_t)(sign | ((bits >> 13) - (112u << 10)));
    }
    static inline void store_half(const float *x, char *to, ptrdiff_t n) {
        for (ptrdiff_t i = 0; i < n; i++) {
            const uint16_t half = float_to_half(x[i]);
            memcpy(to + 2 * i, &half, 2);
        }
    }
    """
    float FLOAT16_MAX
    void store_half(const float* x, char* to, Py_ssize_t n) noexcept nogil


cdef int store_last(const cache_t* cache, const float* k, const float* v) noexcept nogil:
    # Keys and values of the last token. Returns 0, with nothing stored, if one is beyond float16.
    cdef Py_ssize_t head, i, n = cache.kv_heads * cache.d, last = cache.n - 1
    cdef char* key
    cdef char* value
    if cache.half:
        for i in range(n):
            if not (fabsf(k[i]) <= FLOAT16_MAX and fabsf(v[i]) <= FLOAT16_MAX):
                return 0
    for head in range(cache.kv_heads):
        key = cache.keys + last * cache.k_token + head * cache.k_head
        value = cache.values + last * cache.v_token + head * cache.v_head
        if cache.half:
            store_half(k + head * cache.d, key, cache.d)
            store_half(v + head * cache.d, value, cache.d)
        else:
            memcpy(key, k + head * cache.d, cache.d * sizeof(float))
            memcpy(value, v + head * cache.d, cache.d * sizeof(float))
    return 1


cdef enum:
    GROUP_ROWS = 16  # of a table of integers, see reference/head.py


cdef double now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec * 1e9 + t.tv_nsec


cdef Py_ssize_t input_bytes(const matrix_t* a) noexcept nogil:
    # The int8 values, on a cache line, and the tables, on another.
    return a.n_blocks * (a.block + (TABLE_BYTES if a.build != NULL else 0)) + 128


cdef class Steps:
    """The compiled steps of one instruction set, on a number of threads.

    Parameters
    ----------
    capsule : the ``STEPS`` of a module ``steps__<isa>``
    n_threads : int
    """

    cdef const decoder_steps* call
    cdef int n_threads
    cdef double product_ns, attention_ns

    def __init__(self, capsule, int n_threads):
        self.call = <const decoder_steps*>PyCapsule_GetPointer(capsule, b"bitnet_ref.steps/3")
        self.n_threads = n_threads

    def take_inner_ns(self):
        """Time that parts of `self_attention` and `feed_forward` took since this was asked last, in ns, as a dict.

        product: with the rescaling of sums and the gate, which the same threads do; attention: with storing keys and values.
        """
        taken = {"product": self.product_ns, "attention": self.attention_ns}
        self.product_ns = self.attention_ns = 0
        return taken

    def rms_norm(self, x, weight, float eps, float offset=0.0):
        """As reference.norm.rms_norm; weight float32."""
        cdef _View a = _contiguous(x, float32, "x"), w = _contiguous(weight, float32, "weight", 1)
        y = np.empty(x.shape, float32)
        cdef _View b = _View(y, float32, "y")
        cdef Py_ssize_t k = w.size(0), t, rows
        if a.buffer.ndim < 1 or a.size(a.buffer.ndim - 1) != k:
            raise ValueError(f"the last axis of x must be as long as the weight, {k}, got shape {x.shape}")
        if k == 0:
            return y
        rows = a.buffer.len // (4 * k)
        cdef const float* source = <const float*>a.buffer.buf
        cdef const float* scale = <const float*>w.buffer.buf
        cdef float* target = <float*>b.buffer.buf
        if rows == 1:
            self.call.norm(source, scale, target, k, eps, offset)
            return y
        for t in prange(rows, nogil=True, num_threads=self.n_threads, schedule='static'):
            self.call.norm(source + t * k, scale, target + t * k, k, eps, offset)
        return y

    def quantize(self, x):
        """As reference.quantize.quantize_activations for float32 of shape (T, K): int8 (T, K) and float32 (T, 1)."""
        cdef _View a = _contiguous(x, float32, "x", 2)
        cdef Py_ssize_t rows = a.size(0), k = a.size(1), t
        cdef int bad = 0
        x_q, x_scale = np.empty((rows, k), int8), np.empty((rows, 1), float32)
        cdef _View q = _View(x_q, int8, "x_q"), s = _View(x_scale, float32, "x_scale")
        cdef const float* source = <const float*>a.buffer.buf
        cdef signed char* target = <signed char*>q.buffer.buf
        cdef float* scale = <float*>s.buffer.buf
        if rows == 1:
            bad = not self.call.quantize(source, target, scale, k)
        else:
            for t in prange(rows, nogil=True, num_threads=self.n_threads, schedule='static'):
                bad += not self.call.quantize(source + t * k, target + t * k, scale + t, k)
        if bad:
            raise ValueError("x must be finite in float32, got NaN or infinity")
        return x_q, x_scale

    def rescale(self, sums, x_scale, float w_scale):
        """float32(sums) * (x_scale * w_scale) for int32 sums of shape (T, M), in their memory; x_scale float32 (T, 1)."""
        cdef _View a = _View(sums, int32, "sums", 2, PyBUF_ND | PyBUF_WRITABLE)
        cdef _View s = _contiguous(x_scale, float32, "x_scale", 2)
        cdef Py_ssize_t rows = a.size(0), m = a.size(1), t
        if s.size(0) != rows or s.size(1) != 1:
            raise ValueError(f"x_scale must have shape ({rows}, 1), got {x_scale.shape}")
        y = sums.view(float32)
        cdef const int* source = <const int*>a.buffer.buf
        cdef const float* scale = <const float*>s.buffer.buf
        cdef float* target = <float*>a.buffer.buf
        if rows == 1:
            self.call.rescale(source, target, m, scale[0] * w_scale)
            return y
        for t in prange(rows, nogil=True, num_threads=self.n_threads, schedule='static'):
            self.call.rescale(source + t * m, target + t * m, m, scale[t] * w_scale)
        return y

    cdef int _input(self, const float* x, const float* weight, float eps, float offset, float* normed, const matrix_t* a,
                    char* memory, input_t* out) noexcept nogil:
        # Norm, quantiser and tables. Returns 0 if a value is not finite.
        cdef signed char* x_q = <signed char*>(memory + (-<Py_ssize_t>memory & 63))
        cdef Py_ssize_t padded = a.n_blocks * a.block, chunk, i
        cdef signed char* tables = x_q + padded + (-padded & 63)
        if not self.call.norm_quantize(x, weight, normed, x_q, &out.scale, &out.sum, a.k, eps, offset):
            return 0
        memset(x_q + a.k, 0, padded - a.k)
        out.operand = out.x_q = x_q
        if a.build != NULL:
            chunk = (a.n_blocks + self.n_threads - 1) // self.n_threads
            for i in prange(self.n_threads, num_threads=self.n_threads, schedule='static', chunksize=1):
                if i * chunk < a.n_blocks:
                    a.build(x_q + i * chunk * a.block, tables + i * chunk * TABLE_BYTES, min(chunk, a.n_blocks - i * chunk))
            out.operand = tables
        return 1

    cdef Py_ssize_t _share(self, const matrix_t* a, const input_t* x, Py_ssize_t worker, int* sums,
                           Py_ssize_t* first) noexcept nogil:
        # Multiply one thread's tiles, a contiguous run; gives the first of its rows and how many there are.
        cdef Py_ssize_t start = a.n_tiles * worker // self.n_threads, end = a.n_tiles * (worker + 1) // self.n_threads
        if end > start:
            a.multiply(a.w + start * a.w_stride, a.w_stride, x.operand, 0, &x.sum, sums + start * a.rows, 0, end - start,
                       a.n_blocks, 1)
        first[0] = start * a.rows
        return min(end * a.rows, a.m) - first[0]

    def self_attention(self, x, weight, sub_weight, float eps, float offset, tuple matrices, biases, norms, turns,
                       keys, values, float scale, window=None):
        """The attention half of a block for one token, added to itself; x float32 (1, hidden).

        ``x + linear(rms_norm(a, sub_weight), o)``, without the inner norm if sub_weight is None, where a is the attention of
        the token's queries to keys and values: those of the tokens before it, which the arrays hold, and its own, which are
        stored as their last row.

        Parameters
        ----------
        x : float32 (1, hidden)
        weight : float32 (hidden,)
        sub_weight : float32 (H * D,) or None
        matrices : q, k, v and o, each a Matrix; the first three of one packing
        biases : None, or three arrays float32 (H * D,), (KV * D,), (KV * D,)
        norms : None, or those of queries and keys, float32 (D,)
        turns : cos and sin, float32 (1, 1, D / 2)
        keys, values : float32 or float16 (S, KV, D), of any strides but along D
        scale : float
        window : int, optional

        Returns
        -------
        float32 (1, hidden)
        """
        cdef matrix_t about[4]
        cdef float* target[MOST_TOGETHER]
        cdef int* sums[MOST_TOGETHER]
        cdef const float* bias[MOST_TOGETHER]
        cdef const float* head_norm[2]
        cdef cache_t cache
        cdef Py_ssize_t j, i, size = 0, k = (<Matrix?>matrices[0]).about.k
        cdef _View a = _contiguous(x, float32, "x", 2), w = _contiguous(weight, float32, "weight", 1)
        cdef _View cosine = _contiguous(turns[0], float32, "cos", 3), sine = _contiguous(turns[1], float32, "sin", 3)
        cdef _View b = _View(keys, keys.dtype, "keys", 3, PyBUF_STRIDES | PyBUF_WRITABLE)
        cdef _View c = _View(values, keys.dtype, "values", 3, PyBUF_STRIDES | PyBUF_WRITABLE)
        self._cache_of(keys, b, c, &cache)
        for j in range(4):
            about[j] = (<Matrix?>matrices[j]).about
        for j in range(MOST_TOGETHER):
            if about[j].k != k or about[j].block != about[0].block or about[j].build != about[0].build:
                raise ValueError("matrices that read the same token must have the same K and packing")
            size += about[j].n_tiles * about[j].rows
        cdef Py_ssize_t d = cache.d, heads = about[0].m // d, width = about[0].m, kv_width = cache.kv_heads * d
        if (heads * d != width or heads % cache.kv_heads or d % 2 or about[1].m != kv_width or about[2].m != kv_width
                or about[3].k != width or about[3].m != k or cache.n < 1):
            raise ValueError(f"q, k, v and o must fit keys of shape {keys.shape}, got {width}, {about[1].m} and {about[2].m} "
                             f"rows for {k} columns, and {about[3].m} for {about[3].k}")
        if a.size(0) != 1 or a.size(1) != k or w.size(0) != k or cosine.size(2) != d // 2 or sine.size(2) != d // 2:
            raise ValueError(f"x must have shape (1, {k}), weight ({k},) and cos and sin (1, 1, {d // 2}), got {x.shape}, "
                             f"{weight.shape}, {turns[0].shape} and {turns[1].shape}")
        held = []
        for j in range(MOST_TOGETHER):
            bias[j] = NULL if biases is None else self._vector(held, biases[j], "bias", about[j].m)
        for j in range(2):
            head_norm[j] = NULL if norms is None else self._vector(held, norms[j], "the norm of heads", d)
        cdef const float* inner = NULL if sub_weight is None else self._vector(held, sub_weight, "sub_weight", width)
        y = np.empty((1, k), float32)
        cdef _View out = _View(y, float32, "y")
        cdef Py_ssize_t input_size = max(input_bytes(about), input_bytes(about + 3))
        cdef Py_ssize_t out_size = about[3].n_tiles * about[3].rows, floats = 2 * (width + kv_width) + kv_width + max(k, width)
        cdef char* memory = <char*>malloc(4 * (floats + size + out_size) + input_size)
        if memory == NULL:
            raise MemoryError("no memory for the activations of a layer")
        cdef float* normed = <float*>memory
        target[0] = normed + max(k, width)
        target[1] = target[0] + width
        target[2] = target[1] + kv_width
        cdef float* turned = target[2] + kv_width  # queries and keys
        sums[0] = <int*>(turned + width + kv_width)
        for j in range(1, MOST_TOGETHER):
            sums[j] = sums[j - 1] + about[j - 1].n_tiles * about[j - 1].rows
        cdef int* out_sums = sums[0] + size
        cdef char* rest = <char*>(out_sums + out_size)
        cdef const float* source = <const float*>a.buffer.buf
        cdef float* result = <float*>out.buffer.buf
        cdef Py_ssize_t seen = cache.n if window is None else max(1, window)
        cdef input_t token
        cdef int finite, fits = 1, found = 1
        cdef double start
        with nogil:
            finite = self._input(source, <const float*>w.buffer.buf, eps, offset, normed, about, rest, &token)
            if finite:
                self._project_shares(about, MOST_TOGETHER, &token, sums, NULL, target)
                for j in range(MOST_TOGETHER):
                    if bias[j] != NULL:
                        for i in range(about[j].m):
                            target[j][i] += bias[j][i]
                for j in range(2):
                    if head_norm[j] != NULL:
                        for i in range(about[j].m // d):
                            self.call.norm(target[j] + i * d, head_norm[j], target[j] + i * d, d, eps, offset)
                    self.call.rotate(target[j], <const float*>cosine.buffer.buf, <const float*>sine.buffer.buf,
                                     turned + j * width, about[j].m // d, d // 2)
                start = now_ns()
                fits = store_last(&cache, turned + width, target[2])
                # The attention overwrites the queries before their rotation.
                found = fits and self._attend(turned, 1, heads, &cache, seen, scale, target[0])
                self.attention_ns += now_ns() - start
            if finite and found:
                finite = self._input(target[0], inner, eps, offset, normed, about + 3, rest, &token)
            if finite and found:
                self._project_shares(about + 3, 1, &token, &out_sums, source, &result)
        free(memory)
        if not fits:
            raise ValueError(f"keys and values must be within {FLOAT16_MAX:,.0f} to be kept as float16, got larger ones")
        if not found:
            raise MemoryError("no memory for the scores of attention")
        if not finite:
            raise ValueError("x must be finite in float32, got NaN or infinity")
        return y

    cdef const float* _vector(self, list held, array, str name, Py_ssize_t size) except NULL:
        # Its memory, which `held` keeps.
        cdef _View a = _contiguous(array, float32, name, 1)
        if a.size(0) != size:
            raise ValueError(f"{name} must have shape ({size},), got {array.shape}")
        held.append(a)
        return <const float*>a.buffer.buf

    cdef void _project_shares(self, const matrix_t* about, Py_ssize_t n, const input_t* token, int** sums,
                              const float* added, float** target) noexcept nogil:
        cdef double start = now_ns()
        cdef Py_ssize_t worker
        for worker in prange(self.n_threads, num_threads=self.n_threads, schedule='static', chunksize=1):
            self._project_share(about, n, token, worker, sums, added, target)
        self.product_ns += now_ns() - start

    cdef void _project_share(self, const matrix_t* about, Py_ssize_t n, const input_t* token, Py_ssize_t worker, int** sums,
                             const float* added, float** target) noexcept nogil:
        cdef Py_ssize_t j, first, count
        for j in range(n):
            count = self._share(about + j, token, worker, sums[j], &first)
            if count <= 0:
                continue
            if added != NULL:
                self.call.rescale_add(sums[j] + first, added + first, target[j] + first, count,
                                      token.scale * about[j].scale)
            else:
                self.call.rescale(sums[j] + first, target[j] + first, count, token.scale * about[j].scale)

    def feed_forward(self, x, weight, sub_weight, float eps, float offset, Matrix gate, Matrix up, Matrix down,
                     str activation, ListedRows listed=None):
        """One token through the gated feed-forward network, added to itself; x float32 (1, K).

        ``x + linear(rms_norm(activate(linear(a, gate)) * linear(a, up), sub_weight), down)``, a = rms_norm(x, weight);
        without the inner norm if sub_weight is None. With `listed`, for relu2 only, rows of up and columns of down that
        add nothing may be left out: the same values.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be relu2, silu or gelu_tanh, got {activation!r}")
        cdef int kind = ACTIVATIONS[activation], finite
        cdef double start
        cdef _View a = _contiguous(x, float32, "x", 2), w = _contiguous(weight, float32, "weight", 1), s = None
        cdef Py_ssize_t k = gate.about.k, ffn = gate.about.m, worker
        cdef Py_ssize_t padded = gate.about.n_tiles * gate.about.rows
        cdef Py_ssize_t size = max(k, ffn) + 2 * padded + ffn + down.about.n_tiles * down.about.rows
        if (up.about.k != k or up.about.m != ffn or up.about.block != gate.about.block or up.about.rows != gate.about.rows
                or up.about.build != gate.about.build or down.about.k != ffn or down.about.m != k):
            raise ValueError("gate and up must have the same shape and packing, and down the transposed shape")
        if a.size(0) != 1 or a.size(1) != k or w.size(0) != k:
            raise ValueError(f"x must have shape (1, {k}) and weight ({k},), got {x.shape} and {weight.shape}")
        cdef const float* inner = NULL
        if sub_weight is not None:
            s = _contiguous(sub_weight, float32, "sub_weight", 1)
            if s.size(0) != ffn:
                raise ValueError(f"sub_weight must have shape ({ffn},), got {sub_weight.shape}")
            inner = <const float*>s.buffer.buf
        y = np.empty((1, k), float32)
        cdef _View b = _View(y, float32, "y")
        cdef Py_ssize_t input_size = max(input_bytes(&gate.about), input_bytes(&down.about))
        if listed is not None:
            if listed.ffn != ffn or listed.k != k or kind != ACTIVATE_RELU2:
                raise ValueError("listed rows must be of this network, and its activation relu2")
            input_size += self._listed_bytes(listed)
        cdef char* memory = <char*>malloc(4 * size + input_size)
        if memory == NULL:
            raise MemoryError("no memory for the activations of a layer")
        cdef float* normed = <float*>memory
        cdef int* gate_sums = <int*>memory + max(k, ffn)
        cdef int* up_sums = gate_sums + padded
        cdef float* gated = <float*>(up_sums + padded)
        cdef int* down_sums = <int*>(gated + ffn)
        cdef const float* source = <const float*>a.buffer.buf
        cdef const float* norm = <const float*>w.buffer.buf
        cdef float* target = <float*>b.buffer.buf
        cdef input_t token
        cdef char* more = memory + 4 * size  # for listed rows
        cdef char* rest = more + (self._listed_bytes(listed) if listed is not None else 0)
        cdef int up_done = 0
        with nogil:
            finite = self._input(source, norm, eps, offset, normed, &gate.about, rest, &token)
            if finite:
                start = now_ns()
                if listed is not None:
                    up_done = self._gate_listed(listed, &gate.about, &up.about, &token, gate_sums, up_sums, gated, more)
                if not up_done:
                    for worker in prange(self.n_threads, num_threads=self.n_threads, schedule='static', chunksize=1):
                        self._gate_share(&gate.about, &up.about, &token, worker, gate_sums, up_sums, gated, kind,
                                         listed is None)
                self.product_ns += now_ns() - start
                finite = self._input(gated, inner, eps, offset, normed, &down.about, rest, &token)
            if finite and (listed is None or not self._down_listed(listed, &down.about, &token, source, target, more)):
                self._project_shares(&down.about, 1, &token, &down_sums, source, &target)
        free(memory)
        if not finite:
            raise ValueError("x must be finite in float32, got NaN or infinity")
        return y

    cdef void _gate_share(self, const matrix_t* gate, const matrix_t* up, const input_t* token, Py_ssize_t worker,
                          int* gate_sums, int* up_sums, float* gated, int kind, bint with_gate) noexcept nogil:
        cdef Py_ssize_t first, count
        if with_gate:  # else its sums are there
            self._share(gate, token, worker, gate_sums, &first)
        count = self._share(up, token, worker, up_sums, &first)
        if count > 0:
            self.call.gate(gate_sums + first, up_sums + first, gated + first, count, token.scale * gate.scale,
                           token.scale * up.scale, kind)

    cdef Py_ssize_t _listed_bytes(self, ListedRows listed) noexcept nogil:
        # A list and its sums; then a token of int8, or for each thread scratch and sums of a row; 63 to align those.
        cdef Py_ssize_t columns = listed.n_blocks * ROW_BLOCK
        return 8 * listed.ffn + max(columns, 8 * columns * self.n_threads) + 63

    cdef int _gate_listed(self, ListedRows listed, const matrix_t* gate, const matrix_t* up, const input_t* token,
                          int* gate_sums, int* up_sums, float* gated, char* memory) noexcept nogil:
        # The gate, and if few of its values are positive the rows of up that they meet. Returns 0 if up is still to do.
        cdef int* rows = <int*>memory
        cdef int* sums = rows + listed.ffn
        cdef signed char* x_q = <signed char*>(sums + listed.ffn)
        cdef float up_scale = token.scale * up.scale
        cdef float most = <float>(128 * up.k) * fabsf(up_scale)  # in float32, where it may overflow
        cdef Py_ssize_t worker, n
        for worker in prange(self.n_threads, num_threads=self.n_threads, schedule='static', chunksize=1):
            self._gate_only(gate, token, worker, gate_sums)
        n = list_positive(gate_sums, listed.ffn, token.scale * gate.scale, rows)
        listed.tokens += 1
        listed.up_rows += n
        # Where a row could overflow, the dense product sees whether one does, counting or not.
        if n > listed.up_most or not most < INFINITY:
            return 0
        listed.up_listed += 1
        listed.read_bytes += n * listed.stride
        x_q += -<Py_ssize_t>x_q & 63  # on a cache line, as dotrows likes it
        memcpy(x_q, token.x_q, listed.k)
        memset(x_q + listed.k, 0, listed.n_blocks * ROW_BLOCK - listed.k)
        for worker in prange(self.n_threads, num_threads=self.n_threads, schedule='static', chunksize=1):
            self._up_rows(listed, worker, rows, n, x_q, token.sum, sums, up_sums, gate_sums, gated,
                          token.scale * gate.scale, up_scale)
        return 1

    cdef void _gate_only(self, const matrix_t* gate, const input_t* token, Py_ssize_t worker, int* sums) noexcept nogil:
        cdef Py_ssize_t first
        self._share(gate, token, worker, sums, &first)

    cdef void _up_rows(self, ListedRows listed, Py_ssize_t worker, const int* rows, Py_ssize_t n, const signed char* x_q,
                       int x_sum, int* sums, int* up_sums, const int* gate_sums, float* gated, float gate_scale,
                       float up_scale) noexcept nogil:
        # One thread's part of the list, and the rows from its first up to the next part's.
        cdef Py_ssize_t start = n * worker // self.n_threads, end = n * (worker + 1) // self.n_threads, i
        cdef Py_ssize_t first = rows[start] if worker and start < n else (listed.ffn if worker else 0)
        cdef Py_ssize_t last = rows[end] if end < n else listed.ffn
        memset(up_sums + first, 0, (last - first) * sizeof(int))
        if end > start:
            listed.dot(<const unsigned char*>listed.held_up.buffer.buf, listed.stride, rows + start, end - start, x_q,
                       listed.n_blocks, x_sum, sums + start)
        for i in range(start, end):
            up_sums[rows[i]] = sums[i]
        if last > first:
            self.call.gate(gate_sums + first, up_sums + first, gated + first, last - first, gate_scale, up_scale,
                           ACTIVATE_RELU2)

    cdef int _down_listed(self, ListedRows listed, const matrix_t* down, const input_t* token, const float* x, float* y,
                          char* memory) noexcept nogil:
        # y = x + the columns of down whose activation is not zero. Returns 0 if they are too many.
        cdef int* rows = <int*>memory
        cdef int* sums = rows + listed.ffn
        cdef Py_ssize_t n = list_nonzero(token.x_q, listed.ffn, rows), size = listed.n_blocks * ROW_BLOCK, worker, j
        cdef double start
        listed.down_rows += n
        if n > listed.down_most:
            return 0
        listed.down_listed += 1
        listed.read_bytes += n * listed.stride
        start = now_ns()
        sums = <int*>(<char*>sums + (-<Py_ssize_t>sums & 63))
        for worker in prange(self.n_threads, num_threads=self.n_threads, schedule='static', chunksize=1):
            listed.add(<const unsigned char*>listed.held_down.buffer.buf, listed.stride,
                       rows + n * worker // self.n_threads,
                       n * (worker + 1) // self.n_threads - n * worker // self.n_threads, token.x_q, listed.n_blocks,
                       sums + 2 * worker * size, sums + (2 * worker + 1) * size)
        for worker in range(1, self.n_threads):
            for j in range(listed.k):
                sums[size + j] += sums[(2 * worker + 1) * size + j]
        self.call.rescale_add(sums + size, x, y, listed.k, token.scale * down.scale)
        self.product_ns += now_ns() - start
        return 1

    def rotate(self, x, cos, sin):
        """As reference.rope.rotate."""
        cdef _View a = _contiguous(x, float32, "x", 3)
        cdef _View c = _contiguous(cos, float32, "cos", 3), s = _contiguous(sin, float32, "sin", 3)
        cdef Py_ssize_t rows = a.size(0), heads = a.size(1), half = a.size(2) // 2, t
        shape = (rows, 1, half)
        if 2 * half != a.size(2) or cos.shape != shape or sin.shape != shape:
            raise ValueError(f"cos and sin must have shape (T, 1, D/2) for x of shape {x.shape}, got {cos.shape}")
        y = np.empty(x.shape, float32)
        cdef _View b = _View(y, float32, "y")
        cdef const float* source = <const float*>a.buffer.buf
        cdef const float* cosine = <const float*>c.buffer.buf
        cdef const float* sine = <const float*>s.buffer.buf
        cdef float* target = <float*>b.buffer.buf
        for t in range(rows):
            self.call.rotate(source + t * 2 * half * heads, cosine + t * half, sine + t * half,
                             target + t * 2 * half * heads, heads, half)
        return y

    def activate(self, x, str activation):
        """As reference.mlp.activate."""
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be relu2, silu or gelu_tanh, got {activation!r}")
        cdef int kind = ACTIVATIONS[activation]
        cdef _View a = _contiguous(x, float32, "x")
        y = np.empty(x.shape, float32)
        cdef _View b = _View(y, float32, "y")
        cdef Py_ssize_t n = a.buffer.len // 4, part = 8192, i
        cdef const float* source = <const float*>a.buffer.buf
        cdef float* target = <float*>b.buffer.buf
        if n <= part:
            self.call.activate(source, target, n, kind)
            return y
        for i in prange((n + part - 1) // part, nogil=True, num_threads=self.n_threads, schedule='static'):
            self.call.activate(source + i * part, target + i * part, min(part, n - i * part), kind)
        return y

    def gate_quantize(self, gate_sums, up_sums, x_scale, float gate_scale, float up_scale, str activation, weight, float eps,
                      float offset):
        """What the down projection of several tokens reads, of the int32 sums of gate and up; their memory is used up.

        ``quantize(rms_norm(activate(gate) * up, weight))``, without the norm if weight is None, where gate and up are the
        rescaled sums.

        Parameters
        ----------
        gate_sums, up_sums : int32 (T, M), C-contiguous
            Overwritten.
        x_scale : float32 (T, 1)
            Of the tokens that gate and up were multiplied with.
        gate_scale, up_scale : float
        activation : str
        weight : float32 (M,) or None

        Returns
        -------
        int8 (T, M) and float32 (T, 1)
        """
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be relu2, silu or gelu_tanh, got {activation!r}")
        cdef int kind = ACTIVATIONS[activation], bad = 0
        cdef _View a = _View(gate_sums, int32, "gate_sums", 2, PyBUF_ND | PyBUF_WRITABLE)
        cdef _View b = _View(up_sums, int32, "up_sums", 2, PyBUF_ND | PyBUF_WRITABLE)
        cdef _View s = _contiguous(x_scale, float32, "x_scale", 2)
        cdef Py_ssize_t rows = a.size(0), m = a.size(1), t
        if b.size(0) != rows or b.size(1) != m or s.size(0) != rows or s.size(1) != 1:
            raise ValueError(f"up_sums must have shape ({rows}, {m}) and x_scale ({rows}, 1), got {up_sums.shape} and "
                             f"{x_scale.shape}")
        held = []
        cdef const float* norm = NULL if weight is None else self._vector(held, weight, "weight", m)
        x_q, out_scale = np.empty((rows, m), int8), np.empty((rows, 1), float32)
        cdef _View q = _View(x_q, int8, "x_q"), o = _View(out_scale, float32, "x_scale")
        cdef int* gate = <int*>a.buffer.buf
        cdef int* up = <int*>b.buffer.buf
        cdef const float* scale = <const float*>s.buffer.buf
        cdef signed char* target = <signed char*>q.buffer.buf
        cdef float* target_scale = <float*>o.buffer.buf
        for t in prange(rows, nogil=True, num_threads=self.n_threads, schedule='static'):
            bad += not self._gate_row(gate + t * m, up + t * m, scale[t] * gate_scale, scale[t] * up_scale, kind, norm,
                                      target + t * m, target_scale + t, m, eps, offset)
        if bad:
            raise ValueError("x must be finite in float32, got NaN or infinity")
        return x_q, out_scale

    cdef int _gate_row(self, int* gate, int* up, float gate_scale, float up_scale, int kind, const float* norm,
                       signed char* x_q, float* x_scale, Py_ssize_t m, float eps, float offset) noexcept nogil:
        cdef int x_sum
        self.call.gate(gate, up, <float*>gate, m, gate_scale, up_scale, kind)
        return self.call.norm_quantize(<float*>gate, norm, <float*>up, x_q, x_scale, &x_sum, m, eps, offset)

    cdef void _attend_one(self, const float* q, Py_ssize_t heads, const char* k, Py_ssize_t k_token, const char* v,
                          Py_ssize_t v_token, Py_ssize_t n, Py_ssize_t seen, Py_ssize_t d, int half, float scale,
                          float* scratch, float* out) noexcept nogil:
        # The last `seen` of n tokens.
        cdef Py_ssize_t first = n - seen if n > seen else 0
        self.call.attend(q, heads, k + first * k_token, k_token, v + first * v_token, v_token, n - first, d, half, scale,
                         scratch, out)

    cdef int _cache_of(self, keys, _View b, _View c, cache_t* cache) except -1:
        if keys.dtype != float32 and keys.dtype != float16:
            raise TypeError(f"keys must be float32 or float16, got {keys.dtype}")
        cache.half = keys.dtype == float16
        cdef Py_ssize_t width = 2 if cache.half else 4
        if b.buffer.strides[2] != width or c.buffer.strides[2] != width:
            raise ValueError("the values of one head must lie side by side in keys and values")
        cache.keys, cache.values = <char*>b.buffer.buf, <char*>c.buffer.buf
        cache.n, cache.kv_heads, cache.d = b.size(0), b.size(1), b.size(2)
        cache.k_token, cache.k_head = b.buffer.strides[0], b.buffer.strides[1]
        cache.v_token, cache.v_head = c.buffer.strides[0], c.buffer.strides[1]
        if c.size(0) != cache.n or c.size(1) != cache.kv_heads or c.size(2) != cache.d or not cache.kv_heads or not cache.d:
            raise ValueError(f"keys and values must have the same shape (S, KV, D), got {keys.shape} and "
                             f"({c.size(0)}, {c.size(1)}, {c.size(2)})")
        return 0

    def attention(self, q, k, v, float scale, window=None):
        """As reference.attention.attention; k and v float32 or float16, of any strides but along D."""
        cdef _View a = _contiguous(q, float32, "q", 3)
        cdef _View b = _View(k, k.dtype, "k", 3, PyBUF_STRIDES), c = _View(v, k.dtype, "v", 3, PyBUF_STRIDES)
        cdef cache_t cache
        self._cache_of(k, b, c, &cache)
        cdef Py_ssize_t tokens = a.size(0), heads = a.size(1)
        if a.size(2) != cache.d or heads % cache.kv_heads or cache.n < tokens:
            raise ValueError(f"k and v must have shape (S, KV, D) for q of shape {q.shape}, got {k.shape}, {v.shape}")
        cdef Py_ssize_t seen = cache.n if window is None else max(1, window)
        out = np.empty(q.shape, float32)
        cdef _View o = _View(out, float32, "out")
        cdef const float* queries = <const float*>a.buffer.buf
        cdef float* target = <float*>o.buffer.buf
        cdef int done
        with nogil:
            done = self._attend(queries, tokens, heads, &cache, seen, scale, target)
        if not done:
            raise MemoryError("no memory for the scores of attention")
        return out

    cdef int _attend(self, const float* queries, Py_ssize_t tokens, Py_ssize_t heads, const cache_t* cache, Py_ssize_t seen,
                     float scale, float* target) noexcept nogil:
        # Returns 0 if there is no memory for scores.
        cdef Py_ssize_t kv_heads = cache.kv_heads, d = cache.d, n = cache.n
        cdef Py_ssize_t group = heads // kv_heads, item, t, head, half_group, count, first
        cdef int n_threads = self.n_threads
        # Threads share the key/value heads of each token; those that are left over are cut in two, by their query heads.
        cdef Py_ssize_t items = tokens * kv_heads, whole = items
        if items % n_threads and group % 2 == 0:
            whole = items // n_threads * n_threads
        cdef Py_ssize_t total = whole + 2 * (items - whole)
        cdef Py_ssize_t scratch_size = STEP_ATTEND_SCRATCH(min(n, seen), d)
        cdef float* scratch = <float*>malloc(n_threads * scratch_size * sizeof(float))
        if scratch == NULL:
            return 0
        cdef Py_ssize_t worker
        for worker in prange(n_threads, num_threads=n_threads, schedule='static', chunksize=1):
            # Interleaved, because later tokens see more.
            item = worker
            while item < total:
                half_group = (item - whole) % 2 if item >= whole else 0
                count = group // 2 if item >= whole else group
                t = whole + (item - whole) // 2 if item >= whole else item
                head = t % kv_heads
                first = t * group + half_group * count  # of the query heads of all tokens
                t = t // kv_heads
                self._attend_one(queries + first * d, count, cache.keys + head * cache.k_head, cache.k_token,
                                 cache.values + head * cache.v_head, cache.v_token, n - tokens + t + 1, seen, d, cache.half,
                                 scale, scratch + worker * scratch_size, target + first * d)
                item = item + n_threads
        free(scratch)
        return 1

    def head(self, x, raw, str type_name):
        """As reference.head.head_logits for a table of floats: x float32 (T, K) times stored rows, uint8 (V, row bytes)."""
        cdef int kind
        cdef Py_ssize_t block, block_bytes
        kind, block, block_bytes = TABLES.get(type_name, (0, 0, 0))
        if block != 1:
            raise ValueError(f"the type of stored rows must be F32, F16 or BF16, got {type_name!r}")
        cdef _View a = _contiguous(x, float32, "x", 2), w = _contiguous(raw, uint8, "raw", 2)
        cdef Py_ssize_t tokens = a.size(0), k = a.size(1), vocabulary = w.size(0), row_bytes = w.size(1), t, i, first
        cdef Py_ssize_t padded = (k + 15) // 16 * 16
        if row_bytes != k * block_bytes:
            raise ValueError(f"rows of {k} {type_name} values must have {k * block_bytes} bytes, got {row_bytes}")
        out = np.empty((tokens, vocabulary), float32)
        cdef _View o = _View(out, float32, "out")
        cdef float* copy = <float*>malloc(max(1, tokens * padded) * sizeof(float))
        if copy == NULL:
            raise MemoryError("no memory for padded activations")
        cdef const float* source = <const float*>a.buffer.buf
        cdef const unsigned char* table = <const unsigned char*>w.buffer.buf
        cdef float* target = <float*>o.buffer.buf
        cdef int n_threads = self.n_threads
        cdef Py_ssize_t blocks = (vocabulary + 3) // 4
        with nogil:
            for t in range(tokens):
                memcpy(copy + t * padded, source + t * k, k * sizeof(float))
                memset(copy + t * padded + k, 0, (padded - k) * sizeof(float))
            for i in prange(n_threads, num_threads=n_threads, schedule='static', chunksize=1):
                first = blocks * i // n_threads * 4
                self.call.head(table + first * row_bytes, row_bytes,
                               min(vocabulary, blocks * (i + 1) // n_threads * 4) - first, copy, padded, tokens, k,
                               target + first, vocabulary, kind)
        free(copy)
        return out

    def grouped_head(self, x, data, str type_name, Py_ssize_t vocabulary):
        """As reference.head.head_logits for a GroupedTable: x float32 (T, K), data uint8 (V / 16, 16 rows)."""
        cdef int kind
        cdef Py_ssize_t block, block_bytes
        kind, block, block_bytes = TABLES.get(type_name, (0, 0, 0))
        if block <= 1:
            raise ValueError(f"the type of grouped rows must be Q8_0, Q6_K or Q4_0, got {type_name!r}")
        cdef _View a = _contiguous(x, float32, "x", 2), w = _contiguous(data, uint8, "data", 2)
        cdef Py_ssize_t tokens = a.size(0), k = a.size(1), t, i, first, last
        cdef Py_ssize_t n_groups = (vocabulary + GROUP_ROWS - 1) // GROUP_ROWS
        cdef Py_ssize_t group_bytes = GROUP_ROWS * (k // block * block_bytes)
        if k % block or w.size(1) != group_bytes or w.size(0) != n_groups:
            raise ValueError(f"{vocabulary} grouped rows of {k} {type_name} values must have {n_groups} groups of "
                             f"{group_bytes} bytes in blocks of {block} columns, got {w.size(0)} of {w.size(1)}")
        out = np.empty((tokens, vocabulary), float32)
        cdef _View o = _View(out, float32, "out")
        cdef Py_ssize_t token_bytes = HEAD_TOKEN_BYTES(k)
        cdef int n_threads = self.n_threads, bad = 0
        cdef char* memory = <char*>malloc(tokens * token_bytes + 63)
        if memory == NULL:
            raise MemoryError("no memory for the activations of a head")
        cdef char* token = memory + (-<Py_ssize_t>memory & 63)
        cdef const float* source = <const float*>a.buffer.buf
        cdef const unsigned char* table = <const unsigned char*>w.buffer.buf
        cdef float* target = <float*>o.buffer.buf
        with nogil:
            for t in range(tokens):
                bad += not self.call.head_prepare(source + t * k, k, kind, token + t * token_bytes)
            if not bad:
                for i in prange(n_threads, num_threads=n_threads, schedule='static', chunksize=1):
                    first = n_groups * i // n_threads
                    last = min(n_groups * (i + 1) // n_threads * GROUP_ROWS, vocabulary)
                    self.call.head_integer(table + first * group_bytes, group_bytes, last - first * GROUP_ROWS, token,
                                           tokens, k, target + first * GROUP_ROWS, vocabulary, kind)
        free(memory)
        if bad:
            raise ValueError("x must be finite in float32, got NaN or infinity")
        return out

    def group_rows(self, raw, str type_name):
        """As reference.head.group_rows."""
        cdef int kind
        cdef Py_ssize_t block, block_bytes
        kind, block, block_bytes = TABLES.get(type_name, (0, 0, 0))
        if block <= 1:
            raise ValueError(f"rows of Q8_0, Q6_K or Q4_0 can be grouped, got {type_name!r}")
        cdef _View a = _contiguous(raw, uint8, "raw", 2)
        cdef Py_ssize_t rows = a.size(0), row_bytes = a.size(1), n_groups = (rows + GROUP_ROWS - 1) // GROUP_ROWS, i
        if row_bytes % block_bytes:
            raise ValueError(f"rows of {type_name} must be whole blocks of {block_bytes} bytes, got {row_bytes}")
        data = np.empty((n_groups, GROUP_ROWS * row_bytes), uint8)
        if rows % GROUP_ROWS:
            data[n_groups - 1] = 0
        cdef _View o = _View(data, uint8, "data")
        cdef const unsigned char* source = <const unsigned char*>a.buffer.buf
        cdef unsigned char* target = <unsigned char*>o.buffer.buf
        cdef int n_threads = self.n_threads
        for i in prange(n_groups, num_threads=n_threads, schedule='static', nogil=True):
            head_group_rows(source + i * GROUP_ROWS * row_bytes, row_bytes, min(GROUP_ROWS, rows - i * GROUP_ROWS),
                            block_bytes, target + i * GROUP_ROWS * row_bytes)
        return data
