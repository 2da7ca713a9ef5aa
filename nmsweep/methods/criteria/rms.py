"""`rms`: a channel counts by its root mean square in a calibration text."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from nmsweep.methods.base import Criterion, Fitter, Layer, Slots, State
from nmsweep.methods.fitters import SquareSum


@dataclass(frozen=True)
class Rms(Criterion):
    """w_j = √E[z_j²] over the tokens of the calibration text. Calibrated.

    Source: the activation norm of Wanda, arXiv:2306.11695, used on activations.
    """

    calibration: ClassVar[Literal["none", "weights", "text", "learned"]] = "text"

    def weight(self, layer: Layer, state: State) -> Tensor:
        """[in] fp32."""
        return self.found(layer, state, "rms")

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return SquareSum("rms", slots, mean=True)
