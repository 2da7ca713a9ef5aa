"""`clact`: weight channels by their norm over this sequence."""

from dataclasses import dataclass

from torch import Tensor

from nmsweep.errors import InputError
from nmsweep.kernels.norms import channel_squares
from nmsweep.kernels.reference import in_float64
from nmsweep.methods.base import Criterion, Memory, Tokens, as_tensor


@dataclass(frozen=True)
class Clact(Criterion):
    """w_j = ‖z_:,j‖₂ over the tokens of this sequence, padding excluded; summed in float64. Dynamic.

    It depends on later tokens, so it is undefined while text is generated, and refused there.

    Source: arXiv:2509.22166, CLACT (cosine-loss activation).
    Differs: the paper also divides by the token's norm, which is constant within a token and changes no mask; its code takes
    the norm over the flattened batch, so that a sequence's mask depends on its batch mates.
    """

    dynamic = True
    across_tokens = True
    looks_ahead = True

    def token_weight(self, z: Tensor, tokens: Tokens, memory: Memory) -> Tensor:
        """Return [batch, 1, in] fp32 (float64 for a float64 model)."""
        if tokens.past:
            raise InputError(
                f"criterion clact: a pass after {tokens.past} cached tokens; it needs the whole sequence at once; "
                "take clact_causal or rms, or tasks without generation"
            )
        padding = None if tokens.padding is None else tokens.padding.to(z.device)
        return as_tensor(channel_squares(z, padding).sqrt_(), z)


def squares(z: Tensor, tokens: Tokens) -> Tensor:
    """Return z² in float64, 0 for padding: [batch, seq, in]."""
    squared = in_float64(z).square()
    padding = tokens.padding
    return squared if padding is None else squared.masked_fill(padding[..., None].to(squared.device), 0.0)
