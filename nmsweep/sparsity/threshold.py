"""The stage behind ``threshold:p%``: one static threshold a layer, below which a score is pruned."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nmsweep.pattern import Pattern
from nmsweep.sparsity.linear import rotated, score
from nmsweep.sparsity.method import Fitter, Layer, Slot, Slots, Stage, State, Tokens, as_tensor


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
    """The score of rank ⌈·⌋ p·n from below, exact: [] fp32."""

    def __init__(self, share: float, slots: Slots) -> None:
        self.share, self.slots = share, slots
        self.scores: list[Tensor] = []

    def update(self, x: Tensor, scope: Tensor | None = None) -> None:
        seen = score(rotated(x, self.slots), self.slots, Tokens(), {})
        self.scores.append((seen if scope is None else seen[scope]).flatten())

    def result(self) -> dict[str, Tensor]:
        scores = torch.cat(self.scores)
        below = min(len(scores) - 1, round(self.share * len(scores)))
        return {"threshold": as_tensor(order_statistic(scores, below), scores)}


def order_statistic(values: Tensor, rank: int) -> Tensor:
    """The value with exactly `rank` values before it in ascending order, exact at any size: []."""
    return values.flatten().kthvalue(rank + 1).values
