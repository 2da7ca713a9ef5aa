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

LANES = 32  # 16-bit lanes of one 512-bit vector
PAD = 0xFFFF  # fills a buffer of 16-bit keys up to whole vectors: never below a candidate


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
def float_bits(typing: Any, value: Any) -> Any:
    """The bit pattern of an fp32 value as int32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), codegen


def _compare(builder: Any, order: str, address: Any, index: Any, candidate: Any) -> Any:
    """Bit mask (i32) of the lanes of one vector of unsigned 16-bit keys that stand in `order` to the candidate (i64)."""
    half, word = ir.IntType(16), ir.IntType(32)
    vector, undefined = ir.VectorType(half, LANES), ir.Constant(ir.VectorType(half, LANES), ir.Undefined)
    first = builder.insert_element(undefined, builder.trunc(candidate, half), ir.Constant(word, 0))
    splat = builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(word, LANES), [0] * LANES))
    place = builder.gep(builder.inttoptr(address, vector.as_pointer()), [index])
    return builder.bitcast(builder.icmp_unsigned(order, builder.load(place, align=2), splat), word)


@intrinsic
def count_below(typing: Any, address: Any, vectors: Any, candidate: Any) -> Any:
    """How many unsigned 16-bit keys of `vectors` whole vectors at an address are below the candidate."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, vectors, candidate = arguments
        number = ir.IntType(64)
        total = cgutils.alloca_once_value(builder, ir.Constant(number, 0))
        with cgutils.for_range(builder, vectors) as loop:
            below = builder.ctpop(_compare(builder, "<", address, loop.index, candidate))
            builder.store(builder.add(builder.load(total), builder.zext(below, number)), total)
        return builder.load(total)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def equal_bits(typing: Any, address: Any, vector: Any, candidate: Any) -> Any:
    """Bit mask of the lanes of one vector of 16-bit keys that equal the candidate."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(_compare(builder, "==", *arguments), ir.IntType(64))

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def lowest_bit(typing: Any, bits: Any) -> Any:
    """Number of the lowest set bit."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


@jit
def whole_vectors(count: Any) -> Any:
    """Vectors of 16-bit lanes that hold `count` keys."""
    return (count + LANES - 1) // LANES


@jit
def pad(keys: Any, count: Any) -> Any:
    """Fill keys[count:] up to whole vectors; their number."""
    vectors = whole_vectors(count)
    for i in range(count, vectors * LANES):
        keys[i] = PAD
    return vectors


@jit
def kth_of_16(keys: Any, count: Any, k: Any) -> Any:
    """The k-th smallest (from 0) of the uint16 keys[:count], bit by bit from the top; the array has room for padding."""
    vectors = pad(keys, count)
    found = 0
    for bit in range(15, -1, -1):
        candidate = found | (1 << bit)
        if count_below(keys.ctypes.data, vectors, candidate) <= k:
            found = candidate
    return found


@jit
def kth_of_32(keys: Any, count: Any, k: Any, halves: Any) -> Any:
    """The k-th smallest (from 0) of the uint32 keys[:count].

    halves: uint16 scratch with room for padding: first the upper halves of all keys, then the lower halves of those that share the
    upper half of the answer, which are few.
    """
    for i in range(count):
        halves[i] = keys[i] >> np.uint32(16)
    upper = kth_of_16(halves, count, k)
    vectors = whole_vectors(count)
    k -= count_below(halves.ctypes.data, vectors, upper)
    found = 0
    for vector in range(vectors):
        bits = equal_bits(halves.ctypes.data, vector, upper)
        while bits:
            place = vector * LANES + lowest_bit(bits)
            bits &= bits - 1
            if place < count:  # the padding may equal the answer
                halves[found] = keys[place] & np.uint32(0xFFFF)
                found += 1
    return (upper << 16) | kth_of_16(halves, found, k)
