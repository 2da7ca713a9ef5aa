"""`bias_learned`: each output channel gets a learned constant."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nmsweep.methods.base import Layer, Mitigation, Slot, Slots, State, as_tensor


@dataclass(frozen=True)
class BiasLearned(Mitigation):
    """β: per output channel, learned from 0, kept and applied in fp32, beside the layer's own bias.

    Source: "shift" in the code of arXiv:2509.22166; the form of SPON.
    """

    slot: ClassVar[Slot] = "beta"
    calibration: ClassVar[Literal["none", "weights", "text", "learned"]] = "learned"
    per_input: ClassVar[bool] = False

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, beta=self.found(layer, state, "beta"))

    def masters(self, layer: Layer) -> dict[str, Tensor]:
        return {"beta": torch.zeros_like(as_tensor(layer.weight[:, 0], layer.weight))}
