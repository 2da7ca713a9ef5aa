"""`shift_static` (S-PTS): inputs are centred on a constant found in a calibration text; dropped channels become it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nmsweep.methods.base import Fitter, Layer, Mitigation, Slot, Slots, State, as_tensor
from nmsweep.methods.fitters import order_statistic, rows
from nmsweep.sparsity.linear import rotated

_CHUNK = 2**24
"""Values sorted at once where each channel has its own, 64 MiB in fp32."""

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
    """Holds on to the group's inputs, as they are, and takes their middle at the end."""

    def __init__(self, stat: str, granularity: str, slots: Slots) -> None:
        self.stat, self.granularity, self.slots = stat, granularity, slots
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def update(self, x: Tensor, scope: Tensor | None = None) -> None:
        self.seen.append((x, scope))

    def _tokens(self) -> Iterator[Tensor]:
        for x, scope in self.seen:
            yield rows(rotated(x, self.slots), scope)

    def result(self) -> dict[str, Tensor]:
        x, n_tokens = self.seen[0][0], sum(len(part) for part in self._tokens())
        if self.granularity == "layer":
            return {"eta": as_tensor(self._of_layer(n_tokens * x.shape[-1]), x)}
        width = max(1, _CHUNK // max(1, n_tokens))
        columns = range(0, x.shape[-1], width)
        parts = [torch.cat([part[:, start : start + width] for part in self._tokens()]) for start in columns]
        return {"eta": torch.cat([as_tensor(self._of_columns(part), x) for part in parts])}

    def _of_layer(self, n_values: int) -> Tensor:
        if self.stat == "mean":
            return torch.stack([part.sum(dtype=torch.float64) for part in self._tokens()]).sum() / n_values
        if self.stat == "median":
            return order_statistic(self._tokens, (n_values - 1) // 2)
        return mode(self._tokens)

    def _of_columns(self, x: Tensor) -> Tensor:
        """The statistic of each column of x [tokens, columns]."""
        if self.stat == "mean":
            return x.mean(dim=0, dtype=torch.float64)
        if self.stat == "median":
            return x.median(dim=0).values
        return torch.stack([mode(partial(list, [column])) for column in x.unbind(dim=1)])


def mode(parts: Callable[[], Iterable[Tensor]]) -> Tensor:
    """The peak of the kernel density of the values, as `ShiftStatic` defines it; the median where IQR is 0: [].

    Args:
        parts: gives the values again at each call, in tensors of one dtype.
    """
    n = sum(part.numel() for part in parts())
    ranks = [round(0.25 * (n - 1)), (n - 1) // 2, round(0.75 * (n - 1))]
    lower, median, upper = (order_statistic(parts, rank).double() for rank in ranks)
    spread = float(upper - lower)
    if spread == 0:
        return median
    step = 0.9 * spread / 1.34 * n**-0.2 / 4
    half = int(_SPAN * spread / step)
    counts = torch.zeros(2 * half + 1, dtype=torch.float64, device=median.device)
    for part in parts():
        cell = ((part.flatten().double() - median) / step).round().long() + half
        counts += torch.bincount(cell[(cell >= 0) & (cell <= 2 * half)], minlength=2 * half + 1)
    reach = torch.arange(-16, 17, dtype=torch.float64, device=median.device)  # 4 bandwidths in steps of h/4
    kernel = (-0.5 * (reach / 4) ** 2).exp()
    density = torch.nn.functional.conv1d(counts[None, None], kernel[None, None], padding=16)[0, 0]
    peak: Tensor = median + (density.argmax() - half) * step
    return peak
