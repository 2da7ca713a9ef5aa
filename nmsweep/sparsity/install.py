"""Make a model sparse in place, and dense again."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
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
from nmsweep.sparsity.linear import SparseLinear
from nmsweep.sparsity.scope import Scope
from nmsweep.sparsity.shared_input import SharedInput, TokenView


class SparseModel:
    """A model whose layers become sparse in place, the layers of one input at a time; a context manager that makes it dense again.

    Args:
        model: a causal language model of transformers.
        sparsification: pattern, criterion and mitigations.
        linears: the target layers by module path.
        scope: which tokens are pruned.

    Attributes:
        layers: the sparse layers by module path; empty where weights are pruned.
        kept_weights: the entries kept of each pruned weight, by module path; empty where activations are pruned.
        view: the state that the sparse layers share.
        joined: norms and MLPs that are fused with the prune, and the forward that they run.
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
        self.joined: Mapping[nn.Module, Forward] = {}
        self.restored = False
        self._flops = linear_flops(model)
        self._weights = {name: linear.weight for name, linear in linears.items()}
        self._undo = ExitStack()
        self._undo.callback(self._put_back)
        # partial, because a hook must be copied with the model, but not this object
        before, after = partial(_watch_tokens, self.view), partial(_forget_pass, self.view, self.layers)
        for module in dict.fromkeys((model, model.get_decoder())):  # type: ignore[operator]
            self._undo.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            self._undo.enter_context(module.register_forward_hook(after, always_call=True))

    def __repr__(self) -> str:
        method = self.sparsification
        pattern = f"{method.pattern}{' on average' if method.patterns else ''}"
        word = "restored" if self.restored else "sparse"
        return f"<{word} {type(self.model).__name__}: {pattern} {method.label}, {len(self.linears)} layers>"

    def put(self, group: Sequence[str], state: Mapping[str, State]) -> None:
        """Make the layers of one input sparse.

        Args:
            group: module paths of layers that read one tensor.
            state: calibrated state of each layer by module path.
        """
        criterion = self.sparsification.criterion
        if isinstance(criterion, WeightCriterion):
            for name in group:
                layer = Layer(name, self.linears[name])
                pattern = self.sparsification.pattern_of(name)
                weight, self.kept_weights[name] = criterion.pruned(layer, pattern, state.get(name, {}))
                self.linears[name].weight = nn.Parameter(weight, requires_grad=False)
            return
        layers = sparse_layers(self.sparsification, {name: self.linears[name] for name in group}, state, self.view)
        self.layers.update(layers)
        for name, sparse in layers.items():
            self.model.set_submodule(name, sparse)

    def join(self) -> None:
        """Fuse norms and MLPs with the prune, once all layers are sparse."""
        self.joined = joined(self.model, self.layers)
        self._undo.enter_context(replaced(self.joined))

    def restore(self) -> None:
        """Make the model dense again; does nothing the second time."""
        self.restored = True
        self._undo.close()

    def _put_back(self) -> None:
        for name, linear in self.linears.items():
            linear.weight = self._weights[name]
            self.model.set_submodule(name, linear)

    def __enter__(self) -> "SparseModel":
        if self.restored:
            raise InputError(f"sparsify: {self!r} is dense again; call sparsify once more")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    @contextmanager
    def as_dense(self) -> Iterator[None]:
        """Make the model compute as the dense one inside the block; nothing is counted."""
        pruned = {name: self.linears[name].weight for name in self.kept_weights}
        try:
            for name in pruned:
                self.linears[name].weight = self._weights[name]
            with self.view.as_dense():
                yield
        finally:
            for name, weight in pruned.items():
                self.linears[name].weight = weight

    def counts(self) -> list[LayerCount]:
        """Return the channels seen and kept by each layer since `reset_counts`, from the masks. Waits for the device.

        Where weights are pruned these are the entries of the weight.
        """
        flops, counts = sum(self._flops.values()), []
        for name, linear in self.linears.items():
            kept, total = self.kept_weights.get(name, 0), linear.weight.numel()
            if layer := self.layers.get(name):
                kept, total = layer.shared.counted()
            share = self._flops[name] / flops
            counts.append(LayerCount(name, linear.in_features, linear.out_features, total, kept, share))
        return counts

    def reset_counts(self) -> None:
        for layer in self.layers.values():
            layer.shared.reset_counts()


def install(
    model: nn.Module,
    sparsification: Sparsification,
    targets: Sequence[str],
    state: Mapping[str, State] | None = None,
    scope: str = "all",
) -> SparseModel:
    """Make a model sparse until the result is restored.

    Args:
        model: a causal language model of transformers; left as it was after an error.
        sparsification: pattern, criterion and mitigations.
        targets: presets or globs that say which layers.
        state: calibrated state of each layer by module path.
        scope: which tokens are pruned, as `config` reads it.

    Raises:
        InputError: a target that matches nothing, an input width that M does not divide, a missing state, or a model that
            is sparse already.
    """
    sparse = SparseModel(model, sparsification, dense_targets(model, sparsification, targets), scope)
    try:
        for group in input_groups(model, list(sparse.linears)):
            sparse.put(group, state or {})
        sparse.join()
    except BaseException:
        sparse.restore()
        raise
    return sparse


def dense_targets(model: nn.Module, sparsification: Sparsification, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the target layers of a dense model by module path.

    Raises:
        InputError: a target that matches nothing, an input width that M does not divide, or a model that is sparse already.
    """
    linears = target_linears(model, targets)
    if errors := pattern_errors(linears, sparsification):
        raise InputError(*errors)
    if any(isinstance(linear, SparseLinear) for linear in linears.values()):
        raise InputError(
            "sparsify: the model is sparse already; leave the other block first, or call restore() on the result of that call"
        )
    return linears


def pattern_errors(linears: Mapping[str, nn.Linear], sparsification: Sparsification) -> list[str]:
    """Return one message for each mismatch between target layers and their patterns."""
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
    """Return one message if M does not divide the input width of some target; it names one layer of each such width."""
    if pattern.kind != "n:m":
        return []
    layer_of = {linear.in_features: name for name, linear in reversed(list(linears.items()))}
    bad = [f"{layer_of[width]} has {width} inputs" for width in sorted(layer_of) if width % pattern.m]
    common = math.gcd(*layer_of)
    divisors = ", ".join(str(m) for m in range(1, min(common, 64) + 1) if common % m == 0)
    where = f"pattern {pattern}: {' and '.join(bad)}, not a multiple of {pattern.m}"
    return [f"{where}; choose M from {divisors}, or drop these targets"] if bad else []


def sparse_layers(
    sparsification: Sparsification, group: Mapping[str, nn.Linear], state: Mapping[str, State], view: TokenView
) -> dict[str, SparseLinear]:
    """Return sparse layers for dense ones that read one tensor, by module path; equal pruned inputs are shared."""
    slots = {name: sparsification.slots(Layer(name, linear), state.get(name, {})) for name, linear in group.items()}
    layers = {}
    for members in _equal_inputs(slots):
        first = group[members[0]]
        shared = SharedInput(slots[members[0]], len(members), view, first.weight.device)
        shared.compile(first.in_features, first.weight.dtype)
        for name in members:
            layers[name] = SparseLinear(group[name], shared, slots[name], sparsification.drops_bias)
    return {name: layers[name] for name in group}


def _equal_inputs(slots: Mapping[str, Slots]) -> list[list[str]]:
    """Split layers of one input into lists of those with the same pruned input."""
    split: list[list[str]] = []
    for name in slots:
        same = next((members for members in split if slots[name].same_input(slots[members[0]])), None)
        if same is None:
            split.append([name])
        else:
            same.append(name)
    return split


def _watch_tokens(view: TokenView, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set what the layers know about the tokens of a pass: padding, positions and cache length. A forward pre-hook.

    It watches the decoder, which evaluation calls directly, and the whole model, because some models pass their decoder a
    prepared attention mask from which padding can no longer be read.
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
    """Release the tensors of a pass, also of one that ended early. A forward hook."""
    view.tokens = Tokens()
    for layer in layers.values():
        layer.shared.forget()
