"""Streaming statistics that several stages share: `update` with each window, `result` when the text is over."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from nmsweep.sparsity.linear import centred, rotated
from nmsweep.sparsity.method import Fitter, Slots, as_tensor


def rows(x: Tensor, scope: Tensor | None) -> Tensor:
    """The tokens in scope of x [batch, seq, in]: [tokens, in]."""
    return x.flatten(0, -2) if scope is None else x[scope]


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
