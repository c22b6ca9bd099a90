"""A streaming-read probe: how fast can this machine read memory at all? Compiled with baseline flags."""

from cython.parallel cimport prange

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
