"""`clact`: a channel counts by how strong it is in this sequence."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nmsweep.errors import InputError
from nmsweep.kernels.norms import channel_squares
from nmsweep.kernels.reference import in_float64
from nmsweep.methods.base import Criterion, Memory, Tokens, as_tensor


@dataclass(frozen=True)
class Clact(Criterion):
    """w_j = ‖z_:,j‖₂ over the tokens of this sequence, padding excluded; summed in float64. Dynamic.

    It looks at future tokens and is undefined while text is generated: refused there.

    Source: arXiv:2509.22166, CLACT (cosine-loss activation).
    Differs: the paper also divides by the token's norm, which is constant in a token and changes no mask; its code takes
    the norm over the flattened batch, so that a sentence's mask depends on its batch mates.
    """

    dynamic: ClassVar[bool] = True
    across_tokens: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True

    def token_weight(self, z: Tensor, tokens: Tokens, memory: Memory) -> Tensor:
        """[batch, 1, in] fp32 (float64 for a float64 model)."""
        if tokens.past:
            raise InputError(
                f"criterion clact: a pass after {tokens.past} cached tokens; it needs the whole sequence at once; "
                "take clact_causal or clact_static, or tasks without generation"
            )
        padding = None if tokens.padding is None else tokens.padding.to(z.device)
        return as_tensor(channel_squares(z, padding).sqrt_(), z)


def squares(z: Tensor, tokens: Tokens) -> Tensor:
    """z² in float64, 0 for padding: [batch, seq, in]."""
    squared = in_float64(z).square()
    padding = tokens.padding
    return squared if padding is None else squared.masked_fill(padding[..., None].to(squared.device), 0.0)
