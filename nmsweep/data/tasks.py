"""Where a task's items or text lie, and what identifies them. No torch, nothing downloaded.

A task is either *text* for perplexity (`wikitext2`, `mini_prose`) or an lm-evaluation-harness task. The harness's own
YAML says how an item becomes a request; only where the items are read from is ever changed.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from nmsweep.data.groups import Member, expanded, group_file, members
from nmsweep.data.hub import hub_fingerprint, hub_rows
from nmsweep.data.lines import check_lines
from nmsweep.data.yamls import find_config, harness_folder, is_shipped, read_config, task_files, with_includes
from nmsweep.errors import DataError, nearest

MINI_FOLDER = Path(__file__).parent / "mini"
"""The shipped items and texts."""

MINI_TASKS = {
    "mini_cloze": ("winogrande", "cloze.jsonl"),
    "mini_continuation": ("hellaswag", "continuation.jsonl"),
    "mini_science": ("arc_easy", "science.jsonl"),
    "mini_yesno": ("boolq", "yesno.jsonl"),
}
"""Shipped task: the harness task whose form it has, and its file."""

TEXT_TASKS = ("mini_prose", "wikitext2")
"""Tasks that are one text, measured by its perplexity."""

TRAINING_FILES = ("train.txt", "train_head.txt")
"""WikiText-2's training text in a mirror, or its beginning: what methods are calibrated on."""

_WIKITEXT_HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1")


@dataclass(frozen=True)
class TaskSource:
    """One task and where its data is.

    Attributes:
        task: the name in records.
        kind: ``"text"`` or ``"harness"``.
        config: the harness's own YAML as plain values, functions unresolved; empty for a text.
        yaml_file: that YAML; None for a text.
        files: local file of each split; empty where the hub is asked.
        split: the split that is evaluated; empty for a group.
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
        """The harness's version of the task, with the harness's own; ``1`` for a text.

        A YAML of the user's may change without a new version: its definition is part of it.
        """
        if self.yaml_file is None or self.task in MINI_TASKS:
            return "1"
        own = f"{(self.config.get('metadata') or {}).get('version', 0)}/{version('lm_eval')}"
        if not is_shipped(self.yaml_file):
            own += f"/{self.definition()[:12]}"
        if self.members:
            return f"{own}/{_digest(f'{member.task} {member.version}' for member in self.members)[:12]}"
        return own

    @property
    def generates(self) -> bool:
        """Whether the model writes text, token by token; else whole sequences are scored."""
        return any(leaf.config.get("output_type") == "generate_until" for leaf in self.leaves)

    def fingerprint(self, examples: bool = False) -> str:
        """sha256 of the evaluated split, or of all splits where few-shot examples come from another one.

        Of its file's bytes, or of what the hub calls its revision.
        """
        if examples:
            return self.content()
        if self.members:
            return _digest(member.fingerprint() for member in self.members)
        if self.split in self.files:
            return file_sha256(self.files[self.split])
        return hub_fingerprint(*self.hub_name, self.split)

    def content(self) -> str:
        """sha256 of all splits that there are."""
        if self.members:
            return _digest(member.content() for member in self.members)
        if not self.files:
            return hub_fingerprint(*self.hub_name, "")
        return _digest(f"{split} {file_sha256(file)}" for split, file in sorted(self.files.items()))

    def definition(self) -> str:
        """sha256 of what says how an item becomes a request: the YAML, and the code in its folder; not where the items lie."""
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

    def num_fewshot(self, asked: int | None) -> int | None:
        """Examples before each item; of a group what was asked for, as each of its tasks has its own number."""
        return asked if self.members else self.shots(asked)

    def shots(self, asked: int | None) -> int:
        """Examples before each item of a single task: as asked, else its own number; none where its YAML says 0.

        The harness takes such a 0 for a decision that nobody overrules.
        """
        own = self.config.get("num_fewshot")
        return int(own or 0) if asked is None or own == 0 else asked

    @property
    def hub_name(self) -> tuple[str, str | None]:
        if self.kind == "text":
            return _WIKITEXT_HUB
        return str(self.config["dataset_path"]), self.config.get("dataset_name")

    @property
    def hub_options(self) -> dict[str, Any]:
        """What else the data library is told; code of others' is never run."""
        options = self.config.get("dataset_kwargs") or {}
        return {key: value for key, value in options.items() if key != "trust_remote_code"}


def _mini(task: str, config: Mapping[str, Any], file: Path, name: str) -> TaskSource:
    """A shipped task; its few-shot examples are the first ones of a file of their own, the same for every item."""
    split = _split(config)
    files = {split: MINI_FOLDER / name, "train": MINI_FOLDER / name.replace(".jsonl", "_examples.jsonl")}
    own = {"training_split": "train", "fewshot_config": {"sampler": "first_n"}}
    return TaskSource(task, "harness", {**config, **own}, file, files, split)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def task_names(name: str, include_path: Path | None = None) -> list[str]:
    """The tasks that a name stands for: itself, or those of a tag or of a group that has no number of its own.

    Raises:
        DataError: a group whose tasks have no names.
    """
    return [name] if name in (*TEXT_TASKS, *MINI_TASKS) else expanded(name, include_path)


def find_task(task: str, mirror: Path | None, include_path: Path | None = None) -> TaskSource:
    """Find a task by name.

    Args:
        task: a text, a shipped task, or any task of the harness.
        mirror: a folder laid out as ``<task>/<split>.jsonl``; None for the hub.
        include_path: a folder with task YAMLs of the user's; they win over the harness's.

    Raises:
        DataError: no such task, or the mirror lacks its file.
    """
    if task == "mini_prose":
        return TaskSource(task, "text", {}, None, {"test": MINI_FOLDER / "prose.txt"}, "test")
    if task == "wikitext2":
        files = {"test": _mirror_file(mirror, "wikitext2", "test.txt")} if mirror else {}
        return TaskSource(task, "text", {}, None, files, "test")
    if task in MINI_TASKS:
        base, name = MINI_TASKS[task]
        config, file = _harness_config(base)
        return _mini(task, config, file, name)
    if group := group_file(task, include_path):
        return _group(task, group, mirror, include_path)
    config, file = _harness_config(task, include_path)
    files = _own_files(config) or (_mirror_splits(mirror, task, config) if mirror else {})
    return TaskSource(task, "harness", config, file, files, _split(config))


def _harness_config(task: str, include_path: Path | None = None) -> tuple[dict[str, Any], Path]:
    """The YAML of a task, and its file.

    Raises:
        DataError: there is no such task, or it is none that a YAML describes.
    """
    found = find_config(task, include_path)
    if found is None:
        own = task_files(include_path) if include_path else {}
        known = [*own, *task_files(harness_folder()), *MINI_TASKS, *TEXT_TASKS]
        raise DataError(f"tasks: {task!r} is no task of the harness; {nearest(task, known)}")
    if "class" in found[0]:
        raise DataError(f"tasks: {task} is a program of the harness, which nmsweep does not run; leave it out")
    return found


def _named_files(config: Mapping[str, Any]) -> dict[str, Path]:
    """The local JSON files that a task's YAML names itself, by split."""
    named = (config.get("dataset_kwargs") or {}).get("data_files") if config.get("dataset_path") == "json" else None
    named = {"train": named} if isinstance(named, str) else named
    if not isinstance(named, Mapping) or not all(isinstance(file, str) for file in named.values()):
        return {}
    return {str(split): Path(file) for split, file in named.items()}


def _own_files(config: Mapping[str, Any]) -> dict[str, Path]:
    """`_named_files`, which have to be there; a mirror does not replace them."""
    files = _named_files(config)
    if lost := [str(file) for file in files.values() if not file.is_file()]:
        raise DataError(
            f"task {config.get('task')}: its YAML names {', '.join(lost)}, which does not exist; correct data_files"
        )
    return files


def _group(task: str, file: Path, mirror: Path | None, include_path: Path | None) -> TaskSource:
    """A group with its tasks; one message if the mirror lacks some of them."""
    found, missing = [], []
    named = members(file, include_path)
    for name, member in named.items():
        try:
            found.append(_member(task, name, member, mirror))
        except DataError as error:
            missing.append(str(error))
    if missing or not named:
        first = missing[0] if missing else "it names none"
        raise DataError(f"task {task}: {len(missing)} of its {len(named)} tasks cannot be had; the first: {first}")
    return TaskSource(task, "harness", read_config(file), file, {}, "", tuple(found))


def _member(group: str, name: str, member: Member, mirror: Path | None) -> TaskSource:
    """A task of a group.

    Raises:
        DataError: it cannot be had, or is another one in the group than by itself.
    """
    found = find_task(name, mirror, None if member.folder == harness_folder() else member.folder)
    if other := sorted(key for key, value in member.changes.items() if found.config.get(key) != value):
        raise DataError(
            f"task {group}: it sets {', '.join(other)} of {name} anew, which nmsweep does not follow; name tasks of it instead"
        )
    return found


def _split(config: Mapping[str, Any]) -> str:
    """The split that the harness evaluates: test if the task has one, else validation."""
    split = config.get("test_split") or config.get("validation_split")
    return str(split)


def _mirror_file(mirror: Path, task: str, name: str) -> Path:
    file = mirror / task / name
    if not file.is_file():
        have = ", ".join(sorted(p.name for p in mirror.iterdir() if p.is_dir())) or "nothing"
        raise DataError(
            f"data.mirror: {mirror} has no {task}/{name}, which task {task} needs; it has {have}; "
            "leave the task out, fill the mirror with `nmsweep prefetch`, or pass eval.skip_missing=true"
        )
    return file


def _mirror_splits(mirror: Path, task: str, config: Mapping[str, Any]) -> dict[str, Path]:
    """Files of the evaluated split, and of the others that are there."""
    evaluated = _split(config)
    files = {evaluated: _mirror_file(mirror, task, f"{evaluated}.jsonl")}
    for key in ("training_split", "validation_split", "fewshot_split"):
        split = config.get(key)
        if split and (other := mirror / task / f"{split}.jsonl").is_file():
            files.setdefault(str(split), other)
    for file in files.values():
        check_lines(file)
    return files


@cache
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_sha256(file: Path) -> str:
    """sha256 of a file, remembered while the file does not change."""
    stat = file.stat()
    return _sha256(file, stat.st_size, stat.st_mtime_ns)


def read_text(source: TaskSource) -> str:
    """The text of a text task.

    WikiText-2 is ``"\\n\\n".join(rows)`` over the rows of the hub's data set: the lines of ``wiki.test.raw``, each with its
    newline, a blank line being the empty string.

    Raises:
        DataError: the file is no UTF-8.
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
