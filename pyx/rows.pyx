"""The caller of the kernels that read single rows: threads, and the sums of threads that share a sum.

The arguments have been checked in bitnet_ref/kernels.py; shapes here are trusted. Results do not depend on the number of
threads: sums are int32, exact in any order.
"""

from cpython.pycapsule cimport PyCapsule_GetPointer
from cython.parallel cimport prange
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cimport numpy as cnp
from kernel_abi cimport add_rows_t, dot_rows_t

cnp.import_array()

cdef Py_ssize_t BLOCK = 320
cdef Py_ssize_t LEAST = 16  # rows for a thread: fewer are done before another has started


cdef int parts(Py_ssize_t n_rows, int n_threads) noexcept nogil:
    return <int>max(1, min(<Py_ssize_t>n_threads, n_rows // LEAST))


def dot_rows(kernel, cnp.ndarray w, cnp.ndarray rows, cnp.ndarray x, cnp.ndarray out, int n_threads):
    """out[i] = row rows[i] of w times x; every thread takes a run of the list.

    w : (M, stride) uint8; rows : (n,) int32; x : (K,) int8, K <= 65,536; out : (n,) int32; all C-contiguous
    """
    cdef dot_rows_t call = <dot_rows_t>PyCapsule_GetPointer(kernel, b"bitnet_ref.dotrows/1")
    cdef const unsigned char* weights = <const unsigned char*>cnp.PyArray_DATA(w)
    cdef const int* listed = <const int*>cnp.PyArray_DATA(rows)
    cdef const signed char* acts = <const signed char*>cnp.PyArray_DATA(x)
    cdef int* sums = <int*>cnp.PyArray_DATA(out)
    cdef Py_ssize_t stride = w.shape[1], n = rows.shape[0], k = x.shape[0], n_blocks = (k + BLOCK - 1) // BLOCK, j
    cdef int x_sum = 0, n_parts = parts(n, n_threads), i
    cdef signed char* buffer
    cdef signed char* aligned
    with nogil:
        for j in range(k):
            x_sum += acts[j]
        # On a cache line: a row costs five loads of activations for one of weights, and each would straddle two lines.
        buffer = <signed char*>malloc(n_blocks * BLOCK + 63)
        if buffer == NULL:
            with gil:
                raise MemoryError("no memory for aligned activations")
        aligned = buffer + (-<Py_ssize_t>buffer & 63)
        memcpy(aligned, acts, k)
        memset(aligned + k, 0, n_blocks * BLOCK - k)
        if n_parts == 1:
            call(weights, stride, listed, n, aligned, n_blocks, x_sum, sums)
        else:
            for i in prange(n_parts, num_threads=n_parts, schedule='static', chunksize=1):
                call(weights, stride, listed + n * i // n_parts, n * (i + 1) // n_parts - n * i // n_parts, aligned,
                     n_blocks, x_sum, sums + n * i // n_parts)
        free(buffer)


def add_rows(kernel, cnp.ndarray w, cnp.ndarray rows, cnp.ndarray x, cnp.ndarray out, int n_threads):
    """out = sum of the listed rows of w, each times its x; every thread adds up a run of the list.

    w : (M, stride) uint8; rows : (n,) int32, n <= 65,536; x : (M,) int8; out : (K,) int32; all C-contiguous
    """
    cdef add_rows_t call = <add_rows_t>PyCapsule_GetPointer(kernel, b"bitnet_ref.addrows/1")
    cdef const unsigned char* weights = <const unsigned char*>cnp.PyArray_DATA(w)
    cdef const int* listed = <const int*>cnp.PyArray_DATA(rows)
    cdef const signed char* acts = <const signed char*>cnp.PyArray_DATA(x)
    cdef int* target = <int*>cnp.PyArray_DATA(out)
    cdef Py_ssize_t stride = w.shape[1], n = rows.shape[0], k = out.shape[0], n_blocks = (k + BLOCK - 1) // BLOCK, j
    cdef Py_ssize_t n_sums = n_blocks * BLOCK
    cdef int n_parts = parts(n, n_threads), i
    cdef int* buffer
    cdef int* aligned
    with nogil:
        # Each part has its scratch and its sums; they start on a cache line, with 15 spare ints for the first.
        buffer = <int*>malloc((2 * n_parts * n_sums + 15) * sizeof(int))
        if buffer == NULL:
            with gil:
                raise MemoryError("no memory for the sums of a product")
        aligned = <int*>(<char*>buffer + (-<Py_ssize_t>buffer & 63))
        for i in prange(n_parts, num_threads=n_parts, schedule='static', chunksize=1):
            call(weights, stride, listed + n * i // n_parts, n * (i + 1) // n_parts - n * i // n_parts, acts, n_blocks,
                 aligned + 2 * i * n_sums, aligned + (2 * i + 1) * n_sums)
        memcpy(target, aligned + n_sums, k * sizeof(int))
        for i in range(1, n_parts):
            for j in range(k):
                target[j] += aligned[(2 * i + 1) * n_sums + j]
        free(buffer)
