"""Search the k-th lowest number of a token on CUDA, with two 16-bit numbers per register.

The number is found bit by bit from the top, counting the numbers below a candidate each time. They are compared as floats, two per
instruction: floats order as their bits do, ±0 is one number, and a NaN is below nothing. A comparison sets all bits of each half where
it holds, so one sum of the words counts both halves. Keys of 31 bits are found in three parts of fewer bits, each among the keys that
share the previous parts.
"""

# triton's compiler reads no annotations of the future
import triton
import triton.language as tl

from nmsweep.kernels.triton.numbers import EMULATE, to_float


@triton.jit
def half_floats(words, KIND: tl.constexpr):
    """Return the fp32 values of the low and of the high halves."""
    return to_float((words & 0xFFFF).to(tl.int16), KIND), to_float((words >> 16).to(tl.int16), KIND)


@triton.jit
def _below(x, bound, KIND: tl.constexpr):
    """Set all bits of each half that is below the bound, which is in both halves."""
    if EMULATE:
        low, high = half_floats(x, KIND)
        value, _ = half_floats(bound, KIND)
        found = tl.where(low < value, 0xFFFF, 0) | (tl.where(high < value, 0xFFFF, 0) << 16)
    elif KIND == 0:
        found = tl.inline_asm_elementwise(
            "set.lt.u32.bf16x2 $0, $1, $2;", "=r,r,r", [x, bound], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        found = tl.inline_asm_elementwise(
            "set.lt.u32.f16x2 $0, $1, $2;", "=r,r,r", [x, bound], dtype=tl.int32, is_pure=True, pack=1
        )
    return found


@triton.jit
def _numbers(x, KIND: tl.constexpr):
    """Set all bits of each half that is not NaN."""
    if EMULATE:
        low, high = half_floats(x, KIND)
        found = tl.where(low == low, 0xFFFF, 0) | (tl.where(high == high, 0xFFFF, 0) << 16)
    elif KIND == 0:
        found = tl.inline_asm_elementwise(
            "set.num.u32.bf16x2 $0, $1, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        found = tl.inline_asm_elementwise(
            "set.num.u32.f16x2 $0, $1, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    return found


@triton.jit
def _count(found):
    """Count the halves that are all ones, of fewer than 2¹⁶ words.

    h high and l low ones add up to (2¹⁶ − 1)·(2¹⁶·h + l) modulo 2³², and 0xFFFEFFFF is the inverse of 2¹⁶ − 1.
    """
    both = tl.sum(found, axis=0).to(tl.uint32, bitcast=True) * 0xFFFEFFFF
    return ((both & 0xFFFF) + (both >> 16)).to(tl.int32)


@triton.jit
def count_numbers(x, KIND: tl.constexpr):
    """Count the halves of words [T] that are not NaN."""
    return _count(_numbers(x, KIND))


@triton.jit
def kth_lowest(x, k, SIGNED: tl.constexpr, KIND: tl.constexpr):
    """Return the bit pattern of the k-th lowest (from 0) half of words [T]; infinity if it is NaN. Without SIGNED no sign bit is set."""
    INFINITY: tl.constexpr = 0x7F80 if KIND == 0 else 0x7C00
    ZERO: tl.constexpr = 0x8000 if SIGNED else 0  # where +0 is in the order of the numbers
    BITS: tl.constexpr = 16 if SIGNED else 15
    return _pattern(_search(x, k, BITS, ZERO, ZERO + INFINITY, KIND), ZERO)


@triton.jit
def _search(x, k, BITS: tl.constexpr, ZERO: tl.constexpr, LAST: tl.constexpr, KIND: tl.constexpr):
    """Return the place of the k-th lowest half of words [T] in the order of the numbers, of BITS bits and at most LAST."""
    found = tl.full((), 0, tl.int32)
    for step in range(BITS):
        candidate = found | ((1 << (BITS - 1)) >> step)
        n_below = _count(_below(x, tl.zeros_like(x) + _pattern(candidate, ZERO) * 0x10001, KIND))
        found = tl.where((n_below <= k) & (candidate <= LAST), candidate, found)
    return found


@triton.jit
def part_of_keys(key, found, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """Return BITS bits, from SHIFT on, of keys of 31 bits (−1 is none); a float16 NaN where the higher bits differ from those of `found`."""
    ours = (key >> (SHIFT + BITS)) == (found >> (SHIFT + BITS))
    return tl.where(ours, (key >> SHIFT) & ((1 << BITS) - 1), 0x7FFF)


@triton.jit
def next_bits(words, found, k, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """Find the next part of the k-th lowest (from 0) key; the halves of words [T] are the `part_of_keys`.

    They are compared as float16, which every NVIDIA GPU compares two at once.

    Returns:
        `found` with the new part; how many of the keys that share all of it precede the k-th lowest; how many share it.
    """
    value = _search(words, k, BITS, 0, 0x7C00, 1)
    n_below = _count(_below(words, tl.zeros_like(words) + value * 0x10001, 1))
    n_alike = _count(_below(words, tl.zeros_like(words) + (value + 1) * 0x10001, 1)) - n_below
    return found | (value << SHIFT), k - n_below, n_alike


@triton.jit
def _pattern(place, ZERO: tl.constexpr):
    """Return the bit pattern of the number at a place of the order."""
    return tl.where(place >= ZERO, place - ZERO, place ^ 0xFFFF)
