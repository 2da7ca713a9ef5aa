"""Make a model sparse in place, and always dense again."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from nmsweep.config.pattern import Pattern
from nmsweep.errors import InputError
from nmsweep.methods.base import Layer, Slots, State, Tokens, WeightCriterion, counted_as
from nmsweep.methods.sparsification import Sparsification
from nmsweep.models.targets import input_groups, linear_flops, target_linears
from nmsweep.results.record import LayerCount
from nmsweep.sparsity.fusion import Forward, joined, replaced
from nmsweep.sparsity.linear import SharedInput, SparseLinear, TokenView
from nmsweep.sparsity.scope import Scope


@dataclass(frozen=True)
class Installed:
    """A model that is sparse right now.

    Attributes:
        model: the model, changed in place.
        layers: its sparse layers by module path, in the order they run; empty where the weights are pruned instead.
        flops_share: the share of the model's linear FLOPs that each of them has.
        view: what the layers know about the tokens of the current pass.
        weights: entries and kept entries of every pruned weight; empty where activations are pruned.
        dense_weights: the layers whose weights are pruned, with their dense weights; empty where activations are pruned.
        joined: norms and MLPs that hand the prune their parts, with the forward that they run.
    """

    model: nn.Module
    layers: Mapping[str, SparseLinear]
    flops_share: Mapping[str, float]
    view: TokenView
    weights: Sequence[LayerCount] = ()
    dense_weights: Sequence[tuple[nn.Linear, torch.Tensor]] = ()
    joined: Mapping[nn.Module, Forward] = field(default_factory=dict)

    @contextmanager
    def as_dense(self) -> Iterator[None]:
        """The model computes what the dense one does inside the block; nothing is counted."""
        pruned: list[torch.Tensor] = [linear.weight for linear, _ in self.dense_weights]
        try:
            for linear, weight in self.dense_weights:
                linear.weight = weight
            with self.view.as_dense():
                yield
        finally:
            for (linear, _), weight in zip(self.dense_weights, pruned, strict=True):
                linear.weight = weight

    def counts(self) -> list[LayerCount]:
        """Channels seen and kept by every layer since `reset_counts`, counted from the masks. Waits for the device.

        Where weights are pruned these are the entries of the weight, the same at any time.
        """
        return list(self.weights) or [
            LayerCount(name, layer.in_features, layer.out_features, total, kept, self.flops_share[name])
            for name, layer in self.layers.items()
            for kept, total in [layer.shared.counted()]
        ]

    def reset_counts(self) -> None:
        for layer in self.layers.values():
            layer.shared.reset_counts()


def pattern_errors(linears: Mapping[str, nn.Linear], sparsification: Sparsification) -> list[str]:
    """What does not fit between target layers and their patterns: one message for each mistake."""
    patterns = sparsification.patterns
    errors = []
    if patterns:
        without, beyond = [n for n in linears if n not in patterns], [n for n in patterns if n not in linears]
        if without:
            errors.append(
                f"policy: no pattern for {_some(without)}; leave these out of targets, or add them to the recipe"
            )
        if beyond:
            errors.append(
                f"policy: {_some(beyond)} in the recipe, but no target of this model; widen targets, or take them out"
            )
    by_pattern: dict[Pattern, dict[str, nn.Linear]] = {}
    for name, linear in linears.items():
        by_pattern.setdefault(sparsification.pattern_of(name), {})[name] = linear
    return errors + [message for pattern, same in by_pattern.items() for message in check_divisible(same, pattern)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", … ({len(names)} layers)" if len(names) > 3 else "")


def check_divisible(linears: Mapping[str, nn.Linear], pattern: Pattern) -> list[str]:
    """One message if M does not divide the input width of some target; it names a layer of each such width."""
    if pattern.kind != "n:m":
        return []
    layer_of = {linear.in_features: name for name, linear in reversed(list(linears.items()))}
    bad = [f"{layer_of[width]} has {width} inputs" for width in sorted(layer_of) if width % pattern.m]
    common = math.gcd(*layer_of)
    divisors = ", ".join(str(m) for m in range(1, min(common, 64) + 1) if common % m == 0)
    where = f"pattern {pattern}: {' and '.join(bad)}, not a multiple of {pattern.m}"
    return [f"{where}; choose M from {divisors}, or drop these targets"] if bad else []


class Surgery:
    """Puts sparse layers into a model, an input group at a time, and the dense ones back.

    Args:
        model: a causal language model of transformers.
        sparsification: pattern, criterion and mitigations.
        linears: the target layers by module path.
        scope: which tokens are pruned.
    """

    def __init__(
        self, model: nn.Module, sparsification: Sparsification, linears: Mapping[str, nn.Linear], scope: str = "all"
    ) -> None:
        self.model = model
        self.sparsification = sparsification
        self.linears = linears
        self.view = TokenView(Scope.parse(scope))
        self.view.needs_past |= sparsification.criterion.dynamic
        self.layers: dict[str, SparseLinear] = {}
        self.kept_weights: dict[str, int] = {}
        self._weights = {name: linear.weight for name, linear in linears.items()}
        watched = dict.fromkeys((model, model.get_decoder()))  # type: ignore[operator]
        before, after = partial(_watch_tokens, self.view), partial(_forget_pass, self.view, self.layers)
        self._hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in watched]
        self._hooks += [module.register_forward_hook(after, always_call=True) for module in watched]

    def put(self, group: Sequence[str], state: Mapping[str, State]) -> None:
        """Make the layers of one input sparse.

        Args:
            group: module paths of layers that read one tensor.
            state: calibrated state for each layer by module path.
        """
        made = self.sparsification
        if isinstance(made.criterion, WeightCriterion):
            for name in group:
                layer = Layer(name, self.linears[name])
                pattern = made.pattern_of(name)
                weight, self.kept_weights[name] = made.criterion.pruned(layer, pattern, state.get(name, {}))
                self.linears[name].weight = nn.Parameter(weight, requires_grad=False)
            return
        layers = sparse_layers(made, {name: self.linears[name] for name in group}, state, self.view)
        self.layers.update(layers)
        for name, double in layers.items():
            _put(self.model, name, double)

    def dense_weight(self, name: str) -> torch.Tensor:
        """The weight that a target layer had before."""
        return self._weights[name]

    def restore(self) -> None:
        """Make the model what it was."""
        for hook in self._hooks:
            hook.remove()
        for name, linear in self.linears.items():
            linear.weight = self._weights[name]
            _put(self.model, name, linear)


def sparse_layers(
    made: Sparsification, group: Mapping[str, nn.Linear], state: Mapping[str, State], view: TokenView
) -> dict[str, SparseLinear]:
    """The sparse doubles of layers that read one tensor, by module path; those that see the same pruned tensor share it."""
    slots = {name: made.slots(Layer(name, linear), state.get(name, {})) for name, linear in group.items()}
    found = {}
    for members in _equal_inputs(slots):
        shared = SharedInput(slots[members[0]], len(members), view, group[members[0]].weight.device)
        shared.prepare(group[members[0]].in_features, group[members[0]].weight.dtype)
        for name in members:
            found[name] = SparseLinear(group[name], shared, slots[name], made.drops_bias)
    return found


def dense_targets(model: nn.Module, sparsification: Sparsification, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The target layers of a model that is dense now, by module path.

    Raises:
        InputError: a target that matches nothing, an input width that M does not divide, or a model that is sparse.
    """
    linears = target_linears(model, targets)
    if errors := pattern_errors(linears, sparsification):
        raise InputError(*errors)
    if any(isinstance(linear, SparseLinear) for linear in linears.values()):
        raise InputError("sparsify: the model is sparse already; leave the other block first")
    return linears


@contextmanager
def installed(
    model: nn.Module,
    sparsification: Sparsification,
    targets: Sequence[str],
    state: Mapping[str, State] | None = None,
    scope: str = "all",
) -> Iterator[Installed]:
    """Make `model` sparse inside the block and dense again after it, also after an error.

    Args:
        model: a causal language model of transformers.
        sparsification: pattern, criterion and mitigations.
        targets: presets or globs that say which layers.
        state: calibrated state for each layer by module path.
        scope: which tokens are pruned, as `config` reads it.

    Raises:
        InputError: a target that matches nothing, an input width that M does not divide, or a state that is missing.
    """
    linears = dense_targets(model, sparsification, targets)
    flops = linear_flops(model)
    total = sum(flops.values())
    share = {name: flops[name] / total for name in linears}
    surgery = Surgery(model, sparsification, linears, scope)
    try:
        for group in input_groups(model, list(linears)):
            surgery.put(group, state or {})
        ordered = {name: surgery.layers[name] for name in linears if name in surgery.layers}
        weights = [
            LayerCount(name, linear.in_features, linear.out_features, linear.weight.numel(), kept, share[name])
            for name, linear in linears.items()
            if (kept := surgery.kept_weights.get(name)) is not None
        ]
        dense_weights = [(linears[name], surgery.dense_weight(name)) for name in surgery.kept_weights]
        forwards = joined(model, ordered)
        with replaced(forwards):
            yield Installed(model, ordered, share, surgery.view, weights, dense_weights, forwards)
    finally:
        surgery.restore()


def _equal_inputs(slots: Mapping[str, Slots]) -> list[list[str]]:
    """Split layers of one input into those whose pruned input is the same tensor."""
    split: list[list[str]] = []
    for name, own in slots.items():
        found = next((members for members in split if own.same_input(slots[members[0]])), None)
        if found is None:
            split.append([name])
        else:
            found.append(name)
    return split


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _watch_tokens(view: TokenView, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the layers which tokens are padding, where they stand, and how many are in the cache already: a hook before a pass.

    It watches the decoder, which evaluation calls by itself, and the whole model, because some models hand their decoder a
    ready attention mask from which padding can no longer be read.
    """
    mask, cache, position = (kwargs.get(name) for name in ("attention_mask", "past_key_values", "position_ids"))
    past = cache.get_seq_length() if cache is not None and view.needs_past else 0
    padding = view.tokens.padding if isinstance(mask, dict) else None
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        rows = next(v for v in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if v is not None)
        padding = (mask == 0)[:, -rows.shape[1] :]
    weight = counted_as()
    if weight is None:
        view.tokens = Tokens(padding, int(past), position)
    else:
        device = next(module.parameters()).device
        view.tokens = Tokens(padding, int(past), position, weight.to(device), int(weight.sum()))


def _forget_pass(
    view: TokenView, layers: Mapping[str, SparseLinear], module: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    """Let go of what was known of a pass, and of its tensors where it ended early: a hook after it."""
    view.tokens = Tokens()
    for layer in layers.values():
        layer.shared.forget()
