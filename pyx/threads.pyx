"""What OpenMP offers to this process; compiled with baseline flags."""

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    static int openmp(void) { return 1; }
    static int max_threads(void) { return omp_get_max_threads(); }
    #else
    static int openmp(void) { return 0; }
    static int max_threads(void) { return 1; }
    #endif
    """
    int openmp() nogil
    int max_threads() nogil


def has_openmp():
    """True if this build can run more than one thread."""
    return bool(openmp())


def default_threads():
    """OpenMP's own choice: OMP_NUM_THREADS, or the processors that this process may use; 1 without OpenMP."""
    return max_threads()
