"""What a criterion and a mitigation are: each fills one slot of the formula in `linear.py`.

A new one is one file with one class here or in a package of your own, and one YAML file that names it.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nmsweep.config import Method
from nmsweep.errors import InputError
from nmsweep.pattern import Pattern

Slot = Literal["eta", "nu", "gamma", "beta", "residual", "rotation"]
"""Slots of the formula that a mitigation can fill; the criterion fills the weight."""

State = Mapping[str, Tensor]
"""What calibration found out for one layer, by name; empty where nothing is calibrated."""


@dataclass(frozen=True)
class Layer:
    """One target layer, as criteria and mitigations see it.

    Attributes:
        name: module path in the model.
        linear: the dense layer; `weight` [out, in], `bias` [out] or None.
    """

    name: str
    linear: nn.Linear

    @property
    def weight(self) -> Tensor:
        return self.linear.weight.detach()


@dataclass(frozen=True)
class Tokens:
    """What is known about the rows of an input beyond their values.

    Attributes:
        padding: [batch, seq] bool, True for padding; None without any.
        past: tokens already in the key-value cache; 0 for a fresh sequence.
    """

    padding: Tensor | None = None
    past: int = 0


@dataclass(frozen=True)
class Slots:
    """The formula's slots for one layer; a default is the absence of the stage.

    Attributes:
        pattern: which share is kept.
        eta: η: None is 0; "median" or "mean" of each token; a scalar or [in] tensor.
        weight: w, [in] fp32 ≥ 0; None is 1.
        dynamic: the criterion, where w depends on the input; then `weight` is None.
        nu: whether ν is the variance ratio of the token; else ν = 1.
        gamma, beta: γ, β, [out] fp32; None is 0.
        residual: U [out, r] and V [r, in] of the low-rank residual; None without it.
    """

    pattern: Pattern
    eta: Tensor | Literal["median", "mean"] | None = None
    weight: Tensor | None = None
    dynamic: "Criterion | None" = None
    nu: bool = False
    gamma: Tensor | None = None
    beta: Tensor | None = None
    residual: tuple[Tensor, Tensor] | None = None


class Criterion:
    """Says what a channel is worth: the score is ``|z| · w``, higher is kept.

    Attributes:
        version: raise it when the numbers change; it is part of a cell's identity.
        operand: what is pruned.
        dynamic: whether w depends on the input (`token_weight`) and not on the layer alone (`weight`).
        across_tokens: whether w of one token depends on other tokens.
    """

    version: ClassVar[int] = 1
    operand: ClassVar[Literal["activations", "weights"]] = "activations"
    dynamic: ClassVar[bool] = False
    across_tokens: ClassVar[bool] = False

    def weight(self, layer: Layer, state: State) -> Tensor | None:
        """w of a layer, [in] fp32 ≥ 0; None stands for ones."""
        return None

    def token_weight(self, z: Tensor, tokens: Tokens) -> Tensor:
        """w of a batch of inputs, [batch, 1, in] or [batch, seq, in] fp32, for a dynamic criterion.

        Args:
            z: [batch, seq, in] fp32, the centred input.
            tokens: what is known about the rows.
        """
        raise NotImplementedError(f"{type(self).__name__} is not dynamic")


class Mitigation(ABC):
    """A correction: fills one slot of the formula.

    Attributes:
        version: raise it when the numbers change; it is part of a cell's identity.
        slot: the slot it fills; two mitigations of one slot do not compose.
    """

    version: ClassVar[int] = 1
    slot: ClassVar[Slot]

    @abstractmethod
    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        """The layer's slots with this stage's own one filled."""


@dataclass(frozen=True)
class Sparsification:
    """Pattern, criterion and mitigations together: everything that turns a dense layer into a sparse one."""

    pattern: Pattern
    criterion: Criterion
    mitigations: Sequence[Mitigation] = field(default_factory=tuple)

    def slots(self, layer: Layer, state: State) -> Slots:
        """Fill all slots of one layer."""
        slots = Slots(self.pattern)
        if self.criterion.dynamic:
            slots = replace(slots, dynamic=self.criterion)
        else:
            slots = replace(slots, weight=self.criterion.weight(layer, state))
        for mitigation in self.mitigations:
            slots = mitigation.fill(slots, layer, state)
        return slots


def build(method: Method) -> Any:
    """Make a criterion or mitigation from its YAML file.

    Raises:
        InputError: its class does not exist or refuses its parameters.
    """
    module_name, _, class_name = method.target.rpartition(".")
    try:
        made = getattr(importlib.import_module(module_name), class_name)(**method.params)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{method.name}: _target_ {method.target} cannot be imported: {error}; correct its YAML file"
        ) from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{method.name}: {error}; parameters given: {dict(method.params)}") from error
    if not isinstance(made, Criterion | Mitigation):
        raise InputError(f"{method.name}: {method.target} is neither a Criterion nor a Mitigation; derive it from one")
    return made


def build_sparsification(pattern: Pattern, criterion: Method, mitigations: Sequence[Method]) -> Sparsification:
    """Make the sparsification that a config names.

    Raises:
        InputError: a class that cannot be made, or two mitigations of one slot.
    """
    made = [(method.name, build(method)) for method in mitigations]
    by_slot: dict[str, str] = {}
    errors = []
    for name, mitigation in made:
        if not isinstance(mitigation, Mitigation):
            errors.append(f"mitigation: {name} is a criterion; use it as criterion={name}")
        elif other := by_slot.get(mitigation.slot):
            errors.append(f"mitigation: {other} and {name} both set {mitigation.slot}; keep one of them")
        else:
            by_slot[mitigation.slot] = name
    ranks = build(criterion)
    if not isinstance(ranks, Criterion):
        errors.append(f"criterion: {criterion.name} is a mitigation; use it as mitigation={criterion.name}")
    if errors:
        raise InputError(*errors)
    return Sparsification(pattern, ranks, tuple(mitigation for _, mitigation in made))


def as_tensor(value: Tensor, like: Tensor) -> Tensor:
    """`value` on the device of `like`, fp32 (float64 for a float64 model)."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return value.to(device=like.device, dtype=dtype)
