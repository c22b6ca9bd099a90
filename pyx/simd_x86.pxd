# The x86 intrinsics that templates/isa uses; their meaning is Intel's, in immintrin.h.
cdef extern from "immintrin.h" nogil:
    ctypedef struct __m128i:
        pass
    ctypedef struct __m256i:
        pass
    ctypedef struct __m512i:
        pass
    ctypedef unsigned long long __mmask64

    void _mm_prefetch(const char*, const int)
    __m128i _mm_loadu_si128(const __m128i*)
    __m128i _mm_setr_epi8(char, char, char, char, char, char, char, char, char, char, char, char, char, char, char, char)

    __m256i _mm256_setzero_si256()
    __m256i _mm256_set1_epi8(char)
    __m256i _mm256_set1_epi16(short)
    __m256i _mm256_setr_epi8(char, char, char, char, char, char, char, char, char, char, char, char, char, char, char, char,
                             char, char, char, char, char, char, char, char, char, char, char, char, char, char, char, char)
    __m256i _mm256_loadu_si256(const __m256i*)
    void _mm256_storeu_si256(__m256i*, __m256i)
    __m128i _mm256_castsi256_si128(__m256i)
    __m128i _mm256_extracti128_si256(__m256i, const int)
    __m256i _mm256_broadcastsi128_si256(__m128i)
    __m256i _mm256_permute4x64_epi64(__m256i, const int)
    __m256i _mm256_and_si256(__m256i, __m256i)
    __m256i _mm256_or_si256(__m256i, __m256i)
    __m256i _mm256_srli_epi16(__m256i, int)
    __m256i _mm256_slli_epi16(__m256i, int)
    __m256i _mm256_add_epi8(__m256i, __m256i)
    __m256i _mm256_sub_epi8(__m256i, __m256i)
    __m256i _mm256_sign_epi8(__m256i, __m256i)
    __m256i _mm256_shuffle_epi8(__m256i, __m256i)
    __m256i _mm256_unpacklo_epi8(__m256i, __m256i)
    __m256i _mm256_unpackhi_epi8(__m256i, __m256i)
    __m256i _mm256_packs_epi16(__m256i, __m256i)
    __m256i _mm256_add_epi16(__m256i, __m256i)
    __m256i _mm256_sub_epi16(__m256i, __m256i)
    __m256i _mm256_sign_epi16(__m256i, __m256i)
    __m256i _mm256_mullo_epi16(__m256i, __m256i)
    __m256i _mm256_mulhrs_epi16(__m256i, __m256i)
    __m256i _mm256_maddubs_epi16(__m256i, __m256i)
    __m256i _mm256_madd_epi16(__m256i, __m256i)
    __m256i _mm256_add_epi32(__m256i, __m256i)

    __m512i _mm512_setzero_si512()
    __m512i _mm512_set1_epi8(char)
    __m512i _mm512_set1_epi16(short)
    __m512i _mm512_loadu_si512(const void*)
    __m128i _mm512_extracti32x4_epi32(__m512i, const int)
    __m512i _mm512_broadcast_i32x4(__m128i)
    __m512i _mm512_and_si512(__m512i, __m512i)
    __m512i _mm512_srli_epi16(__m512i, unsigned int)
    __m512i _mm512_add_epi8(__m512i, __m512i)
    __m512i _mm512_mask_sub_epi8(__m512i, __mmask64, __m512i, __m512i)
    __mmask64 _mm512_test_epi8_mask(__m512i, __m512i)
    __m512i _mm512_shuffle_epi8(__m512i, __m512i)
    __m512i _mm512_permutex2var_epi8(__m512i, __m512i, __m512i)
    __m512i _mm512_unpacklo_epi8(__m512i, __m512i)
    __m512i _mm512_unpackhi_epi8(__m512i, __m512i)
    __m512i _mm512_maddubs_epi16(__m512i, __m512i)
    __m512i _mm512_add_epi16(__m512i, __m512i)
    __m512i _mm512_add_epi32(__m512i, __m512i)
    __m512i _mm512_dpbusd_epi32(__m512i, __m512i, __m512i)
    int _mm512_reduce_add_epi32(__m512i)
