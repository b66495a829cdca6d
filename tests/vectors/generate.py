#!/usr/bin/env python3
"""Writes the golden vectors: what docs/format.md and the selection rules say, as bytes.

Written from the specification alone: standard library only, nothing shared with the Rust code, so that an error in
one of the two shows up as a difference. Deterministic.

    python3 tests/vectors/generate.py [DIRECTORY]      (default: the directory of this file)
"""

import json
import math
import pathlib
import struct
import sys

# ---- numbers ---------------------------------------------------------------------------------------------------


def f32(x):
    """The float32 nearest to x."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def decode(dtype, bits):
    if dtype == "f16":
        return struct.unpack("<e", struct.pack("<H", bits))[0]
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def encode(dtype, x):
    """The 16-bit pattern nearest to the float32 x, ties to even; NaN becomes the canonical one."""
    if math.isnan(x):
        return 0x7E00 if dtype == "f16" else 0x7FC0
    if dtype == "f16":
        try:
            return struct.unpack("<H", struct.pack("<e", x))[0]
        except OverflowError:
            return 0xFC00 if x < 0 else 0x7C00
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    low, high = bits & 0xFFFF, bits >> 16
    return high + (low > 0x8000 or (low == 0x8000 and high & 1 == 1))


# ---- 8-bit values ----------------------------------------------------------------------------------------------


def e4m3(code):
    """The number of an e4m3 code."""
    exponent, fraction = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    magnitude = math.ldexp(fraction, -9) if exponent == 0 else math.ldexp(8 + fraction, exponent - 10)
    return -magnitude if code & 0x80 else magnitude


def round_half_even(codes, q):
    """Of (number, code) pairs the one nearest to q; of two equally near ones that with the even code."""
    return min(codes, key=lambda pair: (abs(pair[0] - q), pair[1] & 1))[1]


E4M3 = [(e4m3(code), code) for code in range(0x7F)]
INT8 = [(float(n), n) for n in range(128)]


def scale_up(x):
    """The pattern of the smallest bfloat16 that is not below x >= 0."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return (bits >> 16) + (bits & 0xFFFF != 0)


def quantise(dtype, value_type, row, kept):
    """(scale pattern, code of each channel) of the kept elements of a row of 16-bit patterns."""
    numbers = {c: decode(dtype, row[c]) for c in kept}
    zeros = {c: 0 for c in kept}
    if any(not math.isfinite(x) for x in numbers.values()):
        return 0x7FC0, zeros
    largest = max((abs(x) for x in numbers.values()), default=0.0)
    scale = scale_up(f32(largest / (448 if value_type == "e4m3" else 127)))
    if scale == 0:
        return 0, zeros
    codes = {}
    for c, x in numbers.items():
        q = f32(x / decode("bf16", scale))
        code = round_half_even(E4M3 if value_type == "e4m3" else INT8, abs(q))
        if math.copysign(1, q) < 0:
            code = code | 0x80 if value_type == "e4m3" else -code & 0xFF
        codes[c] = code
    return scale, codes


def dequantise(dtype, value_type, scale, codes, dim):
    """What decompressing the row to `dtype` gives."""
    factor = decode("bf16", scale)
    number = {c: e4m3(code) if value_type == "e4m3" else float(code - 256 * (code > 127)) for c, code in codes.items()}
    return [encode(dtype, factor * number.get(c, 0.0)) for c in range(dim)]


# ---- selection -------------------------------------------------------------------------------------------------


def keep_largest(scores, keep):
    """Indices of the keep largest scores, ties to the lower index."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep])


def token_scores(dtype, row, weights):
    """A number per channel that orders as the score does; NaN above everything."""
    if weights is None:
        return [x & 0x7FFF for x in row]
    products = [f32(abs(decode(dtype, x)) * w) for x, w in zip(row, weights)]
    return [math.inf if math.isnan(p) else (1e300 if math.isinf(p) else abs(p)) for p in products]


def prune_token(dtype, rows, keep, weights=None):
    return [keep_largest(token_scores(dtype, row, weights), keep) for row in rows]


def prune_reference_ties(rows, dropped):
    kept = []
    for row in rows:
        threshold = sorted(x & 0x7FFF for x in row)[dropped - 1]
        kept.append({c for c, x in enumerate(row) if x & 0x7FFF >= threshold})
    return kept


def prune_channel(rows, keep):
    kept = [set() for _ in rows]
    for start in range(0, len(rows), 32):
        for c in range(len(rows[0])):
            for t in keep_largest([row[c] & 0x7FFF for row in rows[start : start + 32]], keep):
                kept[start + t].add(c)
    return kept


# ---- pages -----------------------------------------------------------------------------------------------------


def bitmap(kept, dim):
    word = sum(1 << c for c in kept)
    return word.to_bytes(dim // 8, "little")


def store(dtype, value_type, row, kept):
    """Scale bytes, value bytes, and what decompressing the row to `dtype` gives."""
    if value_type == dtype:
        stored = b"".join(struct.pack("<H", row[c]) for c in sorted(kept))
        return b"", stored, dense([row], [kept])[0]
    scale, codes = quantise(dtype, value_type, row, kept)
    back = dequantise(dtype, value_type, scale, codes, len(row))
    return struct.pack("<H", scale), bytes(codes[c] for c in sorted(kept)), back


class UniformPage:
    """A page in which rows are written one at a time, 0xFF elsewhere."""

    def __init__(self, value_type, dim, page_tokens, keep):
        eight = value_type in ("e4m3", "int8")
        sizes = [dim // 8, 2 if eight else 0, keep if eight else keep * 2]
        self.sections = [(page_tokens * sum(sizes[:i]), size) for i, size in enumerate(sizes)]
        self.bytes = bytearray(b"\xff" * (page_tokens * sum(sizes)))

    def write(self, index, *parts):
        """Bitmap, scale and values of a row."""
        for (start, size), part in zip(self.sections, parts):
            assert len(part) == size
            self.bytes[start + index * size : start + (index + 1) * size] = part


def pad16(data):
    return data + bytes(-len(data) % 16)


def ragged_page(dtype, value_type, dim, page_tokens, capacity, rows, kept):
    kept = kept + [set()] * (page_tokens - len(kept))
    rows = rows + [[0] * dim] * (page_tokens - len(rows))
    offsets = [0]
    for k in kept:
        offsets.append(offsets[-1] + len(k))
    assert offsets[-1] <= capacity
    head = b"".join(bitmap(k, dim) for k in kept)
    head += pad16(b"".join(struct.pack("<H", o) for o in offsets))
    parts = [store(dtype, value_type, row, k) for row, k in zip(rows, kept)]
    head += b"".join(scale for scale, _, _ in parts)
    stored = b"".join(values for _, values, _ in parts)
    size = 2 if value_type == dtype else 1
    # Unused values and padding mean nothing; a writer should make them zero.
    return head + pad16(stored + bytes(size * capacity - len(stored)))


# ---- inputs ----------------------------------------------------------------------------------------------------


class Source:
    """A linear congruential generator (Numerical Recipes' constants); its high bits are good enough here."""

    def __init__(self, seed):
        self.state = seed

    def next(self):
        self.state = (self.state * 1664525 + 1013904223) % 2**32
        return self.state >> 8

    def below(self, n):
        return self.next() % n

    def spread(self):
        """Between -4 and 4, denser near 0."""
        return sum(self.below(2001) - 1000 for _ in range(4)) / 1000

    def rows(self, dtype, tokens, dim, kind):
        return [[self.element(dtype, kind, t, c) for c in range(dim)] for t in range(tokens)]

    def element(self, dtype, kind, t, c):
        if kind == "normal":
            return encode(dtype, f32(self.spread()))
        if kind == "ties":
            return encode(dtype, (self.below(7) - 3) * 0.5)
        if kind == "zeros":
            return self.below(2) << 15 if self.below(4) else encode(dtype, f32(self.spread()))
        if kind == "subnormal":
            return (self.below(2) << 15) | self.below(0x404 if dtype == "f16" else 0x84)
        if kind == "outliers":
            return encode(dtype, f32((30 if c % 16 == 5 else 0) + self.spread()))
        if kind == "special":
            # NaN with any payload, one in sixteen infinite.
            exponent, fraction = (0x7C00, 0x3FF) if dtype == "f16" else (0x7F80, 0x7F)
            payload = self.below(fraction + 1) if self.below(16) else 0
            return (self.below(2) << 15) | exponent | payload
        assert kind == "bits"
        return self.below(0x10000)


def hex_rows(rows):
    return b"".join(struct.pack("<H", x) for row in rows for x in row).hex()


def hex_floats(numbers):
    return b"".join(struct.pack("<f", x) for x in numbers).hex()


def dense(rows, kept):
    return [[x if c in k else 0 for c, x in enumerate(row)] for row, k in zip(rows, kept)]


# ---- cases -----------------------------------------------------------------------------------------------------


def append_case(name, dtype, dim, page_tokens, keep, rows, slots=None, weights=None, center=None, value_type=None):
    """One page of one head. slots[i] is the row that token i is written to, -1 for none."""
    value_type = value_type or dtype
    slots = list(range(len(rows))) if slots is None else slots
    stored = rows
    if center is not None:
        stored = [[encode(dtype, f32(decode(dtype, x) - c)) for x, c in zip(row, center)] for row in rows]
    kept = prune_token(dtype, stored, keep, weights)
    page = UniformPage(value_type, dim, page_tokens, keep)
    written = {}
    for token, slot in enumerate(slots):
        if slot >= 0:
            scale, values, written[slot] = store(dtype, value_type, stored[token], kept[token])
            page.write(slot, bitmap(kept[token], dim), scale, values)
    return {
        "name": name,
        "dtype": dtype,
        "value_type": value_type,
        "head_dim": dim,
        "page_tokens": page_tokens,
        "keep": keep,
        "input": hex_rows(rows),
        "slots": slots,
        "weights": None if weights is None else hex_floats(weights),
        "center": None if center is None else hex_floats(center),
        "page": page.bytes.hex(),
        "rows": [{"row": slot, "dense": hex_rows([written[slot]])} for slot in sorted(written)],
    }


def worked_example():
    """The page of docs/format.md: 1.0, -2.0 and so on at chosen channels, zero elsewhere."""
    rows = [[0] * 64 for _ in range(3)]
    for t, c, x in [(0, 0, 1.0), (0, 9, -2.0), (0, 63, 0.5), (1, 5, 3.0), (2, 62, -0.25), (2, 63, 0.25)]:
        rows[t][c] = encode("f16", x)
    return rows


def append_cases():
    s = Source(1)
    yield append_case("worked example", "f16", 64, 16, 2, worked_example())
    yield append_case(
        "keep 39 of 128, the default page half filled", "f16", 128, 64, 39, s.rows("f16", 20, 128, "normal"),
    )
    yield append_case("keep 64 of 128", "bf16", 128, 16, 64, s.rows("bf16", 16, 128, "outliers"))
    yield append_case("keep 1", "f16", 64, 128, 1, s.rows("f16", 9, 64, "normal"))
    yield append_case("one dropped", "bf16", 256, 16, 255, s.rows("bf16", 4, 256, "normal"))
    yield append_case("all kept", "f16", 96, 32, 96, s.rows("f16", 5, 96, "bits"))
    yield append_case("ties go to the lower channel", "bf16", 96, 32, 29, s.rows("bf16", 12, 96, "ties"))
    yield append_case("fewer non-zeros than kept", "f16", 64, 16, 33, s.rows("f16", 16, 64, "zeros"))
    yield append_case("all zeros of both signs", "f16", 64, 16, 20, [[0x8000 * (c % 2) for c in range(64)]])
    yield append_case("subnormals", "f16", 128, 16, 40, s.rows("f16", 6, 128, "subnormal"))
    yield append_case("subnormals, bf16", "bf16", 64, 16, 20, s.rows("bf16", 6, 64, "subnormal"))
    yield append_case("NaN and infinity rank highest", "f16", 64, 16, 9, s.rows("f16", 16, 64, "bits"))
    yield append_case("NaN and infinity rank highest, bf16", "bf16", 64, 16, 3, s.rows("bf16", 16, 64, "bits"))
    yield append_case(
        "slots in any order, skipped, repeated", "f16", 64, 16, 13, s.rows("f16", 6, 64, "normal"),
        slots=[15, -1, 0, 7, 0, -1],
    )
    weights = [f32(s.below(1000) / 250) for _ in range(64)]
    yield append_case("weights", "f16", 64, 16, 20, s.rows("f16", 8, 64, "normal"), weights=weights)
    steps = [float(s.below(3)) for _ in range(128)]
    yield append_case(
        "weights with ties and zeros", "bf16", 128, 16, 50, s.rows("bf16", 8, 128, "ties"), weights=steps,
    )
    yield append_case(
        "weights against NaN and infinity", "f16", 64, 16, 9, s.rows("f16", 8, 64, "bits"),
        weights=[float(c % 3) for c in range(64)],
    )
    tiny = [2.0**-140 * (1 + c % 5) for c in range(64)]
    yield append_case(
        "scores that are subnormal in float32", "f16", 64, 16, 20, s.rows("f16", 8, 64, "ties"), weights=tiny,
    )
    center = [f32(s.spread() + (30 if c % 16 == 5 else 0)) for c in range(128)]
    yield append_case("centre", "f16", 128, 16, 39, s.rows("f16", 8, 128, "outliers"), center=center)
    yield append_case("centre, bf16", "bf16", 128, 16, 39, s.rows("bf16", 8, 128, "outliers"), center=center)
    yield append_case(
        "centre and weights", "f16", 64, 16, 20, s.rows("f16", 8, 64, "outliers"), center=center[:64],
        weights=weights,
    )
    yield append_case(
        "centre against NaN, infinity and overflow", "f16", 64, 16, 20, s.rows("f16", 8, 64, "bits"),
        center=[f32(2000.0 * (c % 9 - 4)) for c in range(64)],
    )
    yield append_case("NaN ranks by its bits", "f16", 64, 16, 20, s.rows("f16", 4, 64, "special"))
    yield append_case(
        "every NaN score ranks the same", "f16", 64, 16, 20, s.rows("f16", 4, 64, "special"), weights=weights,
    )
    yield append_case(
        "every NaN score ranks the same, bf16", "bf16", 64, 16, 20, s.rows("bf16", 4, 64, "special"),
        weights=[0.0] * 32 + [1.0] * 32,
    )
    yield append_case(
        "every centred NaN is the same", "bf16", 64, 16, 20, s.rows("bf16", 4, 64, "special"), center=center[:64],
    )
    yield append_case("worked example in 8 bits", "f16", 64, 16, 2, worked_example(), value_type="int8")
    for value_type in ["e4m3", "int8"]:
        s = Source(4)

        def case(name, dtype, dim, page_tokens, keep, rows, **options):
            name = f"{value_type}: {name}"
            return append_case(name, dtype, dim, page_tokens, keep, rows, value_type=value_type, **options)

        yield case("keep 39 of 128", "f16", 128, 64, 39, s.rows("f16", 20, 128, "normal"))
        yield case("outliers", "bf16", 128, 16, 64, s.rows("bf16", 8, 128, "outliers"))
        yield case("ties between codes", "bf16", 96, 32, 29, s.rows("bf16", 12, 96, "ties"))
        yield case("all kept, all magnitudes", "f16", 256, 16, 256, ramp("f16", 256))
        yield case("zeros of both signs", "f16", 64, 16, 20, [[0x8000 * (c % 2) for c in range(64)]])
        yield case("subnormals", "f16", 64, 16, 20, s.rows("f16", 6, 64, "subnormal"))
        yield case("scales that are subnormal", "bf16", 64, 16, 20, s.rows("bf16", 6, 64, "subnormal") + tiny_rows())
        yield case("NaN and infinity make a row NaN", "f16", 64, 16, 9, s.rows("f16", 16, 64, "bits"))
        yield case("anything in bf16", "bf16", 64, 16, 3, s.rows("bf16", 16, 64, "bits"))
        yield case("largest numbers", "f16", 64, 16, 9, [[0x7BFF - c // 3 | 0x8000 * (c % 2) for c in range(64)]])
        yield case("largest numbers, bf16", "bf16", 64, 16, 9, [[0x7F7F - c // 3 for c in range(64)]])
        yield case(
            "centre and weights, slots in any order", "bf16", 64, 16, 20, s.rows("bf16", 4, 64, "outliers"),
            center=center[:64], weights=weights, slots=[9, -1, 15, 0],
        )


def ramp(dtype, dim):
    """Rows whose elements are close to every multiple of 1/128 and of 1/8 of a code."""
    return [[encode(dtype, f32((c * step + 1) / 128 - 1)) for c in range(dim)] for step in (1, 0.25, 0.0625)]


def tiny_rows():
    """A row for each of the smallest bfloat16 magnitudes that makes another scale."""
    return [[largest, 0x8001] + [c % (largest + 1) for c in range(62)] for largest in (1, 2, 126, 127, 128, 189, 255)]


def compress_case(name, dtype, dim, page_tokens, capacity, rows, kept, value_type=None):
    value_type = value_type or dtype
    return {
        "name": name,
        "dtype": dtype,
        "value_type": value_type,
        "head_dim": dim,
        "page_tokens": page_tokens,
        "capacity": capacity,
        "input": hex_rows(rows),
        "mask": b"".join(bitmap(k, dim) for k in kept).hex(),
        "page": ragged_page(dtype, value_type, dim, page_tokens, capacity, rows, kept).hex(),
        "dense": hex_rows([store(dtype, value_type, row, k)[2] for row, k in zip(rows, kept)]),
    }


def compress_cases():
    s = Source(2)
    kept = [{0, 9, 63}, set(), {62}]
    yield compress_case("worked example", "f16", 64, 16, 5, worked_example(), kept)
    rows = s.rows("bf16", 32, 96, "normal")
    kept = [keep_largest([s.next() for _ in range(96)], s.below(97)) for _ in rows]
    yield compress_case("random counts, exactly full", "bf16", 96, 32, sum(map(len, kept)), rows, kept)
    rows = s.rows("f16", 7, 128, "bits")
    kept = [keep_largest([s.next() for _ in range(128)], n) for n in [128, 0, 1, 127, 64, 0, 8]]
    yield compress_case("full and empty rows, room left", "f16", 128, 64, 333, rows, kept)
    yield compress_case(
        "nothing kept, no capacity", "f16", 256, 16, 0, s.rows("f16", 2, 256, "normal"), [set(), set()],
    )
    rows = s.rows("f16", 16, 64, "bits")
    yield compress_case("everything kept", "f16", 64, 16, 1024, rows, [set(range(64))] * 16)
    rows = s.rows("f16", 32, 64, "normal")
    yield compress_case("channel direction, 10 of 32", "f16", 64, 32, 640, rows, prune_channel(rows, 10))
    for value_type in ["e4m3", "int8"]:
        rows = s.rows("f16", 7, 128, "zeros") + s.rows("f16", 2, 128, "bits")
        kept = [keep_largest([s.next() for _ in range(128)], n) for n in [128, 0, 1, 127, 63, 0, 8, 5, 33]]
        yield compress_case(f"{value_type}, room left", "f16", 128, 64, 377, rows, kept, value_type)


def prune_case(name, dtype, dim, rows, kept, **selection):
    return {
        "name": name,
        "dtype": dtype,
        "head_dim": dim,
        "selection": selection,
        "input": hex_rows(rows),
        "mask": b"".join(bitmap(k, dim) for k in kept).hex(),
        "output": hex_rows(dense(rows, kept)),
    }


def prune_cases():
    s = Source(3)
    rows = s.rows("f16", 8, 128, "normal")
    yield prune_case("token", "f16", 128, rows, prune_token("f16", rows, 39), token=39)
    rows = s.rows("bf16", 8, 64, "ties")
    yield prune_case("token, ties", "bf16", 64, rows, prune_token("bf16", rows, 32), token=32)
    for dropped in [1, 64, 128]:
        rows = s.rows("f16", 4, 128, "ties")
        kept = prune_reference_ties(rows, dropped)
        yield prune_case(
            f"reference ties, {dropped}-th smallest of 128", "f16", 128, rows, kept,
            token_reference_ties=dropped,
        )
    rows = s.rows("f16", 4, 128, "bits")
    yield prune_case(
        "reference ties, NaN", "f16", 128, rows, prune_reference_ties(rows, 89), token_reference_ties=89,
    )
    rows = s.rows("f16", 64, 64, "ties")
    yield prune_case("channel, ties go to the older token", "f16", 64, rows, prune_channel(rows, 10), channel=10)
    rows = s.rows("bf16", 32, 96, "bits")
    yield prune_case("channel, NaN", "bf16", 96, rows, prune_channel(rows, 16), channel=16)


# ---- rejects ---------------------------------------------------------------------------------------------------


def page_rejects():
    """Damaged pages with the number of rows that count and the error that must come back."""
    uniform = {"value_type": "f16", "head_dim": 64, "page_tokens": 16, "keep": 2}
    good = bytes.fromhex(append_case("", "f16", 64, 16, 2, worked_example())["page"])
    ragged = {"value_type": "f16", "head_dim": 64, "page_tokens": 16, "capacity": 5}
    ragged_good = ragged_page("f16", "f16", 64, 16, 5, worked_example(), [{0, 9, 63}, set(), {62}])
    eight = bytes.fromhex(append_case("", "f16", 64, 16, 2, worked_example(), value_type="int8")["page"])

    def patch(page, at, new):
        return page[:at] + new + page[at + len(new) :]

    def case(name, format, page, rows, error, message):
        return {"name": name, **format, "rows": rows, "page": page.hex(), "error": error, "message": message}

    damaged = "page is damaged: "
    yield case("good page", uniform, good, 3, None, None)
    yield case("good page, unused rows hold anything", uniform, good[:24] + bytes(range(168)), 3, None, None)
    yield case("no rows count", uniform, bytes(192), 0, None, None)
    yield case("empty", uniform, b"", 0, "BufferTooSmall", "page has 0 bytes; needed: 192")
    yield case("one byte short", uniform, good[:-1], 3, "BufferTooSmall", "page has 191 bytes; needed: 192")
    yield case(
        "more rows than the page has", uniform, good, 17, "InvalidArgument",
        "rows is 17; allowed: 0 to page_tokens (16)",
    )
    yield case(
        "bit missing", uniform, patch(good, 8, b"\x01"), 3, "CorruptData",
        damaged + "row 1 has 1 bits set, keep is 2",
    )
    yield case(
        "bit too many", uniform, patch(good, 7, b"\x80"), 3, "CorruptData",
        damaged + "row 0 has 3 bits set, keep is 2",
    )
    yield case("row never written", uniform, good, 4, "CorruptData", damaged + "row 3 has 64 bits set, keep is 2")
    yield case("all zero", uniform, bytes(192), 1, "CorruptData", damaged + "row 0 has 0 bits set, keep is 2")
    yield case("good ragged page", ragged, ragged_good, 16, None, None)
    yield case(
        "ragged, unused rows hold anything", ragged,
        patch(patch(ragged_good, 24, b"\x55" * 104), 136, b"\xff" * 26), 3, None, None,
    )
    yield case(
        "ragged, one byte short", ragged, ragged_good[:-1], 16, "BufferTooSmall",
        "page has 191 bytes; needed: 192",
    )
    yield case(
        "first offset not 0", ragged, patch(ragged_good, 128, b"\x01\x00"), 3, "CorruptData",
        damaged + "row 0 starts at value 1, must be 0",
    )
    yield case(
        "offset beyond the bits", ragged, patch(ragged_good, 130, b"\x04\x00"), 3, "CorruptData",
        damaged + "row 0 spans values 0 to 4 but has 3 bits set",
    )
    yield case(
        "offsets fall", ragged, patch(ragged_good, 132, b"\x02\x00"), 3, "CorruptData",
        damaged + "row 1 spans values 3 to 2 but has 0 bits set",
    )
    yield case(
        "bits without offsets", ragged, patch(ragged_good, 8, b"\x01"), 3, "CorruptData",
        damaged + "row 1 spans values 3 to 3 but has 1 bits set",
    )
    full = patch(patch(ragged_good, 8, b"\x07"), 132, b"\x06\x00")
    yield case(
        "past the capacity", ragged, full, 3, "CorruptData", damaged + "row 1 ends at value 6, capacity is 5",
    )
    for value_type in ["e4m3", "int8"]:
        scaled = {**uniform, "value_type": value_type}
        yield case(f"{value_type}, good page", scaled, eight, 3, None, None)
        yield case(f"{value_type}, any scale and code", scaled, patch(eight, 128, bytes(range(192, 256))), 3, None, None)
        yield case(
            f"{value_type}, one byte short", scaled, eight[:-1], 3, "BufferTooSmall",
            "page has 191 bytes; needed: 192",
        )
        yield case(
            f"{value_type}, bit missing", scaled, patch(eight, 8, b"\x01"), 3, "CorruptData",
            damaged + "row 1 has 1 bits set, keep is 2",
        )
    ragged_eight = ragged_page("f16", "int8", 64, 16, 5, worked_example(), [{0, 9, 63}, set(), {62}])
    scaled = {**ragged, "value_type": "int8"}
    yield case("ragged in 8 bits, good page", scaled, ragged_eight, 16, None, None)
    yield case(
        "ragged in 8 bits, offset beyond the bits", scaled, patch(ragged_eight, 130, b"\x04\x00"), 3, "CorruptData",
        damaged + "row 0 spans values 0 to 4 but has 3 bits set",
    )


def format_rejects():
    """Descriptors that no page has."""

    def case(error, message, value_type_code=1, head_dim=64, page_tokens=16, **rows):
        return {
            "value_type_code": value_type_code, "head_dim": head_dim, "page_tokens": page_tokens, **(rows or {"keep": 2}),
            "error": error, "message": message,
        }

    for code in [0, 3, 15, 18, 32, 2**32 - 1]:
        message = f"value_type is {code}; allowed: 1 (f16), 2 (bf16), 16 (e4m3), 17 (int8)"
        yield case("InvalidArgument", message, value_type_code=code)
    for dim in [0, 63, 80, 512]:
        yield case("Unsupported", f"head_dim is {dim}; supported: 64, 96, 128, 256", head_dim=dim)
    for tokens in [0, 8, 48, 256]:
        yield case("Unsupported", f"page_tokens is {tokens}; supported: 16, 32, 64, 128", page_tokens=tokens)
    for keep in [0, 65]:
        yield case("InvalidArgument", f"keep is {keep}; allowed: 1 to head_dim (64)", keep=keep)
    yield case("InvalidArgument", "capacity is 1025; allowed: 0 to page_tokens * head_dim (1024)", capacity=1025)


def main():
    directory = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else __file__)
    directory = directory if directory.is_dir() else directory.parent
    files = {
        "append.json": append_cases(),
        "compress.json": compress_cases(),
        "prune.json": prune_cases(),
        "page_rejects.json": page_rejects(),
        "format_rejects.json": format_rejects(),
    }
    for name, cases in files.items():
        text = json.dumps(list(cases), indent=1) + "\n"
        (directory / name).write_text(text, encoding="ascii", newline="\n")


if __name__ == "__main__":
    main()
