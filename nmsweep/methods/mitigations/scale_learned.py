"""`scale_learned` (LS): scale each output channel by a learned factor."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nmsweep.methods.base import Layer, Mitigation, Slots, State, as_tensor


@dataclass(frozen=True)
class ScaleLearned(Mitigation):
    """γ: per output channel, learned from 0, kept and applied in fp32: y = (1+γ) ⊙ Wu + b.

    Source: arXiv:2509.22166, learnable scale (LS).
    Differs: the paper's code keeps 1+γ in bf16, where it rounds to 1 below 0.004.
    """

    slot = "gamma"
    calibration = "learned"
    per_input = False

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, gamma=self.state_entry(layer, state, "gamma"))

    def initial_parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"gamma": torch.zeros_like(as_tensor(layer.weight[:, 0], layer.weight))}
