"""`bias_learned`: add a learned constant to each output channel."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nmsweep.methods.base import Layer, Mitigation, Slots, State, as_tensor


@dataclass(frozen=True)
class BiasLearned(Mitigation):
    """β: per output channel, learned from 0, kept and applied in fp32, in addition to the layer's own bias.

    Source: "shift" in the code of arXiv:2509.22166; the form of SPON.
    """

    slot = "beta"
    calibration = "learned"
    per_input = False

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, beta=self.state_entry(layer, state, "beta"))

    def initial_parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"beta": torch.zeros_like(as_tensor(layer.weight[:, 0], layer.weight))}
