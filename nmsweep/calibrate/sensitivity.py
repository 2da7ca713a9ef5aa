"""How much each layer's output suffers from being pruned by itself, on a calibration text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmsweep.calibrate.fit import fit
from nmsweep.config.pattern import Pattern
from nmsweep.config.schema import CalibrationConfig
from nmsweep.methods.base import Layer, State, WeightCriterion
from nmsweep.methods.sparsification import Sparsification
from nmsweep.models.targets import input_groups
from nmsweep.sparsity.install import dense_targets, sparse_layers
from nmsweep.sparsity.linear import TokenView
from nmsweep.sparsity.scope import Scope


def output_errors(
    model: Any,
    windows: Tensor,
    sparsification: Sparsification,
    patterns: Sequence[Pattern],
    targets: Sequence[str] = ("all",),
    *,
    scope: str = "all",
    settings: CalibrationConfig | None = None,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> dict[str, dict[Pattern, float]]:
    """‖ŷ−y‖/‖y‖ of every target layer under every pattern, over all tokens of a text, each on the dense model's input.

    Calibrated stages are fitted on the same text with ``prefix=dense``, once a pattern; learned stages are left out.
    Memory: one window's activations, and one pruned copy of each weight where weights are pruned.

    Args:
        model: a dense causal language model of transformers.
        windows: ids [n_windows, seqlen].
        sparsification: criterion and mitigations; its pattern is not used.
        patterns: to try.
        targets: presets or globs that say which layers.
        scope: which tokens are pruned; ``prefill`` and ``decode`` take all.
        settings: of calibration.
        seed: of calibration.
        step: called after each window.

    Returns:
        module path -> pattern -> error, layers in the order they run; 0 for an output that is all zero.
    """
    settings = (settings or CalibrationConfig.model_validate({})).model_copy(update={"prefix": "dense"})
    scope = "all" if scope in ("prefill", "decode") else scope
    meters = [
        meter
        for pattern in patterns
        for meter in _meters(model, windows, sparsification.fitted_only(pattern), targets, scope, settings, seed)
    ]
    hooks = [model.get_submodule(meter.name).register_forward_hook(meter) for meter in meters]
    try:
        with torch.no_grad():
            for window in windows.to(model.device).split(1):
                model(input_ids=window, use_cache=False)
                step()
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[str, dict[Pattern, float]] = {}
    for meter in meters:
        found.setdefault(meter.name, {})[meter.pattern] = meter.error
    return found


@dataclass
class _Meter:
    """A hook on one dense layer: what its sparse double makes of the same input."""

    name: str
    pattern: Pattern
    double: Callable[[Tensor], Tensor]
    wrong: float | Tensor = 0.0
    whole: float | Tensor = 0.0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        self.wrong += (self.double(args[0]).double() - y.double()).square().sum()
        self.whole += y.double().square().sum()

    @property
    def error(self) -> float:
        whole = float(self.whole)
        return (float(self.wrong) / whole) ** 0.5 if whole else 0.0


def _meters(
    model: Any, windows: Tensor, made: Sparsification, targets: Sequence[str], scope: str, settings: CalibrationConfig, seed: int
) -> list[_Meter]:  # fmt: skip
    state: Mapping[str, State] = {}
    if made.calibrated:
        state = fit(model, windows, made, targets, scope=scope, settings=settings, seed=seed).state
    linears, view = dense_targets(model, made, targets), TokenView(Scope.parse(scope))
    if isinstance(made.criterion, WeightCriterion):
        return [
            _Meter(name, made.pattern, _pruned(made.criterion, name, linears[name], made, state)) for name in linears
        ]
    return [
        _Meter(name, made.pattern, double.forward)  # the hook is the double's too
        for group in input_groups(model, list(linears))
        for name, double in sparse_layers(made, {name: linears[name] for name in group}, state, view).items()
    ]


def _pruned(
    criterion: WeightCriterion, name: str, linear: nn.Linear, made: Sparsification, state: Mapping[str, State]
) -> Callable[[Tensor], Tensor]:
    """The layer with its weight pruned."""
    weight, _ = criterion.pruned(Layer(name, linear), made.pattern, state.get(name, {}))
    return lambda x: F.linear(x, weight, linear.bias)
