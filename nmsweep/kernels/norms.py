"""Sums of squares of channels over the tokens of each sequence, in one pass over the input."""

from __future__ import annotations

import torch
from torch import Tensor

from nmsweep.kernels.dispatch import by_device
from nmsweep.kernels.reference import in_float64

_SLICE_ELEMENTS = 2**22  # float64 squares held at once without a compiled kernel


def channel_squares(z: Tensor, padding: Tensor | None = None) -> Tensor:
    """Return Σ_t z_tj² over the tokens of each sequence: float64 [batch, 1, hidden], on the CPU if the device of z has no float64.

    The squares are exact in float64, so only the last bits of the sum depend on the order of the tokens.

    Args:
        z: [batch, tokens, hidden], floating.
        padding: [batch, tokens] bool, True for tokens to leave out; None counts all.
    """
    if z.is_cuda and z.dtype != torch.float64 and by_device("cuda") is not None:
        from nmsweep.kernels.triton.norms import channel_squares as compiled

        return compiled(z, padding)
    step = max(1, _SLICE_ELEMENTS // max(1, z.shape[0] * z.shape[2]))
    total = in_float64(z.new_zeros(z.shape[0], 1, z.shape[2]))
    for start in range(0, z.shape[1], step):
        squares = in_float64(z[:, start : start + step]).square()
        if padding is not None:
            squares.masked_fill_(padding[:, start : start + step, None].to(squares.device), 0.0)
        total += squares.sum(dim=1, keepdim=True)
    return total
