"""Fill a mirror with the data of tasks: list what to fetch and its size, fetch it, check it. No torch.

Files are laid out as `find_task` reads them, ``<mirror>/<task>/<split>.jsonl``. Each fetched file has its digest beside it,
``<split>.jsonl.sha256``; a file that no longer matches it is fetched again.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nmsweep.data.hub import hub_rows, hub_size, why_unreachable
from nmsweep.data.requirements import fewshot_split, needs_split
from nmsweep.data.tasks import TRAINING_FILES, TaskSource, file_sha256, find_task, task_names
from nmsweep.errors import DataError
from nmsweep.results.storage import whole_file, write_text


@dataclass(frozen=True)
class Need:
    """One file of a mirror.

    Attributes:
        task: the task that reads it.
        split: split of the hub's data set.
        file: its path.
        state: ``"there"``, ``"damaged"`` (its digest differs), or ``"missing"``.
        source: the task with its data on the hub.
    """

    task: str
    split: str
    file: Path
    state: str
    source: TaskSource

    @property
    def hub_name(self) -> str:
        path, name = self.source.hub_name
        return f"{path} {name or ''}".strip()

    @property
    def is_local(self) -> bool:
        """Whether the data set is a folder on this machine, which `datasets` reads like one of the hub's."""
        return Path(self.source.hub_name[0]).is_dir()


def needs(
    tasks: Iterable[str],
    mirror: Path,
    num_fewshot: int | None,
    include_path: Path | None,
    training_text: bool = False,
) -> list[Need]:
    """List the files that tasks read from a mirror.

    Args:
        tasks: names of tasks; shipped tasks and those whose YAML names local files need none.
        mirror: the folder; it need not exist.
        num_fewshot: as `eval.num_fewshot`; with few-shot examples, their split is needed too.
        include_path: a folder of the user's task YAMLs.
        training_text: whether methods are calibrated on WikiText-2's training text.

    Raises:
        DataError: there is no such task.
    """
    wanted = []
    for task in sorted({task for name in tasks for task in task_names(name, include_path)}):
        for leaf in find_task(task, None, include_path).leaves:
            if leaf.files:
                continue
            for split in _splits(leaf, leaf.shots(num_fewshot)):
                file = mirror / leaf.task / (f"{split}.txt" if leaf.kind == "text" else f"{split}.jsonl")
                wanted.append(Need(leaf.task, split, file, _state(file), leaf))
    if training_text:
        candidates = [mirror / "wikitext2" / name for name in TRAINING_FILES]
        file = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
        wanted.append(Need("wikitext2", "train", file, _state(file), find_task("wikitext2", None)))
    return wanted


def _splits(source: TaskSource, num_fewshot: int) -> list[str]:
    """Return the evaluated split, and the one of the few-shot examples."""
    if not needs_split(source, num_fewshot):
        return [source.split]
    try:
        return [source.split, fewshot_split(source, num_fewshot)]
    except DataError:  # a run is refused for it
        return [source.split]


def _state(file: Path) -> str:
    if not file.is_file():
        return "missing"
    try:
        digest = _digest_file(file).read_text().split()[0]
    except (OSError, ValueError, IndexError):  # a file without a digest was not fetched by nmsweep
        return "there"
    return "there" if digest == file_sha256(file) else "damaged"


def _digest_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def size(need: Need) -> int | None:
    """Return the download size in bytes of all splits of a data set, or None if the hub does not tell.

    Raises:
        DataError: the hub does not give it.
    """
    return hub_size(*need.source.hub_name, **need.source.hub_options)


def fetch(need: Need) -> int:
    """Write one file and its digest, in the format of `sha256sum`; return its number of rows.

    Raises:
        DataError: the hub does not give the split, or it is empty.
    """
    rows = hub_rows(*need.source.hub_name, need.split, **need.source.hub_options)
    if not rows:
        raise DataError(f"data {need.hub_name}: its split {need.split} is empty; {need.task} cannot be measured on it")
    if need.source.kind == "text":
        lines = wikitext_lines(rows)
    else:
        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    with whole_file(need.file) as file, file.open("w", encoding="utf-8", newline="\n") as handle:
        handle.writelines(lines)
    write_text(_digest_file(need.file), f"{file_sha256(need.file)}  {need.file.name}\n")
    return len(rows)


def wikitext_lines(rows: Iterable[dict[str, str]]) -> list[str]:
    """Return the lines of WikiText's raw file; a blank line is a single space there, and an empty string on the hub."""
    return [row["text"] or " \n" for row in rows]


def away(wanted: Iterable[Need]) -> str:
    """Return why the hub cannot be reached; empty if it can, or if nothing is needed from it."""
    from_hub = any(need.state != "there" and not need.is_local for need in wanted)
    return why_unreachable() if from_hub else ""


def fill(wanted: Sequence[Need], mirror: Path, say: Callable[[str], None]) -> list[str]:
    """Fetch the missing files; a failure does not stop it, but an unreachable hub is not asked again.

    Returns:
        One line for each file that is still missing.
    """
    missing: list[str] = []
    if no_hub := away(wanted):
        say(f"  the hub cannot be reached ({no_hub})")
    for need in wanted:
        if need.state == "there":
            continue
        name = need.file.relative_to(mirror)
        description = f"{name} (task {need.task}, {need.hub_name}, split {need.split})"
        if no_hub and not need.is_local:
            missing.append(description)
            continue
        try:
            say(f"  {name}: {fetch(need)} rows")
        except DataError as error:
            missing.append(f"{description}: {error}")
            if no_hub := away([need]):
                say(f"  the hub cannot be reached any more ({no_hub})")
    return missing
