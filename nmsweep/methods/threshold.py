"""The stage behind ``threshold:p%``: one static threshold a layer, below which a score is pruned."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from nmsweep.config.pattern import Pattern
from nmsweep.methods.base import Fitter, Layer, Slot, Slots, Stage, State, Tokens
from nmsweep.methods.fitters import order_statistic, rows
from nmsweep.sparsity.linear import rotated, score


@dataclass(frozen=True)
class Threshold(Stage):
    """θ so that over the calibration tokens p % of the scores are below it; kept where s ≥ θ.

    Source: arXiv:2408.14690 (TEAL).
    Differs: TEAL's threshold is on \\|x\\|; this one is on the score of any criterion.
    """

    pattern: Pattern
    slot: ClassVar[Slot] = "threshold"
    calibration: ClassVar[Literal["none", "weights", "text", "learned"]] = "text"
    per_input: ClassVar[bool] = False

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, threshold=self.found(layer, state, "threshold"))

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return _Quantile(self.pattern.percent / 100, slots)


class _Quantile(Fitter):
    """The score of rank ⌈·⌋ p·n from below, exact: [] fp32. Holds on to the inputs as they are; scores are made anew."""

    def __init__(self, share: float, slots: Slots) -> None:
        self.share, self.slots = share, slots
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def update(self, x: Tensor, scope: Tensor | None = None) -> None:
        self.seen.append((x, scope))

    def _scores(self) -> Iterator[Tensor]:
        for x, scope in self.seen:
            yield rows(score(rotated(x, self.slots), self.slots, Tokens(), {}), scope)

    def result(self) -> dict[str, Tensor]:
        n_scores = sum(scores.numel() for scores in self._scores())
        return {"threshold": order_statistic(self._scores, min(n_scores - 1, round(self.share * n_scores)))}
