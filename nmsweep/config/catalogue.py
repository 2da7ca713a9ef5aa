"""What can be chosen: the YAML files of the shipped `conf/` and of a user's own config folder."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from nmsweep.config.schema import Method
from nmsweep.errors import InputError, nearest


@dataclass(frozen=True)
class Option:
    """One YAML file of a group: its name, what its first comment line says, and its content."""

    group: str
    name: str
    summary: str
    node: Mapping[str, Any]
    file: Path


@cache
def conf_dir() -> Path:
    """The shipped `conf/`: inside the package in a wheel, beside it in a checkout.

    Raises:
        InputError: this installation has none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise InputError(f"nmsweep: no conf/ folder beside or inside {package}; install nmsweep again")


def options(group: str, config_dir: Path | None = None) -> dict[str, Option]:
    """All options of a group by name; a user's own file is added to the shipped ones.

    Raises:
        InputError: a file that is no YAML mapping.
    """
    found = {option.name: option for option in _read_folder(config_dir / group, group)} if config_dir else {}
    found.update({option.name: option for option in _read_folder(conf_dir() / group, group)})
    return dict(sorted(found.items()))


def _read_folder(folder: Path, group: str) -> Iterator[Option]:
    for file in sorted(folder.glob("*.yaml")):
        text = file.read_text()
        try:
            node = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise InputError(f"{file}: is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(node, dict):
            raise InputError(f"{file}: holds a {type(node).__name__}; a mapping of keys is needed")
        first = next(
            (
                line.lstrip("# ").strip()
                for line in text.splitlines()
                if line.startswith("#") and not line.startswith("# @")
            ),
            "",
        )
        yield Option(group, file.stem, first, node, file)


def find_method(group: str, name: str, parameters: Mapping[str, Any], config_dir: Path | None = None) -> Method:
    """A criterion or mitigation by name, with some of its parameters replaced.

    Raises:
        InputError: no such name, or no such parameter.
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
