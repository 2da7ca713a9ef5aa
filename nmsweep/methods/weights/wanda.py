"""`wanda`: weights are pruned by their size times the size of what they multiply."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from nmsweep.config.pattern import Pattern
from nmsweep.kernels import prune
from nmsweep.methods.base import Fitter, Layer, Slots, State, WeightCriterion
from nmsweep.methods.fitters import SquareSum
from nmsweep.sparsity.linear import budget


@dataclass(frozen=True)
class Wanda(WeightCriterion):
    """The score of a weight is |W_ij|·√E[x_j²], among those of its output row; fp32. Calibrated.

    Source: arXiv:2306.11695 (Wanda), eq. 1.
    Differs: within a block each input is that of the layers before it pruned; Wanda takes all of a block's at once.
    """

    calibration: ClassVar[Literal["none", "weights", "text", "learned"]] = "text"

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return SquareSum("rms", slots, mean=True)

    def pruned(self, layer: Layer, pattern: Pattern, state: State) -> tuple[Tensor, int]:
        rms = self.found(layer, state, "rms")
        weight, mask = prune(layer.weight, **budget(pattern, layer.weight.shape[1]), weight=rms, return_mask=True)
        return weight, int(mask.sum())
