"""Measure how much pruning each layer alone changes its output, on a calibration text."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmsweep.calibration.fit import fit
from nmsweep.config.pattern import Pattern
from nmsweep.config.schema import CalibrationConfig
from nmsweep.methods.base import Layer, State, WeightCriterion
from nmsweep.methods.sparsification import Sparsification
from nmsweep.models.targets import input_groups
from nmsweep.sparsity.install import dense_targets, sparse_layers
from nmsweep.sparsity.scope import Scope
from nmsweep.sparsity.shared_input import TokenView


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
    """Return ‖ŷ−y‖/‖y‖ of every target layer under every pattern, over all tokens of a text, on the dense model's input.

    Calibrated stages are fitted on the same text with ``prefix=dense``, once for each pattern; learned stages are left out.
    Memory: the activations of one window, and for weight pruning one pruned copy of each weight.

    Args:
        model: a dense causal language model of transformers.
        windows: ids [n_windows, seqlen].
        sparsification: criterion and mitigations; its pattern is not used.
        patterns: to measure.
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
    with ExitStack() as hooks, torch.no_grad():
        for meter in meters:
            hooks.enter_context(model.get_submodule(meter.name).register_forward_hook(meter))
        for window in windows.to(model.device).split(1):
            model(input_ids=window, use_cache=False)
            step()
    errors: dict[str, dict[Pattern, float]] = {}
    for meter in meters:
        errors.setdefault(meter.name, {})[meter.pattern] = meter.error
    return errors


@dataclass
class _Meter:
    """A hook on one dense layer that compares its output with that of a sparse layer on the same input."""

    name: str
    pattern: Pattern
    sparse: Callable[[Tensor], Tensor]
    squared_error: float | Tensor = 0.0
    squared_norm: float | Tensor = 0.0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        self.squared_error += (self.sparse(args[0]).double() - y.double()).square().sum()
        self.squared_norm += y.double().square().sum()

    @property
    def error(self) -> float:
        norm = float(self.squared_norm)
        return (float(self.squared_error) / norm) ** 0.5 if norm else 0.0


def _meters(
    model: Any, windows: Tensor, method: Sparsification, targets: Sequence[str], scope: str, settings: CalibrationConfig,
    seed: int,
) -> list[_Meter]:  # fmt: skip
    state: Mapping[str, State] = {}
    if method.calibrated:
        state = fit(model, windows, method, targets, scope=scope, settings=settings, seed=seed).state
    linears, view = dense_targets(model, method, targets), TokenView(Scope.parse(scope))
    if isinstance(method.criterion, WeightCriterion):
        meters = []
        for name, linear in linears.items():
            weight, _ = method.criterion.pruned(Layer(name, linear), method.pattern, state.get(name, {}))
            meters.append(_Meter(name, method.pattern, partial(F.linear, weight=weight, bias=linear.bias)))
        return meters
    return [
        _Meter(name, method.pattern, sparse.forward)  # not the layer itself, which shares this hook
        for group in input_groups(model, list(linears))
        for name, sparse in sparse_layers(method, {name: linears[name] for name in group}, state, view).items()
    ]
