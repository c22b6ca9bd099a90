"""Every compiled kernel against the integer product: exact, at awkward shapes, inside guard zones.

The tests take their list from the registry and call the variant object itself, so no test can run another kernel than
the one that its id names. The oracle is NumPy's int32 product of the unpacked integers.
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bitnet_ref as br
from bitnet_ref import kernels, testing
from bitnet_ref._native import matmul as native_matmul
from bitnet_ref.reference.packing import PackedTernary, get_scheme, tables_tl1, tables_tl2
from bitnet_ref.reference.packing.base import freeze

TABLES = {"tl1": tables_tl1, "tl2": tables_tl2}
POISON = 0x5A5A5A5A
MARGIN = 512  # elements on each side of a guarded array: more than a tile or a block of any scheme
SEGMENT = kernels.SEGMENT_COLUMNS  # longer rows are cut

every_kernel = pytest.mark.parametrize("name", kernels.compiled(), ids=str)
every_table_builder = pytest.mark.parametrize("name", kernels.compiled("lut"), ids=str)
every_probe = pytest.mark.parametrize("name", kernels.compiled("peak"), ids=str)


@pytest.fixture(autouse=True)
def no_cap(monkeypatch):
    """A cap in the caller's environment must not hide kernels from these tests."""
    monkeypatch.delenv("BITNET_REF_ISA", raising=False)


@pytest.fixture
def kernel(name, runnable):
    """The variant that the test's parameter names."""
    runnable(name)
    return kernels.get(name)


def product(w_q, x_q):
    return x_q.astype(np.int32) @ w_q.astype(np.int32).T


def dense(rng, m, k, t):
    """Ternary weights and full-range activations without any symmetry to hide behind."""
    return rng.integers(-1, 2, (m, k), dtype=np.int8), rng.integers(-128, 128, (t, k), dtype=np.int8)


def guarded(shape, dtype, poison, offset_bytes=0):
    """A C-contiguous array of ``poison`` inside a larger one, and a function that says if the rest is untouched."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape))
    raw = np.empty((count + 2 * MARGIN) * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64 + offset_bytes
    whole = raw[start : start + (count + 2 * MARGIN) * dtype.itemsize].view(dtype)
    whole[:] = poison
    array = whole[MARGIN : MARGIN + count].reshape(shape)
    return array, lambda: bool((whole[:MARGIN] == poison).all() and (whole[MARGIN + count :] == poison).all())


def at_offset(array, offset_bytes):
    """A read-only copy that starts ``offset_bytes`` after a 64-byte line."""
    copy, _ = guarded(array.shape, array.dtype, 0, offset_bytes)
    copy[...] = array
    freeze(copy)  # a PackedTernary would copy what can still be changed
    assert copy.ctypes.data % 64 == (MARGIN * array.itemsize + offset_bytes) % 64
    return copy


# --- exact results --------------------------------------------------------------------------------------------------


@every_kernel
def test_matches_the_integer_product(name, kernel):
    @given(testing.products(rows=name.rows, block=name.block, max_tiles=2), st.integers(1, 3))
    def check(problem, n_threads):
        w_q, x_q = problem
        got = kernel(x_q, br.pack(w_q, name.scheme), n_threads=n_threads)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, product(w_q, x_q))

    check()


@every_kernel
def test_dense_weights_around_tiles_and_blocks(name, kernel):
    rng = np.random.default_rng(11)
    heights = {1, name.rows - 1, name.rows, name.rows + 1, 3 * name.rows + 2}
    widths = {1} | {blocks * name.block + rest for blocks in (1, 2, 3) for rest in (-1, 0, 1)}
    for (m, k), t in zip(itertools.product(sorted(heights), sorted(widths)), itertools.cycle((1, 2, 3, 4, 5, 7, 8, 9))):
        w_q, x_q = dense(rng, m, k, t)
        got = kernel(x_q, br.pack(w_q, name.scheme), n_threads=1 + m % 3)
        np.testing.assert_array_equal(got, product(w_q, x_q), err_msg=f"M = {m}, K = {k}, T = {t}")


@every_kernel
def test_many_tokens_and_tiles(name, kernel):
    """More tokens than one pass over the weights takes (matmul.pyx), and several tiles for every thread."""
    w_q, x_q = dense(np.random.default_rng(12), 7 * name.rows + 3, 20 * name.block, 300)
    got = kernel(x_q, br.pack(w_q, name.scheme), n_threads=3)
    np.testing.assert_array_equal(got, product(w_q, x_q))


@every_kernel
def test_every_small_number_of_tokens(name, kernel):
    """Every micro-tile, alone and behind full ones; two depths of a panel, and a last tile that is cut."""
    rng = np.random.default_rng(29)
    w_q, x_q = dense(rng, 2 * name.rows + 1, 384 + 2 * name.block - 1, 130)
    packed, expected = br.pack(w_q, name.scheme), product(w_q, x_q)
    for t in (*range(1, 18), *range(24, 31), 127, 128, 129, 130):
        got = kernel(x_q[:t], packed, n_threads=1 + t % 2)
        np.testing.assert_array_equal(got, expected[:t], err_msg=f"T = {t}")


PANEL_TILES = 16  # tiles of a panel in panel_rows.pyx.j2, or a multiple of them
PANEL_DEPTH = 512  # columns of a panel at a time


@every_kernel
def test_panels(name, kernel):
    """Panels and single tiles behind them, one depth and several, and micro-tiles of every number of tokens."""
    rng = np.random.default_rng(18)
    tokens = itertools.cycle((3, 5, 7, 9, 10, 11, 13, 16, 23, 24, 25, 26, 27, 28, 29, 31, 35))
    for tiles, k in itertools.product(
        (PANEL_TILES // 2, PANEL_TILES, 2 * PANEL_TILES + 1),
        (name.block, PANEL_DEPTH, PANEL_DEPTH + 1, 2 * PANEL_DEPTH + name.block + 3),
    ):
        for t in itertools.islice(tokens, 3):
            w_q, x_q = dense(rng, tiles * name.rows - 1, k, t)
            got = kernel(x_q, br.pack(w_q, name.scheme), n_threads=1 + t % 3)
            np.testing.assert_array_equal(got, product(w_q, x_q), err_msg=f"{tiles} tiles, K = {k}, T = {t}")


@every_kernel
@pytest.mark.parametrize("weight", [1, -1])
@pytest.mark.parametrize("activation", [127, -128])
def test_worst_cases_fill_no_accumulator_of_a_panel(name, kernel, weight, activation):
    for k in (PANEL_DEPTH // 2, PANEL_DEPTH, 7000):
        w_q = np.full((PANEL_TILES * name.rows, k), weight, np.int8)
        got = kernel(np.full((29, k), activation, np.int8), br.pack(w_q, name.scheme))
        assert (got == weight * activation * k).all(), f"K = {k}: expected {weight * activation * k}, got {got}"


@every_kernel
@pytest.mark.parametrize("weight", [1, -1])
@pytest.mark.parametrize("activation", [127, -128])
def test_worst_cases_fill_no_accumulator(name, kernel, weight, activation):
    """Constant extremes: an int16 sum of 128 overflows after 256 columns, int8 digits of tables after eight lookups."""
    for k in (*range(name.block, 12 * name.block, name.block), 4096, 7000):
        w_q = np.full((name.rows + 1, k), weight, np.int8)
        x_q = np.full((5, k), activation, np.int8)
        got = kernel(x_q, br.pack(w_q, name.scheme), n_threads=2)
        assert (got == weight * activation * k).all(), f"K = {k}: expected {weight * activation * k}, got {got}"


@every_kernel
def test_worst_cases_of_each_row_alone(name, kernel):
    """One row +1 and the others -1, so that neither rows nor weights can be exchanged unseen."""
    k = 3 * name.block
    for row in range(name.rows):
        w_q = np.full((name.rows, k), -1, np.int8)
        w_q[row] = 1
        x_q = np.full((1, k), -128, np.int8)
        np.testing.assert_array_equal(kernel(x_q, br.pack(w_q, name.scheme)), product(w_q, x_q))


@every_kernel
@pytest.mark.parametrize("k", [SEGMENT, SEGMENT + 1, 2 * SEGMENT + 77])
def test_rows_longer_than_a_segment(name, kernel, k):
    w_q, x_q = dense(np.random.default_rng(k), 3, k, 2)
    # float64 is exact here (sums below 2**53) and much faster than NumPy's integer product.
    expected = (x_q.astype(float) @ w_q.T.astype(float)).astype(np.int32)
    np.testing.assert_array_equal(kernel(x_q, br.pack(w_q, name.scheme), n_threads=2), expected)


@pytest.mark.parametrize("name", [n for n in kernels.compiled() if n.scheme == "base3" and n.op == "gemv"], ids=str)
def test_every_pair_of_bytes(name, kernel):
    """Some instruction sets take bytes apart in pairs: every byte that packing writes, beside every other."""
    codes = np.array(np.unravel_index(np.arange(3**5), (3,) * 5), np.int8)  # (5, 243)
    first, second = np.repeat(np.arange(3**5), 3**5), np.tile(np.arange(3**5), 3**5)
    w_q = codes[:, np.stack([first, second], 1).reshape(-1)] - np.int8(1)  # (5, 118098)
    x_q = np.random.default_rng(21).integers(1, 128, w_q.shape[1], dtype=np.int8)  # no zero hides a byte
    np.testing.assert_array_equal(kernel(x_q, br.pack(w_q, "base3")), w_q.astype(np.int32) @ x_q.astype(np.int32))


# All weights +1 in the scheme's bytes, and one weight 0: what pack() gives, without packing 16 million columns.
ALL_ONES = {"i2": (0xAA, 0x55), "base3": (242, 121)}


@pytest.mark.parametrize("name", [n for n in kernels.compiled() if n.scheme in ALL_ONES and n.op == "gemv"], ids=str)
def test_the_longest_row_fits_int32(name, kernel):
    k = kernels.MAX_K
    ones, zeros = ALL_ONES[name.scheme]
    scheme = get_scheme(name.scheme)
    assert br.pack(np.ones((name.rows, 1), np.int8), name.scheme).data[0, :2].tolist() == [ones, zeros]
    data = np.full(scheme.data_shape((name.rows, k)), ones, np.uint8)
    data[:, k:] = zeros
    data.setflags(write=False)
    x_q = np.full(k, -128, np.int8)
    got = kernel(x_q, PackedTernary(data, (name.rows, k), name.scheme), n_threads=2)
    assert (got == -128 * k).all() and -128 * k == -(2**31) + 128


@every_kernel
def test_result_does_not_depend_on_threads_or_repetition(name, kernel):
    w_q, x_q = dense(np.random.default_rng(13), 5 * name.rows + 1, 3 * name.block + 5, 9)
    packed = br.pack(w_q, name.scheme)
    expected = product(w_q, x_q)
    for n_threads in (1, 2, 3, 7, 64, None, 1):  # 7 and 64: more threads than tiles
        np.testing.assert_array_equal(kernel(x_q, packed, n_threads=n_threads), expected)


# --- memory ---------------------------------------------------------------------------------------------------------


def check_guard_zones(call, name, offset_bytes=0):
    """``call(x_q, packed, out)`` gives the product, writes nothing but ``out``, depends on nothing beside ``x_q``.

    Also used on broken kernels, in test_seeded_bugs.py.
    """
    rng = np.random.default_rng(14)
    for m, k, t in itertools.product(
        (1, name.rows - 1, name.rows + 1, 2 * name.rows), (1, name.block - 1, name.block, 2 * name.block + 3), (1, 3, 5)
    ):
        w_q, x_q = dense(rng, m, k, t)
        packed = br.pack(w_q, name.scheme)
        for surroundings in (127, -128):
            x, x_untouched = guarded(x_q.shape, np.int8, surroundings, offset_bytes)
            x[...] = x_q
            out, out_untouched = guarded((t, m), np.int32, POISON)
            call(x, packed, out)
            where = f"M = {m}, K = {k}, T = {t}"
            assert out_untouched(), f"{where}: written outside out"
            assert x_untouched() and np.array_equal(x, x_q), f"{where}: activations changed"
            np.testing.assert_array_equal(out, product(w_q, x_q), err_msg=where)


@every_kernel
@pytest.mark.parametrize("n_threads", [1, 3])
def test_guard_zones(name, kernel, n_threads):
    check_guard_zones(lambda x, packed, out: kernel(x, packed, out=out, n_threads=n_threads), name, n_threads - 1)


@every_kernel
@pytest.mark.parametrize("offset_bytes", [1, 3, 8, 31, 63])
def test_unaligned_inputs(name, kernel, offset_bytes):
    # Whole blocks, so that x_q is not copied first.
    w_q, x_q = dense(np.random.default_rng(15), name.rows + 1, 2 * name.block, 5)
    packed = br.pack(w_q, name.scheme)
    data = at_offset(packed.data, offset_bytes)
    shifted = PackedTernary(data, packed.shape, packed.scheme)
    assert shifted.data.ctypes.data == data.ctypes.data  # taken as it is, not copied to an aligned place
    x = at_offset(x_q, offset_bytes)
    np.testing.assert_array_equal(kernel(x, shifted, n_threads=2), product(w_q, x_q))


@every_kernel
def test_inputs_are_not_changed(name, kernel):
    w_q, x_q = dense(np.random.default_rng(16), name.rows + 1, 2 * name.block + 3, 5)
    packed = br.pack(w_q, name.scheme)
    before, bytes_before = x_q.copy(), packed.data.copy()
    kernel(x_q, packed)
    np.testing.assert_array_equal(x_q, before)
    np.testing.assert_array_equal(packed.data, bytes_before)
    x_q.setflags(write=False)
    np.testing.assert_array_equal(kernel(x_q, packed), product(w_q, x_q))


# Arrays at the very end (or start) of readable memory, so that one byte too far ends the process.
OVERREAD = """
import ctypes, mmap, sys
import numpy as np
import bitnet_ref as br
from bitnet_ref import kernels
from bitnet_ref.reference.packing import PackedTernary
from bitnet_ref.reference.packing.base import freeze

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
PAGE = mmap.PAGESIZE

def fenced(array, at_end):
    size = -(-array.nbytes // PAGE) * PAGE
    pages = np.frombuffer(mmap.mmap(-1, size + 2 * PAGE), np.uint8)
    start = PAGE + (size - array.nbytes if at_end else 0)
    copy = pages[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    for fence in (pages.ctypes.data, pages.ctypes.data + PAGE + size):
        if libc.mprotect(fence, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return copy

if sys.argv[1:] == ["overread"]:
    row = fenced(np.zeros(8, np.int8), True)
    print("reading too far", flush=True)
    print(np.lib.stride_tricks.as_strided(row, (9,), (1,)).sum())
rng = np.random.default_rng(17)
for name in kernels.supported():
    for k in (name.block - 1, name.block, 2 * name.block + 1):
        for at_end in (True, False):
            w_q = rng.integers(-1, 2, (name.rows + 1, k), dtype=np.int8)
            x_q = rng.integers(-128, 128, (5, k), dtype=np.int8)
            packed = br.pack(w_q, name.scheme)
            data = fenced(packed.data, at_end)
            freeze(data)
            matrix = PackedTernary(data, packed.shape, packed.scheme)
            assert matrix.data.ctypes.data == data.ctypes.data
            out = fenced(np.zeros((5, name.rows + 1), np.int32), at_end)
            print(name, k, at_end, flush=True)
            got = kernels.get(name)(fenced(x_q, at_end), matrix, n_threads=2, out=out)
            assert np.array_equal(got, x_q.astype(np.int32) @ w_q.T.astype(np.int32)), name
    for at_end in (True, False):  # panels of tiles
        w_q = rng.integers(-1, 2, (17 * name.rows, 577), dtype=np.int8)
        x_q = rng.integers(-128, 128, (17, 577), dtype=np.int8)
        data = fenced(br.pack(w_q, name.scheme).data, at_end)
        freeze(data)
        out = fenced(np.zeros((17, 17 * name.rows), np.int32), at_end)
        kernels.get(name)(fenced(x_q, at_end), PackedTernary(data, w_q.shape, name.scheme), n_threads=1, out=out)
        assert np.array_equal(out, x_q.astype(np.int32) @ w_q.T.astype(np.int32)), name
print("done")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs mmap and mprotect")
def test_nothing_is_read_or_written_outside_the_arrays():
    """On a memory fence; in a process of its own, since a failure is a segmentation fault."""
    run = subprocess.run([sys.executable, "-c", OVERREAD], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.endswith("done\n"), f"after {run.stdout.splitlines()[-1:]}: {run.stderr}"
    assert all(f"{name} " in run.stdout for name in kernels.supported())
    # The fence itself works: reading past it does end the process.
    run = subprocess.run([sys.executable, "-c", OVERREAD, "overread"], capture_output=True, text=True)
    assert run.returncode != 0 and run.stdout == "reading too far\n"


# --- shapes and the out parameter -----------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (1, 1, 1), (0,), (2, 0)], ids=str)
def test_batch_shapes(name, kernel, batch):
    k = name.block + 7
    w_q, x_q = dense(np.random.default_rng(18), name.rows + 1, k, int(np.prod(batch)))
    got = kernel(x_q.reshape(*batch, k), br.pack(w_q, name.scheme))
    assert got.shape == (*batch, name.rows + 1) and got.dtype == np.int32
    np.testing.assert_array_equal(got.reshape(-1, name.rows + 1), product(w_q, x_q))


@every_kernel
def test_memory_order_of_the_activations_does_not_matter(name, kernel):
    w_q, x_q = dense(np.random.default_rng(19), name.rows + 1, 2 * name.block, 6)
    packed = br.pack(w_q, name.scheme)
    wide = np.zeros((12, 3 * x_q.shape[1]), np.int8)
    wide[::2, ::3] = x_q
    mirrored = np.ascontiguousarray(x_q[:, ::-1])[:, ::-1]
    for x in (wide[::2, ::3], np.asfortranarray(x_q), mirrored):
        assert not x.flags.c_contiguous
        np.testing.assert_array_equal(kernel(x, packed), product(w_q, x_q))
    batched = np.asfortranarray(x_q.reshape(2, 3, -1))
    np.testing.assert_array_equal(kernel(batched, packed).reshape(6, -1), product(w_q, x_q))


@every_kernel
def test_out_is_written_and_returned(name, kernel):
    w_q, x_q = dense(np.random.default_rng(20), name.rows + 1, name.block + 1, 6)
    packed = br.pack(w_q, name.scheme)
    out = np.full((2, 3, name.rows + 1), POISON, np.int32)
    assert kernel(x_q.reshape(2, 3, -1), packed, out=out) is out
    np.testing.assert_array_equal(out.reshape(6, -1), product(w_q, x_q))
    one = np.full(name.rows + 1, POISON, np.int32)
    assert kernel(x_q[0], packed, out=one) is one
    np.testing.assert_array_equal(one, product(w_q, x_q)[0])


# --- refusals -------------------------------------------------------------------------------------------------------


@every_kernel
def test_refuses_other_activations(name, kernel):
    packed = br.pack(np.ones((3, 5), np.int8), name.scheme)
    for x in (np.ones(5), np.ones(5, np.uint8), np.ones(5, np.int32), np.ones(5, bool)):
        with pytest.raises(TypeError, match=f"^x_q must be an int8 array, got {x.dtype}$"):
            kernel(x, packed)
    with pytest.raises(TypeError, match=r"^x_q must be an int8 array, got list$"):
        kernel([1, 2, 3, 4, 5], packed)
    for shape in [(), (4,), (6,), (5, 4), (0,)]:
        with pytest.raises(ValueError, match=r"x_q must have shape \(\.\.\., 5\) for this matrix of K = 5, got shape "):
            kernel(np.ones(shape, np.int8), packed)


@every_kernel
def test_refuses_matrices_of_other_schemes(name, kernel):
    for scheme in set(br.schemes()) - {name.scheme}:
        packed = br.pack(np.ones((3, 5), np.int8), scheme)
        with pytest.raises(ValueError, match=f"^{name} reads scheme {name.scheme}, got a matrix packed as {scheme}$"):
            kernel(np.ones(5, np.int8), packed)


@every_kernel
def test_refuses_other_outputs(name, kernel):
    packed, x_q = br.pack(np.ones((3, 5), np.int8), name.scheme), np.ones((2, 5), np.int8)
    for dtype in (np.float32, np.int64, np.uint32, np.dtype(np.int32).newbyteorder()):
        with pytest.raises(TypeError, match=r"^out must be an int32 array, got "):
            kernel(x_q, packed, out=np.zeros((2, 3), dtype))
    with pytest.raises(TypeError, match=r"^out must be an int32 array, got list$"):
        kernel(x_q, packed, out=[[0, 0, 0], [0, 0, 0]])
    rule = r"^out must be a writable, aligned, C-contiguous array of shape \(2, 3\), got "
    for shape in [(3,), (3, 2), (6,), (1, 2, 3), (2, 4)]:
        with pytest.raises(ValueError, match=rule + "shape "):
            kernel(x_q, packed, out=np.zeros(shape, np.int32))
    with pytest.raises(ValueError, match=rule + r"non-contiguous shape \(2, 3\)$"):
        kernel(x_q, packed, out=np.zeros((3, 2), np.int32).T)
    read_only = np.zeros((2, 3), np.int32)
    read_only.setflags(write=False)
    with pytest.raises(ValueError, match=rule + r"read-only shape \(2, 3\)$"):
        kernel(x_q, packed, out=read_only)
    unaligned = np.zeros(25, np.uint8)[1:].view(np.int32).reshape(2, 3)
    with pytest.raises(ValueError, match=rule + r"unaligned shape \(2, 3\)$"):
        kernel(x_q, packed, out=unaligned)


def test_refuses_what_is_no_packed_matrix():
    with pytest.raises(TypeError, match=r"^packed must be a PackedTernary, made by bitnet_ref.pack, got str$"):
        br.matmul(np.ones(5, np.int8), "i2")
    with pytest.raises(TypeError, match=r"^packed must be a PackedTernary, made by bitnet_ref.pack, got ndarray$"):
        kernels.select("gemv", "i2")(np.ones(5, np.int8), np.ones((3, 5), np.int8))


@every_kernel
@pytest.mark.parametrize("n_threads", [0, -1, 1025])
def test_refuses_other_thread_counts(name, kernel, n_threads):
    packed = br.pack(np.ones((3, 5), np.int8), name.scheme)
    with pytest.raises(ValueError, match=f"^n_threads must be between 1 and 1024, got {n_threads}$"):
        kernel(np.ones(5, np.int8), packed, n_threads=n_threads)


def test_refuses_rows_that_int32_cannot_hold():
    assert 128 * kernels.MAX_K < 2**31 <= 128 * (kernels.MAX_K + 1)
    k = kernels.MAX_K + 1
    packed = PackedTernary(np.broadcast_to(np.uint8(0x55), (1, k)), (1, k), "i2")
    with pytest.raises(ValueError, match=r"^K must be at most 16777215 so that no int32 sum overflows, got 16777216$"):
        br.matmul(np.broadcast_to(np.int8(0), (k,)), packed)


# --- lookup tables --------------------------------------------------------------------------------------------------


@every_table_builder
def test_tables_are_those_of_the_reference(name, kernel):
    @given(testing.activations(st.tuples(st.integers(1, 4 * name.block))))
    def check(x_q):
        before = x_q.copy()
        tables = kernel.build_tables(x_q)
        np.testing.assert_array_equal(x_q, before)
        assert tables.dtype == np.int8
        np.testing.assert_array_equal(tables, TABLES[name.scheme](x_q))

    check()


@every_table_builder
def test_tables_of_all_pairs_of_extremes(name, kernel):
    group = name.block // 8
    values = (-128, -127, -1, 0, 1, 126, 127)
    x_q = np.array(list(itertools.product(values, repeat=group)), np.int8).reshape(-1)
    np.testing.assert_array_equal(kernel.build_tables(x_q), TABLES[name.scheme](x_q))


@every_table_builder
@pytest.mark.parametrize("offset_bytes", [0, 1, 31])
def test_tables_stay_in_their_guard_zones(name, kernel, offset_bytes):
    for n_blocks in (1, 2, 5):
        x_q = np.random.default_rng(21).integers(-128, 128, n_blocks * name.block, dtype=np.int8)
        x, x_untouched = guarded(x_q.shape, np.int8, 77, offset_bytes)
        x[...] = x_q
        tables, tables_untouched = guarded(256 * n_blocks, np.int8, 0x5A, offset_bytes)
        native_matmul.build_tables(kernel._capsule, x, tables, name.block)
        assert x_untouched() and tables_untouched()
        np.testing.assert_array_equal(tables.reshape(-1, 2, 16), TABLES[name.scheme](x_q))


@every_table_builder
def test_table_builders_refuse(name, kernel):
    with pytest.raises(TypeError, match=r"^x_q must be an int8 array, got float64$"):
        kernel.build_tables(np.ones(5))
    for shape in [(), (0,), (2, 4)]:
        with pytest.raises(ValueError, match=r"^x_q must be one token of shape \(K,\) with K >= 1, got shape \("):
            kernel.build_tables(np.ones(shape, np.int8))
    packed = br.pack(np.ones((3, 5), np.int8), name.scheme)
    with pytest.raises(ValueError, match=f"^{name} multiplies no matrix; name a gemv or gemm kernel$"):
        kernel(np.ones(5, np.int8), packed)


@every_kernel
def test_products_build_no_tables_and_count_nothing(name, kernel):
    with pytest.raises(ValueError, match=f"^only lut kernels build tables, {name} multiplies$"):
        kernel.build_tables(np.ones(5, np.int8))
    with pytest.raises(ValueError, match=f"^only peak probes count multiply-adds, {name} is a {name.op} kernel$"):
        kernel.multiply_adds(1)


# --- probes ---------------------------------------------------------------------------------------------------------


@every_probe
@pytest.mark.parametrize("n_threads", [1, 2])
def test_probes_count_their_multiply_adds(name, kernel, n_threads):
    bytes_per_vector = {"scalar": 1, "avx2": 32, "avxvnni": 32, "avx512vnni": 64}[name.isa]
    # A tile of rows x block dot products a step, each as many multiply-adds as the vector has bytes, on every thread.
    expected = 1000 * name.rows * name.block * bytes_per_vector * kernels.resolve_threads(n_threads)
    assert kernel.multiply_adds(1000, n_threads) == expected
    with pytest.raises(ValueError, match=r"^n_steps must be at least 1, got -5$"):
        kernel.multiply_adds(-5)


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("lines", [1, 2, 3, 1000])
def test_streaming_read_visits_every_word_once(lines, n_threads):
    words = np.random.default_rng(lines).integers(0, 2**64, 8 * lines, dtype=np.uint64)
    assert kernels.read_all(words, n_threads) == sum(map(int, words)) % 2**64


@pytest.mark.parametrize("size", [0, 7, 9])
def test_streaming_read_refuses_parts_of_a_line(size):
    with pytest.raises(ValueError, match=f"^words must hold a positive multiple of 8 values, got {size}$"):
        kernels.read_all(np.zeros(size, np.uint64))


# --- identity -------------------------------------------------------------------------------------------------------


class DlInfo(ctypes.Structure):
    """Dl_info of dlfcn.h."""

    _fields_ = (
        ("fname", ctypes.c_char_p),
        ("fbase", ctypes.c_void_p),
        ("sname", ctypes.c_char_p),
        ("saddr", ctypes.c_void_p),
    )


def pointer(kernel):
    """The C function behind a kernel."""
    get_name, get_pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = ctypes.c_char_p, (ctypes.py_object,)
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return get_pointer(kernel._capsule, get_name(kernel._capsule))


@pytest.mark.skipif(sys.platform == "win32", reason="needs dladdr")
@pytest.mark.parametrize("name", kernels.compiled(*kernels.OPS), ids=str)
def test_a_kernel_is_the_code_that_its_name_says(name, kernel):
    """The function pointer lies in the extension module of that name: no kernel is another one under a second name."""
    assert kernel.name == name and repr(kernel) == f"Kernel({name})"
    info = DlInfo()
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = ctypes.c_void_p, ctypes.POINTER(DlInfo)
    assert dladdr(pointer(kernel), ctypes.byref(info))
    assert f"/{name}." in info.fname.decode()


def test_kernels_are_different_functions():
    supported = [kernels.get(name) for name in kernels.supported(*kernels.OPS)]
    assert len({pointer(kernel) for kernel in supported}) == len(supported) > 0


@every_kernel
def test_a_kernel_never_hands_over_to_another(name, kernel, monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"a call of {name} asked for another kernel")

    monkeypatch.setattr(kernels, "select", refuse)
    monkeypatch.setattr(kernels, "get", refuse)
    w_q, x_q = dense(np.random.default_rng(22), name.rows + 1, name.block + 1, 9)
    for tokens in (x_q[0], x_q[:1], x_q):  # whatever the number of tokens, and so also gemv for many
        np.testing.assert_array_equal(kernel(tokens, br.pack(w_q, name.scheme)), product(w_q, tokens))
