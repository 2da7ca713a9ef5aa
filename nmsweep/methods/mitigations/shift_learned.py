"""`shift_learned` (L-PTS): centre inputs on a learned vector; pruned channels take its values."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nmsweep.methods.base import Layer, Mitigation, Slots, State, as_tensor


@dataclass(frozen=True)
class ShiftLearned(Mitigation):
    """η: a vector over the input channels, learned from 0 in fp32; the mask is a constant in the backward pass.

    Source: arXiv:2509.22166, learnable shift (L-PTS).
    """

    slot = "eta"
    calibration = "learned"

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, eta=self.state_entry(layer, state, "eta"))

    def initial_parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"eta": torch.zeros_like(as_tensor(layer.weight[0], layer.weight))}
