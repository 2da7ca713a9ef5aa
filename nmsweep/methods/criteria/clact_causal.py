"""`clact_causal`: weight channels by their norm over this sequence so far."""

from dataclasses import dataclass

from torch import Tensor

from nmsweep.errors import InputError
from nmsweep.methods.base import Criterion, Memory, Tokens, as_tensor
from nmsweep.methods.criteria.clact import squares


@dataclass(frozen=True)
class ClactCausal(Criterion):
    """w_tj = ‖z_≤t,j‖₂ over the tokens up to t, padding excluded; summed in float64. Dynamic.

    While text is generated, each layer keeps its sums from pass to pass. Rows must not be reordered between passes, as beam
    search does.

    Source: ours, after CLACT of arXiv:2509.22166.
    Differs: CLACT's norm is over the whole sequence, later tokens included.
    """

    dynamic = True
    across_tokens = True

    def token_weight(self, z: Tensor, tokens: Tokens, memory: Memory) -> Tensor:
        """Return [batch, seq, in] fp32 (float64 for a float64 model)."""
        running = squares(z, tokens).cumsum(dim=1)
        if tokens.past:
            before = memory.get("squares")
            if before is None or before.shape != running[:, -1:].shape:
                raise InputError(
                    f"criterion clact_causal: a pass after {tokens.past} cached tokens that this layer has not seen; "
                    "run the sequence from its beginning with the criterion in place"
                )
            running = running + before
        memory["squares"] = running[:, -1:]
        return as_tensor(running.sqrt(), z)
