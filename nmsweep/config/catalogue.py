"""The options of each config group: the YAML files of the shipped `conf/` and of a user's own config folder."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nmsweep.config.defaults import conf_dir
from nmsweep.config.schema import Method
from nmsweep.errors import InputError, nearest


@dataclass(frozen=True)
class Option:
    """One YAML file of a config group.

    Attributes:
        group: the folder.
        name: the file's name without suffix.
        summary: its first comment line.
        node: its content.
        file: its path.
    """

    group: str
    name: str
    summary: str
    node: Mapping[str, Any]
    file: Path


def options(group: str, config_dir: Path | None = None) -> dict[str, Option]:
    """Return all options of a group by name, the user's added to the shipped ones; a shipped name takes precedence.

    Raises:
        InputError: a file that is not a YAML mapping.
    """
    folders = [*([config_dir / group] if config_dir else []), conf_dir() / group]
    by_name = {option.name: option for folder in folders for option in _read_folder(folder, group)}
    return dict(sorted(by_name.items()))


def _read_folder(folder: Path, group: str) -> Iterator[Option]:
    for file in sorted(folder.glob("*.yaml")):
        text = file.read_text()
        try:
            node = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise InputError(f"{file}: is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(node, dict):
            raise InputError(f"{file}: holds a {type(node).__name__}; a mapping of keys is needed")
        comments = (line.lstrip("# ").strip() for line in text.splitlines() if re.match("#(?! @)", line))
        yield Option(group, file.stem, next(comments, ""), node, file)


def find_method(group: str, name: str, parameters: Mapping[str, Any], config_dir: Path | None = None) -> Method:
    """Return a criterion or mitigation by name, with some of its parameters replaced.

    Raises:
        InputError: there is no such name, or no such parameter.
    """
    known = options(group, config_dir)
    word = group.removesuffix("s")
    if name not in known:
        raise InputError(f"{word}: {name!r} is not known; {nearest(name, known)}")
    method = Method.from_node(name, known[name].node)
    if unknown := set(parameters) - set(method.params):
        raise InputError(
            f"{word} {name}: no parameter {', '.join(sorted(unknown))}; it has {', '.join(method.params) or 'none'}"
        )
    return method.model_copy(update={"params": {**method.params, **parameters}})
