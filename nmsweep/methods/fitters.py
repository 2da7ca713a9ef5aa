"""Streaming statistics that several stages share: `update` with each window, `result` when the text is over."""

from collections.abc import Callable, Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nmsweep.methods.base import Fitter, Slots, as_tensor
from nmsweep.sparsity.linear import centred, rotated


def rows(x: Tensor, scope: Tensor | None) -> Tensor:
    """The tokens in scope of x [batch, seq, in]: [tokens, in]."""
    return x.flatten(0, -2) if scope is None else x[scope]


_DIGIT = 16
"""Bits of a value that one pass of `order_statistic` settles."""

_INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def order_statistic(parts: Callable[[], Iterable[Tensor]], rank: int) -> Tensor:
    """The value with exactly `rank` values before it in ascending order: [], exact at any size, without a copy of the whole.

    Args:
        parts: gives the values again at each call, in tensors of one floating dtype; asked once for each 16 bits of it.
        rank: 0 for the smallest.
    """
    prefix, settled, like = 0, 0, torch.empty(0)
    while True:
        counts = torch.zeros(2**_DIGIT, dtype=torch.int64)
        for part in parts():
            like = part
            key, bits = _ordered_bits(part)
            if settled:
                key = key[(key >> (bits - settled)) == prefix]
            digit = (key >> (bits - settled - _DIGIT)) - (prefix << _DIGIT if settled else -(2 ** (_DIGIT - 1)))
            counts += torch.bincount(digit, minlength=2**_DIGIT).cpu()
        until = counts.cumsum(0)
        found = int((until > rank).nonzero()[0])
        rank -= int(until[found] - counts[found])
        prefix = (prefix << _DIGIT) + found if settled else found - 2 ** (_DIGIT - 1)
        settled += _DIGIT
        if settled == like.element_size() * 8:
            return _from_ordered_bits(prefix, like)


def _ordered_bits(x: Tensor) -> tuple[Tensor, int]:
    """int64 [n] that orders as x does, and how many bits of it count."""
    bits = x.element_size() * 8
    raw = x.flatten().view(_INTEGERS[x.dtype]).long()
    return torch.where(raw < 0, raw ^ (2 ** (bits - 1) - 1), raw), bits


def _from_ordered_bits(key: int, like: Tensor) -> Tensor:
    raw = key ^ (2 ** (like.element_size() * 8 - 1) - 1) if key < 0 else key
    return torch.tensor([raw], dtype=_INTEGERS[like.dtype], device=like.device).view(like.dtype)[0]


class SquareSum(Fitter):
    """√Σ_t z_tj² over the tokens, or √E_t[z_tj²] with `mean`; summed in float64.

    Args:
        name: of the entry of the state, [in] fp32.
        slots: the stages before this one: they say what z is.
        mean: divide by the number of tokens.
    """

    def __init__(self, name: str, slots: Slots, *, mean: bool) -> None:
        self.name, self.slots, self.mean = name, slots, mean
        self.total: Tensor | float = 0.0
        self.n_tokens = 0
        self.like = torch.empty(0)

    def update(self, x: Tensor, scope: Tensor | None = None) -> None:
        z = rows(self._seen(x), scope)
        self.total = self.total + z.double().square().sum(dim=0)
        self.n_tokens += len(z)
        self.like = z

    def _seen(self, x: Tensor) -> Tensor:
        return centred(rotated(x, self.slots), self.slots)

    def result(self) -> dict[str, Tensor]:
        total = torch.as_tensor(self.total) / (max(1, self.n_tokens) if self.mean else 1)
        return {self.name: as_tensor(total.sqrt(), self.like)}


class GradientMeanSquare(SquareSum):
    """√E_t[g_tj²] of the loss's gradient with respect to the (rotated) input."""

    sees: ClassVar[Literal["input", "gradient", "nothing"]] = "gradient"

    def _seen(self, x: Tensor) -> Tensor:
        return as_tensor(rotated(x, self.slots), x)


class Peak(Fitter):
    """max_t |z_tj| over the tokens: [in] fp32."""

    def __init__(self, name: str, slots: Slots) -> None:
        self.name, self.slots = name, slots
        self.peak: Tensor | None = None

    def update(self, x: Tensor, scope: Tensor | None = None) -> None:
        z = rows(centred(rotated(x, self.slots), self.slots), scope)
        if len(z):
            peak = z.abs().amax(dim=0)
            self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)

    def result(self) -> dict[str, Tensor]:
        assert self.peak is not None
        return {self.name: self.peak}


class SecondMoment(Fitter):
    """E_t[x_t x_tᵀ], uncentred, of the layer's own input: [in, in] fp32 (float64 for a float64 model)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.total: Tensor | None = None
        self.n_tokens = 0

    def update(self, x: Tensor, scope: Tensor | None = None) -> None:
        seen = as_tensor(rows(x, scope), x)
        product = seen.T @ seen
        self.total = product if self.total is None else self.total.add_(product)
        self.n_tokens += len(seen)

    def result(self) -> dict[str, Tensor]:
        assert self.total is not None
        return {self.name: self.total / max(1, self.n_tokens)}
