"""Recipes: a pattern for each layer, as YAML that can be shared and run again. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nmsweep.config.pattern import Pattern, parse_pattern
from nmsweep.errors import InputError

_KEYS = {"pattern", "layers", "density", "made"}


@dataclass(frozen=True)
class Recipe:
    """A pattern for each layer.

    Attributes:
        pattern: the uniform pattern that set the budget.
        layers: module path -> pattern.
        density: average density of the layers, weighted by their multiply-adds.
        made: its origin, for the reader; not used.
    """

    pattern: Pattern
    layers: Mapping[str, Pattern]
    density: float
    made: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Return the recipe as YAML."""
        plain = {
            "pattern": str(self.pattern),
            "density": round(self.density, 6),
            "made": dict(self.made),
            "layers": {name: str(pattern) for name, pattern in self.layers.items()},
        }
        head = "# A pattern for each layer: run it again with policy=THIS_FILE.\n"
        return head + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


def read_recipe(file: Path) -> Recipe:
    """Read a recipe.

    Raises:
        InputError: there is no such file, or it is not a recipe; one message for each mistake.
    """
    where = f"policy {file}"
    if not file.is_file():
        raise InputError(f"policy: {str(file)!r} is no file; allowed: none, greedy, or the YAML file of a recipe")
    try:
        node = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: is not YAML: {' '.join(str(error).split())}") from error
    if (
        not isinstance(node, dict)
        or not {"pattern", "layers"} <= set(node) <= _KEYS
        or not isinstance(node["layers"], dict)
    ):
        raise InputError(f"{where}: is no recipe; it needs pattern, and layers as module path: pattern")
    errors, layers = [], {}
    for name, word in [("pattern", node["pattern"]), *node["layers"].items()]:
        try:
            layers[str(name)] = parse_pattern(word)
            if layers[str(name)].kind not in ("n:m", "unstructured"):
                errors.append(f"{where}: {name} has {word}; allowed: N:M or p%")
        except InputError as error:
            errors += [f"{where}: {name}: {message}" for message in error.messages]
    if errors:
        raise InputError(*errors)
    pattern = layers.pop("pattern")
    return Recipe(pattern, layers, float(node.get("density") or 0.0), node.get("made") or {})
