"""Statistics that several methods share."""

from collections.abc import Iterable

import torch
from torch import Tensor

from nmsweep.methods.base import Fitter, as_tensor

_DIGIT = 16
"""Bits of a value that one pass of `order_statistic` settles."""

_INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def order_statistic(parts: Iterable[Tensor], rank: int) -> Tensor:
    """Return the value with exactly `rank` values before it in ascending order: [], exact at any size, by radix selection.

    Args:
        parts: the values, in tensors of one floating dtype; iterated once for every 16 bits of it.
        rank: 0 for the smallest.
    """
    prefix, settled, like = 0, 0, torch.empty(0)
    while True:
        counts = torch.zeros(2**_DIGIT, dtype=torch.int64)
        for part in parts:
            like = part
            key, bits = _ordered_bits(part)
            if settled:
                key = key[(key >> (bits - settled)) == prefix]
            digit = (key >> (bits - settled - _DIGIT)) - (prefix << _DIGIT if settled else -(2 ** (_DIGIT - 1)))
            counts += torch.bincount(digit, minlength=2**_DIGIT).cpu()
        cumulative = counts.cumsum(0)
        digit_of_rank = int((cumulative > rank).nonzero()[0])
        rank -= int(cumulative[digit_of_rank] - counts[digit_of_rank])
        prefix = (prefix << _DIGIT) + digit_of_rank if settled else digit_of_rank - 2 ** (_DIGIT - 1)
        settled += _DIGIT
        if settled == like.element_size() * 8:
            return _from_ordered_bits(prefix, like)


def _ordered_bits(x: Tensor) -> tuple[Tensor, int]:
    """Return int64 [n] in the order of x, and the number of bits that count."""
    bits = x.element_size() * 8
    raw = x.flatten().view(_INTEGERS[x.dtype]).long()
    return torch.where(raw < 0, raw ^ (2 ** (bits - 1) - 1), raw), bits


def _from_ordered_bits(key: int, like: Tensor) -> Tensor:
    raw = key ^ (2 ** (like.element_size() * 8 - 1) - 1) if key < 0 else key
    return torch.tensor([raw], dtype=_INTEGERS[like.dtype], device=like.device).view(like.dtype)[0]


class RootMeanSquare(Fitter):
    """√E_t[x_tj²] over the tokens, [in] in the dtype of x; summed in float64.

    Args:
        name: of the state entry.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.total: Tensor | float = 0.0
        self.n_tokens = 0
        self.dtype = torch.float32

    def update(self, x: Tensor) -> None:
        self.total = self.total + x.double().square().sum(dim=0)
        self.n_tokens += len(x)
        self.dtype = x.dtype

    def result(self) -> dict[str, Tensor]:
        mean = torch.as_tensor(self.total) / max(1, self.n_tokens)
        return {self.name: mean.sqrt().to(self.dtype)}


class GradientRootMeanSquare(RootMeanSquare):
    """√E_t[g_tj²] of the loss's gradient with respect to the layer's input."""

    sees = "gradient"


class SecondMoment(Fitter):
    """E_t[x_t x_tᵀ], uncentred: [in, in] fp32 (float64 for a float64 model).

    Args:
        name: of the state entry.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.total: Tensor | None = None
        self.n_tokens = 0

    def update(self, x: Tensor) -> None:
        wide = as_tensor(x, x)
        product = wide.T @ wide
        self.total = product if self.total is None else self.total.add_(product)
        self.n_tokens += len(x)

    def result(self) -> dict[str, Tensor]:
        assert self.total is not None
        return {self.name: self.total / max(1, self.n_tokens)}
