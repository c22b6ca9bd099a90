"""Which instruction sets of this project the processor and its operating system support; compiled with baseline flags."""

cdef extern from *:
    """
    #if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    #include <cpuid.h>
    /* __builtin_cpu_supports also checks that the operating system saves the wide registers. */
    #define HAS(feature) (__builtin_cpu_init(), __builtin_cpu_supports(feature) != 0)
    /* And float16 conversion, leaf 1, ECX, bit 29, which every processor with AVX2 has. */
    static int has_avx2(void) {
        unsigned a, b, c, d;
        return HAS("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
    }
    /* Leaf 7.1, EAX, bit 4; the compilers' names for it are younger than the instructions. */
    static int has_avxvnni(void) {
        unsigned a, b, c, d;
        return has_avx2() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)
            && (a >> 4 & 1);
    }
    static int has_avx512vnni(void) {
        return HAS("avx512f") && HAS("avx512bw") && HAS("avx512vl") && HAS("avx512dq") && HAS("avx512vnni");
    }
    static int has_avx512vbmi(void) { return has_avx512vnni() && HAS("avx512vbmi"); }
    #else
    static int has_avx2(void) { return 0; }
    static int has_avxvnni(void) { return 0; }
    static int has_avx512vnni(void) { return 0; }
    static int has_avx512vbmi(void) { return 0; }
    #endif

    #if defined(__aarch64__) && defined(__linux__)
    #include <sys/auxv.h>
    static int has_neon(void) { return 1; }
    static int has_neondot(void) { return (getauxval(AT_HWCAP) >> 20) & 1; }  /* HWCAP_ASIMDDP */
    #elif defined(__aarch64__) && defined(__APPLE__)
    static int has_neon(void) { return 1; }
    static int has_neondot(void) { return 1; }  /* every Apple processor that runs macOS on ARM has it */
    #else
    static int has_neon(void) { return 0; }
    static int has_neondot(void) { return 0; }
    #endif
    """
    int has_avx2() nogil
    int has_avxvnni() nogil
    int has_avx512vnni() nogil
    int has_avx512vbmi() nogil
    int has_neon() nogil
    int has_neondot() nogil


def supported_isas():
    """Names of the instruction sets that may run here, in rising rank; "scalar" always leads."""
    found = (("scalar", 1), ("neon", has_neon()), ("neondot", has_neondot()), ("avx2", has_avx2()),
             ("avxvnni", has_avxvnni()), ("avx512vnni", has_avx512vnni()), ("avx512vbmi", has_avx512vbmi()))
    return tuple(name for name, present in found if present)
