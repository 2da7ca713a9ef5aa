"""Pattern, criterion and mitigations put together: what a config names, made and checked."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nmsweep.config.pattern import Pattern
from nmsweep.config.schema import Method
from nmsweep.errors import InputError
from nmsweep.methods.base import SLOT_ORDER, Criterion, Layer, Mitigation, Slot, Slots, Stage, State


@dataclass(frozen=True)
class Sparsification:
    """Pattern, criterion and mitigations together: everything that turns a dense layer into a sparse one.

    Attributes:
        pattern: of all layers; with `patterns` the uniform one that they stand for.
        criterion: says which channels are kept.
        mitigations: fill the other slots.
        patterns: module path -> pattern, where layers have patterns of their own; then every target is named.
        drops_bias: sparse layers lose their bias, a defect of the paper's code that `profile=paper_code` reproduces.
    """

    pattern: Pattern
    criterion: Criterion
    mitigations: Sequence[Mitigation] = field(default_factory=tuple)
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    drops_bias: bool = False

    def pattern_of(self, layer: str) -> Pattern:
        """The pattern of one layer, by module path."""
        return self.patterns.get(layer, self.pattern)

    def fitted_only(self, pattern: Pattern) -> "Sparsification":
        """The same with one pattern for all layers and without learned stages."""
        fitted = tuple(stage for stage in self.mitigations if stage.calibration != "learned")
        return replace(self, pattern=pattern, patterns={}, mitigations=fitted)

    @property
    def stages(self) -> list[Stage]:
        """All stages in the order of their slots."""
        stages: list[Stage] = [self.criterion, *self.mitigations]
        if self.pattern.kind == "threshold":
            from nmsweep.methods.threshold import Threshold

            stages.append(Threshold(self.pattern))
        return sorted(stages, key=lambda stage: SLOT_ORDER.index(stage.slot))

    @property
    def calibrated(self) -> bool:
        """Whether any stage has a state."""
        return any(stage.calibration != "none" for stage in self.stages)

    @property
    def uses_text(self) -> bool:
        """Whether any stage's state comes from a calibration text."""
        return any(stage.calibration in ("text", "learned") for stage in self.stages)

    def fills(self, slot: Slot) -> bool:
        """Whether any stage fills a slot."""
        return any(stage.slot == slot for stage in self.stages)

    @property
    def learned(self) -> bool:
        """Whether any stage is trained."""
        return any(stage.calibration == "learned" for stage in self.stages)

    def slots(self, layer: Layer, state: State, before: Stage | None = None) -> Slots:
        """Fill all slots of one layer, or those of the stages that come before one."""
        slots = Slots(self.pattern_of(layer.name))
        for stage in self.stages:
            if before is not None and SLOT_ORDER.index(stage.slot) >= SLOT_ORDER.index(before.slot):
                break
            slots = stage.fill(slots, replace(layer, folded=slots.folded), state)
        return slots


def build(method: Method) -> Any:
    """Make a criterion or mitigation from its YAML file.

    Raises:
        InputError: its class does not exist, is no method, or refuses its parameters.
    """
    module_name, _, class_name = method.target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{method.name}: _target_ {method.target} cannot be imported: {error}; correct its YAML file"
        ) from error
    if not (
        isinstance(found, type) and issubclass(found, Criterion | Mitigation)
    ):  # before it is called: it may be anything
        raise InputError(f"{method.name}: {method.target} is neither a Criterion nor a Mitigation; derive it from one")
    try:
        return found(**method.params)
    except (TypeError, ValueError) as error:
        raise InputError(f"{method.name}: {error}; parameters given: {dict(method.params)}") from error


def build_sparsification(
    pattern: Pattern,
    criterion: Method,
    mitigations: Sequence[Method],
    scope: str = "all",
    *,
    patterns: Mapping[str, Pattern] | None = None,
    drops_bias: bool = False,
) -> Sparsification:
    """Make the sparsification that a config names.

    Raises:
        InputError: a class that cannot be made, two mitigations of one slot, or stages that cannot act together.
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
    elif ranks.operand == "weights":
        errors += _weight_errors(criterion.name, pattern, [method.name for method in mitigations], scope)
    if errors:
        raise InputError(*errors)
    return Sparsification(pattern, ranks, tuple(mitigation for _, mitigation in made), patterns or {}, drops_bias)


def _weight_errors(criterion: str, pattern: Pattern, mitigations: Sequence[str], scope: str) -> list[str]:
    """What has no meaning where weights are pruned and every token sees the same ones."""
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
