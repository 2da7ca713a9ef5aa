"""The Python API: `sparsify`, which makes a model sparse by the names of the command line or by instances of classes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from nmsweep.config.catalogue import find_method
from nmsweep.config.pattern import Pattern, parse_pattern
from nmsweep.config.recipe import read_recipe
from nmsweep.config.schema import parse_scope, split_names
from nmsweep.errors import InputError
from nmsweep.methods.base import Criterion, Mitigation, State
from nmsweep.methods.sparsification import Sparsification, build_sparsification
from nmsweep.sparsity.install import SparseModel, install

MitigationArgument = str | Mitigation | Sequence[str | Mitigation] | None


def sparsify(
    model: nn.Module,
    *,
    pattern: str = "8:16",
    criterion: str | Mapping[str, Any] | Criterion = "act",
    mitigation: MitigationArgument = "none",
    targets: str | Sequence[str] = "all",
    mitigations: Mapping[str, Mapping[str, Any]] | None = None,
    scope: str = "all",
    state: Mapping[str, State] | None = None,
    recipe: str | Path | None = None,
    config_dir: str | Path | None = None,
) -> SparseModel:
    """Make a transformers model sparse, in place and at once.

    The model stays sparse until `restore` is called on the result, or until the end of a ``with`` block.

    Example:
        >>> with sparsify(model, pattern="8:16", mitigation="shift+var"):
        ...     model.generate(**inputs)
        >>> sparse = sparsify(model, criterion=MyCriterion(), mitigation=["shift", MyBias()])
        >>> sparse.restore()

    Args:
        model: a causal language model of transformers.
        pattern: ``"N:M"`` (N kept of M), ``"p%"`` or ``"threshold:p%"``.
        criterion: a name; a name with parameters, ``{"name": "act", …}``; or an instance.
        mitigation: names as ``"shift+var"``, an instance, or a list of names and instances.
        targets: which layers: a preset or globs.
        mitigations: parameters of named mitigations, ``{"shift": {"stat": "mean"}}``.
        scope: which tokens are pruned: ``"all"``, ``"prefill"``, ``"decode"``, ``"skip_first:4"``, ``"skip_first:50%"``.
        state: the result of `nmsweep.calibrate` for calibrated methods.
        recipe: the YAML file of a pattern for each layer, written by `policy=greedy`; it replaces `pattern`.
        config_dir: a folder of your own with ``criterion/`` and ``mitigations/``.

    Raises:
        InputError: as on the command line, all mistakes together; or the model is sparse already.
    """
    sparsification, names = assemble(pattern, criterion, mitigation, targets, mitigations, config_dir, scope, recipe)
    return install(model, sparsification, names, state, scope)


def assemble(
    pattern: str,
    criterion: str | Mapping[str, Any] | Criterion,
    mitigation: MitigationArgument,
    targets: str | Sequence[str],
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
    config_dir: str | Path | None = None,
    scope: str = "all",
    recipe: str | Path | None = None,
) -> tuple[Sparsification, tuple[str, ...]]:
    """Build the sparsification and the list of targets from the arguments of `sparsify`.

    Raises:
        InputError: all mistakes together.
    """
    folder, parameters = Path(config_dir) if config_dir else None, parameters or {}
    chosen: list[Any] = _as_list(mitigation)
    names = [method for method in chosen if isinstance(method, str)]
    errors = [
        f"mitigation: {name} is named twice; name each mitigation once"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    parsed = Pattern("dense")
    try:
        parse_scope(scope)
        parsed = parse_pattern(pattern)
        if parsed.is_dense:
            errors.append("pattern: dense leaves nothing to do here; use the model as it is")
    except InputError as error:
        errors += error.messages

    def find(group: str, name: str, given: Mapping[str, Any]) -> Any:
        try:
            return find_method(group, name, given, folder)
        except InputError as error:
            errors.extend(error.messages)
            return None

    ranking: Any = criterion
    if isinstance(criterion, str | Mapping):
        given = {"name": criterion} if isinstance(criterion, str) else dict(criterion)
        ranking = find("criterion", str(given.pop("name", "")), given)
    corrections = [
        find("mitigations", method, parameters.get(method, {})) if isinstance(method, str) else method
        for method in chosen
    ]
    if errors:
        raise InputError(*errors)
    sparsification = build_sparsification(parsed, ranking, corrections, scope)
    if recipe is not None:
        of_layers = read_recipe(Path(recipe))
        sparsification = replace(sparsification, pattern=of_layers.pattern, patterns=of_layers.layers)
    return sparsification, split_names(targets)


def _as_list(mitigation: Any) -> list[Any]:
    """Split ``"a+b"``; keep the instances of a list."""
    if mitigation is None or isinstance(mitigation, str):
        return list(split_names(mitigation))
    if not isinstance(mitigation, Sequence):
        return [mitigation]
    return [part for method in mitigation for part in (split_names(method) if isinstance(method, str) else [method])]
