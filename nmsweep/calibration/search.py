"""Search a pattern for each layer of a model: measure the output errors of all patterns, then assign greedily."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nmsweep.calibration.policy import density_of, greedy
from nmsweep.calibration.sensitivity import output_errors
from nmsweep.config.pattern import Pattern
from nmsweep.config.recipe import Recipe
from nmsweep.config.schema import AllocationConfig, CalibrationConfig
from nmsweep.methods.sparsification import Sparsification
from nmsweep.models.targets import linear_flops


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
