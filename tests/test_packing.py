"""Packings: exact round trips, the bytes of the layout, refusals that say where, and exact lookup tables."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitnet_ref.reference import packing
from bitnet_ref.reference.packing import PackedTernary, get_scheme, pack, schemes, unpack
from bitnet_ref.reference.packing.base import base28_digits

SHAPES_2B4T = [(2560, 2560), (640, 2560), (6912, 2560), (2560, 6912)]

every_scheme = pytest.mark.parametrize("scheme", schemes())


def dense(shape, seed=0):
    """Ternary weights, all three values everywhere; Hypothesis arrays are mostly one value and miss swapped places."""
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.int8)


@st.composite
def matrices(draw, max_blocks=3):
    """A scheme and a ternary matrix around whole tiles and blocks of it, Hypothesis-filled or dense."""
    scheme = get_scheme(draw(st.sampled_from(schemes())))
    m = draw(st.integers(1, 2 * scheme.rows + 1))
    k = draw(st.integers(1, max_blocks * scheme.block))
    if draw(st.booleans()):
        return scheme.name, dense((m, k), draw(st.integers(0, 2**32 - 1)))
    return scheme.name, draw(hnp.arrays(np.int8, (m, k), elements=st.integers(-1, 1)))


def plain_bytes(w, scheme):
    """The layouts once more, one weight at a time, by other means than the code under test."""
    scheme = get_scheme(scheme)
    m_padded, k_padded = scheme.padded_shape(w.shape)
    at = np.zeros((m_padded, k_padded), int)
    at[: w.shape[0], : w.shape[1]] = w
    out = [[0] * scheme.data_shape(w.shape)[1] for _ in range(scheme.data_shape(w.shape)[0])]
    for row, k in itertools.product(range(m_padded), range(k_padded)):
        tile, r = divmod(row, scheme.rows)
        if scheme.name == "i2":
            out[tile][k] += int(at[row, k] + 1) * 4**r
        elif scheme.name == "base3":
            out[tile][k] += int(at[row, k] + 1) * 3**r
        elif scheme.name == "tl1" and k % 2 == 0:
            index = ["--", "-0", "-+", "0-", "00", "0+", "+-", "+0", "++"].index(
                "".join("-0+"[v + 1] for v in at[row, k : k + 2])
            )
            out[tile][k // 4 * 64 + r] += index * 16 ** (k % 4 // 2)
        elif scheme.name == "tl2" and k % 3 == 0:
            value = int(at[row, k : k + 3] @ [9, 3, 1])
            block, triple = divmod(k // 3, 8)
            out[tile][320 * block + 64 * (triple // 2) + r] += abs(value) * 16 ** (triple % 2)
            out[tile][320 * block + 256 + r] += (value < 0) * 2**triple
    return np.array(out, np.uint8)


# --- round trips and bytes


@given(case=matrices())
def test_round_trip(case):
    scheme, w = case
    before = w.copy()
    packed = pack(w, scheme)
    np.testing.assert_array_equal(w, before)
    for back in (packed.unpack(), unpack(packed), get_scheme(scheme).unpack(packed.data, w.shape)):
        assert back.dtype == np.int8 and back.flags.c_contiguous and back.flags.writeable
        np.testing.assert_array_equal(back, w)


@settings(max_examples=25)
@given(case=matrices(max_blocks=2))
def test_bytes_are_those_of_the_plain_loop(case):
    scheme, w = case
    np.testing.assert_array_equal(pack(w, scheme).data, plain_bytes(w, scheme))


@every_scheme
@pytest.mark.parametrize("shape", [(1, 1), (4, 64), (5, 65), (63, 23), (64, 24), (65, 49), (130, 100), (129, 193)])
def test_dense_round_trip_and_bytes(scheme, shape):
    w = dense(shape, seed=shape[1])
    packed = pack(w, scheme)
    np.testing.assert_array_equal(packed.data, plain_bytes(w, scheme))
    np.testing.assert_array_equal(packed.unpack(), w)


@every_scheme
def test_large_dense_round_trip(scheme):
    w = dense((643, 2570))
    np.testing.assert_array_equal(pack(w, scheme).unpack(), w)


@every_scheme
def test_memory_order_and_strides_do_not_matter(scheme):
    w = dense((70, 50))
    expected = pack(w, scheme)
    assert pack(np.asfortranarray(w), scheme) == expected
    wide = np.zeros((140, 150), np.int8)
    wide[::2, ::3] = w
    assert pack(wide[::2, ::3], scheme) == expected
    w.setflags(write=False)
    assert pack(w, scheme) == expected


@every_scheme
def test_functions_by_name_are_the_scheme(scheme):
    w = dense((9, 30))
    packed = getattr(packing, f"pack_{scheme}")(w)
    assert packed == pack(w, scheme)
    np.testing.assert_array_equal(getattr(packing, f"unpack_{scheme}")(packed.data, w.shape), w)


def test_known_bytes():
    # i2 of one column (-1, 0, +1, +1): codes 0, 1, 2, 2 -> 0 + 4 + 32 + 128; three more bytes of padding would be 0x55.
    i2 = pack(np.array([[-1], [0], [1], [1]], np.int8), "i2").data
    assert i2.shape == (1, 64) and i2[0, 0] == 164 and (i2[0, 1:] == 0x55).all()
    # base3 of (-1, 0, +1, +1, -1): digits 0, 1, 2, 2, 0 -> 3 + 18 + 54
    base3 = pack(np.array([[-1], [0], [1], [1], [-1]], np.int8), "base3").data
    assert base3.shape == (1, 64) and base3[0, 0] == 75 and (base3[0, 1:] == 121).all()
    # tl1 of (+, -), (0, +): indices 6 and 5 -> 0x56
    tl1 = pack(np.array([[1, -1, 0, 1]], np.int8), "tl1").data
    assert tl1.shape == (1, 256) and tl1[0, 0] == 0x56 and (tl1[0, 1:] == 0x44).all()
    # tl2 of (-, +, 0), (0, +, -): values -6 and 2 -> indices 0x26, sign bit of triple 0
    tl2 = pack(np.array([[-1, 1, 0, 0, 1, -1]], np.int8), "tl2").data
    assert tl2.shape == (1, 320) and tl2[0, 0] == 0x26 and tl2[0, 256] == 1 and np.count_nonzero(tl2) == 2


# --- sizes and the objects


def test_schemes():
    assert schemes() == ("i2", "base3", "tl1", "tl2")
    assert [get_scheme(s).bits_per_weight for s in schemes()] == [2, 1.6, 2, 5 / 3]
    assert [(get_scheme(s).rows, get_scheme(s).block) for s in schemes()] == [(4, 64), (5, 64), (64, 16), (64, 24)]
    with pytest.raises(ValueError, match="scheme must be one of i2, base3, tl1, tl2, got 'i2_s'"):
        get_scheme("i2_s")
    with pytest.raises(ValueError, match="scheme must be one of"):
        pack(dense((2, 2)), "I2")


@every_scheme
@pytest.mark.parametrize("shape", [(1, 1), (5, 65), *SHAPES_2B4T])
def test_sizes_include_the_padding(scheme, shape):
    packed = pack(np.zeros(shape, np.int8), scheme)
    s = get_scheme(scheme)
    m, k = packed.padded_shape
    assert m % s.rows == 0 and 0 <= m - shape[0] < s.rows
    assert k % s.block == 0 and 0 <= k - shape[1] < s.block
    assert packed.data.shape == s.data_shape(shape)
    assert packed.nbytes == packed.data.size == m * k * s.bits_per_weight / 8
    assert packed.bits_per_weight == packed.nbytes * 8 / (shape[0] * shape[1]) >= s.bits_per_weight


@every_scheme
def test_packed_matrix_cannot_be_changed(scheme):
    packed = pack(dense((6, 6)), scheme)
    assert packed.data.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        packed.data[0, 0] = 0
    with pytest.raises(AttributeError):
        packed.shape = (6, 7)
    mine = packed.data.copy()
    copy = PackedTernary(mine, (6, 6), scheme)
    mine[:] = 0  # the caller's array is still the caller's
    assert copy == packed
    assert PackedTernary(packed.data, (6, 6), scheme).data is packed.data  # read-only bytes are not copied


@every_scheme
def test_equality_and_hash(scheme):
    w = dense((6, 6))
    packed, again = pack(w, scheme), pack(w, scheme)
    assert packed == again and hash(packed) == hash(again)
    assert pickle.loads(pickle.dumps(packed)) == packed
    w[5, 5] = -1 if w[5, 5] else 1
    assert packed != pack(w, scheme)
    assert pack(np.zeros((6, 6), np.int8), scheme) != pack(np.zeros((6, 7), np.int8), scheme)  # same bytes, other shape
    assert packed != "i2"


def test_representations():
    packed = pack(dense((2560, 640)), "i2")
    assert repr(packed) == "PackedTernary(i2, 2560 x 640, 409,600 bytes, 2.0000 bits/weight)"
    html = packed._repr_html_()
    assert "2560 outputs" in html and "409,600 bytes" in html and packed.data[0, :12].tobytes().hex(" ") in html


# --- refusals


@every_scheme
def test_pack_refuses_other_dtypes(scheme):
    for w in (np.zeros((2, 2)), np.zeros((2, 2), np.int32), np.zeros((2, 2), np.uint8), np.zeros((2, 2), bool)):
        with pytest.raises(TypeError, match=f"w_q must be an int8 array, got {w.dtype}"):
            pack(w, scheme)
    with pytest.raises(TypeError, match="w_q must be an int8 array, got list"):
        pack([[0, 1]], scheme)


@every_scheme
@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2), (0, 4), (4, 0)])
def test_pack_refuses_other_ranks(scheme, shape):
    with pytest.raises(ValueError, match=r"w_q must have shape \(M, K\) with M >= 1 and K >= 1"):
        pack(np.zeros(shape, np.int8), scheme)


@every_scheme
@pytest.mark.parametrize("value", [2, -2, 127, -128])
def test_pack_refuses_other_values(scheme, value):
    w = dense((70, 40))
    w[66, 3] = w[66, 5] = w[67, 0] = value
    with pytest.raises(ValueError, match=f"only -1, 0 and 1, got {value} at row 66, column 3"):
        pack(w, scheme)


@every_scheme
def test_unpack_refuses_other_sizes(scheme):
    packed = pack(dense((70, 40)), scheme)
    s = get_scheme(scheme)
    for data in (packed.data[:-1], packed.data[:, :-1], packed.data.reshape(-1), packed.data[None]):
        with pytest.raises(ValueError, match=rf"{scheme} data of a 70 x 40 matrix must have shape \("):
            s.unpack(data, (70, 40))
        with pytest.raises(ValueError, match="must have shape"):
            PackedTernary(data, (70, 40), scheme)
    with pytest.raises(TypeError, match="data must be a uint8 array, got int8"):
        s.unpack(packed.data.view(np.int8), (70, 40))
    with pytest.raises(ValueError, match="M >= 1 and K >= 1"):
        s.unpack(packed.data, (0, 40))
    with pytest.raises(ValueError, match="scheme must be one of"):
        PackedTernary(packed.data, (70, 40), "tl3")


def damaged(scheme, shape, tile, byte, value):
    """A packed all-zero matrix with one byte changed."""
    data = pack(np.zeros(shape, np.int8), scheme).data.copy()
    data[tile, byte] = value
    return PackedTernary(data, shape, scheme)


UNUSED = [
    # scheme, tile, byte, value, what the message must say
    ("i2", 1, 70, 0x57, "code 3, got it in tile 1, byte 70 (0x57), row 4, column 70"),
    ("i2", 1, 70, 0xD5, "code 3, got it in tile 1, byte 70 (0xd5), row 7, column 70"),
    ("base3", 2, 65, 243, "value 243 (above 242), got it in tile 2, byte 65 (0xf3), row 10 to 14, column 65"),
    ("base3", 0, 0, 255, "value 255 (above 242), got it in tile 0, byte 0 (0xff), row 0 to 4, column 0"),
    ("tl1", 1, 64 * 5 + 7, 0x49, "index 9 (above 8), got it in tile 1, byte 327 (0x49), row 71, column 20"),
    ("tl1", 1, 64 * 5 + 7, 0xF4, "index 15 (above 8), got it in tile 1, byte 327 (0xf4), row 71, column 22"),
    ("tl2", 1, 320 + 64 + 7, 0x0E, "index 14 (above 13), got it in tile 1, byte 391 (0x0e), row 71, column 30"),
    ("tl2", 1, 320 + 64 + 7, 0xF0, "index 15 (above 13), got it in tile 1, byte 391 (0xf0), row 71, column 33"),
    ("tl2", 1, 320 + 256 + 7, 0x20, "a sign bit with index 0, got it in tile 1, byte 583 (0x20), row 71, column 39"),
]


@pytest.mark.parametrize(("scheme", "tile", "byte", "value", "message"), UNUSED)
def test_unused_codes_are_found_with_their_place(scheme, tile, byte, value, message):
    packed = damaged(scheme, (75, 100), tile, byte, value)
    with pytest.raises(ValueError) as error:
        packed.unpack()
    assert str(error.value) == f"{scheme} data must not hold {message}"


@every_scheme
def test_every_bit_pattern_of_a_byte_is_weights_or_refused(scheme):
    """Of the 256 values of a byte, those that unpack are exactly those that packing can give."""
    s = get_scheme(scheme)
    columns = {"tl1": 4, "tl2": 6}.get(scheme, 1)
    rows = {"tl1": 1, "tl2": 1}.get(scheme, s.rows)
    possible = set()
    for weights in itertools.product((-1, 0, 1), repeat=rows * columns):
        if scheme == "tl2" and any(tuple(weights[i : i + 3]) < (0, 0, 0) for i in (0, 3)):
            continue  # negative triples share the index of their mirror image
        possible.add(int(pack(np.array(weights, np.int8).reshape(rows, columns), scheme).data[0, 0]))
    accepted = set()
    for value in range(256):
        try:
            damaged(scheme, (s.rows, s.block), 0, 0, value).unpack()
            accepted.add(value)
        except ValueError:
            pass
    assert accepted == possible
    assert len(accepted) == {"i2": 81, "base3": 243, "tl1": 81, "tl2": 196}[scheme]


PADDING = [
    # scheme, byte, value: one padding weight that is not 0, outside a 3 x 10 matrix
    ("i2", 2, 0x95, "got 1 at row 3, column 2"),
    ("i2", 10, 0x54, "got -1 at row 0, column 10"),
    ("base3", 2, 121 + 81, "got 1 at row 4, column 2"),
    ("base3", 63, 120, "got -1 at row 0, column 63"),
    ("tl1", 3, 0x45, "got 1 at row 3, column 1"),
    ("tl1", 64 * 2, 0x74, "got 1 at row 0, column 10"),
    ("tl2", 3, 0x01, "got 1 at row 3, column 2"),
    ("tl2", 64, 0x90, "got 1 at row 0, column 9"),
]


@pytest.mark.parametrize(("scheme", "byte", "value", "message"), PADDING)
def test_padding_that_is_not_zero_is_found(scheme, byte, value, message):
    shape = (3, 9) if message.endswith("column 9") else (3, 10)
    packed = damaged(scheme, shape, 0, byte, value)
    with pytest.raises(ValueError, match=rf"{scheme} padding must hold weight 0, {message} outside the 3 x {shape[1]}"):
        packed.unpack()


# --- lookup tables


def test_base28_digits_of_every_possible_entry():
    e = np.arange(-384, 385, dtype=np.int16)  # three activations of -128 reach 384, two 256
    low, high = base28_digits(e.reshape(-1, 1))[..., 0].T.astype(int)
    np.testing.assert_array_equal(28 * high + low, e)
    assert (low.min(), low.max()) == (-14, 14)
    assert (high.min(), high.max()) == (-14, 14)
    assert 8 * 14 <= 127  # what the digits are for: eight of them, negated or not, add up in int8
    assert np.abs(high[np.abs(e) <= 256]).max() == 9
    np.testing.assert_array_equal([low, high], [-low[::-1], -high[::-1]])  # digits of -e are minus those of e


@pytest.mark.parametrize(("scheme", "group"), [("tl1", 2), ("tl2", 3)])
@settings(max_examples=40)
@given(data=st.data())
def test_table_entries_are_the_sums_of_their_weights(scheme, group, data):
    x_q = data.draw(hnp.arrays(np.int8, st.integers(1, 60), elements=st.integers(-128, 127)))
    before = x_q.copy()
    entries = getattr(packing, f"entries_{scheme}")(x_q)
    tables = getattr(packing, f"tables_{scheme}")(x_q)
    np.testing.assert_array_equal(x_q, before)
    block = get_scheme(scheme).block
    k_padded = -(-x_q.size // block) * block
    assert entries.dtype == np.int16 and entries.shape == (k_padded // group, 16)
    assert tables.dtype == np.int8 and tables.shape == (k_padded // group, 2, 16)
    np.testing.assert_array_equal(28 * tables[:, 1].astype(int) + tables[:, 0], entries)
    x = np.zeros(k_padded, int)
    x[: x_q.size] = x_q
    combinations = list(itertools.product((-1, 0, 1), repeat=group))
    if scheme == "tl2":
        combinations = [c for c in combinations if c >= (0, 0, 0)]
    for p, i in itertools.product(range(len(entries)), range(16)):
        weights = combinations[i] if i < len(combinations) else (0,) * group
        assert entries[p, i] == sum(a * b for a, b in zip(weights, x[group * p :], strict=False))


@pytest.mark.parametrize("extreme", [-128, 127])
def test_table_entries_at_the_extremes(extreme):
    x_q = np.full(48, extreme, np.int8)
    assert np.abs(packing.entries_tl1(x_q)).max() == 2 * abs(extreme)
    assert np.abs(packing.entries_tl2(x_q)).max() == 3 * abs(extreme)


def test_tables_and_packed_bytes_give_the_product():
    """What a lookup kernel does, in a few lines of NumPy: look up, negate, add; equal to the integer product."""
    rng = np.random.default_rng(4)
    w, x_q = dense((67, 50), seed=5), rng.integers(-128, 128, 50).astype(np.int8)
    expected = w.astype(np.int32) @ x_q

    data = pack(w, "tl1").data.reshape(2, -1, 64)  # (T, Q, 64)
    entries = packing.entries_tl1(x_q).astype(np.int32).reshape(-1, 2, 16)  # (Q, half, 16)
    q = np.arange(data.shape[1])[:, None]
    sums = (entries[q, 0, data & 15] + entries[q, 1, data >> 4]).sum(axis=1)  # (T, 64)
    np.testing.assert_array_equal(sums.reshape(-1)[:67], expected)

    data = pack(w, "tl2").data.reshape(2, -1, 5, 64)  # (T, B, run, 64)
    entries = packing.entries_tl2(x_q).astype(np.int32).reshape(-1, 8, 16)  # (B, triple, 16)
    sums = np.zeros((2, 64), np.int32)
    for b, triple in itertools.product(range(data.shape[1]), range(8)):
        looked_up = entries[b, triple, data[:, b, triple // 2] >> 4 * (triple % 2) & 15]
        sums += np.where(data[:, b, 4] >> triple & 1, -looked_up, looked_up)
    np.testing.assert_array_equal(sums.reshape(-1)[:67], expected)


@pytest.mark.parametrize("name", ["entries_tl1", "tables_tl1", "entries_tl2", "tables_tl2"])
def test_tables_refuse(name):
    with pytest.raises(TypeError, match="x_q must be an int8 array, got float64"):
        getattr(packing, name)(np.zeros(4))
    for shape in [(), (0,), (2, 4)]:
        with pytest.raises(ValueError, match=r"x_q must be one token of shape \(K,\)"):
            getattr(packing, name)(np.zeros(shape, np.int8))


def test_a_packed_matrix_cannot_be_changed():
    packed = pack(np.ones((5, 70), np.int8), "i2")
    again = pickle.loads(pickle.dumps(packed))
    assert again == packed and not again.data.flags.writeable
    owner = packed.data.copy()
    view = owner[:]
    view.setflags(write=False)
    taken = PackedTernary(view, packed.shape, packed.scheme)
    owner[:] = 0
    assert taken == packed
    assert (packed == packed.data) is False


@pytest.mark.parametrize("shape", [(8,), (1, 2, 3), 8, ("a", "b"), None])
def test_refuses_what_is_no_shape(shape):
    with pytest.raises(ValueError, match=r"^shape must be two integers \(M, K\), got "):
        PackedTernary(np.zeros((2, 64), np.uint8), shape, "i2")


@pytest.mark.parametrize("name", ["i3", ["i2"], None])
def test_refuses_what_is_no_scheme(name):
    with pytest.raises(ValueError, match=r"^scheme must be one of i2, base3, tl1, tl2, got "):
        pack(np.ones((1, 1), np.int8), name)
