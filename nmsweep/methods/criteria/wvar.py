"""`wvar`: weight channels by the variance of their column of W."""

from dataclasses import dataclass

from torch import Tensor

from nmsweep.methods.base import Criterion, Layer, State, as_tensor


@dataclass(frozen=True)
class Wvar(Criterion):
    """w_j = Var_i(W_ij) over the outputs, of the population, fp32. From the weights alone, no calibration.

    Source: the code of arXiv:2509.22166.
    """

    def weight(self, layer: Layer, state: State) -> Tensor:
        return as_tensor(layer.weight, layer.weight).var(dim=0, correction=0)
