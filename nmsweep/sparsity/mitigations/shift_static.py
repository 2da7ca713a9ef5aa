"""`shift_static` (S-PTS): inputs are centred on a constant found in a calibration text; dropped channels become it."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nmsweep.sparsity.fitters import rows
from nmsweep.sparsity.linear import rotated
from nmsweep.sparsity.method import Fitter, Layer, Mitigation, Slot, Slots, State, as_tensor

_CHUNK = 2**24
"""Values sorted at once, 64 MiB in fp32."""

_SPAN = 4.0
"""The mode is looked for within so many interquartile ranges of the median."""


@dataclass(frozen=True)
class ShiftStatic(Mitigation):
    """η = the median, mean or mode of the layer's input over the calibration tokens: one number, or one a channel. Calibrated.

    The median is the lower of the two middle values. The mode is the peak of a Gaussian kernel density with bandwidth
    h = 0.9·IQR/1.34·n^(−1/5) (Silverman), looked for on a grid of h/4 within 4 IQR of the median.

    Args:
        stat: ``"median"``, ``"mean"`` or ``"mode"``.
        granularity: ``"layer"``, a scalar as in the paper's code, or ``"channel"``, a vector [in].

    Source: arXiv:2509.22166, static shift (S-PTS); the mode is that of SCAP, arXiv:2412.07174.
    Differs: the paper's code takes the statistic of the text that is evaluated.
    """

    stat: Literal["median", "mean", "mode"] = "median"
    granularity: Literal["layer", "channel"] = "layer"
    slot: ClassVar[Slot] = "eta"
    calibration: ClassVar[Literal["none", "weights", "text", "learned"]] = "text"

    def __post_init__(self) -> None:
        if self.stat not in ("median", "mean", "mode"):
            raise ValueError(f"stat {self.stat!r}; allowed: median, mean, mode")
        if self.granularity not in ("layer", "channel"):
            raise ValueError(f"granularity {self.granularity!r}; allowed: layer, channel")

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, eta=self.found(layer, state, "eta"))

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return _Middle(self.stat, self.granularity, slots)


class _Middle(Fitter):
    """Keeps the block's inputs (as they are, not copied without need) and takes their middle at the end."""

    def __init__(self, stat: str, granularity: str, slots: Slots) -> None:
        self.stat, self.granularity, self.slots = stat, granularity, slots
        self.seen: list[Tensor] = []

    def update(self, x: Tensor, scope: Tensor | None = None) -> None:
        self.seen.append(rows(rotated(x, self.slots), scope))

    def result(self) -> dict[str, Tensor]:
        x = torch.cat(self.seen)
        if self.granularity == "layer":
            return {"eta": as_tensor(self._middle(x.reshape(-1, 1)), x)[0]}
        width = max(1, _CHUNK // max(1, len(x)))
        return {"eta": torch.cat([as_tensor(self._middle(part), x) for part in x.split(width, dim=1)])}

    def _middle(self, x: Tensor) -> Tensor:
        """The statistic of each column of x [tokens, columns]."""
        if self.stat == "mean":
            return x.mean(dim=0, dtype=torch.float64)
        if self.stat == "median":
            return x.median(dim=0).values
        return torch.stack([mode(column) for column in as_tensor(x, x).unbind(dim=1)])


def mode(x: Tensor) -> Tensor:
    """The peak of the kernel density of x [n], as `ShiftStatic` defines it; the median where IQR is 0: []."""
    n = len(x)
    lower, median, upper = (x.kthvalue(1 + round(share * (n - 1))).values for share in (0.25, 0.5, 0.75))
    spread = float(upper - lower)
    if spread == 0:
        return median
    step = 0.9 * spread / 1.34 * n**-0.2 / 4
    half = int(_SPAN * spread / step)
    cell = ((x.double() - median) / step).round().long() + half
    inside = cell[(cell >= 0) & (cell <= 2 * half)]
    counts = torch.bincount(inside, minlength=2 * half + 1).double()
    reach = torch.arange(-16, 17, dtype=torch.float64, device=x.device)  # 4 bandwidths in steps of h/4
    kernel = (-0.5 * (reach / 4) ** 2).exp()
    density = torch.nn.functional.conv1d(counts[None, None], kernel[None, None], padding=16)[0, 0]
    peak: Tensor = median.double() + (density.argmax() - half) * step
    return peak.to(x.dtype)
