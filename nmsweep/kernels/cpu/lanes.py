"""Words of the cpu backend that numba lacks: pointers, bit patterns as floats, calls by address, order statistics on 16-bit lanes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.core.extending import intrinsic as numba_intrinsic
from numba.core.extending import overload

Compiled = Callable[..., Any]
"""What numba makes of a function: types are its own business, and annotations are for the reader."""

VECTOR_BITS = 512  # lowered to two halves where the CPU has 256
OCTETS = VECTOR_BITS // 8  # lanes of one vector
PAD = 0xFFFF  # fills a buffer of keys up to whole vectors: never below a candidate


def jit(function: Callable[..., Any]) -> Compiled:
    """Compile when called, with the caller."""
    compiled: Compiled = njit(function)
    return compiled


def jit_in_place(function: Callable[..., Any]) -> Compiled:
    """Compile into the caller: handing over arrays costs as much as a hundred channels do."""
    compiled: Compiled = njit(inline="always")(function)
    return compiled


def jit_any_order(function: Callable[..., Any]) -> Compiled:
    """Compile so that sums may be taken in any order, on vectors."""
    compiled: Compiled = njit(fastmath={"reassoc", "contract"})(function)
    return compiled


def intrinsic(function: Callable[..., Any]) -> Compiled:
    """A word whose code is written out in LLVM's language; its first parameter is the compiler's.

    Functions that use it are compiled for vectors as wide as the network's, where LLVM would stop at half.
    """

    @wraps(function)
    def typed(*arguments: Any) -> Any:
        signature, codegen = function(*arguments)

        def widely(context: Any, builder: Any, *rest: Any) -> Any:
            set.add(
                builder.function.attributes, f'"prefer-vector-width"="{VECTOR_BITS}"'
            )  # llvmlite's own add knows other names
            return codegen(context, builder, *rest)

        return signature, widely

    compiled: Compiled = numba_intrinsic(typed)
    return compiled


def literal_intrinsic(function: Callable[..., Any]) -> Compiled:
    """An intrinsic that is given the values of its constant arguments."""
    compiled: Compiled = numba_intrinsic(prefer_literal=True)(function)
    return compiled


def at(values: Any, i: Any) -> Any:
    """values[i]; a number is its own at every i."""
    return values[i] if isinstance(values, np.ndarray) else values


@overload(at)
def _at(values: Any, i: Any) -> Any:
    def element(values: Any, i: Any) -> Any:
        return values[i]

    def number(values: Any, i: Any) -> Any:
        return values

    return element if isinstance(values, types.Array) else number


def comes_in_pairs(patterns: Any) -> Any:
    """Whether an array of bit patterns can be read as pairs of bfloat16, which costs less than one by one."""
    return patterns.dtype == np.uint16 and patterns.size % 2 == 0


@overload(comes_in_pairs)
def _comes_in_pairs(patterns: Any) -> Any:
    def even(patterns: Any) -> Any:
        return patterns.size % 2 == 0

    def no(patterns: Any) -> Any:
        return False

    return even if patterns.dtype == types.uint16 else no


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An integer address as a void pointer, for carray."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@jit
def as_words(values: Any) -> Any:
    """The same memory as uint32; numba's own view costs as much as a token's arithmetic."""
    return carray(pointer(values.ctypes.data), (values.size * values.itemsize // 4,), np.uint32)


@intrinsic
def call_blocks(typing: Any, function: Any, source: Any, short: Any, target: Any, blocks: Any) -> Any:
    """Call a block kernel of cpu_select by its address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(64)
        kind = ir.FunctionType(number, [number] * 4).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], kind), arguments[1:])

    return types.int64(types.int64, types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def fetch_add(typing: Any, address: Any, amount: Any) -> Any:
    """Atomically add to the int64 at an address; the value before. This is how threads share work and totals."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _prefetch(typing: Any, address: Any, to_write: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", (cgutils.voidptr_t,), kind)
        place = builder.inttoptr(arguments[0], cgutils.voidptr_t)
        write = builder.trunc(arguments[1], flag)
        for constant in (0, 1):
            with builder.if_then(builder.icmp_signed("==", write, ir.Constant(flag, constant))):
                builder.call(function, [place, ir.Constant(flag, constant), ir.Constant(flag, 2), ir.Constant(flag, 1)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@jit
def prefetch(address: Any, size: Any, to_write: int) -> None:
    """Have `size` bytes on their way to the cache, to be read or, to_write = 1, written soon."""
    for line in range(address, address + size, 64):
        _prefetch(line, to_write)


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
        if like.dtype == types.uint32:
            return builder.bitcast(value, ir.IntType(32))
        word = ir.IntType(32)
        rounded = _rounded(builder, builder.bitcast(value, word))
        nan = builder.fcmp_unordered("uno", value, value)
        rounded = builder.select(nan, ir.Constant(word, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    return like.dtype(types.float32, like), codegen


def _rounded(builder: Any, bits: Any) -> Any:
    """Bits whose upper half is the bfloat16 nearest to the fp32 number with the given bits, ties to even."""
    word = ir.IntType(32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
    return builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))


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
def upper_halves(typing: Any, a: Any, b: Any) -> Any:
    """The upper halves of the bits of two unsigned keys, side by side in one number of their width."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _side_by_side(builder, builder.lshr(arguments[0], _half(a)), builder.lshr(arguments[1], _half(a)), a)

    return a(a, b), codegen


@intrinsic
def lower_halves(typing: Any, a: Any, b: Any, upper: Any) -> Any:
    """The lower halves of the bits of two unsigned keys, side by side; PAD for a key whose upper half is another one."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.IntType(a.bitwidth)
        low = ir.Constant(kind, (1 << a.bitwidth // 2) - 1)
        ours = builder.trunc(arguments[2], kind)

        def lower(key: Any) -> Any:
            is_ours = builder.icmp_unsigned("==", builder.lshr(key, _half(a)), ours)
            return builder.select(is_ours, builder.and_(key, low), low)

        return _side_by_side(builder, lower(arguments[0]), lower(arguments[1]), a)

    return a(a, b, types.int64), codegen


def _half(kind: Any) -> Any:
    return ir.Constant(ir.IntType(kind.bitwidth), kind.bitwidth // 2)


def _side_by_side(builder: Any, low: Any, high: Any, kind: Any) -> Any:
    return builder.or_(low, builder.shl(high, _half(kind)))


@intrinsic
def two_floats(typing: Any, pair: Any) -> Any:
    """The fp32 values of two bfloat16 patterns in one uint32: the lower one, then the upper one."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        low = builder.shl(arguments[0], ir.Constant(word, 16))
        high = builder.and_(arguments[0], ir.Constant(word, 0xFFFF0000))
        values = [builder.bitcast(bits, ir.FloatType()) for bits in (low, high)]
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.float32, 2)(pair), codegen


@intrinsic
def two_patterns(typing: Any, low: Any, high: Any) -> Any:
    """Two fp32 values rounded to bfloat16, in one uint32; a NaN stays one only if the lower half of its bits is 0."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        low, high = (_rounded(builder, builder.bitcast(value, word)) for value in arguments)
        upper = builder.and_(high, ir.Constant(word, 0xFFFF0000))
        return builder.or_(upper, builder.lshr(low, ir.Constant(word, 16)))

    return types.uint32(types.float32, types.float32), codegen


@intrinsic
def kept_of_two(typing: Any, low: Any, high: Any, mask: Any) -> Any:
    """Two fp32 values, each 0 where its half of a uint32 of two masks is."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *values, mask = arguments
        word, half = ir.IntType(32), ir.Constant(ir.IntType(32), 16)
        masks = [builder.ashr(builder.shl(mask, half), half), builder.ashr(mask, half)]
        kept = [
            builder.bitcast(builder.and_(builder.bitcast(value, word), each), ir.FloatType())
            for value, each in zip(values, masks, strict=True)
        ]
        return context.make_tuple(builder, signature.return_type, kept)

    return types.UniTuple(types.float32, 2)(low, high, mask), codegen


@intrinsic
def population(typing: Any, bits: Any) -> Any:
    """How many bits of an int64 are set."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.int64), codegen


@intrinsic
def trailing_zeros(typing: Any, bits: Any) -> Any:
    """The place of the lowest bit that is set in an int64 that is not 0."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


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

    keys: has room for one more.
    octets: uint8 scratch with room for padding.
    """
    pairs, half = carray(pointer(octets.ctypes.data), (octets.size // 2,), np.uint16), _even(keys, count)
    for i in range(half):
        pairs[i] = upper_halves(keys[i], keys[half + i])
    vectors = pad(octets, 2 * half)
    upper = kth_of_8(octets, vectors, k)
    k -= count_below(octets, vectors, upper, 0)[0]
    for i in range(half):
        pairs[i] = lower_halves(keys[i], keys[half + i], upper)
    return (upper << 8) | kth_of_8(octets, vectors, k)


@jit
def kth_of_32(keys: Any, count: Any, k: Any, halves: Any, octets: Any) -> Any:
    """The k-th smallest (from 0) of the uint32 keys[:count]: first its upper half, then the lower one among the keys that share it.

    keys: has room for one more.
    halves, octets: uint16 and uint8 scratch with room for padding.
    """
    pairs, half = as_words(halves), _even(keys, count)
    for i in range(half):
        pairs[i] = upper_halves(keys[i], keys[half + i])
    vectors = pad(halves, 2 * half)
    upper = kth_of_16(halves, 2 * half, k, octets)
    k -= count_below(halves, vectors, upper, 0)[0]
    for i in range(half):
        pairs[i] = lower_halves(keys[i], keys[half + i], upper)
    return (upper << 16) | kth_of_16(halves, 2 * half, k, octets)


@jit
def _even(keys: Any, count: Any) -> Any:
    """Half the number of keys, after one more that is never below a candidate where it is odd."""
    if count % 2 == 1:
        keys[count] = -1
    return (count + 1) // 2
