"""Pattern, criterion and mitigations combined: built from their YAML files or from instances, and checked."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nmsweep.config.pattern import Pattern
from nmsweep.config.schema import Method
from nmsweep.errors import InputError
from nmsweep.methods.base import SLOT_ORDER, Criterion, Layer, Mitigation, Slot, Slots, Stage, State
from nmsweep.methods.threshold import Threshold


@dataclass(frozen=True)
class Sparsification:
    """Everything that turns a dense layer into a sparse one.

    Attributes:
        pattern: of all layers; with `patterns` the uniform pattern that sets their budget.
        criterion: ranks the channels.
        mitigations: fill the other slots.
        patterns: module path -> pattern, where each layer has its own; it names every target.
        drops_bias: sparse layers lose their bias, a defect of the paper's code that `profile=paper_code` reproduces.
        label: the methods by name, ``act shift+var``.
    """

    pattern: Pattern
    criterion: Criterion
    mitigations: Sequence[Mitigation] = field(default_factory=tuple)
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    drops_bias: bool = False
    label: str = ""

    def pattern_of(self, layer: str) -> Pattern:
        """Return the pattern of one layer, by module path."""
        return self.patterns.get(layer, self.pattern)

    def fitted_only(self, pattern: Pattern) -> "Sparsification":
        """Return a copy with one pattern for all layers and without learned mitigations."""
        fitted = tuple(stage for stage in self.mitigations if stage.calibration != "learned")
        return replace(self, pattern=pattern, patterns={}, mitigations=fitted)

    @property
    def stages(self) -> list[Stage]:
        """All stages in the order of their slots."""
        stages: list[Stage] = [self.criterion, *self.mitigations]
        if self.pattern.kind == "threshold":
            stages.append(Threshold(self.pattern))
        return sorted(stages, key=lambda stage: SLOT_ORDER.index(stage.slot))

    @property
    def calibrated(self) -> bool:
        """Whether any stage has a state."""
        return any(stage.calibration != "none" for stage in self.stages)

    @property
    def uses_text(self) -> bool:
        """Whether the state of any stage comes from a calibration text."""
        return any(stage.calibration in ("text", "learned") for stage in self.stages)

    @property
    def learned(self) -> bool:
        """Whether any stage is trained."""
        return any(stage.calibration == "learned" for stage in self.stages)

    def fills(self, slot: Slot) -> bool:
        """Whether any stage fills a slot."""
        return any(stage.slot == slot for stage in self.stages)

    def slots(self, layer: Layer, state: State, before: Stage | None = None) -> Slots:
        """Fill the slots of one layer: all of them, or those that come before a stage."""
        slots = Slots(self.pattern_of(layer.name))
        for stage in self.stages:
            if before is not None and SLOT_ORDER.index(stage.slot) >= SLOT_ORDER.index(before.slot):
                break
            slots = stage.fill(slots, replace(layer, folded=slots.folded), state)
        return slots


def build(method: Method) -> Any:
    """Build a criterion or mitigation from its YAML file.

    Raises:
        InputError: its class does not exist, is no method, or refuses its parameters.
    """
    module_name, _, class_name = method.target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{method.name}: _target_ {method.target} cannot be imported: {error}; correct its YAML file"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Criterion | Mitigation)):  # before the call: it may be anything
        raise InputError(f"{method.name}: {method.target} is neither a Criterion nor a Mitigation; derive it from one")
    try:
        return cls(**method.params)
    except (TypeError, ValueError) as error:
        raise InputError(f"{method.name}: {error}; parameters given: {dict(method.params)}") from error


def build_sparsification(
    pattern: Pattern,
    criterion: Method | Criterion,
    mitigations: Sequence[Method | Mitigation],
    scope: str = "all",
    *,
    patterns: Mapping[str, Pattern] | None = None,
    drops_bias: bool = False,
) -> Sparsification:
    """Combine a pattern, a criterion and mitigations.

    Args:
        pattern: of all layers.
        criterion, mitigations: instances, or YAML files to build them from.
        scope: which tokens are pruned.
        patterns, drops_bias: as in `Sparsification`.

    Raises:
        InputError: a method that cannot be built, two mitigations of one slot, or methods that cannot act together.
    """
    named = [(_name(method), build(method) if isinstance(method, Method) else method) for method in mitigations]
    by_slot: dict[str, str] = {}
    errors = []
    for name, mitigation in named:
        if isinstance(mitigation, type):
            errors.append(f"mitigation: {name} is a class; pass an instance, such as {name}()")
        elif not isinstance(mitigation, Mitigation):
            errors.append(f"mitigation: {name} is {_kind(mitigation)}; pass it as criterion={name}")
        elif other := by_slot.get(mitigation.slot):
            errors.append(f"mitigation: {other} and {name} both set {mitigation.slot}; keep one of them")
        else:
            by_slot[mitigation.slot] = name
    ranking = build(criterion) if isinstance(criterion, Method) else criterion
    if isinstance(ranking, type):
        errors.append(f"criterion: {_name(criterion)} is a class; pass an instance, such as {_name(criterion)}()")
    elif not isinstance(ranking, Criterion):
        errors.append(f"criterion: {_name(criterion)} is {_kind(ranking)}; pass it as mitigation={_name(criterion)}")
    elif ranking.operand == "weights":
        errors += _weight_errors(_name(criterion), pattern, [name for name, _ in named], scope)
    if errors:
        raise InputError(*errors)
    label = " ".join([_name(criterion), "+".join(name for name, _ in named)]).rstrip()
    return Sparsification(
        pattern, ranking, tuple(mitigation for _, mitigation in named), patterns or {}, drops_bias, label
    )


def _name(method: Any) -> str:
    """Return the name of a YAML file, or the class of an instance."""
    if isinstance(method, Method):
        return method.name
    return (method if isinstance(method, type) else type(method)).__name__


def _kind(method: Any) -> str:
    """Return "a criterion", "a mitigation", or that it is neither."""
    kinds = {"a criterion": Criterion, "a mitigation": Mitigation}
    return next((kind for kind, base in kinds.items() if isinstance(method, base)), "no method")


def _weight_errors(criterion: str, pattern: Pattern, mitigations: Sequence[str], scope: str) -> list[str]:
    """Return what cannot be combined with pruned weights, which are the same for every token."""
    errors = []
    if mitigations:
        errors.append(
            f"mitigation: {'+'.join(mitigations)} corrects activations, but criterion {criterion} prunes weights; "
            "take mitigation=none, or a criterion of activations such as act"
        )
    if pattern.kind == "threshold":
        errors.append(f"pattern: {pattern} is of activations, but criterion {criterion} prunes weights; take N:M or p%")
    if scope != "all":
        errors.append(f"scope: {scope} chooses tokens, but criterion {criterion} prunes weights; take scope=all")
    return errors
