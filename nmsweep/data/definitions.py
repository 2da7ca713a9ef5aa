"""Task definitions of the lm-evaluation-harness: the YAML files of tasks, groups (``mmlu``) and tags (``ai2_arc``). No torch.

Names are found with one regular expression over all files, which takes 0.5 s; the harness's own index parses all 14,000
of them, which takes 9 s. The files of common names are listed here, so that most commands read no other.
"""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from nmsweep.errors import DataError

_COMMON_TASKS = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "ifeval": "ifeval/ifeval.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "rte": "glue/rte/default.yaml",
    "winogrande": "winogrande/default.yaml",
}
_COMMON_GROUPS = {"mmlu": "mmlu/default/_mmlu.yaml"}

_NAME_LINE = re.compile(rb"^[\"']?(task|group)[\"']?:[ \t]*[\"']?([A-Za-z0-9_.+-]+)[\"']?[ \t]*$", re.MULTILINE)
_SUFFIXES = {"", ".yaml", ".yml"}
"""Suffixes of YAML files and of the files that they include."""

_GROUP_KEYS = {"group", "group_alias", "task", "task_alias", "aggregate_metric_list", "metadata", "tag", "include"}
"""Keys of a group, or of its entry for a task, that do not change the task."""


class Names(NamedTuple):
    """The YAML file of each task and of each group in a folder."""

    tasks: dict[str, Path]
    groups: dict[str, Path]


class Member(NamedTuple):
    """A task of a group.

    Attributes:
        folder: the folder that its YAML was found in or below.
        changes: keys of its YAML that the group replaces.
    """

    folder: Path
    changes: Mapping[str, Any]


@cache
def harness_folder() -> Path:
    """Return the folder of the harness's own tasks."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def is_shipped(file: Path) -> bool:
    """Return whether a file belongs to the harness, so that it changes only with the harness's version."""
    return file.is_relative_to(harness_folder())


@cache
def names_in(folder: Path) -> Names:
    """Find the names of the tasks and groups below a folder by their `task:` and `group:` lines."""
    names = Names({}, {})
    for file in sorted(folder.rglob("*.yaml")):
        for key, name in dict(reversed(_NAME_LINE.findall(file.read_bytes()))).items():
            (names.tasks if key == b"task" else names.groups).setdefault(name.decode(), file)
    return names


def find_config(task: str, include_path: Path | None = None) -> tuple[dict[str, Any], Path] | None:
    """Return the definition of a task and its YAML file, or None if there is no such task.

    Args:
        task: its name.
        include_path: a folder of the user's YAMLs; they take precedence over the harness's.

    Returns:
        The definition with its includes merged in and its functions as names.

    Raises:
        DataError: a YAML of the user's that cannot be read.
    """
    file = names_in(include_path).tasks.get(task) if include_path else None
    if file is None and task in _COMMON_TASKS:
        file = harness_folder() / _COMMON_TASKS[task]
    if file is None:
        file = names_in(harness_folder()).tasks.get(task)
    return None if file is None else (read_config(file), file)


def find_group(name: str, include_path: Path | None = None) -> Path | None:
    """Return the YAML file of a group, or None if there is no such group or a task has its name.

    Args:
        name: its name.
        include_path: a folder of the user's YAMLs; they take precedence over the harness's.
    """
    if include_path is None and name in _COMMON_GROUPS:
        return harness_folder() / _COMMON_GROUPS[name]
    if find_config(name, include_path):
        return None
    users = names_in(include_path).groups.get(name) if include_path else None
    return users or names_in(harness_folder()).groups.get(name)


def expand(name: str, include_path: Path | None = None) -> list[str]:
    """Return the tasks of a tag, or of a group without a score of its own; for any other name the name itself.

    Raises:
        DataError: a group that defines tasks without names.
    """
    file = find_group(name, include_path)
    if file is not None:
        config = read_config(file)
        if config.get("aggregate_metric_list"):
            return [name]
        children = [_entry_name(entry, name) for entry in as_list(config.get("task"))]
        return list(dict.fromkeys(task for child in children for task in expand(child, include_path)))
    return [name] if find_config(name, include_path) else tasks_of_tag(name, include_path) or [name]


def _entry_name(entry: Any, group: str) -> str:
    if not isinstance(entry, Mapping):
        return str(entry)
    if isinstance(entry.get("task"), list) or _changes(entry):
        raise DataError(
            f"task {group}: it has no number of its own, and tasks that only it describes; name tasks of it instead"
        )
    return str(entry.get("task") or entry.get("group"))


def tasks_of_tag(tag: str, include_path: Path | None = None) -> list[str]:
    """Return the tasks with a tag, sorted: the user's if any has it, else the harness's."""
    return (_tagged(tag, include_path) if include_path else []) or _tagged(tag, harness_folder())


@cache
def _tagged(tag: str, folder: Path) -> list[str]:
    """Return the tasks below a folder whose YAML, or a file that it includes, has a tag."""
    texts = {file: file.read_bytes() for file in folder.rglob("*") if file.suffix in _SUFFIXES and file.is_file()}
    candidates: set[Path] = set()
    words = {tag.encode()}
    while new := {file for file, text in texts.items() if file not in candidates and any(w in text for w in words)}:
        candidates |= new
        words = {file.name.encode() for file in new}  # a file that includes one of these may have the tag, too
    configs = [read_config(file) for file in candidates if file.suffix == ".yaml"]
    return sorted({str(c["task"]) for c in configs if tag in as_list(c.get("tag")) and isinstance(c.get("task"), str)})


def find_members(file: Path, include_path: Path | None = None) -> dict[str, Member]:
    """Return the tasks of a group by name, sorted, with those of the groups and tags inside it.

    Args:
        file: YAML of the group.
        include_path: a folder of the user's YAMLs.

    Raises:
        DataError: a task without a name.
    """
    return dict(sorted(_members(read_config(file), file.parent, include_path, {}).items()))


def _members(
    config: Mapping[str, Any], folder: Path, include_path: Path | None, changes: Mapping[str, Any]
) -> dict[str, Member]:
    members: dict[str, Member] = {}
    changes = {**_changes(config), **changes}
    for item in as_list(config.get("task")):
        entry = item if isinstance(item, Mapping) else {"task": item}
        name = entry.get("task") or entry.get("group")
        if isinstance(name, list):  # a group that is written out inside this one
            members |= _members(entry, folder, include_path, changes)
        elif name is None:
            raise DataError(f"task {config.get('group')}: it has a task without a name, which nmsweep does not run")
        else:
            members |= _resolve(str(name), folder, include_path, {**changes, **_changes(entry)})
    return members


def _resolve(name: str, folder: Path, include_path: Path | None, changes: Mapping[str, Any]) -> dict[str, Member]:
    """Return the tasks that an entry of a group names; the group's own folder is searched before the whole harness."""
    for place in (include_path, folder, harness_folder()):
        if place and (file := names_in(place).groups.get(name)):
            return _members(read_config(file), file.parent, include_path, changes)
        if place and name in names_in(place).tasks:
            return {name: Member(place, changes)}
        if place and (tagged := _tagged(name, place)):
            return {task: Member(place, changes) for task in tagged}
    return {name: Member(folder, changes)}


def _changes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a group, or of its entry for a task, that change the task itself."""
    return {key: value for key, value in config.items() if key not in _GROUP_KEYS}


def read_config(file: Path) -> dict[str, Any]:
    """Read a YAML and its includes; functions stay names. The result is cached while none of the files changes.

    Raises:
        DataError: it cannot be read.
    """
    return dict(_read(file, True, () if is_shipped(file) else tuple(map(_stamp, with_includes(file)))))


def with_includes(file: Path) -> list[Path]:
    """Return a YAML file and all files that it includes, without duplicates.

    Raises:
        DataError: one of them cannot be read.
    """
    files = [file]
    for parent in files:  # grows meanwhile
        names = as_list(_read(parent, False, _stamp(parent)).get("include"))
        files += [path for name in names if (path := parent.parent / name) not in files]
    return files


@cache
def _read(file: Path, recursive: bool, stamp: object) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return dict(load_yaml(file, resolve_func=False, recursive=recursive))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _unreadable(file, error) from error


def _stamp(file: Path) -> tuple[Path, int, int]:
    """Return the path, size in bytes and modification time in ns of a file."""
    try:
        stat = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    return file, stat.st_size, stat.st_mtime_ns


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(f"eval.include_path: {file} is no task YAML: {' '.join(str(error).split())}; correct it")


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, None as an empty list, and any other value as a list of one."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]
