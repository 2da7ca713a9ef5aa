"""`rms`: weight channels by their root mean square over a calibration text."""

from dataclasses import dataclass

from torch import Tensor

from nmsweep.methods.base import Criterion, Fitter, Layer, Slots, State
from nmsweep.methods.fitters import RootMeanSquare


@dataclass(frozen=True)
class Rms(Criterion):
    """w_j = √E[z_j²] over the tokens of the calibration text. Calibrated.

    Source: the activation norm of Wanda, arXiv:2306.11695, used on activations.
    """

    calibration = "text"

    def weight(self, layer: Layer, state: State) -> Tensor:
        return self.state_entry(layer, state, "rms")

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return RootMeanSquare("rms")
