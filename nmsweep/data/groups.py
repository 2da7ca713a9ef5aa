"""Groups of the harness's tasks that are reported as one number, such as ``mmlu``: which tasks they have."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_GROUP_LINE = re.compile(rb"^[\"']?group[\"']?:[ \t]*[\"']?([A-Za-z0-9_.+-]+)[\"']?[ \t]*$", re.MULTILINE)

KNOWN_GROUPS = {"mmlu": "mmlu/default/_mmlu.yaml"}
"""Files of common groups below lm_eval/tasks, so that they are found without a look at the others."""


def find_group(name: str, folder: Path) -> Path | None:
    """The YAML of a group below a folder of tasks; None if there is no such group."""
    if name in KNOWN_GROUPS and (file := folder / KNOWN_GROUPS[name]).is_file():
        return file
    return _group_files(folder).get(name)


@cache
def _group_files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.yaml")):
        if hit := _GROUP_LINE.search(file.read_bytes()):
            found.setdefault(hit[1].decode(), file)
    return found


def group_config(file: Path) -> dict[str, Any]:
    """A group's YAML as plain values."""
    return dict(yaml.load(file.read_text(), Loader=_Loader) or {})


class _Loader(yaml.SafeLoader):
    """Reads the harness's YAML; functions stay names."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def member_names(file: Path) -> list[str]:
    """The tasks of a group, groups inside it and tags resolved among the files of its own folder; sorted, without doubles."""
    configs = _folder_configs(file.parent)
    groups = {config["group"]: config for config in configs if isinstance(config.get("group"), str)}

    def resolve(names: Sequence[Any]) -> list[str]:
        found = []
        for name in names:
            if not isinstance(name, str):
                name = name.get("task", name.get("group")) if isinstance(name, dict) else str(name)
            if name in groups:
                found += resolve(_listed(groups[name].get("task")))
            elif tagged := [str(config["task"]) for config in configs if name in _listed(config.get("tag"))]:
                found += tagged
            else:
                found.append(str(name))
        return found

    return sorted(set(resolve(_listed(group_config(file).get("task")))))


@cache
def _folder_configs(folder: Path) -> list[dict[str, Any]]:
    configs = [yaml.load(file.read_text(), Loader=_Loader) for file in sorted(folder.glob("*.yaml"))]
    return [config for config in configs if isinstance(config, dict)]


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]
