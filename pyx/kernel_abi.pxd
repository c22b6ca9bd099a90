# The contract between generated kernels (templates/) and the hand-written callers (pyx/).
# A generated module exports one PyCapsule, KERNEL, whose name is the signature's tag. Change a typedef, raise its number:
# a stale module then fails by name in PyCapsule_GetPointer instead of crashing.

# "bitnet_ref.matmul/1": out[t, tile * rows + r] = sum over k of w[row, k] * x[t, k], for n_tiles whole tiles.
#   w         packed tiles, w_stride bytes apart; n_blocks blocks each
#   x         one operand per token, x_stride bytes apart: n_blocks * block int8 activations, or (tl1, tl2) n_blocks * 256
#             bytes of lookup tables
#   x_sums    sum of the int8 activations of each token; ignored by table kernels
#   out       int32, out_stride elements from token to token
ctypedef void (*matmul_t)(const unsigned char* w, Py_ssize_t w_stride,
                          const signed char* x, Py_ssize_t x_stride, const int* x_sums,
                          int* out, Py_ssize_t out_stride,
                          Py_ssize_t n_tiles, Py_ssize_t n_blocks, Py_ssize_t n_tokens) noexcept nogil

# "bitnet_ref.lut/1": table[256 * b ...] = the eight lookup tables of block b, each 16 low digits then 16 high digits.
ctypedef void (*lut_t)(const signed char* x, signed char* table, Py_ssize_t n_blocks) noexcept nogil

# "bitnet_ref.peak/1": n_steps rounds of a register tile of dot products on 448 bytes of each operand; the sums (at most 16) keep
# the compiler from dropping the work. Returns the number of multiply-adds.
ctypedef long long (*peak_t)(const unsigned char* codes, const signed char* acts, int* sums, Py_ssize_t n_steps) noexcept nogil

# "bitnet_ref.dotrows/1": out[i] = sum over k of w[rows[i], k] * x[k], for n_rows listed rows of w, w_stride bytes apart.
#   x         n_blocks * 320 int8 activations; x_sum is their sum
ctypedef void (*dot_rows_t)(const unsigned char* w, Py_ssize_t w_stride, const int* rows, Py_ssize_t n_rows,
                            const signed char* x, Py_ssize_t n_blocks, int x_sum, int* out) noexcept nogil

# "bitnet_ref.addrows/1": out[k] = sum over i of x[rows[i]] * w[rows[i], k], for all n_blocks * 320 columns k.
#   x         one int8 activation for each row of w, listed or not
#   sums      scratch of the same size as out
ctypedef void (*add_rows_t)(const unsigned char* w, Py_ssize_t w_stride, const int* rows, Py_ssize_t n_rows,
                            const signed char* x, Py_ssize_t n_blocks, int* sums, int* out) noexcept nogil
