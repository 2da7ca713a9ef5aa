"""Assign a pattern to each layer under one budget: greedily, by output error on a text."""

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from nmsweep.calibration.sensitivity import output_errors
from nmsweep.config.pattern import Pattern
from nmsweep.config.recipe import Recipe
from nmsweep.config.schema import AllocationConfig, CalibrationConfig
from nmsweep.errors import InputError
from nmsweep.methods.sparsification import Sparsification
from nmsweep.models.targets import linear_flops

VERSION = 1
"""Part of the identity of every cell that searches; increased when the result changes."""


def density_of(layers: Mapping[str, Pattern], cost: Mapping[str, int]) -> float:
    """Return the average density of some layers, weighted by their multiply-adds, 0 to 1."""
    return sum((1 - pattern.sparsity) * cost[name] for name, pattern in layers.items()) / sum(
        cost[name] for name in layers
    )


def check_budget(patterns: Sequence[Pattern], density: float) -> None:
    """Check that some assignment of the patterns is within the budget, and that there is a choice.

    Raises:
        InputError: the strictest pattern everywhere is above the budget, or the loosest within it.
    """
    strictest, loosest = (pick(patterns, key=lambda pattern: pattern.sparsity) for pick in (max, min))
    if 1 - strictest.sparsity > density + 1e-9:
        raise InputError(
            f"allocation.density: {density:g} is below the strictest pattern {strictest}, which keeps "
            f"{1 - strictest.sparsity:g}; raise it, or add a stricter pattern to allocation.patterns"
        )
    if 1 - loosest.sparsity <= density + 1e-9:
        raise InputError(
            f"allocation.density: {density:g} lets every layer have the loosest pattern {loosest}; lower it, or add a looser "
            "pattern to allocation.patterns"
        )


def greedy(
    errors: Mapping[str, Mapping[Pattern, float]], cost: Mapping[str, int], patterns: Sequence[Pattern], density: float
) -> dict[str, Pattern]:
    """Assign patterns greedily until the average density is within the budget.

    All layers begin with the loosest pattern. In each step, one layer moves to its next stricter pattern: the layer for which
    this adds the least squared relative error per multiply-add saved. Ties go to the layer that runs first.

    Args:
        errors: layer -> pattern -> relative output error, ‖ŷ−y‖/‖y‖.
        cost: layer -> multiply-adds a token.
        patterns: to choose from, in any order.
        density: the budget, the average of the layers' densities weighted by `cost`.

    Returns:
        layer -> pattern; the average density is at most `density`.

    Raises:
        InputError: no assignment meets the budget, or every one does.

    Source: ours.
    """
    check_budget(patterns, density)
    ladder = sorted(dict.fromkeys(patterns), key=lambda pattern: pattern.sparsity)
    place = dict.fromkeys(errors, 0)

    def step(name: str, order: int) -> tuple[float, int, str]:
        now, after = ladder[place[name]], ladder[place[name] + 1]
        saved = (after.sparsity - now.sparsity) * cost[name]
        return ((errors[name][after] ** 2 - errors[name][now] ** 2) / saved, order, name)

    steps = [step(name, order) for order, name in enumerate(errors)]
    heapq.heapify(steps)
    while density_of({name: ladder[at] for name, at in place.items()}, cost) > density + 1e-9:
        _, order, name = heapq.heappop(steps)
        place[name] += 1
        if place[name] + 1 < len(ladder):
            heapq.heappush(steps, step(name, order))
    return {name: ladder[at] for name, at in place.items()}


def search(
    model: Any,
    windows: Tensor,
    sparsification: Sparsification,
    allocation: AllocationConfig,
    targets: Sequence[str] = ("all",),
    *,
    scope: str = "all",
    settings: CalibrationConfig | None = None,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> Recipe:
    """Assign a pattern to each target layer under an average density budget, by output errors on a text.

    Args:
        model: a dense causal language model of transformers.
        windows: ids [n_windows, seqlen].
        sparsification: criterion and mitigations; its pattern sets the budget where `allocation` has none.
        allocation: the patterns to choose from, and the budget.
        targets, scope, settings, seed, step: as for `output_errors`.

    Raises:
        InputError: no assignment meets the budget, or every one does; or widths that do not fit a pattern.
    """
    ladder: Sequence[Pattern] = allocation.ladder
    budget = allocation.density or 1 - sparsification.pattern.sparsity
    errors = output_errors(
        model, windows, sparsification, ladder, targets, scope=scope, settings=settings, seed=seed, step=step
    )
    cost = linear_flops(model)
    layers = greedy(errors, cost, ladder, budget)
    made = {
        "policy": "greedy", "budget": budget, "patterns": [str(pattern) for pattern in ladder],
        "windows": len(windows), "seqlen": windows.shape[1],
    }  # fmt: skip
    return Recipe(sparsification.pattern, layers, density_of(layers, cost), made)
