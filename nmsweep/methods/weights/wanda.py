"""`wanda`: prune weights by their magnitude times the root mean square of their input."""

from dataclasses import dataclass

from torch import Tensor

from nmsweep.config.pattern import Pattern
from nmsweep.kernels import prune_with_mask
from nmsweep.methods.base import Fitter, Layer, Slots, State, WeightCriterion
from nmsweep.methods.fitters import RootMeanSquare


@dataclass(frozen=True)
class Wanda(WeightCriterion):
    """The score of a weight is |W_ij|·√E[x_j²], among those of its output row; fp32. Calibrated.

    Source: arXiv:2306.11695 (Wanda), eq. 1.
    Differs: within a block, the input of each layer comes from the pruned layers before it; Wanda collects all inputs of a
    block before pruning it.
    """

    calibration = "text"

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return RootMeanSquare("rms")

    def pruned(self, layer: Layer, pattern: Pattern, state: State) -> tuple[Tensor, int]:
        rms = self.state_entry(layer, state, "rms")
        weight, mask = prune_with_mask(layer.weight, **pattern.budget(layer.weight.shape[1]), weight=rms)
        return weight, int(mask.sum())
