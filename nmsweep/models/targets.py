"""Select the target linear layers of a model by its structure: METHODS.md §5."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from nmsweep.config.schema import TARGET_PRESETS, split_names
from nmsweep.errors import InputError, nearest

ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder block in execution order."""

_SHARED_INPUT = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}

_PRESETS: Mapping[str, frozenset[str]] = {
    "all": frozenset(ORDER),
    "mlp": frozenset({"gate_proj", "up_proj", "down_proj"}),
    "attn": frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}),
    "paper": frozenset(ORDER),
    # arXiv:2508.02128: never k, v, o, up. Its sensitive layers differ by model: name them with `!glob`.
    "amber": frozenset({"q_proj", "gate_proj", "down_proj"}),
}

_PAPER_QWEN2 = frozenset({"o_proj", "gate_proj", "up_proj", "down_proj"})
"""The paper leaves q, k, v of Qwen2 dense; its reason was a lost bias (METHODS.md §7, 1)."""


def target_linears(model: nn.Module, targets: str | Iterable[str]) -> dict[str, nn.Linear]:
    """Select linear layers of the text decoder.

    Args:
        model: a causal language model of transformers, on any device including `meta`.
        targets: presets (`all`, `mlp`, `attn`, `paper`, `amber`) and globs, as a list or joined by ``+``. A glob matches
            the module path, the path from ``layers.`` on, or its last component. ``!glob`` excludes layers, in any
            position.

    Returns:
        Module path -> layer, in execution order; never lm_head or a vision tower.

    Raises:
        InputError: targets that match nothing, one message each, or a model without a text decoder.
    """
    words = split_names(targets)
    linears = decoder_linears(model)
    errors: list[str] = []
    chosen: set[str] = set()
    for word in words:
        if word.startswith("!"):
            continue
        matches, message = _select(model, linears, word)
        chosen |= matches
        errors += [message] if message else []
    for word in words:
        if word.startswith("!"):
            matches, message = _match(linears, word[1:], word)
            chosen -= matches
            errors += [message] if message else []
    if not errors and not chosen:
        errors.append(f"targets: {'+'.join(words)!r} leaves no layer; {_describe_layers(linears)}")
    if errors:
        raise InputError(*errors)
    return {name: linear for name, linear in linears.items() if name in chosen}


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return all linear layers of the text decoder's blocks by module path, in execution order.

    Raises:
        InputError: the model has no text decoder.
    """
    prefix, layers = _decoder_layers(model)
    linears: dict[str, nn.Linear] = {}
    for index, layer in layers.named_children():
        inside = [(f"{prefix}.{index}.{name}", module) for name, module in _outermost_linears(layer)]
        linears.update(sorted(inside, key=lambda item: _rank(item[0])))
    return linears


def linear_flops(model: nn.Module) -> dict[str, int]:
    """Return the multiply-adds per token of each linear layer of the text decoder and of the output embedding.

    Shares of linear FLOPs refer to their sum, which excludes the products inside attention.

    Returns:
        Module path -> in_features × out_features; the output embedding, tied or not, under its own path (`lm_head`).
    """
    linears: dict[str, Any] = dict(decoder_linears(model))
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    linears.update((name, module) for name, module in model.named_modules() if head is not None and module is head)
    return {name: linear.in_features * linear.out_features for name, linear in linears.items()}


def input_groups(model: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Group the layers that read the same tensor: q/k/v of a block, gate/up of a block.

    Returns:
        The groups of `names`; groups and members keep their order.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        groups.setdefault((parent, _SHARED_INPUT.get(leaf, leaf)), []).append(name)
    return list(groups.values())


def _select(model: nn.Module, linears: Mapping[str, nn.Linear], word: str) -> tuple[set[str], str]:
    """Return the layers of a preset or glob, and an error message; one of them is empty."""
    if word not in TARGET_PRESETS:
        return _match(linears, word, word)
    unknown = sorted({_leaf(name) for name in linears} - set(ORDER))
    if unknown:
        return set(), (
            f"targets: preset {word} knows {', '.join(ORDER)}, but the model also has {', '.join(unknown)}; "
            f"name the layers by globs, such as targets='*.{unknown[0]}'"
        )
    leaves = _PAPER_QWEN2 if word == "paper" and _model_type(model).startswith("qwen2") else _PRESETS[word]
    matches = {name for name in linears if _leaf(name) in leaves}
    return matches, "" if matches else f"targets: preset {word} matches no layer; {_describe_layers(linears)}"


def _match(linears: Mapping[str, nn.Linear], glob: str, word: str) -> tuple[set[str], str]:
    matches = {name for name in linears if any(fnmatchcase(text, glob) for text in _spellings(name))}
    if matches:
        return matches, ""
    known = [*TARGET_PRESETS, *{_leaf(name) for name in linears}]
    return set(), f"targets: {word!r} matches no layer; {nearest(glob, known)}; {_describe_layers(linears)}"


def _spellings(name: str) -> Iterator[str]:
    yield name
    yield name[name.find("layers.") :]
    yield _leaf(name)


def _describe_layers(linears: Mapping[str, nn.Linear]) -> str:
    """Describe the model's module paths, with the block's number as N."""
    n_blocks = len({match[1] for name in linears if (match := re.search(r"layers\.(\d+)\.", name))})
    paths = dict.fromkeys(re.sub(r"layers\.\d+\.", "layers.N.", name) for name in linears)
    return f"the model has {', '.join(paths)} with N in 0–{n_blocks - 1}"


def _decoder_layers(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the path and the list of the text decoder's blocks: the list next to a token embedding."""
    for name, module in model.named_modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and isinstance(getattr(module, "embed_tokens", None), nn.Module):
            return f"{name}.layers" if name else "layers", layers
    raise InputError(
        f"targets: {type(model).__name__} has no text decoder with `embed_tokens` and `layers`; "
        "models built like Llama, Qwen2 or Gemma3 are supported; choose one of `nmsweep list`"
    )


def _outermost_linears(block: nn.Module, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the linear layers of a block by path; a replacement of nmsweep's counts instead of the layer inside it."""
    for name, module in block.named_children():
        if _is_linear(module):
            yield path + name, module
        else:
            yield from _outermost_linears(module, f"{path}{name}.")


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer or nmsweep's replacement of one."""
    return isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def _rank(name: str) -> int:
    leaf = _leaf(name)
    return ORDER.index(leaf) if leaf in ORDER else len(ORDER)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _model_type(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return str(getattr(text, "model_type", ""))
