"""The element-wise steps of decoding and the output head: shapes, memory and threads around the loops of decoder_steps.h.

Arguments are those of bitnet_ref/reference/{norm,rope,mlp,attention,head}.py. Each output value is computed by one
thread, so results do not depend on how many there are. Compiled with baseline flags; the loops come in a capsule.
"""

from cpython.buffer cimport PyBUF_ND, PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.pycapsule cimport PyCapsule_GetPointer
from cython.parallel cimport prange
from libc.math cimport INFINITY, fabsf
from libc.stdlib cimport calloc, free, malloc
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
        void (*attend)(const float* q, Py_ssize_t q_stride, Py_ssize_t tokens, Py_ssize_t heads, const char* k,
                    Py_ssize_t k_stride, const char* v, Py_ssize_t v_stride, Py_ssize_t n, Py_ssize_t d, int half,
                    float scale, float* scratch, float* out) noexcept nogil
        void (*head)(const unsigned char* w, Py_ssize_t row_bytes, Py_ssize_t rows, const float* x, Py_ssize_t x_stride,
                  Py_ssize_t tokens, Py_ssize_t k, float* out, Py_ssize_t out_stride, int type) noexcept nogil
        int (*head_prepare)(const float* x, Py_ssize_t k, int type, char* token) noexcept nogil
        void (*head_integer)(const unsigned char* w, Py_ssize_t group_bytes, Py_ssize_t rows, const char* x,
                  Py_ssize_t tokens, Py_ssize_t k, float* out, Py_ssize_t out_stride, int type) noexcept nogil
    Py_ssize_t ATTEND_TOKENS
    Py_ssize_t STEP_ATTEND_SCRATCH(Py_ssize_t tokens, Py_ssize_t n, Py_ssize_t d)
    int ACTIVATE_RELU2, ACTIVATE_SILU, ACTIVATE_GELU_TANH
    Py_ssize_t HEAD_TOKEN_BYTES(Py_ssize_t k)
    void head_group_rows(const unsigned char* rows, Py_ssize_t row_bytes, Py_ssize_t count, Py_ssize_t block_bytes,
                         unsigned char* group)
    void head_decode_row(const unsigned char* group, Py_ssize_t row, Py_ssize_t k, int type, float* y)
    int TABLE_F32, TABLE_F16, TABLE_BF16, TABLE_Q8_0, TABLE_Q6_K, TABLE_Q4_0

cdef dict ACTIVATIONS = {"relu2": ACTIVATE_RELU2, "silu": ACTIVATE_SILU, "gelu_tanh": ACTIVATE_GELU_TANH}
# Number of the type, columns and bytes of a block.
cdef dict TABLES = {"F32": (TABLE_F32, 1, 4), "F16": (TABLE_F16, 1, 2), "BF16": (TABLE_BF16, 1, 2),
                    "Q8_0": (TABLE_Q8_0, 32, 34), "Q6_K": (TABLE_Q6_K, 256, 210), "Q4_0": (TABLE_Q4_0, 32, 18)}

float32, float16, int8, int32, int64, uint8 = (
    np.dtype(t) for t in (np.float32, np.float16, np.int8, np.int32, np.int64, np.uint8)
)


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


cdef struct listed_t:
    dot_rows_t dot
    add_rows_t add
    const unsigned char* up
    const unsigned char* down
    Py_ssize_t ffn, k, n_blocks, stride, up_most, down_most
    long long tokens, up_rows, down_rows, up_listed, down_listed, read_bytes


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

    cdef listed_t about
    cdef _View held_up, held_down

    def __init__(self, dot, add, up, down, Py_ssize_t k, Py_ssize_t up_most, Py_ssize_t down_most):
        self.about.dot = <dot_rows_t>PyCapsule_GetPointer(dot, b"bitnet_ref.dotrows/1")
        self.about.add = <add_rows_t>PyCapsule_GetPointer(add, b"bitnet_ref.addrows/1")
        self.held_up, self.held_down = _contiguous(up, uint8, "up", 2), _contiguous(down, uint8, "down", 2)
        self.about.up = <const unsigned char*>self.held_up.buffer.buf
        self.about.down = <const unsigned char*>self.held_down.buffer.buf
        self.about.ffn, self.about.k, self.about.n_blocks = self.held_up.size(0), k, (k + ROW_BLOCK - 1) // ROW_BLOCK
        self.about.stride = ROW_BLOCK // 5 * self.about.n_blocks
        self.about.up_most, self.about.down_most = up_most, down_most
        shape = (self.about.ffn, self.about.stride)
        for view in (self.held_up, self.held_down):
            if ((<_View>view).size(0), (<_View>view).size(1)) != shape:
                raise ValueError(f"up and down must have shape {shape}, got {up.shape}, {down.shape}")

    def take_counts(self):
        """What happened since this was asked last, as a dict.

        tokens; up_rows, down_rows: rows that counted, of all tokens; up_listed, down_listed: tokens whose rows were read
        singly; read_bytes: their bytes.
        """
        cdef listed_t* a = &self.about
        counts = {"tokens": a.tokens, "up_rows": a.up_rows, "down_rows": a.down_rows, "up_listed": a.up_listed,
                  "down_listed": a.down_listed, "read_bytes": a.read_bytes}
        a.tokens = a.up_rows = a.down_rows = a.up_listed = a.down_listed = a.read_bytes = 0
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


cdef enum:
    MOST_TOGETHER = 3  # matrices that read the same activations: q, k and v


cdef struct block_t:
    # One block. What it does without is NULL; a window of 0 is none.
    matrix_t attention[MOST_TOGETHER + 1]  # q, k, v, o
    matrix_t gate, up, down
    const float* norm
    const float* bias[MOST_TOGETHER]
    const float* head_norm[2]  # of queries and keys
    const float* sub_norm
    const float* ffn_norm
    const float* ffn_sub_norm
    listed_t* listed
    Py_ssize_t window


cdef struct network_t:
    # What blocks have in common; width is that of all query heads, kv_width that of all keys.
    Py_ssize_t hidden, ffn, heads, kv_heads, d, width, kv_width
    float eps, offset, scale
    int kind


cdef class Blocks:
    """What a decode step reads of all blocks of a network, checked once. It holds the memory, which must stay as it is.

    Parameters
    ----------
    blocks : sequence of (matrices, norms, biases, head_norms, window, listed), at least one
        matrices : seven Matrix, q, k, v, o, gate, up and down; the first three of one packing, and gate and up
        norms : those in front of q, o, gate and down, float32; None where there is none
        biases : None, or those of q, k and v, float32
        head_norms : None, or those of queries and keys, float32 (D,)
        window : int or None
        listed : ListedRows or None; with it, for relu2 only, rows of up and columns of down that add nothing may be left out
    kv_heads, head_dim : int
    eps, offset : float
        Of all norms.
    scale : float
        Of the scores of attention.
    activation : str
    """

    cdef network_t about
    cdef block_t* block
    cdef Py_ssize_t n
    cdef list held

    def __cinit__(self):
        self.block = NULL

    def __dealloc__(self):
        free(self.block)

    def __init__(self, blocks, Py_ssize_t kv_heads, Py_ssize_t head_dim, float eps, float offset, float scale,
                 str activation):
        if self.block != NULL or not len(blocks):
            raise ValueError("a network must have at least one block, and be made once")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be relu2, silu or gelu_tanh, got {activation!r}")
        if kv_heads < 1 or head_dim < 2 or head_dim % 2:
            raise ValueError(f"heads must be at least one, of an even number of values, got {kv_heads} of {head_dim}")
        self.held = []
        self.block = <block_t*>calloc(len(blocks), sizeof(block_t))
        if self.block == NULL:
            raise MemoryError("no memory for the list of blocks")
        cdef network_t* net = &self.about
        cdef const matrix_t* first = &(<Matrix?>blocks[0][0][0]).about
        net.hidden, net.width, net.ffn = first.k, first.m, (<Matrix?>blocks[0][0][4]).about.m
        net.kv_heads, net.d, net.heads, net.kv_width = kv_heads, head_dim, first.m // head_dim, kv_heads * head_dim
        net.eps, net.offset, net.scale, net.kind = eps, offset, scale, ACTIVATIONS[activation]
        for matrices, norms, biases, head_norms, window, listed in blocks:
            self._fill(self.block + self.n, matrices, norms, biases, head_norms, window, listed)
            self.n += 1

    cdef int _fill(self, block_t* block, matrices, norms, biases, head_norms, window, ListedRows listed) except -1:
        cdef network_t* net = &self.about
        cdef matrix_t* a = block.attention
        cdef Py_ssize_t j
        q, k, v, o, gate, up, down = matrices
        self.held.extend(matrices)
        for j, matrix in enumerate((q, k, v, o)):
            a[j] = (<Matrix?>matrix).about
        block.gate, block.up, block.down = (<Matrix?>gate).about, (<Matrix?>up).about, (<Matrix?>down).about
        for j in range(MOST_TOGETHER):
            if a[j].k != a[0].k or a[j].block != a[0].block or a[j].build != a[0].build:
                raise ValueError("matrices that read the same token must have the same K and packing")
        if (a[0].m != net.width or a[0].k != net.hidden or net.heads * net.d != net.width or net.heads % net.kv_heads
                or a[1].m != net.kv_width or a[2].m != net.kv_width or a[3].k != net.width or a[3].m != net.hidden):
            raise ValueError(f"q, k, v and o must fit {net.kv_heads} heads of {net.d} keys, and those of other blocks, got "
                             f"{a[0].m}, {a[1].m} and {a[2].m} rows for {a[0].k} columns, and {a[3].m} for {a[3].k}")
        if (block.gate.k != net.hidden or block.gate.m != net.ffn or block.up.k != net.hidden or block.up.m != net.ffn
                or block.up.block != block.gate.block or block.up.rows != block.gate.rows
                or block.up.build != block.gate.build or block.down.k != net.ffn or block.down.m != net.hidden):
            raise ValueError("gate and up must have the same shape and packing, and down the transposed shape")
        block.norm = _vector(self.held, norms[0], "the norm", net.hidden)
        block.sub_norm = _vector(self.held, norms[1], "the inner norm", net.width)
        block.ffn_norm = _vector(self.held, norms[2], "the norm", net.hidden)
        block.ffn_sub_norm = _vector(self.held, norms[3], "the inner norm", net.ffn)
        for j in range(MOST_TOGETHER):
            block.bias[j] = _vector(self.held, None if biases is None else biases[j], "the bias", a[j].m)
        for j in range(2):
            block.head_norm[j] = _vector(self.held, None if head_norms is None else head_norms[j], "the norm of heads", net.d)
        block.window = 0 if window is None else max(1, window)
        block.listed = NULL
        if listed is not None:
            if listed.about.ffn != net.ffn or listed.about.k != net.hidden or net.kind != ACTIVATE_RELU2:
                raise ValueError("listed rows must be of this network, and its activation relu2")
            self.held.append(listed)
            block.listed = &listed.about
        return 0


cdef const float* _vector(list held, array, str name, Py_ssize_t size) except? NULL:
    # Its memory, which `held` keeps; NULL for None.
    if array is None:
        return NULL
    cdef _View a = _contiguous(array, float32, name, 1)
    if a.size(0) != size:
        raise ValueError(f"{name} must have shape ({size},), got {array.shape}")
    held.append(a)
    return <const float*>a.buffer.buf


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


cdef Py_ssize_t seen_by(const block_t* block, Py_ssize_t n) noexcept nogil:
    # Of n tokens, as many as the last one sees.
    return min(block.window, n) if block.window else n


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
    # The int8 values, and the tables on another cache line.
    return a.n_blocks * (a.block + (TABLE_BYTES if a.build != NULL else 0)) + 63


cdef struct work_t:
    # Memory of the activations of a block. Those of its two halves lie in one place.
    float* normed
    char* input
    float* target[MOST_TOGETHER]  # queries, keys and values as they are projected; attention overwrites the queries
    float* turned  # queries and keys after their rotation
    int* sums[MOST_TOGETHER]
    int* out_sums
    int* gate_sums
    int* up_sums
    float* gated
    int* down_sums
    char* listed


cdef Py_ssize_t take(Py_ssize_t* at, Py_ssize_t n_bytes) noexcept nogil:
    # The next n_bytes, on whole cache lines.
    cdef Py_ssize_t start = at[0]
    at[0] += (n_bytes + 63) // 64 * 64
    return start


cdef Py_ssize_t sums_bytes(const matrix_t* a) noexcept nogil:
    return a.n_tiles * a.rows * <Py_ssize_t>sizeof(int)


cdef Py_ssize_t lay_out(const network_t* net, const block_t* block, int n_threads, Py_ssize_t start,
                        work_t* to) noexcept nogil:
    # Pointers from the address `start` on, which begins a cache line; returns where they end.
    cdef Py_ssize_t at = start, halves, j
    to.normed = <float*>take(&at, 4 * max(net.hidden, net.width, net.ffn))
    to.input = <char*>take(&at, max(max(input_bytes(block.attention), input_bytes(block.attention + MOST_TOGETHER)),
                                    max(input_bytes(&block.gate), input_bytes(&block.down))))
    halves = at
    to.target[0] = <float*>take(&at, 4 * net.width)
    for j in range(1, MOST_TOGETHER):
        to.target[j] = <float*>take(&at, 4 * net.kv_width)
    to.turned = <float*>take(&at, 4 * (net.width + net.kv_width))
    for j in range(MOST_TOGETHER):
        to.sums[j] = <int*>take(&at, sums_bytes(block.attention + j))
    to.out_sums = <int*>take(&at, sums_bytes(block.attention + MOST_TOGETHER))
    cdef Py_ssize_t end = at
    at = halves
    to.gate_sums = <int*>take(&at, sums_bytes(&block.gate))
    to.up_sums = <int*>take(&at, sums_bytes(&block.up))
    to.gated = <float*>take(&at, 4 * net.ffn)
    to.down_sums = <int*>take(&at, sums_bytes(&block.down))
    to.listed = <char*>take(&at, 0 if block.listed == NULL else listed_bytes(block.listed, n_threads))
    return max(at, end)


cdef Py_ssize_t listed_bytes(const listed_t* listed, int n_threads) noexcept nogil:
    # A list and its sums; then a token of int8, or for each thread scratch and sums of a row; 63 to align those.
    cdef Py_ssize_t columns = listed.n_blocks * ROW_BLOCK
    return 8 * listed.ffn + max(columns, 8 * columns * n_threads) + 63


cdef enum:
    DONE
    NOT_FINITE
    NOT_HALF  # a key or value is beyond float16


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
        """Time that parts of `blocks` took since this was asked last, in ns, as a dict.

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

    cdef int _input(self, const float* x, const float* weight, const network_t* net, const work_t* work, const matrix_t* a,
                    input_t* out) noexcept nogil:
        # Norm, quantiser and tables. Returns 0 if a value is not finite.
        cdef signed char* x_q = <signed char*>work.input
        cdef Py_ssize_t padded = a.n_blocks * a.block, chunk, i
        cdef signed char* tables = x_q + padded + (-padded & 63)
        if not self.call.norm_quantize(x, weight, work.normed, x_q, &out.scale, &out.sum, a.k, net.eps, net.offset):
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

    def blocks(self, Blocks blocks, x, turns, sliding_turns, keys, values):
        """One token through all blocks: the residual stream behind the last; x float32 (1, hidden).

        A block is, with a = rms_norm(x, norms[0]), q, k and v = linear(a, ...) + biases, of which q and k pass the norm of
        heads, and are rotated; without the norms and biases that are None::

            x = x + linear(rms_norm(attention(q, keys, values), norms[1]), o)
            a = rms_norm(x, norms[2])
            x = x + linear(rms_norm(activate(linear(a, gate)) * linear(a, up), norms[3]), down)

        Parameters
        ----------
        x : float32 (1, hidden)
        turns, sliding_turns : cos and sin, each float32 (1, 1, D / 2)
            Of blocks without and with a window.
        keys, values : float32 or float16 (L, S, KV, D), of any strides but along D
            For each block those of the tokens before this one; its own are stored as the last row.

        Returns
        -------
        float32 (1, hidden)
        """
        cdef const network_t* net = &blocks.about
        cdef _View a = _contiguous(x, float32, "x", 2)
        cdef _View b = _View(keys, keys.dtype, "keys", 4, PyBUF_STRIDES | PyBUF_WRITABLE)
        cdef _View c = _View(values, keys.dtype, "values", 4, PyBUF_STRIDES | PyBUF_WRITABLE)
        cdef cache_t cache
        self._cache_of(keys, b, c, &cache)
        if b.size(0) != blocks.n or c.size(0) != blocks.n or cache.kv_heads != net.kv_heads or cache.d != net.d or cache.n < 1:
            raise ValueError(f"keys and values must have shape ({blocks.n}, S, {net.kv_heads}, {net.d}), got {keys.shape}")
        cdef Py_ssize_t half = net.d // 2, j, size = 0, longest = 0, scratch_size
        cdef const float* turn[4]
        held = []
        for j, turned in enumerate((*turns, *sliding_turns)):
            view = _contiguous(turned, float32, "cos and sin", 3)
            held.append(view)
            turn[j] = <const float*>(<_View>view).buffer.buf
            if (<_View>view).buffer.len != 4 * half:
                raise ValueError(f"cos and sin must have shape (1, 1, {half}), got {turned.shape}")
        if a.size(0) != 1 or a.size(1) != net.hidden:
            raise ValueError(f"x must have shape (1, {net.hidden}), got {x.shape}")
        y = np.empty((1, net.hidden), float32)
        cdef _View out = _View(y, float32, "y")
        cdef float* stream = <float*>out.buffer.buf
        memcpy(stream, a.buffer.buf, net.hidden * sizeof(float))
        cdef work_t work
        for j in range(blocks.n):
            size = max(size, lay_out(net, blocks.block + j, self.n_threads, 0, &work))
            longest = max(longest, seen_by(blocks.block + j, cache.n))
        cdef char* memory = <char*>malloc(size + 63)
        if memory == NULL:
            raise MemoryError("no memory for the activations of a layer")
        scratch_size = self._scratch_floats(1, longest, net.d)
        cdef float* scratch = <float*>malloc(scratch_size * sizeof(float))
        if scratch == NULL:
            free(memory)
            raise MemoryError("no memory for the scores of attention")
        cdef Py_ssize_t k_block = b.buffer.strides[0], v_block = c.buffer.strides[0]
        cdef const float** turn_of
        cdef int outcome = DONE
        with nogil:
            for j in range(blocks.n):
                lay_out(net, blocks.block + j, self.n_threads, <Py_ssize_t>memory + (-<Py_ssize_t>memory & 63), &work)
                turn_of = turn + (2 if blocks.block[j].window else 0)
                outcome = self._attention_half(net, blocks.block + j, &cache, turn_of[0], turn_of[1], &work, scratch, stream)
                if outcome == DONE:
                    outcome = self._network_half(net, blocks.block + j, &work, stream)
                if outcome != DONE:
                    break
                cache.keys += k_block
                cache.values += v_block
        free(memory)
        free(scratch)
        if outcome == NOT_HALF:
            raise ValueError(f"keys and values must be within {FLOAT16_MAX:,.0f} to be kept as float16, got larger ones")
        if outcome == NOT_FINITE:
            raise ValueError("x must be finite in float32, got NaN or infinity")
        return y

    cdef int _attention_half(self, const network_t* net, const block_t* block, const cache_t* cache, const float* cosine,
                             const float* sine, const work_t* work, float* scratch, float* stream) noexcept nogil:
        # Adds to the residual stream, where it lies.
        cdef Py_ssize_t i, j
        cdef input_t token
        cdef const float* heads
        cdef double start
        if not self._input(stream, block.norm, net, work, block.attention, &token):
            return NOT_FINITE
        self._project_shares(block.attention, MOST_TOGETHER, &token, <int**>work.sums, NULL, <float**>work.target)
        for j in range(MOST_TOGETHER):
            if block.bias[j] != NULL:
                for i in range(block.attention[j].m):
                    work.target[j][i] += block.bias[j][i]
        for j in range(2):
            heads = work.target[j]
            if block.head_norm[j] != NULL:
                for i in range(block.attention[j].m // net.d):
                    self.call.norm(heads + i * net.d, block.head_norm[j], work.normed + i * net.d, net.d, net.eps, net.offset)
                heads = work.normed
            self.call.rotate(heads, cosine, sine, work.turned + j * net.width, block.attention[j].m // net.d, net.d // 2)
        start = now_ns()
        if not store_last(cache, work.turned + net.width, work.target[2]):
            return NOT_HALF
        self._attend(work.turned, 1, net.heads, cache, seen_by(block, cache.n), net.scale, scratch, work.target[0])
        self.attention_ns += now_ns() - start
        if not self._input(work.target[0], block.sub_norm, net, work, block.attention + MOST_TOGETHER, &token):
            return NOT_FINITE
        self._project_shares(block.attention + MOST_TOGETHER, 1, &token, <int**>&work.out_sums, stream, &stream)
        return DONE

    cdef int _network_half(self, const network_t* net, const block_t* block, const work_t* work, float* stream) noexcept nogil:
        # Adds to the residual stream, where it lies.
        cdef input_t token
        cdef Py_ssize_t worker
        cdef double start
        if not self._input(stream, block.ffn_norm, net, work, &block.gate, &token):
            return NOT_FINITE
        start = now_ns()
        if block.listed == NULL or not self._gate_listed(block, &token, work):
            if self.n_threads == 1:
                self._gate_share(block, &token, 0, work, net.kind)
            else:
                for worker in prange(self.n_threads, num_threads=self.n_threads, schedule='static', chunksize=1):
                    self._gate_share(block, &token, worker, work, net.kind)
        self.product_ns += now_ns() - start
        if not self._input(work.gated, block.ffn_sub_norm, net, work, &block.down, &token):
            return NOT_FINITE
        if block.listed == NULL or not self._down_listed(block, &token, work, stream):
            self._project_shares(&block.down, 1, &token, <int**>&work.down_sums, stream, &stream)
        return DONE

    cdef void _project_shares(self, const matrix_t* about, Py_ssize_t n, const input_t* token, int** sums,
                              const float* added, float** target) noexcept nogil:
        cdef double start = now_ns()
        cdef Py_ssize_t worker
        if self.n_threads == 1:  # and no OpenMP: a team of one, too, costs 0.7 microseconds
            self._project_share(about, n, token, 0, sums, added, target)
        else:
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

    cdef void _gate_share(self, const block_t* block, const input_t* token, Py_ssize_t worker, const work_t* work,
                          int kind) noexcept nogil:
        cdef Py_ssize_t first, count
        if block.listed == NULL:  # else the sums of the gate are there
            self._share(&block.gate, token, worker, work.gate_sums, &first)
        count = self._share(&block.up, token, worker, work.up_sums, &first)
        if count > 0:
            self.call.gate(work.gate_sums + first, work.up_sums + first, work.gated + first, count,
                           token.scale * block.gate.scale, token.scale * block.up.scale, kind)

    cdef int _gate_listed(self, const block_t* block, const input_t* token, const work_t* work) noexcept nogil:
        # The gate, and if few of its values are positive the rows of up that they meet. Returns 0 if up is still to do.
        cdef listed_t* listed = block.listed
        cdef int* rows = <int*>work.listed
        cdef int* sums = rows + listed.ffn
        cdef signed char* x_q = <signed char*>(sums + listed.ffn)
        cdef float most = <float>(128 * block.up.k) * fabsf(token.scale * block.up.scale)  # in float32, where it may overflow
        cdef Py_ssize_t worker, n
        for worker in prange(self.n_threads, num_threads=self.n_threads, schedule='static', chunksize=1):
            self._gate_only(&block.gate, token, worker, work.gate_sums)
        n = list_positive(work.gate_sums, listed.ffn, token.scale * block.gate.scale, rows)
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
            self._up_rows(block, worker, rows, n, x_q, token, sums, work)
        return 1

    cdef void _gate_only(self, const matrix_t* gate, const input_t* token, Py_ssize_t worker, int* sums) noexcept nogil:
        cdef Py_ssize_t first
        self._share(gate, token, worker, sums, &first)

    cdef void _up_rows(self, const block_t* block, Py_ssize_t worker, const int* rows, Py_ssize_t n, const signed char* x_q,
                       const input_t* token, int* sums, const work_t* work) noexcept nogil:
        # One thread's part of the list, and the rows from its first up to the next part's.
        cdef const listed_t* listed = block.listed
        cdef Py_ssize_t start = n * worker // self.n_threads, end = n * (worker + 1) // self.n_threads, i
        cdef Py_ssize_t first = rows[start] if worker and start < n else (listed.ffn if worker else 0)
        cdef Py_ssize_t last = rows[end] if end < n else listed.ffn
        memset(work.up_sums + first, 0, (last - first) * sizeof(int))
        if end > start:
            listed.dot(listed.up, listed.stride, rows + start, end - start, x_q, listed.n_blocks, token.sum, sums + start)
        for i in range(start, end):
            work.up_sums[rows[i]] = sums[i]
        if last > first:
            self.call.gate(work.gate_sums + first, work.up_sums + first, work.gated + first, last - first,
                           token.scale * block.gate.scale, token.scale * block.up.scale, ACTIVATE_RELU2)

    cdef int _down_listed(self, const block_t* block, const input_t* token, const work_t* work, float* stream) noexcept nogil:
        # Adds the columns of down whose activation is not zero to the stream. Returns 0 if they are too many.
        cdef listed_t* listed = block.listed
        cdef int* rows = <int*>work.listed
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
            listed.add(listed.down, listed.stride, rows + n * worker // self.n_threads,
                       n * (worker + 1) // self.n_threads - n * worker // self.n_threads, token.x_q, listed.n_blocks,
                       sums + 2 * worker * size, sums + (2 * worker + 1) * size)
        for worker in range(1, self.n_threads):
            for j in range(listed.k):
                sums[size + j] += sums[(2 * worker + 1) * size + j]
        self.call.rescale_add(sums + size, stream, stream, listed.k, token.scale * block.down.scale)
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
        cdef const float* norm = _vector(held, weight, "weight", m)
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
        self.call.attend(q, 0, 1, heads, k + first * k_token, k_token, v + first * v_token, v_token, n - first, d, half, scale,
                         scratch, out)

    cdef int _cache_of(self, keys, _View b, _View c, cache_t* cache) except -1:
        # The last three axes are (S, KV, D); of one more, this is the first layer.
        cdef Py_ssize_t axis = b.buffer.ndim - 3
        if keys.dtype != float32 and keys.dtype != float16:
            raise TypeError(f"keys must be float32 or float16, got {keys.dtype}")
        cache.half = keys.dtype == float16
        cdef Py_ssize_t width = 2 if cache.half else 4
        if b.buffer.strides[axis + 2] != width or c.buffer.strides[axis + 2] != width:
            raise ValueError("the values of one head must lie side by side in keys and values")
        cache.keys, cache.values = <char*>b.buffer.buf, <char*>c.buffer.buf
        cache.n, cache.kv_heads, cache.d = b.size(axis), b.size(axis + 1), b.size(axis + 2)
        cache.k_token, cache.k_head = b.buffer.strides[axis], b.buffer.strides[axis + 1]
        cache.v_token, cache.v_head = c.buffer.strides[axis], c.buffer.strides[axis + 1]
        if (c.size(axis) != cache.n or c.size(axis + 1) != cache.kv_heads or c.size(axis + 2) != cache.d or not cache.kv_heads
                or not cache.d):
            raise ValueError(f"keys and values must have the same shape (S, KV, D), got {keys.shape[axis:]} and "
                             f"({c.size(axis)}, {c.size(axis + 1)}, {c.size(axis + 2)})")
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
        cdef float* scratch = <float*>malloc(self._scratch_floats(tokens, min(cache.n, seen), cache.d) * sizeof(float))
        if scratch == NULL:
            raise MemoryError("no memory for the scores of attention")
        with nogil:
            self._attend(queries, tokens, heads, &cache, seen, scale, scratch, target)
        free(scratch)
        return out

    cdef Py_ssize_t _scratch_floats(self, Py_ssize_t tokens, Py_ssize_t seen, Py_ssize_t d) noexcept nogil:
        return self.n_threads * STEP_ATTEND_SCRATCH(min(tokens, ATTEND_TOKENS), seen, d)

    cdef void _attend(self, const float* queries, Py_ssize_t tokens, Py_ssize_t heads, const cache_t* cache, Py_ssize_t seen,
                      float scale, float* scratch, float* target) noexcept nogil:
        cdef Py_ssize_t worker
        if self.n_threads == 1:
            self._attend_share(queries, tokens, heads, cache, seen, scale, 0, scratch, target)
        else:
            for worker in prange(self.n_threads, num_threads=self.n_threads, schedule='static', chunksize=1):
                self._attend_share(queries, tokens, heads, cache, seen, scale, worker, scratch, target)

    cdef void _attend_share(self, const float* queries, Py_ssize_t tokens, Py_ssize_t heads, const cache_t* cache,
                            Py_ssize_t seen, float scale, Py_ssize_t worker, float* scratch, float* target) noexcept nogil:
        cdef Py_ssize_t kv_heads = cache.kv_heads, d = cache.d, n = cache.n
        cdef Py_ssize_t group = heads // kv_heads, item = worker, t, head, half_group, count, first
        # Threads share the key/value heads of each token; those that are left over are cut in two, by their query heads.
        cdef Py_ssize_t items = tokens * kv_heads, whole = items
        if items % self.n_threads and group % 2 == 0:
            whole = items // self.n_threads * self.n_threads
        cdef Py_ssize_t total = whole + 2 * (items - whole)
        scratch += worker * STEP_ATTEND_SCRATCH(min(tokens, ATTEND_TOKENS), min(n, seen), d)
        # Tokens without a window share keys and values, if threads get some items each nevertheless.
        cdef Py_ssize_t together = min(ATTEND_TOKENS, items // (4 * self.n_threads))
        if tokens > 1 and together > 1 and seen >= n:
            items = (tokens + together - 1) // together * kv_heads
            while item < items:
                t, head = item // kv_heads * together, item % kv_heads
                count, first = min(together, tokens - t), t * heads + head * group
                self.call.attend(queries + first * d, heads * d, count, group, cache.keys + head * cache.k_head,
                                 cache.k_token, cache.values + head * cache.v_head, cache.v_token, n - tokens + t + count, d,
                                 cache.half, scale, scratch, target + first * d)
                item += self.n_threads
            return
        while item < total:  # interleaved, because later tokens see more
            half_group = (item - whole) % 2 if item >= whole else 0
            count = group // 2 if item >= whole else group
            t = whole + (item - whole) // 2 if item >= whole else item
            head = t % kv_heads
            first = t * group + half_group * count  # of the query heads of all tokens
            t = t // kv_heads
            self._attend_one(queries + first * d, count, cache.keys + head * cache.k_head, cache.k_token,
                             cache.values + head * cache.v_head, cache.v_token, n - tokens + t + 1, seen, d, cache.half,
                             scale, scratch, target + first * d)
            item += self.n_threads

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

    def grouped_rows(self, data, str type_name, Py_ssize_t vocabulary, rows):
        """As reference.head.GroupedTable of V rows, indexed by int64 of shape (n,): float32 (n, K)."""
        cdef int kind
        cdef Py_ssize_t block, block_bytes, i
        kind, block, block_bytes = TABLES.get(type_name, (0, 0, 0))
        if block <= 1:
            raise ValueError(f"the type of grouped rows must be Q8_0, Q6_K or Q4_0, got {type_name!r}")
        cdef _View w = _contiguous(data, uint8, "data", 2), a = _contiguous(rows, int64, "rows", 1)
        cdef Py_ssize_t n = a.size(0), k = w.size(1) // (GROUP_ROWS * block_bytes) * block
        if w.size(1) != GROUP_ROWS * (k // block * block_bytes) or w.size(0) != (vocabulary + GROUP_ROWS - 1) // GROUP_ROWS:
            raise ValueError(f"{vocabulary} grouped rows must have a group of whole blocks for each {GROUP_ROWS} rows, got "
                             f"shape {data.shape}")
        cdef const long long* index = <const long long*>a.buffer.buf
        for i in range(n):
            if not 0 <= index[i] < vocabulary:
                raise IndexError(f"rows must lie between 0 and {vocabulary - 1}, got {index[i]}")
        y = np.empty((n, k), float32)
        cdef _View out = _View(y, float32, "y")
        cdef const unsigned char* table = <const unsigned char*>w.buffer.buf
        cdef float* target = <float*>out.buffer.buf
        with nogil:
            for i in range(n):
                head_decode_row(table + index[i] // GROUP_ROWS * w.buffer.shape[1], index[i] % GROUP_ROWS, k, kind,
                                target + i * k)
        return y

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
