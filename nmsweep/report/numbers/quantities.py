"""The quantities of tables and figures."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Quantity:
    """A quantity that a table or figure can show.

    Attributes:
        name: the word of ``report.metric=``.
        title: for captions and axes.
        column: of `Scores.per_task` and `Scores.per_cell`.
        low, high: columns of its interval; empty without one.
        better: which direction is better.
        scale: factor of the shown value (100 for points and percent).
        text: whether it belongs to perplexity texts.
        digits: digits after the point.
    """

    name: str
    title: str
    column: str
    low: str
    high: str
    better: Literal["lower", "higher"]
    scale: float
    text: bool
    digits: int


QUANTITIES = {
    quantity.name: quantity
    for quantity in (
        Quantity("drop", "drop (points)", "drop", "drop_low", "drop_high", "lower", 100, False, 1),
        Quantity("relative", "relative drop (%)", "relative_drop", "relative_low", "relative_high", "lower", 100, False, 1),
        Quantity("accuracy", "accuracy (%)", "value", "", "", "higher", 100, False, 1),
        Quantity("ratio", "perplexity / dense", "ratio", "ratio_low", "ratio_high", "lower", 1, True, 3),
        Quantity("perplexity", "perplexity", "value", "", "", "lower", 1, True, 2),
        Quantity("kl", "KL(dense ‖ sparse) (nats)", "kl", "", "", "lower", 1, True, 4),
        Quantity("agreement", "top-1 agreement (%)", "top1_agreement", "", "", "higher", 100, True, 1),
        Quantity("flips", "flip rate (%)", "flip_rate", "", "", "lower", 100, False, 1),
    )
}  # fmt: skip
