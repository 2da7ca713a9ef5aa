"""What a criterion and a mitigation are: each fills one slot of the formula in `linear.py`.

A new one is one file with one class here or in a package of your own, and one YAML file that names it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nmsweep.config.pattern import Pattern
from nmsweep.errors import InputError

Slot = Literal["rotation", "eta", "weight", "threshold", "nu", "residual", "gamma", "beta"]
"""Slots of the formula; the criterion fills the weight, the pattern the threshold, mitigations the others."""

SLOT_ORDER: tuple[Slot, ...] = ("rotation", "eta", "weight", "threshold", "nu", "residual", "gamma", "beta")
"""Slots are filled and calibrated in this order: each statistic is of the tensor that its slot will see."""

State = Mapping[str, Tensor]
"""What calibration found out for one layer, by name; empty where nothing is calibrated."""

Memory = MutableMapping[str, Tensor]
"""What a dynamic criterion keeps of a sequence between the passes of one generation."""


@dataclass(frozen=True)
class Layer:
    """One target layer, as criteria and mitigations see it.

    Attributes:
        name: module path in the model.
        linear: the dense layer; `weight` [out, in], `bias` [out] or None.
        folded: W Q [out, in] where the input is rotated; None without a rotation.
    """

    name: str
    linear: nn.Linear
    folded: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The matrix that the pruned input meets: W, or W Q with a rotation."""
        return self.linear.weight.detach() if self.folded is None else self.folded


@dataclass(frozen=True)
class Tokens:
    """What is known about the rows of an input beyond their values.

    Attributes:
        padding: [batch, seq] bool, True for padding; None without any.
        past: tokens already in the key-value cache; 0 for a fresh sequence.
        position: [batch, seq] or [1, seq], each token's place in its own sequence; None for `past`, `past` + 1, …
        weight: [batch, seq] int64, how often each token is counted, as `counting` says; None for once.
        n_counted: the sum of `weight`.
    """

    padding: Tensor | None = None
    past: int = 0
    position: Tensor | None = None
    weight: Tensor | None = None
    n_counted: int = 0


_weight: ContextVar[Tensor | None] = ContextVar("weight", default=None)


@contextmanager
def counting(weight: Tensor) -> Iterator[None]:
    """Passes inside the block count the channels of each token so often: how many sequences it is part of, 0 for padding.

    So the counts are those of the sequences, each for itself, however rows and batches are made of them.

    Args:
        weight: [batch, seq] int64 on the CPU.
    """
    before = _weight.set(weight)
    try:
        yield
    finally:
        _weight.reset(before)


def counted_as() -> Tensor | None:
    """What `counting` was given; None outside of it."""
    return _weight.get()


@dataclass(frozen=True)
class Slots:
    """The formula's slots for one layer; a default is the absence of the stage.

    Attributes:
        pattern: which share is kept.
        eta: η: None is 0; "median" or "mean" of each token; a scalar or [in] tensor.
        weight: w, [in] fp32 ≥ 0; None is 1.
        dynamic: the criterion, where w depends on the input; then `weight` is None.
        priority: [in] fp32, replaces the score where a criterion does not look at the input at all.
        threshold: scalar fp32; a channel is kept where its score is not below it.
        nu: whether ν is the variance ratio of the token; else ν = 1.
        gamma, beta: γ, β, [out] fp32; None is 0.
        residual: U [out, r] and V [r, in] of the low-rank residual; None without it.
        rotation: Q [in, in] fp32, orthogonal; None without it.
        folded: W Q [out, in] in the dtype of the model; None without a rotation.
    """

    pattern: Pattern
    eta: Tensor | Literal["median", "mean"] | None = None
    weight: Tensor | None = None
    dynamic: "Criterion | None" = None
    priority: Tensor | None = None
    threshold: Tensor | None = None
    nu: bool = False
    gamma: Tensor | None = None
    beta: Tensor | None = None
    residual: tuple[Tensor, Tensor] | None = None
    rotation: Tensor | None = None
    folded: Tensor | None = None

    def same_input(self, other: "Slots") -> bool:
        """Whether two layers that read one tensor also see one pruned tensor."""
        names = ("pattern", "eta", "weight", "dynamic", "priority", "threshold", "nu", "rotation")
        return (self.residual is None) == (other.residual is None) and all(
            _same(getattr(self, name), getattr(other, name)) for name in names
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)


class Fitter(ABC):
    """A streaming statistic of one layer's input; frozen into a `State` when the text is over.

    Attributes:
        sees: what `update` is given: the layer's input, the loss's gradient with respect to it, or nothing (weights only).
    """

    sees: ClassVar[Literal["input", "gradient", "nothing"]] = "input"

    @abstractmethod
    def update(self, x: Tensor, scope: Tensor | None = None) -> None:
        """Take in a window.

        Args:
            x: [batch, seq, in], what the dense layer is given, in the dtype of the model.
            scope: [batch, seq] bool, the tokens that are pruned; None for all.
        """

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """The layer's state that this statistic gives, by name."""


class Stage:
    """Fills one slot of the formula.

    Attributes:
        version: raise it when the numbers change; it is part of a cell's identity.
        slot: the slot it fills; two stages of one slot do not compose.
        calibration: what its state is made from: nothing, the weights alone, a text, or learning on a text.
        per_input: whether its state depends on the layer's input alone, so that q/k/v (gate/up) share it.
    """

    version: ClassVar[int] = 1
    slot: ClassVar[Slot]
    calibration: ClassVar[Literal["none", "weights", "text", "learned"]] = "none"
    per_input: ClassVar[bool] = True

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        """The layer's slots with this stage's own one filled."""
        raise NotImplementedError

    def fitter(self, layer: Layer, slots: Slots) -> Fitter | None:
        """What calibration collects for this stage; `slots` holds the stages before it. None where it needs nothing."""
        return None

    def masters(self, layer: Layer) -> dict[str, Tensor]:
        """The parameters that a learned stage starts from, by name, fp32 (float64 for a float64 model)."""
        return {}

    def found(self, layer: Layer, state: State, name: str) -> Tensor:
        """One entry of the layer's state, on the layer's device.

        Raises:
            InputError: the layer was not calibrated.
        """
        if name not in state:
            stage = type(self).__name__
            raise InputError(
                f"{stage}: no calibrated state {name!r} for {layer.name}; it has {', '.join(sorted(state)) or 'none'}; "
                "calibrate the model first (nmsweep.calibration.fit) and pass its state"
            )
        return as_tensor(state[name], layer.weight)


class Criterion(Stage):
    """Says what a channel is worth: the score is ``|z| · w``, higher is kept.

    Attributes:
        operand: what is pruned.
        dynamic: whether w depends on the input (`token_weight`) and not on the layer alone (`weight`).
        across_tokens: whether w of one token depends on other tokens.
        looks_ahead: whether w of one token depends on later tokens, so that it is undefined while text is generated.
    """

    slot: ClassVar[Slot] = "weight"
    operand: ClassVar[Literal["activations", "weights"]] = "activations"
    dynamic: ClassVar[bool] = False
    across_tokens: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False

    def weight(self, layer: Layer, state: State) -> Tensor | None:
        """w of a layer, [in] fp32 ≥ 0; None stands for ones."""
        return None

    def token_weight(self, z: Tensor, tokens: Tokens, memory: Memory) -> Tensor:
        """w of a batch of inputs, [batch, 1, in] or [batch, seq, in] fp32, for a dynamic criterion.

        Args:
            z: [batch, seq, in], the centred input: fp32, or x itself in the dtype of the model where nothing is subtracted.
            tokens: what is known about the rows.
            memory: what this layer kept of the sequence in earlier passes; empty at its beginning.
        """
        raise NotImplementedError(f"{type(self).__name__} is not dynamic")

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        if self.dynamic:
            return replace(slots, dynamic=self)
        return replace(slots, weight=self.weight(layer, state))


class WeightCriterion(Criterion, ABC):
    """A baseline that prunes the weights instead of the activations, under the same patterns along in_features.

    For ``p%`` the budget is that of each output row.
    """

    operand: ClassVar[Literal["activations", "weights"]] = "weights"

    @abstractmethod
    def pruned(self, layer: Layer, pattern: Pattern, state: State) -> tuple[Tensor, int]:
        """The weight to compute with, [out, in] in its own dtype, and how many of its entries are kept."""

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return slots


class Mitigation(Stage, ABC):
    """A correction: fills one slot of the formula."""

    @abstractmethod
    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        """The layer's slots with this stage's own one filled."""


def as_tensor(value: Tensor, like: Tensor) -> Tensor:
    """`value` on the device of `like`, fp32 (float64 for a float64 model)."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return value.to(device=like.device, dtype=dtype)
