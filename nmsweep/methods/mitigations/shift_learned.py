"""`shift_learned` (L-PTS): inputs are centred on a learned vector; dropped channels become it."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nmsweep.methods.base import Layer, Mitigation, Slot, Slots, State, as_tensor


@dataclass(frozen=True)
class ShiftLearned(Mitigation):
    """η: a vector per input channel, learned from 0; the mask is a constant in the backward pass. fp32 master.

    Source: arXiv:2509.22166, learnable shift (L-PTS).
    """

    slot: ClassVar[Slot] = "eta"
    calibration: ClassVar[Literal["none", "weights", "text", "learned"]] = "learned"

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, eta=self.found(layer, state, "eta"))

    def masters(self, layer: Layer) -> dict[str, Tensor]:
        return {"eta": torch.zeros_like(as_tensor(layer.weight[0], layer.weight))}
