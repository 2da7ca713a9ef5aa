"""`shift` (D-PTS): centre each token on its median (or mean) before scoring; pruned channels take that value."""

from dataclasses import dataclass, replace
from typing import Literal

from nmsweep.methods.base import Layer, Mitigation, Slots, State


@dataclass(frozen=True)
class Shift(Mitigation):
    """η_t = the median of the token's channels, the lower of the two middle values; a scalar per token.

    Args:
        stat: ``"median"`` as in the paper's code, or ``"mean"``.

    Source: arXiv:2509.22166, dynamic per-token shift (D-PTS).
    """

    stat: Literal["median", "mean"] = "median"
    slot = "eta"

    def __post_init__(self) -> None:
        if self.stat not in ("median", "mean"):
            raise ValueError(f"stat {self.stat!r}; allowed: median, mean")

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, eta=self.stat)
