"""The element-wise steps of decoding and the output head: shapes, memory and threads around the loops of decoder_steps.h.

Arguments are those of bitnet_ref/reference/{norm,rope,mlp,attention,head}.py. Each output value is computed by one
thread, so results do not depend on how many there are. Compiled with baseline flags; the loops come in a capsule.
"""

from cpython.buffer cimport PyBUF_ND, PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.pycapsule cimport PyCapsule_GetPointer
from cython.parallel cimport prange
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

import numpy as np

cdef extern from "decoder_steps.h" nogil:
    ctypedef struct decoder_steps:
        void (*norm)(const float* x, const float* weight, float* y, Py_ssize_t k, float eps, float offset) noexcept nogil
        int (*quantize)(const float* x, signed char* x_q, float* x_scale, Py_ssize_t k) noexcept nogil
        void (*rescale)(const int* sums, float* y, Py_ssize_t m, float scale) noexcept nogil
        void (*rotate)(const float* x, const float* cosine, const float* sine, float* y, Py_ssize_t heads,
                    Py_ssize_t half) noexcept nogil
        void (*activate)(const float* x, float* y, Py_ssize_t n, int kind) noexcept nogil
        void (*attend)(const float* q, Py_ssize_t heads, const char* k, Py_ssize_t k_stride, const char* v,
                    Py_ssize_t v_stride, Py_ssize_t n, Py_ssize_t d, int half, double scale, double* scratch,
                    float* out) noexcept nogil
        void (*head)(const unsigned char* w, Py_ssize_t row_bytes, Py_ssize_t rows, const float* x, Py_ssize_t x_stride,
                  Py_ssize_t tokens, Py_ssize_t k, float* out, Py_ssize_t out_stride, int type) noexcept nogil
        int (*head_prepare)(const float* x, Py_ssize_t k, int type, char* token) noexcept nogil
        void (*head_integer)(const unsigned char* w, Py_ssize_t row_bytes, Py_ssize_t rows, const char* x,
                  Py_ssize_t tokens, Py_ssize_t k, float* out, Py_ssize_t out_stride, int type, char* scratch) noexcept nogil
    Py_ssize_t STEP_ATTEND_SCRATCH(Py_ssize_t n, Py_ssize_t d)
    int ACTIVATE_RELU2, ACTIVATE_SILU, ACTIVATE_GELU_TANH
    Py_ssize_t HEAD_TOKEN_BYTES(Py_ssize_t k)
    Py_ssize_t HEAD_SCRATCH_BYTES(Py_ssize_t k)
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


cdef class Steps:
    """The compiled steps of one instruction set, on a number of threads.

    Parameters
    ----------
    capsule : the ``STEPS`` of a module ``steps__<isa>``
    n_threads : int
    """

    cdef const decoder_steps* call
    cdef int n_threads

    def __init__(self, capsule, int n_threads):
        self.call = <const decoder_steps*>PyCapsule_GetPointer(capsule, b"bitnet_ref.steps/1")
        self.n_threads = n_threads

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
        """float32(sums) * (x_scale * w_scale) for int32 sums of shape (T, M); x_scale float32 of shape (T, 1)."""
        cdef _View a = _contiguous(sums, int32, "sums", 2), s = _contiguous(x_scale, float32, "x_scale", 2)
        cdef Py_ssize_t rows = a.size(0), m = a.size(1), t
        if s.size(0) != rows or s.size(1) != 1:
            raise ValueError(f"x_scale must have shape ({rows}, 1), got {x_scale.shape}")
        y = np.empty((rows, m), float32)
        cdef _View b = _View(y, float32, "y")
        cdef const int* source = <const int*>a.buffer.buf
        cdef const float* scale = <const float*>s.buffer.buf
        cdef float* target = <float*>b.buffer.buf
        if rows == 1:
            self.call.rescale(source, target, m, scale[0] * w_scale)
            return y
        for t in prange(rows, nogil=True, num_threads=self.n_threads, schedule='static'):
            self.call.rescale(source + t * m, target + t * m, m, scale[t] * w_scale)
        return y

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

    def attention(self, q, k, v, double scale, window=None):
        """As reference.attention.attention; k and v float32 or float16, of any strides but along D."""
        cdef _View a = _contiguous(q, float32, "q", 3)
        if k.dtype != float32 and k.dtype != float16:
            raise TypeError(f"k must be float32 or float16, got {k.dtype}")
        cdef _View b = _View(k, k.dtype, "k", 3, PyBUF_STRIDES), c = _View(v, k.dtype, "v", 3, PyBUF_STRIDES)
        cdef Py_ssize_t tokens = a.size(0), heads = a.size(1), d = a.size(2), n = b.size(0), kv_heads = b.size(1)
        if k.shape != v.shape or b.size(2) != d or kv_heads == 0 or heads % kv_heads or n < tokens:
            raise ValueError(f"k and v must have shape (S, KV, D) for q of shape {q.shape}, got {k.shape}, {v.shape}")
        cdef int half = k.dtype == float16
        cdef Py_ssize_t width = 2 if half else 4
        if b.buffer.strides[2] != width or c.buffer.strides[2] != width:
            raise ValueError("the values of one head must lie side by side in k and v")
        cdef Py_ssize_t seen = n if window is None else max(1, window)
        out = np.empty(q.shape, float32)
        cdef _View o = _View(out, float32, "out")
        cdef Py_ssize_t group = heads // kv_heads, split = 1, item, t, head, part, first, last, parts
        cdef int n_threads = self.n_threads
        # Threads share the key/value heads of each token; the query heads of one are cut in two where that fills them.
        if tokens * kv_heads % n_threads and group % 2 == 0:
            split = 2
        parts = kv_heads * split
        group //= split
        cdef Py_ssize_t scratch_size = STEP_ATTEND_SCRATCH(min(n, seen), d)
        cdef double* scratch = <double*>malloc(n_threads * scratch_size * sizeof(double))
        if scratch == NULL:
            raise MemoryError("no memory for the scores of attention")
        cdef const float* queries = <const float*>a.buffer.buf
        cdef const char* keys = <const char*>b.buffer.buf
        cdef const char* values = <const char*>c.buffer.buf
        cdef float* target = <float*>o.buffer.buf
        cdef Py_ssize_t k_token = b.buffer.strides[0], k_head = b.buffer.strides[1]
        cdef Py_ssize_t v_token = c.buffer.strides[0], v_head = c.buffer.strides[1]
        cdef Py_ssize_t worker, total = tokens * parts
        with nogil:
            for worker in prange(n_threads, num_threads=n_threads, schedule='static', chunksize=1):
                # Interleaved, because later tokens see more.
                item = worker
                while item < total:
                    t = item // parts
                    head = item % parts // split
                    last = n - tokens + t + 1
                    first = last - seen if last > seen else 0
                    self.call.attend(queries + (t * parts + item % parts) * group * d, group,
                                     keys + first * k_token + head * k_head, k_token,
                                     values + first * v_token + head * v_head, v_token,
                                     last - first, d, half, scale, scratch + worker * scratch_size,
                                     target + (t * parts + item % parts) * group * d)
                    item = item + n_threads
        free(scratch)
        return out

    def head(self, x, raw, str type_name):
        """As reference.head.head_logits: x float32 (T, K) times the rows of a stored table, uint8 (V, row bytes)."""
        if type_name not in TABLES:
            raise ValueError(f"the type of a head must be one of {', '.join(TABLES)}, got {type_name!r}")
        cdef int kind
        cdef Py_ssize_t block, block_bytes
        kind, block, block_bytes = TABLES[type_name]
        cdef _View a = _contiguous(x, float32, "x", 2), w = _contiguous(raw, uint8, "raw", 2)
        cdef Py_ssize_t tokens = a.size(0), k = a.size(1), vocabulary = w.size(0), row_bytes = w.size(1), t, i, first
        cdef Py_ssize_t padded = (k + 15) // 16 * 16
        if k % block or row_bytes != k // block * block_bytes:
            raise ValueError(f"rows of {k} {type_name} values must have {k // block * block_bytes} bytes, "
                             f"got {row_bytes}")
        out = np.empty((tokens, vocabulary), float32)
        cdef _View o = _View(out, float32, "out")
        if block > 1:
            self._integer_head(a, w, o, kind)
            return out
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

    cdef int _integer_head(self, _View x, _View w, _View out, int kind) except -1:
        cdef Py_ssize_t tokens = x.size(0), k = x.size(1), vocabulary = w.size(0), row_bytes = w.size(1), t, i, first, last
        cdef Py_ssize_t token_bytes = HEAD_TOKEN_BYTES(k), scratch_bytes = HEAD_SCRATCH_BYTES(k)
        cdef int n_threads = self.n_threads, bad = 0
        cdef char* prepared = <char*>malloc(tokens * token_bytes + n_threads * scratch_bytes + 63)
        if prepared == NULL:
            raise MemoryError("no memory for the activations of a head")
        cdef char* scratch = prepared + (-<Py_ssize_t>prepared & 63)
        cdef char* token = scratch + n_threads * scratch_bytes
        cdef const float* source = <const float*>x.buffer.buf
        cdef const unsigned char* table = <const unsigned char*>w.buffer.buf
        cdef float* target = <float*>out.buffer.buf
        with nogil:
            for t in range(tokens):
                bad += not self.call.head_prepare(source + t * k, k, kind, token + t * token_bytes)
            if not bad:
                for i in prange(n_threads, num_threads=n_threads, schedule='static', chunksize=1):
                    first = vocabulary * i // n_threads
                    last = vocabulary * (i + 1) // n_threads
                    self.call.head_integer(table + first * row_bytes, row_bytes, last - first, token, tokens, k,
                                           target + first, vocabulary, kind, scratch + i * scratch_bytes)
        free(prepared)
        if bad:
            raise ValueError("x must be finite in float32, got NaN or infinity")
        return 0
