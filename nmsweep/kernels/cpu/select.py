"""The selection of the cpu backend: a min/max network over many groups at once, written as LLVM vectors.

A block is a vector's lanes times m keys, read in memory order. Transposed, vector c holds channel c of every group, so one vector
minimum and maximum is one comparator of a sorting network for all groups; of the sorted result only the n-th largest is used, and
LLVM drops the comparators that do not reach it. Whoever is above that threshold is kept, then equals from the lowest channel up until
n are kept: as bits, since a group's channels are neighbours in memory and so one number is its part of a bitmap of the block.
Nothing depends on the data: the time of a block is the same for every input.
"""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types
from numba.core import cgutils

from nmsweep.kernels.cpu.lanes import VECTOR_BITS, jit, literal_intrinsic, pointer, population, trailing_zeros

LARGEST_M = 64

Vectors = list[Any]  # ir.Value of type <lanes x iK>


def lanes(bits: int) -> int:
    """Lanes of one vector of `bits`-wide numbers."""
    return VECTOR_BITS // bits


def channels_of_lane(m: int) -> int:
    """Channels that a lane has in a block: one group of m, or as many as fill a byte."""
    return max(m, 8)


def block_size(m: int, bits: int) -> int:
    """Channels in one block of `bits`-wide keys."""
    return lanes(bits) * channels_of_lane(m)


def odd_even_mergesort(size: int) -> list[tuple[int, int]]:
    """Comparators (low, high) of Batcher's network for a power of two."""
    pairs = []
    p = 1
    while p < size:
        k = p
        while k:
            for j in range(k % p, size - k, 2 * k):
                for i in range(min(k, size - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        pairs.append((i + j, i + j + k))
            k //= 2
        p *= 2
    return pairs


def _exchanges(m: int, width: int) -> list[tuple[int, int]]:
    """Pairs (bit of the vector number, bit of the lane) whose exchange transposes m vectors of `width` lanes; its own inverse."""
    both = min(m, width).bit_length() - 1
    return [(k + max(m // width, 1).bit_length() - 1, k) for k in range(both)]


def channel_of_vector(m: int, width: int) -> list[int]:
    """The channel that vector v holds after the transposition."""
    runs = max(m // width, 1)
    return [(v % runs) * width + v // runs if runs > 1 else v for v in range(m)]


def _transpose(builder: Any, vectors: Vectors, width: int) -> Vectors:
    index = ir.VectorType(ir.IntType(32), width)
    vectors = list(vectors)
    for vector_bit, lane_bit in _exchanges(len(vectors), width):
        step = 1 << lane_bit
        low = ir.Constant(index, [lane if not lane & step else width + lane - step for lane in range(width)])
        high = ir.Constant(index, [lane + step if not lane & step else width + lane for lane in range(width)])
        for v in range(len(vectors)):
            if not v & (1 << vector_bit):
                a, b = vectors[v], vectors[v | (1 << vector_bit)]
                vectors[v] = builder.shuffle_vector(a, b, low)
                vectors[v | (1 << vector_bit)] = builder.shuffle_vector(a, b, high)
    return vectors


def _nth_largest(builder: Any, keys: Vectors, n: int) -> Any:
    """Both halves are sorted; of the pairs with n − 1 keys before them, one half's key and the other's, the smallest maximum."""

    def smaller(a: Any, b: Any) -> Any:
        return builder.select(builder.icmp_signed("<", a, b), a, b)

    def larger(a: Any, b: Any) -> Any:
        return builder.select(builder.icmp_signed(">", a, b), a, b)

    half = len(keys) // 2
    if half == 0:
        return keys[0]
    halves = [list(keys[:half]), list(keys[half:])]
    for ordered in halves:  # descending
        for i, j in odd_even_mergesort(half):
            ordered[i], ordered[j] = larger(ordered[i], ordered[j]), smaller(ordered[i], ordered[j])
    found = None
    for i in range(max(0, n - 1 - half), min(half, n - 1) + 1):  # a half that is used up has no key at `half`
        pair = halves[0][i : i + 1] + halves[1][n - 1 - i : n - i]
        largest = pair[0] if len(pair) == 1 else larger(pair[0], pair[1])
        found = largest if found is None else smaller(found, largest)
    return found


def _mark(builder: Any, keys: Vectors, n: int, words: Vectors, first: int, with_equals: bool) -> None:
    """Set the bits, from bit `first` of the words on, of the n largest of keys in channel order.

    Of the equals of the n-th those from the first channel up, or with_equals all.
    """
    integer = keys[0].type

    def splat(value: int) -> Any:
        return ir.Constant(integer, [value] * integer.count)

    bits = integer.element.width
    threshold = _nth_largest(builder, keys, n)
    room = splat(n)
    for key in keys:
        room = builder.add(room, builder.sext(builder.icmp_signed(">", key, threshold), integer))
    for bit, key in enumerate(keys, first):
        if with_equals:
            flag = builder.icmp_signed(">=", key, threshold)
        else:
            equal, fits = builder.icmp_signed("==", key, threshold), builder.icmp_signed(">", room, splat(0))
            flag = builder.or_(builder.icmp_signed(">", key, threshold), builder.and_(equal, fits))
            room = builder.add(room, builder.sext(equal, integer))
        word = words[bit // bits]
        one = splat((1 << bit % bits) - (1 << bits if bit % bits == bits - 1 else 0))
        words[bit // bits] = builder.select(flag, builder.or_(word, one), word)


def _interleaved(builder: Any, vectors: Vectors) -> Vectors:
    """Lane 0 of each vector, then lane 1 of each, …; their number is a power of two."""
    if len(vectors) == 1:
        return vectors
    even, odd = _interleaved(builder, vectors[::2]), _interleaved(builder, vectors[1::2])
    width = vectors[0].type.count
    index = ir.VectorType(ir.IntType(32), width)
    places = [lane // 2 + width * (lane % 2) for lane in range(2 * width)]
    halves = [ir.Constant(index, places[:width]), ir.Constant(index, places[width:])]
    return [builder.shuffle_vector(a, b, half) for a, b in zip(even, odd, strict=True) for half in halves]


def _in_memory_order(builder: Any, words: Vectors, channels: int) -> Vectors:
    """Words by group, from words by lane after a transposition: lane q · channels + v has group v · runs + q."""
    width = words[0].type.count
    if channels >= width:
        return words
    runs = width // channels  # groups in one vector
    index = ir.VectorType(ir.IntType(32), width)
    order = ir.Constant(index, [(group % runs) * channels + group // runs for group in range(width)])
    return [builder.shuffle_vector(word, word, order) for word in words]


def _bitmap(builder: Any, words: Vectors, channels: int) -> Vectors:
    """The bits of all channels in memory order, from words by group."""
    width, bits = words[0].type.count, words[0].type.element.width
    if channels < bits:
        return [builder.trunc(word, ir.VectorType(ir.IntType(channels), width)) for word in words]
    return _interleaved(builder, words)


def _words(builder: Any, source: Any, n: int, m: int, bits: int, infinity: int, with_equals: bool) -> Vectors:
    """Which channels of a block are kept: a word of bits for each group, or several words. See keep_block and mark_block."""
    width, channels = lanes(bits), channels_of_lane(m)
    integer = ir.VectorType(ir.IntType(bits), width)

    def splat(value: int) -> Any:
        return ir.Constant(integer, [value] * width)

    keys = [builder.load(_at(builder, source, integer, v), align=bits // 8) for v in range(channels)]
    if infinity >= 0:
        keys = [builder.and_(key, splat((1 << (bits - 1)) - 1)) for key in keys]
        nan = splat(infinity + 1)
        keys = [builder.select(builder.icmp_signed("<", key, nan), key, nan) for key in keys]
    channel = channel_of_vector(channels, width)
    transposed = _transpose(builder, keys, width)
    by_channel = [transposed[v] for v in sorted(range(channels), key=channel.__getitem__)]
    words = [splat(0)] * max(1, channels // bits)
    for first in range(0, channels, m):
        _mark(builder, by_channel[first : first + m], n, words, first, with_equals)
    return _in_memory_order(builder, words, channels)


def _at(builder: Any, address: Any, kind: Any, place: int) -> Any:
    """The pointer to the place-th element of a kind from an integer address on."""
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [ir.Constant(ir.IntType(64), place)])


def _store(builder: Any, address: Any, bitmap: Vectors) -> None:
    for place, word in enumerate(bitmap):
        builder.store(word, _at(builder, address, word.type, place), align=1)


def _expand(builder: Any, bitmap: Any, source: Any, target: Any, size: int, total: int) -> Any:
    """Where a bit of a bitmap is set the `size`-wide number of the source, or all ones without a source; else 0. How many are set."""
    number, width = ir.IntType(64), lanes(size)
    chunk = ir.VectorType(ir.IntType(size), width)
    kept = ir.Constant(number, 0)
    for place in range(total // width):
        flags = builder.load(_at(builder, bitmap, ir.IntType(width), place), align=1)
        kept = builder.add(kept, builder.zext(builder.ctpop(flags), number))
        flags = builder.bitcast(flags, ir.VectorType(ir.IntType(1), width))
        if source is None:
            value = builder.sext(flags, chunk)
        else:
            value = builder.load(_at(builder, source, chunk, place), align=size // 8)
            value = builder.select(flags, value, ir.Constant(chunk, [0] * width))
        builder.store(value, _at(builder, target, chunk, place), align=size // 8)
    return kept


def _populations(builder: Any, words: Any) -> Any:
    """How many bits of each lane are set."""
    kind = words.type
    name = f"llvm.ctpop.v{kind.count}i{kind.element.width}"
    function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(kind, [kind]), name)
    return builder.call(function, [words])


def _signature(result: Any, *given: Any) -> Any:
    return result(*(types.literal(each) if isinstance(each, int) else each for each in given))


@literal_intrinsic
def keep_block(typing: Any, source: Any, target: Any, n: Any, m: Any, bits: Any, infinity: Any) -> Any:
    """Prune one block: (source address, target address) -> channels kept. n, m, bits and infinity are literals.

    infinity ≥ 0: source holds x as `bits`-wide patterns, and target gets x where kept, else 0; infinity is the pattern of +inf.
    infinity < 0: source holds `bits`-wide keys (signed, higher is kept), and target gets masks, −infinity bits wide, all ones where kept.
    """
    n, m, bits, infinity = (each.literal_value for each in (n, m, bits, infinity))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = arguments[:2]
        words = _bitmap(builder, _words(builder, source, n, m, bits, infinity, with_equals=False), channels_of_lane(m))
        place = cgutils.alloca_once(builder, ir.ArrayType(words[0].type, len(words)))
        bitmap = builder.ptrtoint(place, ir.IntType(64))
        _store(builder, bitmap, words)
        size = bits if infinity >= 0 else -infinity
        return _expand(builder, bitmap, source if infinity >= 0 else None, target, size, block_size(m, bits))

    return _signature(types.int64, source, target, n, m, bits, infinity), codegen


@literal_intrinsic
def mark_block(typing: Any, keys: Any, bitmap: Any, n: Any, m: Any, bits: Any, with_equals: Any) -> Any:
    """The bitmap of one block: (address of `bits`-wide keys, address of the bitmap) -> lanes with too many bits, as bits.

    n, m, bits and with_equals are literals. Only with_equals, which keeps every equal of the n-th highest key, are there too many.
    """
    n, m, bits, with_equals = (each.literal_value for each in (n, m, bits, with_equals))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        channels, width, number = channels_of_lane(m), lanes(bits), ir.IntType(64)
        words = _words(builder, arguments[0], n, m, bits, -1, with_equals)
        _store(builder, arguments[1], _bitmap(builder, words, channels))
        if not with_equals:
            return ir.Constant(number, 0)
        counts = _populations(builder, words[0])
        for word in words[1:]:
            counts = builder.add(counts, _populations(builder, word))
        exact = ir.Constant(counts.type, [n * (channels // m)] * width)
        return builder.zext(builder.bitcast(builder.icmp_unsigned("!=", counts, exact), ir.IntType(width)), number)

    return _signature(types.int64, keys, bitmap, n, m, bits, with_equals), codegen


@literal_intrinsic
def mask_block(typing: Any, bitmap: Any, target: Any, size: Any, total: Any) -> Any:
    """A bitmap of `total` bits as `size`-wide masks, all ones where set: (its address, target address) -> bits set. Sizes are literals."""
    size, total = size.literal_value, total.literal_value

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _expand(builder, arguments[0], None, arguments[1], size, total)

    return _signature(types.int64, bitmap, target, size, total), codegen


def source_stamp() -> int:
    """Changes with the source of the cpu backend; a part of numba's cache key, which by itself sees one file only."""
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))


def compiled(signature: Any, function: Any) -> Any:
    """Compile a C callback, cached on disk where some folder can be written."""
    try:
        return cfunc(signature, cache=True)(function)
    except RuntimeError:  # numba: no locator available
        return cfunc(signature)(function)


@cache
def block_kernel(n: int, m: int, bits: int, infinity: int) -> Any:
    """Compiled `(source, 0, target, blocks) -> channels kept` over consecutive blocks; see keep_block."""
    read = block_size(m, bits) * (bits // 8)
    written = read if infinity >= 0 else block_size(m, bits) * -infinity // 8
    stamp = source_stamp()

    def run(source: int, short: int, target: int, blocks: int) -> int:
        kept = stamp - stamp
        for block in range(blocks):
            kept += keep_block(source + block * read, target + block * written, n, m, bits, infinity)
        return kept

    return compiled(_BLOCKS, run)


_BLOCKS = types.int64(types.int64, types.int64, types.int64, types.int64)
_FEW = 8  # groups that are mended one by one; for more of them the block is done anew


@cache
def wide_kernel(n: int, m: int, size: int) -> Any:
    """Compiled `(keys, short, target, blocks) -> channels kept` over consecutive blocks of 16-bit keys.

    The short keys, 16 bits and ordered as the 32-bit keys are, decide nearly everything at half the cost. A group in which equals
    of the n-th short key are too many is decided by the keys themselves. Masks are `size` bits wide; after the short keys there is
    room for the bitmap of one block.
    """
    total, channels = block_size(m, 16), channels_of_lane(m)
    stamp = source_stamp()

    def run(source: int, short: int, target: int, blocks: int) -> int:
        kept = stamp - stamp
        place = short + blocks * total * 2
        bitmap = carray(pointer(place), (total // 8,), np.uint8)
        for block in range(blocks):
            keys = source + block * total * 4
            lanes = mark_block(short + block * total * 2, place, n, m, 16, 1)
            if population(lanes) > _FEW:
                mark_block(keys, place, n, m, 32, 0)
                mark_block(keys + total * 2, place + total // 16, n, m, 32, 0)
            elif lanes != 0:
                mend(carray(pointer(keys), (total,), np.int32), bitmap, lanes, channels, n, m)
            kept += mask_block(place, target + block * total * size // 8, size, total)
        return kept

    return compiled(_BLOCKS, run)


@jit
def mend(keys: Any, bitmap: Any, lanes: Any, channels: Any, n: Any, m: Any) -> None:
    """Clear the bits of the lowest keys, of equals the last, in groups of m with more than n bits.

    keys: int32 [lanes · channels]; bitmap: uint8 with a bit for each; lanes: int64, a bit for each lane to look at.
    """
    while lanes != 0:
        lane = trailing_zeros(lanes)
        lanes &= lanes - 1
        for first in range(lane * channels, (lane + 1) * channels, m):
            excess = -n
            for c in range(first, first + m):
                excess += (bitmap[c >> 3] >> (c & 7)) & 1
            for _ in range(excess):
                least, worst = np.int32(0x7FFFFFFF), first
                for c in range(first, first + m):
                    if (bitmap[c >> 3] >> (c & 7)) & 1 != 0 and keys[c] <= least:
                        least, worst = keys[c], c
                bitmap[worst >> 3] &= ~(1 << (worst & 7))
