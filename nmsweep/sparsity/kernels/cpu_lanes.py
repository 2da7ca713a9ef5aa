"""Words of the cpu backend that numba lacks: pointers, bit patterns as floats, calls by address, order statistics on 16-bit lanes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.extending import intrinsic as numba_intrinsic

Compiled = Callable[..., Any]
"""What numba makes of a function: types are its own business, and annotations are for the reader."""

VECTOR_BITS = 512  # lowered to two halves where the CPU has 256
LANES, OCTETS = VECTOR_BITS // 16, VECTOR_BITS // 8  # lanes of one vector
PAD = 0xFFFF  # fills a buffer of keys up to whole vectors: never below a candidate


def jit(function: Callable[..., Any]) -> Compiled:
    """Compile when called, with the caller."""
    compiled: Compiled = njit(function)
    return compiled


def jit_any_order(function: Callable[..., Any]) -> Compiled:
    """Compile so that sums may be taken in any order, on vectors."""
    compiled: Compiled = njit(fastmath={"reassoc", "contract"})(function)
    return compiled


def intrinsic(function: Callable[..., Any]) -> Compiled:
    """A word whose code is written out in LLVM's language; its first parameter is the compiler's."""
    compiled: Compiled = numba_intrinsic(function)
    return compiled


def literal_intrinsic(function: Callable[..., Any]) -> Compiled:
    """An intrinsic that is given the values of its constant arguments."""
    compiled: Compiled = numba_intrinsic(prefer_literal=True)(function)
    return compiled


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An integer address as a void pointer, for carray."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def call_blocks(typing: Any, function: Any, source: Any, target: Any, blocks: Any) -> Any:
    """Call a block kernel of cpu_select by its address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(64)
        kind = ir.FunctionType(number, [number] * 3).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], kind), arguments[1:])

    return types.int64(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def fetch_add(typing: Any, address: Any, amount: Any) -> Any:
    """Atomically add to the int64 at an address; the value before. This is how threads share work and totals."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def to_float(typing: Any, pattern: Any) -> Any:
    """The fp32 value of a bit pattern, exact: uint16 is bfloat16, int16 is float16, uint32 is float32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[0]
        if pattern == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if pattern == types.uint16:
            value = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(value, ir.FloatType())

    return types.float32(pattern), codegen


@intrinsic
def from_float(typing: Any, value: Any, like: Any) -> Any:
    """The bit pattern, of the type of the array `like`, of an fp32 value rounded to nearest even; NaN stays NaN."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[0]
        if like.dtype == types.int16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        word = ir.IntType(32)
        bits = builder.bitcast(value, word)
        if like.dtype == types.uint32:
            return bits
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
        nan = builder.fcmp_unordered("uno", value, value)
        rounded = builder.select(nan, ir.Constant(word, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    return like.dtype(types.float32, like), codegen


@intrinsic
def in_order(typing: Any, pattern: Any, like: Any) -> Any:
    """A bit pattern as an unsigned number, of the type of the array `like`, that orders as the floats do."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, bits = arguments[0], pattern.bitwidth
        kind = ir.IntType(bits)
        negative = builder.ashr(value, ir.Constant(kind, bits - 1))
        return builder.xor(value, builder.or_(negative, ir.Constant(kind, 1 << (bits - 1))))

    return like.dtype(pattern, like), codegen


@intrinsic
def upper_half(typing: Any, key: Any, like: Any) -> Any:
    """The upper half of the bits of an unsigned key, of the type of the array `like`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _halves(builder, arguments[0], like)[1]

    return like.dtype(key, like), codegen


@intrinsic
def lower_half(typing: Any, key: Any, upper: Any, like: Any) -> Any:
    """The lower half of the bits of an unsigned key, of the type of the array `like`; PAD where the upper half is another one."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low, high = _halves(builder, arguments[0], like)
        ours = builder.icmp_unsigned("==", high, builder.trunc(arguments[1], high.type))
        return builder.select(ours, low, ir.Constant(low.type, PAD & ((1 << low.type.width) - 1)))

    return like.dtype(key, types.int64, like), codegen


def _halves(builder: Any, key: Any, like: Any) -> tuple[Any, Any]:
    half = ir.IntType(like.dtype.bitwidth)
    return builder.trunc(key, half), builder.trunc(builder.lshr(key, ir.Constant(key.type, half.width)), half)


@intrinsic
def float_bits(typing: Any, value: Any) -> Any:
    """The bit pattern of an fp32 value as int32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def _count_below(typing: Any, keys: Any, address: Any, vectors: Any, candidate: Any, step: Any) -> Any:
    """How many of the unsigned keys of whole vectors are below the candidate, below it and a step, and below it and two."""
    three = types.UniTuple(types.int64, 3)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, vectors, candidate, step = arguments
        number, word, lane = ir.IntType(64), ir.IntType(32), ir.IntType(keys.dtype.bitwidth)
        lanes = VECTOR_BITS // lane.width
        vector = ir.VectorType(lane, lanes)

        def splat(bound: Any) -> Any:
            undefined = ir.Constant(vector, ir.Undefined)
            first = builder.insert_element(undefined, builder.trunc(bound, lane), ir.Constant(word, 0))
            return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(word, lanes), [0] * lanes))

        bounds = [splat(builder.add(candidate, builder.mul(step, ir.Constant(number, i)))) for i in range(3)]
        totals = [cgutils.alloca_once_value(builder, ir.Constant(number, 0)) for _ in bounds]
        base = builder.inttoptr(address, vector.as_pointer())
        with cgutils.for_range(builder, vectors) as loop:
            value = builder.load(builder.gep(base, [loop.index]), align=lane.width // 8)
            for total, bound in zip(totals, bounds, strict=True):
                found = builder.bitcast(builder.icmp_unsigned("<", value, bound), ir.IntType(lanes))
                builder.store(builder.add(builder.load(total), builder.ctpop(builder.zext(found, number))), total)
        return context.make_tuple(builder, three, [builder.load(total) for total in totals])

    return three(keys, types.int64, types.int64, types.int64, types.int64), codegen


@jit
def count_below(keys: Any, vectors: Any, candidate: Any, step: Any) -> Any:
    """How many of the uint8 or uint16 keys of whole vectors are below the candidate, below it and a step, and below it and two."""
    return _count_below(keys, keys.ctypes.data, vectors, candidate, step)


@jit
def pad(keys: Any, count: Any) -> Any:
    """Fill keys[count:] up to whole vectors; their number."""
    lanes = VECTOR_BITS // (8 * keys.itemsize)
    vectors = (count + lanes - 1) // lanes
    for i in range(count, vectors * lanes):
        keys[i] = PAD
    return vectors


@jit
def kth_of_8(keys: Any, vectors: Any, k: Any) -> Any:
    """The k-th smallest (from 0) of the uint8 keys of whole vectors, two bits at a time from the top."""
    found: Any = 0
    for shift in range(6, -1, -2):
        step = 1 << shift
        one, two, three = count_below(keys, vectors, found + step, step)
        found += (np.int64(one <= k) + np.int64(two <= k) + np.int64(three <= k)) << shift
    return found


@jit
def kth_of_16(keys: Any, count: Any, k: Any, octets: Any) -> Any:
    """The k-th smallest (from 0) of the uint16 keys[:count]: first its upper octet, then the lower one among the keys that share it.

    octets: uint8 scratch with room for padding.
    """
    for i in range(count):
        octets[i] = upper_half(keys[i], octets)
    vectors = pad(octets, count)
    upper = kth_of_8(octets, vectors, k)
    k -= count_below(octets, vectors, upper, 0)[0]
    for i in range(count):
        octets[i] = lower_half(keys[i], upper, octets)
    return (upper << 8) | kth_of_8(octets, vectors, k)


@jit
def kth_of_32(keys: Any, count: Any, k: Any, halves: Any, octets: Any) -> Any:
    """The k-th smallest (from 0) of the uint32 keys[:count]: first its upper half, then the lower one among the keys that share it.

    halves, octets: uint16 and uint8 scratch with room for padding.
    """
    for i in range(count):
        halves[i] = upper_half(keys[i], halves)
    vectors = pad(halves, count)
    upper = kth_of_16(halves, count, k, octets)
    k -= count_below(halves, vectors, upper, 0)[0]
    for i in range(count):
        halves[i] = lower_half(keys[i], upper, halves)
    return (upper << 16) | kth_of_16(halves, count, k, octets)
