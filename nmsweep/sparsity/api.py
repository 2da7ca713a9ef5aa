"""nmsweep in Python: `sparsify`, the names of the command line turned into a sparse model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from nmsweep.config.catalogue import find_method
from nmsweep.config.pattern import Pattern, parse_pattern
from nmsweep.config.recipe import read_recipe
from nmsweep.config.schema import Method, parse_scope, split_names
from nmsweep.errors import InputError
from nmsweep.methods.base import State
from nmsweep.methods.sparsification import Sparsification, build_sparsification
from nmsweep.sparsity.install import Installed, installed


@contextmanager
def sparsify(
    model: nn.Module,
    *,
    pattern: str = "8:16",
    criterion: str | Mapping[str, Any] = "act",
    mitigation: str | Sequence[str] = "none",
    targets: str | Sequence[str] = "all",
    mitigations: Mapping[str, Mapping[str, Any]] | None = None,
    scope: str = "all",
    state: Mapping[str, State] | None = None,
    recipe: str | Path | None = None,
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
        scope: which tokens are pruned: ``"all"``, ``"prefill"``, ``"decode"``, ``"skip_first:4"``, ``"skip_first:50%"``.
        state: what `nmsweep.calibration.fit` gave for calibrated stages.
        recipe: the YAML file of a pattern for each layer, which `policy=greedy` makes; it takes the place of `pattern`.
        config_dir: a folder of your own with ``criterion/`` and ``mitigations/``.

    Raises:
        InputError: as on the command line, all mistakes together.
    """
    made, names = sparsification_from_names(
        pattern, criterion, mitigation, targets, mitigations or {}, config_dir, scope
    )
    if recipe is not None:
        found = read_recipe(Path(recipe))
        made = replace(made, pattern=found.pattern, patterns=found.layers)
    with installed(model, made, names, state, scope) as sparse:
        yield sparse


def sparsification_from_names(
    pattern: str,
    criterion: str | Mapping[str, Any],
    mitigation: str | Sequence[str],
    targets: str | Sequence[str],
    parameters: Mapping[str, Mapping[str, Any]],
    config_dir: str | Path | None = None,
    scope: str = "all",
) -> tuple[Sparsification, tuple[str, ...]]:
    """Turn names into a sparsification and target names; all mistakes together."""
    folder = Path(config_dir) if config_dir else None
    chosen = {"name": criterion} if isinstance(criterion, str) else dict(criterion)
    names = split_names(mitigation)
    errors: list[str] = []
    methods: list[Method] = []
    parsed = Pattern("dense")
    try:
        parse_scope(scope)
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
    return build_sparsification(parsed, methods[0], methods[1:], scope), split_names(targets)
