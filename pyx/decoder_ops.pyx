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
    cdef double product_ns

    def __init__(self, capsule, int n_threads):
        self.call = <const decoder_steps*>PyCapsule_GetPointer(capsule, b"bitnet_ref.steps/3")
        self.n_threads = n_threads

    def take_product_ns(self):
        """Time that products inside of `project` and `feed_forward` took since this was asked last, in ns.

        With them the rescaling of their sums and the gate, which the same threads do.
        """
        taken, self.product_ns = self.product_ns, 0
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

    def project(self, x, weight, float eps, float offset, tuple matrices, residual=None):
        """One token through a norm and the linear layers that read it: [linear(rms_norm(x), matrix) for each matrix].

        Parameters
        ----------
        x : float32 (1, K)
        weight : float32 (K,) or None
            Of the norm; none without.
        matrices : tuple of one to three Matrix of K columns and one packing
        residual : float32 (1, M), optional
            Added to the result of the only matrix.

        Returns
        -------
        tuple of float32 (1, M)
        """
        cdef matrix_t about[MOST_TOGETHER]
        cdef float* target[MOST_TOGETHER]
        cdef int* sums[MOST_TOGETHER]
        cdef Py_ssize_t n = len(matrices), j, size = 0
        cdef _View a = _contiguous(x, float32, "x", 2), w = None, r = None
        if not 1 <= n <= MOST_TOGETHER or residual is not None and n > 1:
            raise ValueError(f"one to {MOST_TOGETHER} matrices read a token, one with a residual, got {n}")
        out, views = [], []
        for j in range(n):
            about[j] = (<Matrix?>matrices[j]).about
            if about[j].k != about[0].k or about[j].block != about[0].block or about[j].build != about[0].build:
                raise ValueError("matrices that read the same token must have the same K and packing")
            out.append(np.empty((1, about[j].m), float32))
            views.append(_View(out[j], float32, "y"))
            target[j] = <float*>(<_View>views[j]).buffer.buf
            size += about[j].n_tiles * about[j].rows
        cdef Py_ssize_t k = about[0].k
        if a.size(0) != 1 or a.size(1) != k:
            raise ValueError(f"x must have shape (1, {k}), got {x.shape}")
        cdef const float* norm = NULL
        cdef const float* added = NULL
        if weight is not None:
            w = _contiguous(weight, float32, "weight", 1)
            if w.size(0) != k:
                raise ValueError(f"weight must have shape ({k},), got {weight.shape}")
            norm = <const float*>w.buffer.buf
        if residual is not None:
            r = _contiguous(residual, float32, "residual", 2)
            if r.size(0) != 1 or r.size(1) != about[0].m:
                raise ValueError(f"residual must have shape (1, {about[0].m}), got {residual.shape}")
            added = <const float*>r.buffer.buf
        cdef char* memory = <char*>malloc(4 * (k + size) + input_bytes(about))
        if memory == NULL:
            raise MemoryError("no memory for the activations of a layer")
        cdef float* normed = <float*>memory
        sums[0] = <int*>memory + k
        for j in range(1, n):
            sums[j] = sums[j - 1] + about[j - 1].n_tiles * about[j - 1].rows
        cdef const float* source = <const float*>a.buffer.buf
        cdef input_t token
        cdef int finite
        with nogil:
            finite = self._input(source, norm, eps, offset, normed, about, memory + 4 * (k + size), &token)
            if finite:
                self._project_shares(about, n, &token, sums, added, target)
        free(memory)
        if not finite:
            raise ValueError("x must be finite in float32, got NaN or infinity")
        return tuple(out)

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

    cdef void _attend_one(self, const float* q, Py_ssize_t heads, const char* k, Py_ssize_t k_token, const char* v,
                          Py_ssize_t v_token, Py_ssize_t n, Py_ssize_t seen, Py_ssize_t d, int half, float scale,
                          float* scratch, float* out) noexcept nogil:
        # The last `seen` of n tokens.
        cdef Py_ssize_t first = n - seen if n > seen else 0
        self.call.attend(q, heads, k + first * k_token, k_token, v + first * v_token, v_token, n - first, d, half, scale,
                         scratch, out)

    def attention(self, q, k, v, float scale, window=None):
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
            raise MemoryError("no memory for the scores of attention")
        cdef const float* queries = <const float*>a.buffer.buf
        cdef const char* keys = <const char*>b.buffer.buf
        cdef const char* values = <const char*>c.buffer.buf
        cdef float* target = <float*>o.buffer.buf
        cdef Py_ssize_t k_token = b.buffer.strides[0], k_head = b.buffer.strides[1]
        cdef Py_ssize_t v_token = c.buffer.strides[0], v_head = c.buffer.strides[1]
        cdef Py_ssize_t worker
        with nogil:
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
                    self._attend_one(queries + first * d, count, keys + head * k_head, k_token, values + head * v_head,
                                     v_token, n - tokens + t + 1, seen, d, half, scale, scratch + worker * scratch_size,
                                     target + first * d)
                    item = item + n_threads
        free(scratch)
        return out

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
