"""Make a model sparse in place, and always dense again."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmsweep.catalogue import find_method
from nmsweep.config import Method, split_names
from nmsweep.errors import InputError
from nmsweep.models.targets import input_groups, linear_flops, target_linears
from nmsweep.pattern import Pattern, parse_pattern
from nmsweep.record import LayerCount
from nmsweep.sparsity.linear import SharedInput, SparseLinear, TokenView
from nmsweep.sparsity.method import Layer, Slots, Sparsification, State, Tokens, build_sparsification


@dataclass(frozen=True)
class Installed:
    """A model that is sparse right now.

    Attributes:
        model: the model, changed in place.
        layers: its sparse layers by module path, in the order they run.
        flops_share: the share of the model's linear FLOPs that each of them has.
        view: what the layers know about the tokens of the current pass.
    """

    model: nn.Module
    layers: Mapping[str, SparseLinear]
    flops_share: Mapping[str, float]
    view: TokenView

    def counts(self) -> list[LayerCount]:
        """Channels seen and kept by every layer since `reset_counts`, counted from the masks. Waits for the device."""
        return [
            LayerCount(name, layer.in_features, layer.out_features, total, kept, self.flops_share[name])
            for name, layer in self.layers.items()
            for kept, total in [layer.shared.counts.tolist()]
        ]

    def reset_counts(self) -> None:
        for layer in self.layers.values():
            layer.shared.counts.zero_()


def check_divisible(linears: Mapping[str, nn.Linear], pattern: Pattern) -> list[str]:
    """One message for each distinct input width that M does not divide."""
    if pattern.kind != "n:m":
        return []
    messages: dict[int, str] = {}
    for name, linear in linears.items():
        width = linear.in_features
        if width % pattern.m and width not in messages:
            divisors = [str(m) for m in range(1, min(width, 64) + 1) if width % m == 0]
            messages[width] = (
                f"pattern {pattern}: {name} has {width} inputs, not a multiple of {pattern.m}; "
                f"choose M from {', '.join(divisors)}, … or drop this target"
            )
    return list(messages.values())


@contextmanager
def installed(
    model: nn.Module,
    sparsification: Sparsification,
    targets: Sequence[str],
    state: Mapping[str, State] | None = None,
) -> Iterator[Installed]:
    """Make `model` sparse inside the block and dense again after it, also after an error.

    Args:
        model: a causal language model of transformers.
        sparsification: pattern, criterion and mitigations.
        targets: presets or globs that say which layers.
        state: calibrated state for each layer by module path.

    Raises:
        InputError: a target that matches nothing, or an input width that M does not divide.
    """
    linears = target_linears(model, targets)
    if errors := check_divisible(linears, sparsification.pattern):
        raise InputError(*errors)
    if any(isinstance(linear, SparseLinear) for linear in linears.values()):
        raise InputError("sparsify: the model is sparse already; leave the other block first")
    view = TokenView()
    slots = {
        name: sparsification.slots(Layer(name, linear), (state or {}).get(name, {})) for name, linear in linears.items()
    }
    sparse: dict[str, SparseLinear] = {}
    for group in input_groups(model, list(linears)):
        for members in _equal_inputs(group, slots):
            shared = SharedInput(slots[members[0]], len(members), view, linears[members[0]].weight.device)
            sparse.update({name: SparseLinear(linears[name], shared, slots[name]) for name in members})
    ordered = {name: sparse[name] for name in linears}
    flops = linear_flops(model)
    total = sum(flops.values())
    share = {name: flops[name] / total for name in linears}
    watch = model.register_forward_pre_hook(_watch_tokens(view), with_kwargs=True)
    try:
        for name, layer in ordered.items():
            _put(model, name, layer)
        yield Installed(model, ordered, share, view)
    finally:
        watch.remove()
        for name, linear in linears.items():
            _put(model, name, linear)


def _equal_inputs(group: Sequence[str], slots: Mapping[str, Slots]) -> list[list[str]]:
    """Split layers of one input into those whose pruned input is the same tensor: no weight or the same one, same η."""
    split: dict[tuple[int, int | str], list[str]] = {}
    for name in group:
        eta = slots[name].eta
        key = (id(slots[name].weight), id(eta) if isinstance(eta, torch.Tensor) else str(eta))
        split.setdefault(key, []).append(name)
    return list(split.values())


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _watch_tokens(view: TokenView) -> Any:
    """A hook that tells the layers which tokens are padding and how many are in the cache already."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        padding = mask == 0 if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        view.tokens = Tokens(padding, past)

    return before


@contextmanager
def sparsify(
    model: nn.Module,
    *,
    pattern: str = "8:16",
    criterion: str | Mapping[str, Any] = "act",
    mitigation: str | Sequence[str] = "none",
    targets: str | Sequence[str] = "all",
    mitigations: Mapping[str, Mapping[str, Any]] | None = None,
    config_dir: str | Path | None = None,
) -> Iterator[Installed]:
    """Make a transformers model sparse inside a `with` block, without a config file.

    Example:
        >>> with sparsify(model, pattern="8:16", mitigation="shift+var"):
        ...     model.generate(**inputs)

    Args:
        model: a causal language model of transformers.
        pattern: ``"N:M"`` (N kept of M) or ``"p%"``.
        criterion: name, or name and parameters as ``{"name": "act", …}``.
        mitigation: names, ``"shift+var"`` or a list.
        targets: preset or globs.
        mitigations: parameters by mitigation, ``{"shift": {"stat": "mean"}}``.
        config_dir: a folder of your own with ``criterion/`` and ``mitigations/``.

    Raises:
        InputError: as on the command line, all mistakes together.
    """
    made, names = _from_names(pattern, criterion, mitigation, targets, mitigations or {}, config_dir)
    with installed(model, made, names) as sparse:
        yield sparse


def _from_names(
    pattern: str,
    criterion: str | Mapping[str, Any],
    mitigation: str | Sequence[str],
    targets: str | Sequence[str],
    parameters: Mapping[str, Mapping[str, Any]],
    config_dir: str | Path | None,
) -> tuple[Sparsification, tuple[str, ...]]:
    """Turn names into a sparsification and target names; all mistakes together."""
    folder = Path(config_dir) if config_dir else None
    chosen = {"name": criterion} if isinstance(criterion, str) else dict(criterion)
    names = split_names(mitigation)
    errors: list[str] = []
    methods: list[Method] = []
    parsed = Pattern("dense")
    try:
        parsed = parse_pattern(pattern)
        if parsed.is_dense:
            errors.append("pattern: dense leaves nothing to do here; use the model as it is")
    except InputError as error:
        errors += error.messages
    name = str(chosen.pop("name", ""))
    errors += [
        f"mitigation: {word} is named twice; name each stage once"
        for word in sorted(set(names))
        if names.count(word) > 1
    ]
    for group, word, given in [
        ("criterion", name, chosen),
        *(("mitigations", word, parameters.get(word, {})) for word in dict.fromkeys(names)),
    ]:
        try:
            methods.append(find_method(group, word, given, folder))
        except InputError as error:
            errors += error.messages
    if errors:
        raise InputError(*errors)
    return build_sparsification(parsed, methods[0], methods[1:]), split_names(targets)
