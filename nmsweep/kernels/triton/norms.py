"""Sums of squares of channels over tokens on CUDA: one pass over the input, one partial sum per slice of tokens, added in a fixed order."""

# triton's compiler reads no annotations of the future
import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS, _CHANNELS, _STEP = 256, 128, 16  # tokens per slice; channels per program; tokens read at once


def channel_squares(z: Tensor, padding: Tensor | None) -> Tensor:
    """Return Σ_t z_tj² over the tokens of each sequence: float64 [batch, 1, hidden] for z [batch, tokens, hidden]."""
    z = z.contiguous()
    batch, tokens, hidden = z.shape
    slices = triton.cdiv(tokens, _TOKENS)
    partial = torch.empty(batch, slices, hidden, dtype=torch.float64, device=z.device)
    padding = None if padding is None else padding.to(z.device).contiguous().view(torch.int8)
    with torch.cuda.device_of(z):
        squares_kernel[(triton.cdiv(hidden, _CHANNELS), slices, batch)](
            z, padding, partial, tokens, hidden, TOKENS=_TOKENS, CHANNELS=_CHANNELS, STEP=_STEP, num_warps=4
        )
    return partial.sum(dim=1, keepdim=True)


@triton.jit
def squares_kernel(
    z_ptr,
    padding_ptr,
    partial_ptr,
    tokens,
    hidden,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sum one slice of tokens and channels of one sequence."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    sequence = tl.program_id(2).to(tl.int64)
    start = tl.program_id(1) * TOKENS
    total = tl.zeros((STEP, CHANNELS), tl.float64)
    for step in range(0, TOKENS, STEP):
        token = start + step + tl.arange(0, STEP)
        counts = token < tokens
        row = sequence * tokens + token
        if padding_ptr is not None:
            counts = counts & (tl.load(padding_ptr + row, mask=counts, other=1) == 0)
        inside = counts[:, None] & (channel < hidden)[None, :]
        z = tl.load(z_ptr + row[:, None] * hidden + channel[None, :], mask=inside, other=0.0).to(tl.float64)
        total += z * z
    place = (sequence * tl.num_programs(1) + tl.program_id(1)) * hidden + channel
    tl.store(partial_ptr + place, tl.sum(total, axis=0), mask=channel < hidden)
