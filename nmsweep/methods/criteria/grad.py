"""`grad`: a channel counts by how steeply the loss depends on it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from nmsweep.methods.base import Criterion, Fitter, Layer, Slots, State
from nmsweep.methods.fitters import GradientMeanSquare


@dataclass(frozen=True)
class Grad(Criterion):
    """w_j = √E[g_j²], g the gradient of the dense model's next-token loss with respect to the layer's input. Calibrated.

    The score ``|z_j|·w_j`` is then about the first-order change of the loss. Layers that read one tensor share the gradient
    of that tensor through all of them that are targets.

    Source: repaired form of "grad-acc" in the code of arXiv:2509.22166.
    Differs: one statistic a channel, not one a token position of the evaluated batch.
    """

    calibration: ClassVar[Literal["none", "weights", "text", "learned"]] = "text"

    def weight(self, layer: Layer, state: State) -> Tensor:
        """[in] fp32."""
        return self.found(layer, state, "grad")

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return GradientMeanSquare("grad", slots, mean=True)
