"""`check_method` on classes of an outsider: sound ones pass, and every broken rule is caught by its name."""

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nmsweep import Criterion, Fitter, Layer, Mitigation, Slots, State, Tokens, WeightCriterion, check_method
from nmsweep.config.pattern import Pattern
from nmsweep.testing import ContractError


@dataclass(frozen=True)
class SquaredColumn(Criterion):
    """w_j = Σ_i |W_ij|^power."""

    power: float = 2.0

    def weight(self, layer: Layer, state: State) -> Tensor:
        return layer.weight.float().abs().pow(self.power).sum(dim=0)


@dataclass(frozen=True)
class HalfMean(Mitigation):
    """η = half the mean input over a calibration text."""

    slot = "eta"
    calibration = "text"

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, eta=0.5 * self.state_entry(layer, state, "mean"))

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return Mean()


class Mean(Fitter):
    def __init__(self) -> None:
        self.total, self.n_tokens = torch.zeros(()), 0

    def update(self, x: Tensor) -> None:
        self.total, self.n_tokens = self.total + x.double().sum(dim=0), self.n_tokens + len(x)

    def result(self) -> dict[str, Tensor]:
        return {"mean": self.total / self.n_tokens}


class BatchNorm(Criterion):
    """Looks at its batch mates."""

    dynamic = across_tokens = looks_ahead = True

    def token_weight(self, z: Tensor, tokens: Tokens, memory: Any) -> Tensor:
        return z.square().sum(dim=(0, 1)).sqrt().expand(len(z), 1, -1)


class Padded(Criterion):
    """A norm over the sequence, its padding included."""

    dynamic = across_tokens = looks_ahead = True

    def token_weight(self, z: Tensor, tokens: Tokens, memory: Any) -> Tensor:
        return (z.square().sum(dim=1, keepdim=True) + (z == z).sum(dim=1, keepdim=True)).sqrt()


class Undeclared(Padded):
    """Looks at later tokens without saying so."""

    looks_ahead = False


class Secretive(Padded):
    """Looks at other tokens without saying so."""

    across_tokens = looks_ahead = False


class TorchDice(SquaredColumn):
    def weight(self, layer: Layer, state: State) -> Tensor:
        return torch.rand(layer.weight.shape[1])


class NumpyDice(SquaredColumn):
    def weight(self, layer: Layer, state: State) -> Tensor:
        return torch.from_numpy(np.random.rand(layer.weight.shape[1])).float()


class PythonDice(SquaredColumn):
    def weight(self, layer: Layer, state: State) -> Tensor:
        return torch.full((layer.weight.shape[1],), random.random())


class Narrow(SquaredColumn):
    """w in the dtype of the model."""

    def weight(self, layer: Layer, state: State) -> Tensor:
        return layer.weight.abs().sum(dim=0)


class Negative(SquaredColumn):
    def weight(self, layer: Layer, state: State) -> Tensor:
        return layer.weight.float().sum(dim=0)


class Transposed(SquaredColumn):
    def weight(self, layer: Layer, state: State) -> Tensor:
        return layer.weight.float().abs().sum(dim=1)


class Unrotated(SquaredColumn):
    """Reads W where the input is rotated."""

    def weight(self, layer: Layer, state: State) -> Tensor:
        return layer.linear.weight.detach().float().abs().sum(dim=0)


class Counting(SquaredColumn):
    """Changes from one calibration to the next."""

    calls = 0
    calibration = "weights"

    def weight(self, layer: Layer, state: State) -> Tensor:
        return self.state_entry(layer, state, "w").float()

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        type(self).calls += 1
        return Constant(torch.arange(layer.weight.shape[1]) * float(self.calls))


class Constant(Fitter):
    sees = "nothing"

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def result(self) -> dict[str, Tensor]:
        return {"w": self.value}


class Vandal(SquaredColumn):
    """Writes to the model's weight."""

    def weight(self, layer: Layer, state: State) -> Tensor:
        layer.linear.weight.data.mul_(1.5)
        return super().weight(layer, state)


class Additive(Mitigation):
    """Claims to fill η, and doubles the weight."""

    slot = "eta"

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, folded=2 * layer.weight)


class Slotless(Mitigation):
    slot = "weight"

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return slots


class Generous(WeightCriterion):
    """Keeps every weight and says otherwise."""

    def pruned(self, layer: Layer, pattern: Pattern, state: State) -> tuple[Tensor, int]:
        return layer.weight, pattern.kept(layer.weight.numel())


@pytest.mark.parametrize("method", [SquaredColumn, SquaredColumn(power=3.0), HalfMean()])
def test_sound_methods_pass(method: Any) -> None:
    check_method(method)


def test_sound_methods_pass_together() -> None:
    check_method(SquaredColumn(), HalfMean(), shape="tiny-gemma3")


@pytest.mark.parametrize(
    ("method", "rule", "seen"),
    [
        (BatchNorm, "other sequences of its batch", "in a padded batch"),
        (Padded, "nor on padding", "in a padded batch"),
        (Undeclared, "`looks_ahead`", "looks_ahead is False"),
        (Secretive, "`across_tokens`", "across_tokens is False"),
        (TorchDice, "global random state", "of torch has changed"),
        (NumpyDice, "global random state", "of numpy has changed"),
        (PythonDice, "global random state", "of random has changed"),
        (Narrow, "fp32", "is torch.bfloat16 in a torch.bfloat16 model"),
        (Negative, "w is not negative", "has negative entries"),
        (Transposed, "right shapes", "has shape"),
        (Unrotated, "as the layer W Q", "differ in weight"),
        (Counting, "same input gives the same result", "two calibrations on one text"),
        (Vandal, "The model is what it was", "have changed"),
        (Additive, "M:M prunes nothing", "with 4:4 logits differ"),
        (Slotless, "fills one slot", "slot is 'weight'"),
        (Generous, "Exactly N of each M", "keeps more than 1 of 4"),
        (dict, "", "is no method; derive it from nmsweep.Criterion"),
    ],
)
def test_a_broken_rule_is_named(method: Any, rule: str, seen: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ContractError) as error:
        check_method(method)
    assert rule in str(error.value)
    assert seen in str(error.value)
    assert torch.equal(torch.get_rng_state(), state)
