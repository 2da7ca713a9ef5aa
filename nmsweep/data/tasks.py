"""Tasks: where their items or texts are, and the fingerprints of both. No torch; nothing is downloaded.

A task is a *text*, measured by its perplexity (`wikitext2`, `mini_prose`), or a task of the lm-evaluation-harness. The
harness's YAML defines how an item becomes a request; nmsweep changes only where the items are read from.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from nmsweep.data.definitions import (
    Member,
    expand,
    find_config,
    find_group,
    find_members,
    harness_folder,
    is_shipped,
    names_in,
    read_config,
    with_includes,
)
from nmsweep.data.hub import hub_fingerprint, hub_rows
from nmsweep.errors import DataError, nearest

MINI_FOLDER = Path(__file__).parent / "mini"
"""The shipped items and texts."""

MINI_TASKS = {
    "mini_cloze": ("winogrande", "cloze.jsonl"),
    "mini_continuation": ("hellaswag", "continuation.jsonl"),
    "mini_science": ("arc_easy", "science.jsonl"),
    "mini_yesno": ("boolq", "yesno.jsonl"),
}
"""Shipped task -> the harness task that defines its form, and its file in `MINI_FOLDER`."""

TEXT_TASKS = ("mini_prose", "wikitext2")
"""Tasks that are one text, measured by its perplexity."""

TRAINING_FILES = ("train.txt", "train_head.txt")
"""Names of WikiText-2's training text, or its beginning, in a mirror. Methods are calibrated on it."""

LONGEST_LINE_BYTES = 16 * 2**20
"""Longest line accepted in a mirror's file; the longest item of the harness's tasks has less than 1 MiB."""

_WIKITEXT_HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1")


@dataclass(frozen=True)
class TaskSource:
    """A task and its data.

    Attributes:
        task: the name in records.
        kind: ``"text"`` or ``"harness"``.
        config: the harness's YAML as plain values, functions as names; empty for a text.
        yaml_file: that YAML; None for a text.
        files: local file of each split; empty if the data comes from the hub.
        split: the evaluated split; empty for a group.
        members: the tasks of a group that is reported as one; empty for a single task.
    """

    task: str
    kind: Literal["text", "harness"]
    config: Mapping[str, Any]
    yaml_file: Path | None
    files: Mapping[str, Path]
    split: str
    members: Sequence["TaskSource"] = ()

    @property
    def leaves(self) -> Sequence["TaskSource"]:
        """The tasks of a group, or the task itself."""
        return self.members or (self,)

    @property
    def version(self) -> str:
        """The task's version and the harness's; ``1`` for a text or a shipped task.

        For a YAML of the user's, which may change without a new version, it includes a hash of the definition.
        """
        if self.yaml_file is None or self.task in MINI_TASKS:
            return "1"
        words = [str((self.config.get("metadata") or {}).get("version", 0)), version("lm_eval")]
        if not is_shipped(self.yaml_file):
            words.append(self.definition()[:12])
        if self.members:
            words.append(_digest(f"{member.task} {member.version}" for member in self.members)[:12])
        return "/".join(words)

    @property
    def generates(self) -> bool:
        """Whether the model generates text, rather than scoring given text."""
        return any(leaf.config.get("output_type") == "generate_until" for leaf in self.leaves)

    def fingerprint(self, examples: bool = False) -> str:
        """Return a sha256 of the evaluated split: of the file's bytes, or of the hub's revision.

        Args:
            examples: whether few-shot examples come from another split; then all splits are hashed.
        """
        if examples:
            return self.content()
        if self.members:
            return _digest(member.fingerprint() for member in self.members)
        if self.split in self.files:
            return file_sha256(self.files[self.split])
        return hub_fingerprint(*self.hub_name, self.split)

    def content(self) -> str:
        """Return a sha256 of all available splits."""
        if self.members:
            return _digest(member.content() for member in self.members)
        if not self.files:
            return hub_fingerprint(*self.hub_name, "")
        return _digest(f"{split} {file_sha256(file)}" for split, file in sorted(self.files.items()))

    def definition(self) -> str:
        """Return a sha256 of the YAML and of the code in its folder, independent of where the items are."""
        assert self.yaml_file is not None
        config = dict(self.config)
        if files := _named_files(config):
            config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": sorted(files)}
        text = repr(sorted(config.items(), key=str))
        folders = dict.fromkeys(file.parent for file in with_includes(self.yaml_file))
        for folder in folders:
            text = text.replace(str(folder), "")
        code = [file_sha256(file) for folder in folders for file in sorted(folder.glob("*.py"))]
        return _digest([text, *code])

    def shots(self, requested: int | None) -> int:
        """Return the number of examples before each item of a single task.

        The task's own number is the default; a task whose YAML says 0 never takes examples, as in the harness.
        """
        default = self.config.get("num_fewshot")
        return int(default or 0) if requested is None or default == 0 else requested

    @property
    def hub_name(self) -> tuple[str, str | None]:
        """Path and config name of the hub's data set."""
        if self.kind == "text":
            return _WIKITEXT_HUB
        return str(self.config["dataset_path"]), self.config.get("dataset_name")

    @property
    def hub_options(self) -> dict[str, Any]:
        """Further arguments of `datasets.load_dataset`; remote code is never trusted."""
        options = self.config.get("dataset_kwargs") or {}
        return {key: value for key, value in options.items() if key != "trust_remote_code"}


def task_names(name: str, include_path: Path | None = None) -> list[str]:
    """Return the tasks of a tag, or of a group without a score of its own; for any other name the name itself.

    Raises:
        DataError: a group that defines tasks without names.
    """
    return [name] if name in (*TEXT_TASKS, *MINI_TASKS) else expand(name, include_path)


def find_task(task: str, mirror: Path | None, include_path: Path | None = None) -> TaskSource:
    """Find a task by name.

    Args:
        task: a text, a shipped task, or a task or group of the harness.
        mirror: a folder laid out as ``<task>/<split>.jsonl``; None for the hub.
        include_path: a folder of the user's task YAMLs; they take precedence over the harness's.

    Raises:
        DataError: there is no such task, or the mirror lacks its file.
    """
    if task == "mini_prose":
        return TaskSource(task, "text", {}, None, {"test": MINI_FOLDER / "prose.txt"}, "test")
    if task == "wikitext2":
        files = {"test": _mirror_file(mirror, "wikitext2", "test.txt")} if mirror else {}
        return TaskSource(task, "text", {}, None, files, "test")
    if task in MINI_TASKS:
        return _mini(task)
    if group := find_group(task, include_path):
        return _group(task, group, mirror, include_path)
    config, file = _harness_config(task, include_path)
    files = _users_files(config) or (_mirror_splits(mirror, task, config) if mirror else {})
    return TaskSource(task, "harness", config, file, files, _evaluated_split(config))


def _mini(task: str) -> TaskSource:
    """Return a shipped task; its few-shot examples are the first ones of a separate file."""
    base, name = MINI_TASKS[task]
    config, file = _harness_config(base)
    split = _evaluated_split(config)
    files = {split: MINI_FOLDER / name, "train": MINI_FOLDER / name.replace(".jsonl", "_examples.jsonl")}
    examples = {"training_split": "train", "fewshot_config": {"sampler": "first_n"}}
    return TaskSource(task, "harness", {**config, **examples}, file, files, split)


def _harness_config(task: str, include_path: Path | None = None) -> tuple[dict[str, Any], Path]:
    """Return the definition of a task and its YAML file.

    Raises:
        DataError: there is no such task, or it is defined by a Python class.
    """
    found = find_config(task, include_path)
    if found is None:
        users = names_in(include_path).tasks if include_path else {}
        known = [*users, *names_in(harness_folder()).tasks, *MINI_TASKS, *TEXT_TASKS]
        raise DataError(f"tasks: {task!r} is no task of the harness; {nearest(task, known)}")
    if "class" in found[0]:
        raise DataError(f"tasks: {task} is a program of the harness, which nmsweep does not run; leave it out")
    return found


def _named_files(config: Mapping[str, Any]) -> dict[str, Path]:
    """Return the local JSON files that a task's YAML names, by split."""
    named = (config.get("dataset_kwargs") or {}).get("data_files") if config.get("dataset_path") == "json" else None
    named = {"train": named} if isinstance(named, str) else named
    if not isinstance(named, Mapping) or not all(isinstance(file, str) for file in named.values()):
        return {}
    return {str(split): Path(file) for split, file in named.items()}


def _users_files(config: Mapping[str, Any]) -> dict[str, Path]:
    """Return the files that a YAML names and check that they exist; they take precedence over a mirror."""
    files = _named_files(config)
    if missing := [str(file) for file in files.values() if not file.is_file()]:
        raise DataError(
            f"task {config.get('task')}: its YAML names {', '.join(missing)}, which does not exist; correct data_files"
        )
    return files


def _group(task: str, file: Path, mirror: Path | None, include_path: Path | None) -> TaskSource:
    """Return a group with its tasks; one error if the mirror lacks some of them."""
    sources, errors = [], []
    members = find_members(file, include_path)
    for name, member in members.items():
        try:
            sources.append(_member(task, name, member, mirror))
        except DataError as error:
            errors.append(str(error))
    if errors or not members:
        first = errors[0] if errors else "it names none"
        raise DataError(f"task {task}: {len(errors)} of its {len(members)} tasks cannot be had; the first: {first}")
    return TaskSource(task, "harness", read_config(file), file, {}, "", tuple(sources))


def _member(group: str, name: str, member: Member, mirror: Path | None) -> TaskSource:
    """Return a task of a group.

    Raises:
        DataError: it is not available, or the group changes its definition.
    """
    source = find_task(name, mirror, None if member.folder == harness_folder() else member.folder)
    if changed := sorted(key for key, value in member.changes.items() if source.config.get(key) != value):
        raise DataError(
            f"task {group}: it sets {', '.join(changed)} of {name} anew, which nmsweep does not follow; name tasks of it instead"
        )
    return source


def _evaluated_split(config: Mapping[str, Any]) -> str:
    """Return the split that the harness evaluates: test if the task has one, else validation."""
    return str(config.get("test_split") or config.get("validation_split"))


def _mirror_file(mirror: Path, task: str, name: str) -> Path:
    file = mirror / task / name
    if not file.is_file():
        folders = ", ".join(sorted(path.name for path in mirror.iterdir() if path.is_dir())) or "nothing"
        raise DataError(
            f"data.mirror: {mirror} has no {task}/{name}, which task {task} needs; it has {folders}; "
            "leave the task out, fill the mirror with `nmsweep prefetch`, or pass eval.skip_missing=true"
        )
    return file


def _mirror_splits(mirror: Path, task: str, config: Mapping[str, Any]) -> dict[str, Path]:
    """Return the checked file of the evaluated split, and those of the other splits that exist."""
    evaluated = _evaluated_split(config)
    files = {evaluated: _mirror_file(mirror, task, f"{evaluated}.jsonl")}
    for key in ("training_split", "validation_split", "fewshot_split"):
        split = config.get(key)
        if split and (other := mirror / task / f"{split}.jsonl").is_file():
            files.setdefault(str(split), other)
    for file in files.values():
        if problem := _line_problem(*_stamp(file)):
            raise DataError(
                f"data.mirror: {file} {problem}; a JSON object a line is expected; fetch it again with `nmsweep prefetch`"
            )
    return files


@cache
def _line_problem(file: Path, size: int, mtime_ns: int) -> str:
    """Return what is wrong with a file of JSON lines; empty if nothing.

    Each line must be a JSON object of at most `LONGEST_LINE_BYTES`: pyarrow's parser can crash the process on others.
    """
    n_items = number = 0
    with file.open("rb") as lines:
        while line := lines.readline(LONGEST_LINE_BYTES + 1):
            number += 1
            if len(line) > LONGEST_LINE_BYTES:
                return f"has more than {LONGEST_LINE_BYTES >> 20} MiB in line {number}"
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except RecursionError:
                return f"is nested too deep in line {number}"
            except ValueError as error:  # invalid JSON or UTF-8
                return f"is no JSON in line {number} ({error})"
            if not isinstance(item, dict):
                return f"has no object in line {number} but {str(item)[:20]!r}"
            n_items += 1
    return "" if n_items else "has no item"


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """Return the sha256 of a file, cached while the file does not change."""
    return _sha256(*_stamp(file))


@cache
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _stamp(file: Path) -> tuple[Path, int, int]:
    """Return the path, size in bytes and modification time in ns of a file."""
    stat = file.stat()
    return file, stat.st_size, stat.st_mtime_ns


def read_text(source: TaskSource) -> str:
    """Return the text of a text task.

    For WikiText-2 it is ``"\\n\\n".join(rows)`` over the rows of the hub's data set. A row is a line of
    ``wiki.test.raw`` with its newline; a blank line is the empty string.

    Raises:
        DataError: the file is not UTF-8.
    """
    try:
        if source.task == "wikitext2":
            return "\n\n".join(_wikitext_rows(source))
        return source.files[source.split].read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"task {source.task}: {source.files[source.split]} is no UTF-8 ({error}); fetch it again with `nmsweep prefetch`"
        ) from error


def _wikitext_rows(source: TaskSource) -> list[str]:
    if source.split in source.files:
        with source.files[source.split].open(encoding="utf-8", newline="\n") as handle:
            return ["" if not line.strip() else line for line in handle]
    return [str(row["text"]) for row in hub_rows(*source.hub_name, source.split)]
