"""The YAML files of the harness's tasks: which there are, what they say, and which files that comes from. No torch."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from nmsweep.errors import DataError

_YAML_FILES = {
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
"""Files of common tasks below lm_eval/tasks, so that they are found without a look at the others."""


class Loader(yaml.SafeLoader):
    """Reads the harness's YAML; functions stay names."""


Loader.add_constructor("!function", lambda loader, node: str(node.value))


@cache
def harness_folder() -> Path:
    """Where the harness has its own tasks."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def is_shipped(file: Path) -> bool:
    """Whether a file is one of the harness's own, which change with its version alone."""
    return file.is_relative_to(harness_folder())


def find_config(task: str, include_path: Path | None = None) -> tuple[dict[str, Any], Path] | None:
    """The YAML of a task, what it includes put in and functions unresolved, and its file; None if there is no such task.

    Args:
        task: its name.
        include_path: a folder with YAMLs of the user's; they win over the harness's.

    Raises:
        DataError: a YAML of the user's that cannot be read.
    """
    file = task_files(include_path).get(task) if include_path else None
    if file is None and task in _YAML_FILES:
        file = harness_folder() / _YAML_FILES[task]
    if file is None:
        file = task_files(harness_folder()).get(task)
    return None if file is None else (read_config(file), file)


def read_config(file: Path) -> dict[str, Any]:
    """A YAML with what it includes, remembered while none of these files changes; functions are names.

    Raises:
        DataError: it cannot be read.
    """
    return dict(_config(file, () if is_shipped(file) else tuple(map(_state, with_includes(file)))))


@cache
def _config(file: Path, state: tuple[object, ...]) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return dict(load_yaml(file, resolve_func=False, recursive=True))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> DataError:
    """The one message for a YAML that is none."""
    return DataError(f"eval.include_path: {file} is no task YAML: {' '.join(str(error).split())}; correct it")


def with_includes(file: Path) -> list[Path]:
    """A YAML and all that it includes, without doubles.

    Raises:
        DataError: one of them cannot be read.
    """
    found = [file]
    for one in found:
        found += [other for other in _includes(*_state(one)) if other not in found]
    return found


def _state(file: Path) -> tuple[Path, int, int]:
    """What tells a file from what it was: size and time of change."""
    try:
        stat = file.stat()
    except OSError as error:
        raise unreadable(file, error) from error
    return file, stat.st_size, stat.st_mtime_ns


@cache
def _includes(file: Path, size: int, mtime_ns: int) -> list[Path]:
    try:
        config = yaml.load(file.read_text(), Loader=Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise unreadable(file, error) from error
    named = config.get("include") if isinstance(config, dict) else None
    return [file.parent / name for name in ([named] if isinstance(named, str) else named or [])]


_TASK_LINE = re.compile(rb"^[\"']?task[\"']?:[ \t]*[\"']?([A-Za-z0-9_.+-]+)[\"']?[ \t]*$", re.MULTILINE)


@cache
def task_files(folder: Path) -> dict[str, Path]:
    """Every task's YAML by name, read off its `task:` line: the harness's own index parses 14,000 files for it."""
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.yaml")):
        if hit := _TASK_LINE.search(file.read_bytes()):
            found.setdefault(hit[1].decode(), file)
    return found


_SUFFIXES = {"", ".yaml", ".yml"}
"""Of YAMLs and of what they include."""


def tagged(tag: str, folder: Path) -> list[str]:
    """The tasks below a folder that have a tag, by their own YAML or by one that it includes; sorted."""
    found: set[Path] = set()
    names = {tag.encode()}
    files = (file for file in folder.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
    texts = {file: file.read_bytes() for file in files}
    while new := {file for file, text in texts.items() if file not in found and any(name in text for name in names)}:
        found |= new
        names = {file.name.encode() for file in new}  # what includes these may have the tag, too
    configs = [read_config(file) for file in found if file.suffix == ".yaml"]
    return sorted({str(c["task"]) for c in configs if tag in listed(c.get("tag")) and isinstance(c.get("task"), str)})


def listed(value: Any) -> list[Any]:
    """A value that may stand alone, as a list."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]
