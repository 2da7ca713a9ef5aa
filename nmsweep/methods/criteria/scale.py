"""`scale`: weight channels by the scale that SmoothQuant moves from the activation to the weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nmsweep.methods.base import Criterion, Fitter, Layer, Slots, State, as_tensor

FLOOR = 1e-5
"""Smallest peak, from SmoothQuant's code: a dead channel gets a finite weight."""


@dataclass(frozen=True)
class Scale(Criterion):
    """w_j = √(max_i |W_ij| / max_t |z_tj|), both maxima clamped to at least 1e-5. Calibrated.

    Pruning z/s and multiplying by W·diag(s) changes only which channels are kept: it is the criterion w = 1/s.

    Source: "scaling" in the code of arXiv:2509.22166; s of SmoothQuant, arXiv:2211.10438, eq. 4 with α = 1/2.
    Differs: the paper's code gives NaN for a dead channel and takes the peak of the evaluated batch.
    """

    calibration = "text"

    def weight(self, layer: Layer, state: State) -> Tensor:
        peak = as_tensor(layer.weight, layer.weight).abs().amax(dim=0).clamp(min=FLOOR)
        return (peak / self.state_entry(layer, state, "peak").clamp(min=FLOOR)).sqrt()

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return _Peak()


class _Peak(Fitter):
    """max_t |z_tj| over the tokens: [in] fp32."""

    def __init__(self) -> None:
        self.peak: Tensor | None = None

    def update(self, z: Tensor) -> None:
        if len(z):
            peak = z.abs().amax(dim=0)
            self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)

    def result(self) -> dict[str, Tensor]:
        assert self.peak is not None
        return {"peak": self.peak}
