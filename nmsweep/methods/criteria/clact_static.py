"""`clact_static`: a channel counts by how strong it is in a calibration text."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from nmsweep.methods.base import Criterion, Fitter, Layer, Slots, State
from nmsweep.methods.fitters import SquareSum


@dataclass(frozen=True)
class ClactStatic(Criterion):
    """w_j = ‖z_:,j‖₂ over the tokens of the calibration text. Calibrated.

    A constant factor changes no mask, so its masks are those of `rms` up to rounding.

    Source: ours, after CLACT of arXiv:2509.22166.
    Differs: CLACT's norm is over the sequence that is evaluated.
    """

    calibration: ClassVar[Literal["none", "weights", "text", "learned"]] = "text"

    def weight(self, layer: Layer, state: State) -> Tensor:
        """[in] fp32."""
        return self.found(layer, state, "norm")

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return SquareSum("norm", slots, mean=False)
