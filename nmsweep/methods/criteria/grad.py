"""`grad`: weight channels by the size of the loss's gradient."""

from dataclasses import dataclass

from torch import Tensor

from nmsweep.methods.base import Criterion, Fitter, Layer, Slots, State
from nmsweep.methods.fitters import GradientRootMeanSquare


@dataclass(frozen=True)
class Grad(Criterion):
    """w_j = √E[g_j²], g the gradient of the dense model's next-token loss with respect to the layer's input. Calibrated.

    The score ``|z_j|·w_j`` approximates the first-order change of the loss. Layers that read one tensor share its gradient
    through all of them that are targets.

    Source: repaired form of "grad-acc" in the code of arXiv:2509.22166.
    Differs: one statistic for each channel, instead of one for each token position of the evaluated batch.
    """

    calibration = "text"

    def weight(self, layer: Layer, state: State) -> Tensor:
        return self.state_entry(layer, state, "grad")

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return GradientRootMeanSquare("grad")
