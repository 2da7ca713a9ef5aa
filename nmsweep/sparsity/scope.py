"""Which tokens are pruned: all, those of the prompt, the generated ones, or all but the first few."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nmsweep.methods.base import Tokens


@dataclass(frozen=True)
class Scope:
    """A choice of tokens by their position in their sequence; padding is not counted.

    Attributes:
        kind: ``"all"``; ``"prefill"``: passes that begin a sequence; ``"decode"``: passes that continue one in the key-value
            cache; ``"skip"``: all but the first tokens.
        first: number of tokens that stay dense.
        percent: share of the tokens in the sequence's first pass that stay dense, rounded down.
    """

    kind: Literal["all", "prefill", "decode", "skip"] = "all"
    first: int = 0
    percent: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Scope":
        """Parse a scope that `config` has checked: ``all``, ``prefill``, ``decode``, ``skip_first:4``, ``skip_first:50%``."""
        word, _, number = text.partition(":")
        if word != "skip_first":
            kinds: dict[str, Literal["all", "prefill", "decode"]] = {
                kind: kind for kind in ("all", "prefill", "decode")
            }
            return cls(kinds[word])
        if number.endswith("%"):
            return cls("skip", percent=float(number[:-1]))
        return cls("skip", first=int(number))

    def tokens(self, x: Tensor, tokens: Tokens) -> bool | Tensor:
        """Return which tokens of x [batch, seq, in] are pruned: True for all, False for none, or [batch, seq] bool."""
        if self.kind == "all":
            return True
        if self.kind in ("prefill", "decode"):
            return (tokens.past > 0) == (self.kind == "decode")
        if self.percent and tokens.past:
            return True
        batch, seq = x.shape[0], x.shape[1]
        position = _position(tokens, batch, seq, x.device)
        if not self.percent:
            return position >= self.first
        real = torch.ones_like(position, dtype=torch.bool) if tokens.padding is None else ~tokens.padding
        length = torch.where(real, position + 1, 0).amax(dim=1, keepdim=True)
        return position >= (length * self.percent / 100).floor()


def _position(tokens: Tokens, batch: int, seq: int, device: torch.device) -> Tensor:
    """Return each token's position in its sequence, [batch, seq]."""
    if tokens.position is not None:
        return tokens.position.to(device).expand(batch, seq)
    place = torch.arange(seq, device=device).expand(batch, seq)
    if tokens.padding is not None:
        place = (~tokens.padding).long().cumsum(dim=1) - 1
    return place + tokens.past
