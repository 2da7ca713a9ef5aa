"""The base classes of methods. A method is a criterion or a mitigation; each fills one slot of the formula.

A new one is a class: here, in a package, or in a notebook. With a YAML file that names it, it can be swept.
The formula is in `nmsweep.sparsity.formula`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nmsweep.config.pattern import Pattern
from nmsweep.errors import InputError

Slot = Literal["rotation", "eta", "weight", "threshold", "nu", "residual", "gamma", "beta"]
"""Slots of the formula. The criterion fills `weight`, the pattern `threshold`, and mitigations fill the others."""

SLOT_ORDER: tuple[Slot, ...] = ("rotation", "eta", "weight", "threshold", "nu", "residual", "gamma", "beta")
"""The order in which slots are filled and calibrated."""

Calibration = Literal["none", "weights", "text", "learned"]
"""Where a method's state comes from: nowhere, the weights alone, a text, or training on a text."""

State = Mapping[str, Tensor]
"""The calibrated tensors of one layer, by name; empty where nothing is calibrated."""

Memory = MutableMapping[str, Tensor]
"""Tensors that a dynamic criterion keeps between the passes of one generation, by name."""


@dataclass(frozen=True)
class Layer:
    """One target layer, as methods see it.

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
        """The matrix that the pruned input is multiplied by, [out, in]: W, or W Q with a rotation."""
        return self.linear.weight.detach() if self.folded is None else self.folded


@dataclass(frozen=True)
class Tokens:
    """Facts about the tokens of a pass, beyond their values.

    Attributes:
        padding: [batch, seq] bool, True for padding; None without padding.
        past: number of tokens already in the key-value cache; 0 for a new sequence.
        position: [batch, seq] or [1, seq], the position of each token in its sequence; None for `past`, `past` + 1, …
        weight: [batch, seq] int64, how often each token is counted (see `counting`); None for once.
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
    """Count the channels of each token several times inside the block.

    A token that several packed sequences share counts once for each of them, and padding counts 0 times. The counts are
    then those of the sequences, however they are packed into rows and batches.

    Args:
        weight: [batch, seq] int64 on the CPU.
    """
    before = _weight.set(weight)
    try:
        yield
    finally:
        _weight.reset(before)


def counted_as() -> Tensor | None:
    """Return the weight of the enclosing `counting` block; None outside of one."""
    return _weight.get()


@dataclass(frozen=True)
class Slots:
    """The slots of the formula for one layer; a default leaves the slot out.

    Attributes:
        pattern: how many channels are kept.
        eta: η: a scalar or [in] tensor, or "median" or "mean" of each token; None for 0.
        weight: w, [in] fp32 ≥ 0; None for 1.
        dynamic: the criterion, where w depends on the input; `weight` is then None.
        priority: [in] fp32, replaces the score of a criterion that ignores the input.
        threshold: scalar fp32; channels with a score of at least this are kept.
        nu: whether ν is the variance ratio of the token; otherwise ν = 1.
        gamma, beta: γ and β, [out] fp32; None for 0.
        residual: U [out, r] and V [r, in] of the low-rank residual; None without one.
        rotation: Q [in, in] fp32, orthogonal; None without one.
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
        """Whether two layers that read the same tensor also get the same pruned tensor."""
        names = ("pattern", "eta", "weight", "dynamic", "priority", "threshold", "nu", "rotation")
        return (self.residual is None) == (other.residual is None) and all(
            _same(getattr(self, name), getattr(other, name)) for name in names
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)


class Pruning(NamedTuple):
    """The effect of pruning one window, for the fitters of ν, γ and β.

    Attributes:
        x: [tokens, in], the (rotated) input.
        u: [tokens, in], the pruned input.
        removed: (1−k)⊙z, [tokens, in] fp32 (float64 for a float64 model); None without a residual.
    """

    x: Tensor
    u: Tensor
    removed: Tensor | None


class Fitter:
    """Collects a statistic of one layer over the calibration text and turns it into the layer's state.

    Calibration passes in the tensor that the slot will see, for the tokens in scope only. All slots before it are applied:

    * rotation: x, in the dtype of the model;
    * eta: x, rotated;
    * weight, residual: z, rotated and centred, fp32 (float64 for a float64 model);
    * threshold: the score s, fp32 (float64);
    * nu, gamma, beta: a `Pruning`.

    Implement `update` and `result`; or `fit`, for a statistic that needs several passes over the text.

    Attributes:
        sees: ``"slot"``; ``"gradient"`` for the (rotated) gradient of the dense model's loss, fp32 (float64), in a criterion;
            ``"nothing"`` for a state from the weights alone.
    """

    sees: ClassVar[Literal["slot", "gradient", "nothing"]] = "slot"

    def update(self, x: Any) -> None:
        """Add the tokens of one window: a tensor [tokens, in], or a `Pruning` of such tensors."""
        raise NotImplementedError(f"{type(self).__name__} has neither update nor fit; implement one of them")

    def result(self) -> dict[str, Tensor]:
        """Return the layer's state, by name."""
        raise NotImplementedError(f"{type(self).__name__} has neither result nor fit; implement one of them")

    def fit(self, windows: Iterable[Any]) -> dict[str, Tensor]:
        """Return the layer's state.

        Args:
            windows: what `update` takes, one item a window. It can be iterated several times; each pass computes the
                tensors again, so that only one of them is in memory.
        """
        for window in windows:
            self.update(window)
        return self.result()


class Stage:
    """Fills one slot of the formula: a method, or the threshold of a pattern.

    Attributes:
        version: part of a cell's identity; increase it when the numbers change.
        slot: the slot it fills; two stages of one slot cannot be combined.
        calibration: where its state comes from.
        per_input: whether the state depends on the layer's input alone, so that q/k/v (gate/up) share it.
    """

    version: ClassVar[int] = 1
    slot: ClassVar[Slot]
    calibration: ClassVar[Calibration] = "none"
    per_input: ClassVar[bool] = True

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        """Return the layer's slots with this stage's slot filled."""
        raise NotImplementedError

    def fitter(self, layer: Layer, slots: Slots) -> Fitter | None:
        """Return a new fitter for a layer (for the first of those that share an input); None without calibration.

        Args:
            layer: `layer.weight` is W Q with a rotation.
            slots: the slots of the stages before this one.
        """
        return None

    def initial_parameters(self, layer: Layer) -> dict[str, Tensor]:
        """Return the parameters that training starts from, by name: fp32 (float64 for a float64 model)."""
        return {}

    def state_entry(self, layer: Layer, state: State, name: str) -> Tensor:
        """Return one tensor of the layer's state, on the layer's device, fp32 (float64 for a float64 model).

        Raises:
            InputError: the layer has no such state.
        """
        if name not in state:
            raise InputError(
                f"{type(self).__name__}: no calibrated state {name!r} for {layer.name}; it has "
                f"{', '.join(sorted(state)) or 'none'}; pass state=nmsweep.calibrate(model, …) with the same method"
            )
        return as_tensor(state[name], layer.weight)


class Criterion(Stage):
    """Ranks channels: the score is ``|z| · w``, and the highest scores are kept.

    Implement `weight`; or set `dynamic` and implement `token_weight`.

    Attributes:
        operand: what is pruned.
        dynamic: whether w depends on the input (`token_weight`) and not on the layer alone (`weight`).
        across_tokens: whether w of a token depends on other tokens of its sequence.
        looks_ahead: whether w of a token depends on later tokens; it is then undefined while text is generated.
    """

    slot: ClassVar[Slot] = "weight"
    operand: ClassVar[Literal["activations", "weights"]] = "activations"
    dynamic: ClassVar[bool] = False
    across_tokens: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False

    def weight(self, layer: Layer, state: State) -> Tensor | None:
        """Return w of a layer, [in] fp32 ≥ 0; None for ones."""
        return None

    def token_weight(self, z: Tensor, tokens: Tokens, memory: Memory) -> Tensor:
        """Return w of a batch, [batch, 1, in] or [batch, seq, in] fp32 ≥ 0, for a dynamic criterion.

        Args:
            z: [batch, seq, in], the centred input in fp32; without a shift x itself, in the dtype of the model.
            tokens: padding, positions and cache length.
            memory: this layer's tensors from earlier passes of the sequence; empty at its beginning.
        """
        raise NotImplementedError(f"{type(self).__name__} is dynamic but has no token_weight; implement it")

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        if self.dynamic:
            return replace(slots, dynamic=self)
        return replace(slots, weight=self.weight(layer, state))


class WeightCriterion(Criterion, ABC):
    """A baseline that prunes weights instead of activations, with the same patterns along in_features.

    With ``p%`` each output row has its own budget.
    """

    operand: ClassVar[Literal["activations", "weights"]] = "weights"

    @abstractmethod
    def pruned(self, layer: Layer, pattern: Pattern, state: State) -> tuple[Tensor, int]:
        """Return the pruned weight, [out, in] in its own dtype, and the number of entries kept."""

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return slots


class Mitigation(Stage, ABC):
    """Corrects the error of pruning: fills any slot but the criterion's."""

    @abstractmethod
    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        """Return the layer's slots with this mitigation's slot filled."""


def as_tensor(value: Tensor, like: Tensor) -> Tensor:
    """Return `value` on the device of `like`, fp32 (float64 where `like` is float64)."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return value.to(device=like.device, dtype=dtype)
