"""`scale`: a channel counts by what SmoothQuant would shift from the activation to the weight."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from nmsweep.methods.base import Criterion, Fitter, Layer, Slots, State, as_tensor
from nmsweep.methods.fitters import Peak

FLOOR = 1e-5
"""Smallest peak, of SmoothQuant's code: a dead channel gets a finite weight."""


@dataclass(frozen=True)
class Scale(Criterion):
    """w_j = √(max_i |W_ij| / max_t |z_tj|), both clamped to at least 1e-5. Calibrated.

    Pruning z/s and multiplying by W·diag(s) changes only which channels are kept: it is the criterion w = 1/s.

    Source: "scaling" in the code of arXiv:2509.22166; s of SmoothQuant, arXiv:2211.10438, eq. 4 with α = 1/2.
    Differs: the paper's code gives NaN for a dead channel and takes the peak of the evaluated batch.
    """

    calibration: ClassVar[Literal["none", "weights", "text", "learned"]] = "text"

    def weight(self, layer: Layer, state: State) -> Tensor:
        """[in] fp32."""
        peak = as_tensor(layer.weight, layer.weight).abs().amax(dim=0).clamp(min=FLOOR)
        return (peak / self.found(layer, state, "peak").clamp(min=FLOOR)).sqrt()

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return Peak("peak", slots)
