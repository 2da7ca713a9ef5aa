"""`var` (VAR): rescale the kept channels so that the token keeps its variance."""

from dataclasses import dataclass, replace

from nmsweep.methods.base import Layer, Mitigation, Slots, State


@dataclass(frozen=True)
class Var(Mitigation):
    """ν_t = √(Var_j z_t / Var_j x̃_t), fp32; 1 where either variance is 0. A scalar per token.

    Source: arXiv:2509.22166, variance correction (VAR).
    Differs: the paper's code adds 1e-9 to the variance, which underflows to NaN in fp16.
    """

    slot = "nu"

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, nu=True)
