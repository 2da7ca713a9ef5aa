"""`wt`: prune weights by their magnitude."""

from dataclasses import dataclass

from torch import Tensor

from nmsweep.config.pattern import Pattern
from nmsweep.kernels import prune_with_mask
from nmsweep.methods.base import Layer, State, WeightCriterion


@dataclass(frozen=True)
class Wt(WeightCriterion):
    """The score of a weight is |W_ij|, among those of its output row. No statistics, no calibration.

    Source: arXiv:2509.22166, WT.
    """

    def pruned(self, layer: Layer, pattern: Pattern, state: State) -> tuple[Tensor, int]:
        weight, mask = prune_with_mask(layer.weight, **pattern.budget(layer.weight.shape[1]))
        return weight, int(mask.sum())
