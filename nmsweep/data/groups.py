"""Names of the harness that stand for several tasks: groups, such as ``mmlu``, and tags, such as ``ai2_arc``. No torch."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from nmsweep.data.yamls import find_config, harness_folder, is_shipped, listed, read_config, tagged, task_files
from nmsweep.errors import DataError

_GROUP_LINE = re.compile(rb"^[\"']?group[\"']?:[ \t]*[\"']?([A-Za-z0-9_.+-]+)[\"']?[ \t]*$", re.MULTILINE)

KNOWN_GROUPS = {"mmlu": "mmlu/default/_mmlu.yaml"}
"""Files of common groups below lm_eval/tasks, so that they are found without a look at the others."""

_OF_THE_GROUP = {"group", "group_alias", "task", "task_alias", "aggregate_metric_list", "metadata", "tag", "include"}
"""Keys of a group, or of its entry for a task, that leave the task what it is."""


def group_file(name: str, include_path: Path | None = None) -> Path | None:
    """The YAML of a group; None if there is no such group, or if a task has its name.

    Args:
        name: of the group.
        include_path: a folder with YAMLs of the user's; they win over the harness's.
    """
    if include_path is None and name in KNOWN_GROUPS:
        return harness_folder() / KNOWN_GROUPS[name]
    if find_config(name, include_path):
        return None
    own = _group_files(include_path).get(name) if include_path else None
    return own or _group_files(harness_folder()).get(name)


@cache
def _group_files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.yaml")):
        if hit := _GROUP_LINE.search(file.read_bytes()):
            found.setdefault(hit[1].decode(), file)
    return found


def expanded(name: str, include_path: Path | None = None) -> list[str]:
    """The tasks that a name stands for: a tag's, those of a group that has no number of its own; else the name itself.

    Raises:
        DataError: a group of groups without names.
    """
    file = group_file(name, include_path)
    if file is not None:
        config = read_config(file)
        if config.get("aggregate_metric_list"):
            return [name]
        children = [_named(item, name) for item in listed(config.get("task"))]
        return list(dict.fromkeys(task for child in children for task in expanded(child, include_path)))
    return [name] if find_config(name, include_path) else tasks_of_tag(name, include_path) or [name]


def _named(item: Any, group: str) -> str:
    """The name of a group's entry."""
    if isinstance(item, Mapping):
        if isinstance(item.get("task"), list) or _changes(item):
            raise DataError(
                f"task {group}: it has no number of its own, and tasks that only it describes; name tasks of it instead"
            )
        item = item.get("task") or item.get("group")
    return str(item)


def tasks_of_tag(tag: str, include_path: Path | None = None) -> list[str]:
    """The tasks with a tag: the user's, if any of them has it, else the harness's; sorted."""
    return (_tagged(tag, include_path) if include_path else []) or _tagged(tag, harness_folder())


def _tagged(tag: str, folder: Path) -> list[str]:
    return _shipped_tag(tag, folder) if is_shipped(folder) else tagged(tag, folder)


@cache
def _shipped_tag(tag: str, folder: Path) -> list[str]:
    return tagged(tag, folder)


class Member(NamedTuple):
    """A task of a group.

    Attributes:
        folder: where its YAML was found, or a folder above.
        changes: keys of its YAML that the group sets anew.
    """

    folder: Path
    changes: Mapping[str, Any]


def members(file: Path, include_path: Path | None = None) -> dict[str, Member]:
    """The tasks of a group, with those of groups and tags inside it, by name; sorted.

    Args:
        file: the group's YAML.
        include_path: a folder with YAMLs of the user's.

    Raises:
        DataError: a task without a name.
    """
    return dict(sorted(_members(read_config(file), file.parent, include_path, {}).items()))


def _members(
    config: Mapping[str, Any], folder: Path, include_path: Path | None, changes: Mapping[str, Any]
) -> dict[str, Member]:
    found: dict[str, Member] = {}
    changes = {**_changes(config), **changes}
    for item in listed(config.get("task")):
        entry = item if isinstance(item, Mapping) else {"task": item}
        name = entry.get("task") or entry.get("group")
        if isinstance(name, list):  # a group that is written down here
            found |= _members(entry, folder, include_path, changes)
        elif name is None:
            raise DataError(f"task {config.get('group')}: it has a task without a name, which nmsweep does not run")
        else:
            found |= _resolved(str(name), folder, include_path, {**changes, **_changes(entry)})
    return found


def _resolved(name: str, folder: Path, include_path: Path | None, changes: Mapping[str, Any]) -> dict[str, Member]:
    """The tasks that one entry of a group stands for; before all of the harness's what lies beside the group, which is quick."""
    for place in (include_path, folder, harness_folder()):
        if place and (file := _group_files(place).get(name)):
            return _members(read_config(file), file.parent, include_path, changes)
        if place and name in task_files(place):
            return {name: Member(place, changes)}
        if place and (same := _tagged(name, place)):
            return {task: Member(place, changes) for task in same}
    return {name: Member(folder, changes)}


def _changes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a group, or its entry for a task, says about the task itself."""
    return {key: value for key, value in config.items() if key not in _OF_THE_GROUP}
