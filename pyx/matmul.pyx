"""One entry point for every kernel: padding, activation sums, lookup tables, threads, the last partial tile.

The arguments have been checked in bitnet_ref/kernels.py; shapes here are trusted. Results do not depend on the number of
threads: each output is computed by one thread, in int32.
"""

from cpython.pycapsule cimport PyCapsule_GetPointer
from cython.parallel cimport prange
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cimport numpy as cnp
from kernel_abi cimport lut_t, matmul_t

cnp.import_array()

cdef extern from *:
    """
    #include <stddef.h>
    #ifdef __SSE2__
    #include <emmintrin.h>
    #endif
    /* The sum of n int8 values. Baseline SSE2 adds eight of them in one instruction, as distances of v + 128 from 0. */
    static int sum_int8(const signed char *x, ptrdiff_t n) {
        ptrdiff_t k = 0;
        int sum = 0;
    #ifdef __SSE2__
        const __m128i flip = _mm_set1_epi8((char)-128), zero = _mm_setzero_si128();
        __m128i s = zero, s1 = zero;
        for (; k + 32 <= n; k += 32) {
            s = _mm_add_epi64(s, _mm_sad_epu8(_mm_xor_si128(_mm_loadu_si128((const __m128i *)(x + k)), flip), zero));
            s1 = _mm_add_epi64(s1, _mm_sad_epu8(_mm_xor_si128(_mm_loadu_si128((const __m128i *)(x + k + 16)), flip), zero));
        }
        s = _mm_add_epi64(s, s1);
        sum = _mm_cvtsi128_si32(s) + _mm_cvtsi128_si32(_mm_unpackhi_epi64(s, s)) - 128 * (int)k;
    #endif
        for (; k < n; k++)
            sum += x[k];
        return sum;
    }
    """
    int sum_int8(const signed char* x, Py_ssize_t n) noexcept nogil

# Columns that a kernel is given at once; longer rows are cut. Multiply-add kernels keep sums of up to 242 * 128 per column in
# int32 (interleaved_rows.pyx.j2), and the tables of one token then take at most 1 MiB.
SEGMENT_COLUMNS = 65536
cdef Py_ssize_t SEGMENT = SEGMENT_COLUMNS
# Bytes of operands (activations, or tables) that a pass over the weights works on. Tables are read at random places and should
# stay in a second-level cache; activations are read in order, and each pass decodes the weights anew.
cdef Py_ssize_t OPERAND_BYTES = 1048576
cdef Py_ssize_t LUT_BYTES = 262144
# A thread's share is whole panels of tiles (panel_rows.pyx.j2) where there are many tokens, if every thread gets some. A tile of
# 64 rows is a panel by itself (panel_indices.pyx.j2).
cdef Py_ssize_t PANEL_TILES = 16
cdef Py_ssize_t TABLE_BYTES = 256  # of one block: eight lookups of 32 bytes


cdef void run_tiles(matmul_t kernel, const unsigned char* w, Py_ssize_t w_stride,
                    const signed char* x, Py_ssize_t x_stride, const int* x_sums, int* out, Py_ssize_t out_stride,
                    Py_ssize_t rows, Py_ssize_t m, Py_ssize_t first, Py_ssize_t last, Py_ssize_t n_blocks,
                    Py_ssize_t n_tokens, int* scratch) noexcept nogil:
    # Tiles first..last-1. A tile that reaches past row m goes through scratch, so that out is never overrun.
    cdef Py_ssize_t whole = min(last, m // rows)
    cdef Py_ssize_t t
    if whole > first:
        kernel(w + first * w_stride, w_stride, x, x_stride, x_sums, out + first * rows, out_stride,
               whole - first, n_blocks, n_tokens)
    if last * rows > m:
        kernel(w + (last - 1) * w_stride, w_stride, x, x_stride, x_sums, scratch, rows, 1, n_blocks, n_tokens)
        for t in range(n_tokens):
            memcpy(out + t * out_stride + (last - 1) * rows, scratch + t * rows, (m - (last - 1) * rows) * sizeof(int))


cdef int run(matmul_t kernel, lut_t build, const unsigned char* w, Py_ssize_t w_stride, Py_ssize_t m,
             const signed char* x, Py_ssize_t x_stride, Py_ssize_t n_tokens, int* out, Py_ssize_t out_stride,
             Py_ssize_t rows, Py_ssize_t block, Py_ssize_t n_blocks, int n_threads) except -1 nogil:
    # One segment: n_blocks whole blocks of every row.
    cdef Py_ssize_t n_tiles = (m + rows - 1) // rows
    cdef Py_ssize_t operand = n_blocks * (TABLE_BYTES if build != NULL else block)
    cdef Py_ssize_t batch = max(4, (LUT_BYTES if build != NULL else OPERAND_BYTES) // operand // 4 * 4)
    cdef Py_ssize_t unit = PANEL_TILES if n_tokens > 1 and rows < 64 and n_tiles >= 2 * PANEL_TILES * n_threads else 1
    cdef Py_ssize_t i, t, count, chunk
    cdef int n_parts = <int>min(<Py_ssize_t>n_threads, n_tiles)
    cdef int* sums = NULL
    cdef int* scratch = NULL
    cdef signed char* tables = NULL
    if batch > n_tokens:
        batch = n_tokens
    sums = <int*>malloc(n_tokens * sizeof(int))
    scratch = <int*>malloc(batch * rows * sizeof(int))
    if build != NULL:
        # 63 spare bytes let the first table start on a cache line.
        tables = <signed char*>malloc(batch * operand + 63)
    if sums == NULL or scratch == NULL or (build != NULL and tables == NULL):
        free(sums)
        free(scratch)
        free(tables)
        with gil:
            raise MemoryError("no memory for the work buffers of a matrix product")
    cdef signed char* aligned = tables + (-<Py_ssize_t>tables & 63)
    if build == NULL:
        if n_tokens == 1:
            sums[0] = sum_int8(x, n_blocks * block)
        else:
            for t in prange(n_tokens, num_threads=n_threads, schedule='static'):
                sums[t] = sum_int8(x + t * x_stride, n_blocks * block)
    t = 0
    while t < n_tokens:
        count = min(batch, n_tokens - t)
        if build != NULL and n_threads == 1:
            for i in range(count):
                build(x + (t + i) * x_stride, aligned + i * operand, n_blocks)
        elif build != NULL:
            # Every thread builds its share of the blocks, for each token of the batch.
            chunk = (n_blocks + n_threads - 1) // n_threads
            for i in prange(count * n_threads, num_threads=n_threads, schedule='static'):
                if i % n_threads * chunk < n_blocks:
                    build(x + (t + i // n_threads) * x_stride + i % n_threads * chunk * block,
                          aligned + i // n_threads * operand + i % n_threads * chunk * TABLE_BYTES,
                          min(chunk, n_blocks - i % n_threads * chunk))
        if n_parts == 1:  # and no OpenMP: a team of one, too, costs 0.7 microseconds
            run_tiles(kernel, w, w_stride,
                      <const signed char*>aligned if build != NULL else x + t * x_stride,
                      operand if build != NULL else x_stride,
                      sums + t, out + t * out_stride, out_stride, rows, m, 0, n_tiles, n_blocks, count, scratch)
        else:
            for i in prange(n_parts, num_threads=n_parts, schedule='static', chunksize=1):
                # One contiguous run of tiles per thread: the order in which the prefetcher reads best.
                run_tiles(kernel, w, w_stride,
                          <const signed char*>aligned if build != NULL else x + t * x_stride,
                          operand if build != NULL else x_stride,
                          sums + t, out + t * out_stride, out_stride, rows, m,
                          n_tiles * i // n_parts // unit * unit,
                          n_tiles if i + 1 == n_parts else n_tiles * (i + 1) // n_parts // unit * unit,
                          n_blocks, count, scratch)
        t += count
    free(sums)
    free(scratch)
    free(tables)
    return 0


def matmul(kernel, lut, cnp.ndarray w, Py_ssize_t m, Py_ssize_t k, cnp.ndarray x, cnp.ndarray out,
           Py_ssize_t rows, Py_ssize_t block, Py_ssize_t block_bytes, int n_threads):
    """out (T, M) int32 = x (T, K) int8 times the transpose of the packed (M, K) matrix.

    kernel, lut : capsules of a compiled variant; lut is None for multiply-add schemes
    w, x, out : C-contiguous arrays of uint8, int8 and int32. They are taken by address, and x and out may have any number of
        leading dimensions: a memoryview of each, or a reshape, would cost a small product a tenth of its time.
    w : packed tiles, one a row; a tile has ``rows`` rows, a block ``block`` columns and ``block_bytes`` bytes
    """
    cdef matmul_t call = <matmul_t>PyCapsule_GetPointer(kernel, b"bitnet_ref.matmul/1")
    cdef lut_t build = NULL
    if lut is not None:
        build = <lut_t>PyCapsule_GetPointer(lut, b"bitnet_ref.lut/1")
    cdef const unsigned char* weights = <const unsigned char*>cnp.PyArray_DATA(w)
    cdef Py_ssize_t w_stride = w.shape[1]
    cdef int* sums = <int*>cnp.PyArray_DATA(out)
    cdef Py_ssize_t n_tokens = cnp.PyArray_SIZE(x) // k, n_blocks = (k + block - 1) // block, padded = n_blocks * block
    cdef Py_ssize_t segment = SEGMENT // block
    cdef Py_ssize_t first, i, t, count
    cdef signed char* copy = NULL
    cdef int* partial = NULL
    cdef const signed char* activations = <const signed char*>cnp.PyArray_DATA(x)
    if n_tokens == 0:
        return
    with nogil:
        if padded != k:
            copy = <signed char*>malloc(n_tokens * padded)
            if copy == NULL:
                with gil:
                    raise MemoryError("no memory for padded activations")
            for t in range(n_tokens):
                memcpy(copy + t * padded, activations + t * k, k)
                memset(copy + t * padded + k, 0, padded - k)
            activations = copy
        try:
            count = min(segment, n_blocks)
            run(call, build, weights, w_stride, m, activations, padded, n_tokens, sums, m,
                rows, block, count, n_threads)
            if count < n_blocks:
                partial = <int*>malloc(n_tokens * m * sizeof(int))
                if partial == NULL:
                    with gil:
                        raise MemoryError("no memory for the partial sums of a long row")
                first = count
                while first < n_blocks:
                    count = min(segment, n_blocks - first)
                    run(call, build, weights + first * block_bytes, w_stride, m, activations + first * block, padded,
                        n_tokens, partial, m, rows, block, count, n_threads)
                    for i in range(n_tokens * m):
                        sums[i] += partial[i]
                    first += count
        finally:
            free(copy)
            free(partial)


def build_tables(lut, const signed char[::1] x, signed char[::1] tables, Py_ssize_t block):
    """Run a table builder alone: x holds whole blocks, tables 256 bytes for each."""
    cdef lut_t build = <lut_t>PyCapsule_GetPointer(lut, b"bitnet_ref.lut/1")
    build(&x[0], &tables[0], x.shape[0] // block)
