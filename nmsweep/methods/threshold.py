"""The stage behind ``threshold:p%``: one static threshold for each layer, below which channels are pruned."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from nmsweep.config.pattern import Pattern
from nmsweep.methods.base import Fitter, Layer, Slots, Stage, State
from nmsweep.methods.fitters import order_statistic


@dataclass(frozen=True)
class Threshold(Stage):
    """θ such that p % of the scores of the calibration tokens lie below it; channels with s ≥ θ are kept.

    Source: arXiv:2408.14690 (TEAL).
    Differs: TEAL's threshold is on \\|x\\|; this one is on the score of any criterion.
    """

    pattern: Pattern
    slot = "threshold"
    calibration = "text"
    per_input = False

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, threshold=self.state_entry(layer, state, "threshold"))

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return _Quantile(self.pattern.percent / 100)


class _Quantile(Fitter):
    """The score of rank round(share · n) from below, exact: [] fp32."""

    def __init__(self, share: float) -> None:
        self.share = share

    def fit(self, windows: Iterable[Tensor]) -> dict[str, Tensor]:
        n_scores = sum(scores.numel() for scores in windows)
        return {"threshold": order_statistic(windows, min(n_scores - 1, round(self.share * n_scores)))}
