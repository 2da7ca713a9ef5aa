"""`shift_static` (S-PTS): centre inputs on a constant from a calibration text; pruned channels take its value."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nmsweep.methods.base import Fitter, Layer, Mitigation, Slots, State, as_tensor
from nmsweep.methods.fitters import order_statistic

_CHUNK = 2**24
"""Number of values processed at once where each channel has its own statistic, 64 MiB in fp32."""

_SPAN = 4.0
"""The mode is searched within this many interquartile ranges of the median."""


@dataclass(frozen=True)
class ShiftStatic(Mitigation):
    """η = the median, mean or mode of the layer's input over the calibration tokens: a scalar or a vector. Calibrated.

    The median is the lower of the two middle values. The mode is the peak of a Gaussian kernel density with bandwidth
    h = 0.9·IQR/1.34·n^(−1/5) (Silverman), searched on a grid of h/4 within 4 IQR of the median.

    Args:
        stat: ``"median"``, ``"mean"`` or ``"mode"``.
        granularity: ``"layer"``, a scalar as in the paper's code, or ``"channel"``, a vector [in].

    Source: arXiv:2509.22166, static shift (S-PTS); the mode is that of SCAP, arXiv:2412.07174.
    Differs: the paper's code takes the statistic of the text that is evaluated.
    """

    stat: Literal["median", "mean", "mode"] = "median"
    granularity: Literal["layer", "channel"] = "layer"
    slot = "eta"
    calibration = "text"

    def __post_init__(self) -> None:
        if self.stat not in ("median", "mean", "mode"):
            raise ValueError(f"stat {self.stat!r}; allowed: median, mean, mode")
        if self.granularity not in ("layer", "channel"):
            raise ValueError(f"granularity {self.granularity!r}; allowed: layer, channel")

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, eta=self.state_entry(layer, state, "eta"))

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return _Middle(self.stat, self.granularity)


class _Middle(Fitter):
    """The statistic of all values, or of each channel, in several passes over the text."""

    def __init__(self, stat: str, granularity: str) -> None:
        self.stat, self.granularity = stat, granularity

    def fit(self, windows: Iterable[Tensor]) -> dict[str, Tensor]:
        lengths, x = [], torch.empty(0)
        for x in windows:
            lengths.append(len(x))
        n_tokens = sum(lengths)
        if self.granularity == "layer":
            return {"eta": as_tensor(self._of_layer(windows, n_tokens * x.shape[-1]), x)}
        width = max(1, _CHUNK // max(1, n_tokens))
        columns = range(0, x.shape[-1], width)
        chunks = [torch.cat([part[:, start : start + width] for part in windows]) for start in columns]
        return {"eta": torch.cat([as_tensor(self._of_columns(chunk), x) for chunk in chunks])}

    def _of_layer(self, windows: Iterable[Tensor], n_values: int) -> Tensor:
        if self.stat == "mean":
            return torch.stack([part.sum(dtype=torch.float64) for part in windows]).sum() / n_values
        if self.stat == "median":
            return order_statistic(windows, (n_values - 1) // 2)
        return mode(windows)

    def _of_columns(self, x: Tensor) -> Tensor:
        """Return the statistic of each column of x [tokens, columns]."""
        if self.stat == "mean":
            return x.mean(dim=0, dtype=torch.float64)
        if self.stat == "median":
            return x.median(dim=0).values
        return torch.stack([mode([column]) for column in x.unbind(dim=1)])


def mode(parts: Iterable[Tensor]) -> Tensor:
    """Return the peak of the kernel density of the values, as `ShiftStatic` defines it: []; the median where IQR is 0.

    Args:
        parts: the values, in tensors of one dtype; iterated several times.
    """
    n = sum(part.numel() for part in parts)
    ranks = [round(0.25 * (n - 1)), (n - 1) // 2, round(0.75 * (n - 1))]
    lower, median, upper = (order_statistic(parts, rank).double() for rank in ranks)
    spread = float(upper - lower)
    if spread == 0:
        return median
    step = 0.9 * spread / 1.34 * n**-0.2 / 4
    half = int(_SPAN * spread / step)
    counts = torch.zeros(2 * half + 1, dtype=torch.float64, device=median.device)
    for part in parts:
        cell = ((part.flatten().double() - median) / step).round().long() + half
        counts += torch.bincount(cell[(cell >= 0) & (cell <= 2 * half)], minlength=2 * half + 1)
    reach = torch.arange(-16, 17, dtype=torch.float64, device=median.device)  # 4 bandwidths in steps of h/4
    kernel = (-0.5 * (reach / 4) ** 2).exp()
    density = torch.nn.functional.conv1d(counts[None, None], kernel[None, None], padding=16)[0, 0]
    peak: Tensor = median + (density.argmax() - half) * step
    return peak
