"""Bit patterns as floats, keys, and the statistics of one token, for the Triton kernels."""

# triton's compiler reads no annotations of the future
import os

import triton
import triton.language as tl

EMULATE = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether the interpreter runs the kernels: it has no inline assembly, and truncates to bfloat16 instead of rounding."""


@triton.jit
def total(x):
    """Return the sum of a tile."""
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def to_float(pattern, KIND: tl.constexpr):
    """Return the fp32 value of a bit pattern, which is exact."""
    if KIND == 0:
        value = (pattern.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == 1:
        value = pattern.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = pattern.to(tl.float32, bitcast=True)
    return value


@triton.jit
def from_float(value, KIND: tl.constexpr):
    """Return the bit pattern of an fp32 value, rounded to nearest even; NaN stays NaN."""
    if KIND == 0 and EMULATE:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        pattern = tl.where(value == value, rounded, 0x7FC0).to(tl.int16)
    elif KIND == 0:
        pattern = value.to(tl.bfloat16).to(tl.int16, bitcast=True)
    elif KIND == 1:
        pattern = value.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        pattern = value.to(tl.int32, bitcast=True)
    return pattern


@triton.jit
def magnitude(pattern, KIND: tl.constexpr):
    """Return the key of |x| for 16-bit patterns: int16; all NaNs are equal."""
    nan: tl.constexpr = 0x7F81 if KIND == 0 else 0x7C01
    return tl.minimum(pattern & 0x7FFF, nan).to(tl.int16)


@triton.jit
def score(z, weight, RAW: tl.constexpr):
    """Return the key of |fl(z·w)|: int32; all NaNs are equal. A GPU computes a single NaN, so only RAW values need a limit."""
    key = (z * weight).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if RAW or EMULATE:
        key = tl.minimum(key, 0x7F800001)
    return key


@triton.jit
def median(pattern, inside, size, KIND: tl.constexpr):
    """Return the fp32 value of the lower of the two middle values; NaN if the row has one; never −0."""
    BITS: tl.constexpr = 32 if KIND == 2 else 16
    SIGN: tl.constexpr = 1 << (BITS - 1)
    bits = pattern.to(tl.uint32, bitcast=True) if KIND == 2 else pattern.to(tl.uint16, bitcast=True).to(tl.uint32)
    order = tl.where((bits & SIGN) != 0, bits ^ (2 * SIGN - 1), bits | SIGN)
    order = tl.where(inside, order, 2 * SIGN - 1)  # never below a candidate
    rank = (size - 1) // 2
    found = tl.full((), 0, tl.uint32)
    for step in range(BITS):
        candidate = found | (tl.full((), SIGN, tl.uint32) >> step)
        found = tl.where(total((order < candidate).to(tl.int32)) <= rank, candidate, found)
    value = tl.where((found & SIGN) != 0, found & (SIGN - 1), found ^ (2 * SIGN - 1))
    if KIND == 2:
        eta = value.to(tl.float32, bitcast=True)
    else:
        eta = to_float(value.to(tl.uint16).to(tl.int16, bitcast=True), KIND)
    number = to_float(pattern, KIND)
    nans = total((inside & (number != number)).to(tl.int32))
    return tl.where(nans > 0, float("nan"), eta + 0.0)


@triton.jit
def mean(pattern, inside, size, KIND: tl.constexpr):
    """Return the mean as fp32, rounded to the kind, in the order-free arithmetic of `reference.token_mean`; never −0."""
    value = tl.where(inside, to_float(pattern, KIND), 0.0)
    # as bits: a maximum of floats would drop NaN
    peak_bits = tl.max(tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)
    peak = peak_bits.to(tl.float32, bitcast=True).to(tl.float64)
    power = (peak.to(tl.int64, bitcast=True) & (0x7FF << 52)).to(tl.float64, bitcast=True)
    wide = value.to(tl.float64)
    magic = power * 196608.0  # 3·2¹⁶
    on_grid = tl.where(peak_bits < 0x7F800000, (wide + magic) - magic, wide)
    mean = (total(on_grid) / size.to(tl.float64)).to(tl.float32)
    return to_float(from_float(mean, KIND), KIND) + 0.0


@triton.jit
def ratio_of_sums(dense, dense_squares, sparse, sparse_squares, size):
    """Return ν from sums over one token. A pruned channel adds a 0 to the sparse ones, so their variance is 0 only if all are 0."""
    n = size.to(tl.float64)
    dense_variance = dense_squares - dense * dense / n
    sparse_variance = sparse_squares - sparse * sparse / n
    ratio = dense_variance / tl.where(sparse_variance == 0, 1.0, sparse_variance)
    return tl.where((dense_variance == 0) | (sparse_variance == 0), 1.0, tl.sqrt(ratio).to(tl.float32))
