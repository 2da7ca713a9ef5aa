"""x · scale · gain on CUDA, with the roundings of `reference.make`.

GAIN: 0 none; with scale [token] 1 [hidden] in the dtype of x, 2 [hidden] fp32; without scale 3 in the shape and dtype of x.
"""

# triton's compiler reads no annotations of the future
import triton
import triton.language as tl

from nmsweep.kernels.triton.numbers import EMULATE, from_float, to_float
from nmsweep.kernels.triton.select import half_floats


@triton.jit
def _pack(low, high, KIND: tl.constexpr):
    """Round two fp32 values to the halves of a word."""
    if EMULATE:
        word = (from_float(low, KIND).to(tl.int32) & 0xFFFF) | (from_float(high, KIND).to(tl.int32) << 16)
    elif KIND == 0:
        word = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,r,r", [high, low], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        word = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,r,r", [high, low], dtype=tl.int32, is_pure=True, pack=1
        )
    return word


@triton.jit
def make_words(x, scale, gain, GAIN: tl.constexpr, KIND: tl.constexpr):
    """Multiply words of x; for GAIN 2 the gain is two fp32 values in an int64."""
    low, high = half_floats(x, KIND)
    if GAIN != 3:
        low, high = low * scale, high * scale
    if GAIN == 1:
        low, high = half_floats(_pack(low, high, KIND), KIND)
    if GAIN == 2:
        low = low * gain.to(tl.int32).to(tl.float32, bitcast=True)
        high = high * (gain >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        gain_low, gain_high = half_floats(gain, KIND)
        low, high = low * gain_low, high * gain_high
    return _pack(low, high, KIND)


@triton.jit
def make_patterns(x, scale, gain, GAIN: tl.constexpr, KIND: tl.constexpr):
    """Multiply bit patterns of x; for GAIN 2 the gain is fp32, else bit patterns."""
    value = to_float(x, KIND)
    if GAIN != 3:
        value = value * scale
    if GAIN == 1:
        value = to_float(from_float(value, KIND), KIND)
    value = value * (gain if GAIN == 2 else to_float(gain, KIND))
    return from_float(value, KIND)


@triton.jit
def make_kernel(x_ptr, u_ptr, scale_ptr, gain_ptr, hidden, GAIN: tl.constexpr, KIND: tl.constexpr, B: tl.constexpr):
    """Write out the product, B channels of one token per program, for kernels that read it more than once."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * B + tl.arange(0, B)
    inside = channel < hidden
    place = row * hidden + channel
    x = tl.load(x_ptr + place, mask=inside, other=0)
    scale = 1.0 if GAIN == 3 else tl.load(scale_ptr + row)
    gain = tl.load(gain_ptr + (place if GAIN == 3 else channel), mask=inside, other=0)
    tl.store(u_ptr + place, make_patterns(x, scale, gain, GAIN, KIND), mask=inside)
