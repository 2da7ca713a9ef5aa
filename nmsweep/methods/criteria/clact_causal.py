"""`clact_causal`: a channel counts by how strong it has been so far in this sequence."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nmsweep.errors import InputError
from nmsweep.methods.base import Criterion, Memory, Tokens, as_tensor
from nmsweep.methods.criteria.clact import squares


@dataclass(frozen=True)
class ClactCausal(Criterion):
    """w_tj = ‖z_≤t,j‖₂ over the tokens up to t, padding excluded; summed in float64. Dynamic.

    While text is generated the sums of each layer are kept from pass to pass. A batch whose rows are reordered between
    passes (beam search) is not followed.

    Source: ours, after CLACT of arXiv:2509.22166.
    Differs: CLACT's norm is over the whole sequence, future tokens included.
    """

    dynamic: ClassVar[bool] = True
    across_tokens: ClassVar[bool] = True

    def token_weight(self, z: Tensor, tokens: Tokens, memory: Memory) -> Tensor:
        """[batch, seq, in] fp32 (float64 for a float64 model)."""
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
