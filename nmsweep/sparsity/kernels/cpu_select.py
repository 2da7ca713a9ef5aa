"""The selection of the cpu backend: a min/max network over many groups at once, written as LLVM vectors.

A block is `lanes` groups of m keys, read in memory order. Transposed, vector c holds channel c of every group, so one vector minimum
and maximum is one comparator of a sorting network for all groups; of the sorted result only the n-th largest is used, and LLVM drops
the comparators that do not reach it. Whoever is above that threshold is kept, then equals from the lowest channel up until n are
kept. Nothing depends on the data: the time of a block is the same for every input.
"""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import cfunc, types

from .cpu_lanes import VECTOR_BITS, literal_intrinsic

LARGEST_M = 64

Vectors = list[Any]  # ir.Value of type <lanes x iK>


def lanes(bits: int) -> int:
    """Groups in one block of `bits`-wide keys."""
    return VECTOR_BITS // bits


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


def _keep(builder: Any, keys: Vectors, n: int, width: int) -> Vectors:
    """Masks <width x i1> of the n largest, equals from the first vector's channel up, for transposed keys in channel order."""
    integer = keys[0].type
    ordered = list(keys)
    for i, j in odd_even_mergesort(len(keys)):
        less = builder.icmp_signed("<", ordered[i], ordered[j])
        small, large = builder.select(less, ordered[i], ordered[j]), builder.select(less, ordered[j], ordered[i])
        ordered[i], ordered[j] = small, large
    threshold = ordered[len(keys) - n]
    room = ir.Constant(integer, [n] * width)
    above = [builder.icmp_signed(">", key, threshold) for key in keys]
    for flag in above:
        room = builder.add(room, builder.sext(flag, integer))
    masks = []
    for key, flag in zip(keys, above, strict=True):
        equal = builder.icmp_signed("==", key, threshold)
        fits = builder.icmp_signed(">", room, ir.Constant(integer, [0] * width))
        room = builder.add(room, builder.sext(equal, integer))
        masks.append(builder.or_(flag, builder.and_(equal, fits)))
    return masks


@literal_intrinsic
def keep_block(typing: Any, source: Any, target: Any, n: Any, m: Any, bits: Any, infinity: Any) -> Any:
    """Prune one block: (source address, target address) -> channels kept. n, m, bits and infinity are literals.

    infinity < 0: source holds keys (signed, higher is kept), target gets masks (all ones where kept).
    infinity ≥ 0: source holds x as bit patterns and target gets x where kept, else 0; infinity is the pattern of +inf.
    """
    n, m, bits, infinity = (each.literal_value for each in (n, m, bits, infinity))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        width = lanes(bits)
        integer = ir.VectorType(ir.IntType(bits), width)
        source, target = (builder.inttoptr(each, integer.as_pointer()) for each in arguments[:2])
        number = ir.IntType(64)

        def splat(value: int) -> Any:
            return ir.Constant(integer, [value] * width)

        def at(base: Any, v: int) -> Any:
            return builder.gep(base, [ir.Constant(number, v)])

        def load(v: int) -> Any:
            return builder.load(at(source, v), align=bits // 8)

        keys = [load(v) for v in range(m)]
        if infinity >= 0:
            keys = [builder.and_(key, splat((1 << (bits - 1)) - 1)) for key in keys]
            nan = splat(infinity + 1)
            keys = [builder.select(builder.icmp_signed("<", key, nan), key, nan) for key in keys]
        channel = channel_of_vector(m, width)
        transposed = _transpose(builder, keys, width)
        by_channel = [transposed[v] for v in sorted(range(m), key=channel.__getitem__)]
        flags = _keep(builder, by_channel, n, width)
        masks = [builder.sext(flags[channel[v]], integer) for v in range(m)]
        kept = splat(0)
        for mask in masks:
            kept = builder.sub(kept, mask)
        for v, mask in enumerate(_transpose(builder, masks, width)):
            value = mask if infinity < 0 else builder.and_(load(v), mask)
            builder.store(value, at(target, v), align=bits // 8)
        wide = ir.VectorType(ir.IntType(32), width)
        name = f"llvm.vector.reduce.add.v{width}i32"
        add = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(ir.IntType(32), [wide]), name
        )
        return builder.zext(builder.call(add, [builder.zext(kept, wide)]), number)

    return types.int64(source, target, *(types.literal(each) for each in (n, m, bits, infinity))), codegen


def source_stamp() -> int:
    """Changes with the source of the cpu backend; a part of numba's cache key, which by itself sees one file only."""
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("cpu*.py"))))


def compiled(signature: Any, function: Any) -> Any:
    """Compile a C callback, cached on disk where some folder can be written."""
    try:
        return cfunc(signature, cache=True)(function)
    except RuntimeError:  # numba: no locator available
        return cfunc(signature)(function)


@cache
def block_kernel(n: int, m: int, bits: int, infinity: int) -> Any:
    """Compiled `(source, target, blocks) -> channels kept` over consecutive blocks; see keep_block."""
    step = lanes(bits) * m * (bits // 8)

    stamp = source_stamp()

    def run(source: int, target: int, blocks: int) -> int:
        kept = stamp - stamp
        for block in range(blocks):
            kept += keep_block(source + block * step, target + block * step, n, m, bits, infinity)
        return kept

    return compiled(types.int64(types.int64, types.int64, types.int64), run)
