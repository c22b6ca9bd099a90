"""The machine's own limits, measured: streaming reads, and int8 multiply-adds. Compiled with baseline flags."""

from cpython.pycapsule cimport PyCapsule_GetPointer
from cython.parallel cimport prange
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from kernel_abi cimport peak_t

cdef extern from *:
    """
    #include <stddef.h>
    /* Eight independent sums, so that neither a dependency chain nor the loop itself is the limit. */
    static unsigned long long read_words(const unsigned long long *p, ptrdiff_t n) {
        unsigned long long s[8] = {0};
        for (ptrdiff_t i = 0; i + 8 <= n; i += 8)
            for (int j = 0; j < 8; j++)
                s[j] += p[i + j];
        return s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
    }
    """
    unsigned long long read_words(const unsigned long long* p, Py_ssize_t n) noexcept nogil


def read_all(const unsigned long long[::1] words, int n_threads):
    """Read every 64-byte line of ``words`` (a multiple of 8 of them) once and return the sum modulo 2^64."""
    cdef Py_ssize_t lines = words.shape[0] // 8
    cdef unsigned long long total = 0
    cdef Py_ssize_t i
    if lines * 8 != words.shape[0] or lines == 0:
        raise ValueError(f"words must hold a positive multiple of 8 values, got {words.shape[0]}")
    for i in prange(n_threads, nogil=True, num_threads=n_threads, schedule='static', chunksize=1):
        total += read_words(&words[0] + lines * i // n_threads * 8,
                            (lines * (i + 1) // n_threads - lines * i // n_threads) * 8)
    return total


def multiply_adds(probe, Py_ssize_t n_steps, int n_threads):
    """Run a ``peak`` probe on every thread and return how many int8 multiply-adds all of them did together."""
    cdef peak_t call = <peak_t>PyCapsule_GetPointer(probe, b"bitnet_ref.peak/1")
    cdef unsigned char[448] codes
    cdef signed char[448] acts
    cdef long long total = 0
    cdef int* sums = <int*>malloc(n_threads * 16 * sizeof(int))  # a cache line each
    cdef int i
    if sums == NULL:
        raise MemoryError("no memory for the sums of the probe")
    memset(codes, 1, sizeof(codes))
    memset(acts, 1, sizeof(acts))
    for i in prange(n_threads, nogil=True, num_threads=n_threads, schedule='static', chunksize=1):
        total += call(&codes[0], &acts[0], sums + 16 * i, n_steps)
    free(sums)
    return total
