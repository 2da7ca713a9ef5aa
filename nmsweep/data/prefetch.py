"""Fill a mirror with the data of tasks: what there is to fetch and how large it is, fetching, checking. No torch.

`<mirror>/<task>/<split>.jsonl` as `find_task` reads it, and beside every file fetched its digest, `<split>.jsonl.sha256`, by
which a file that changed since is told and fetched again.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmsweep.data.examples import fewshot_split, needs_split
from nmsweep.data.hub import hub_rows, hub_size, why_unreachable
from nmsweep.data.tasks import TRAINING_FILES, TaskSource, file_sha256, find_task, task_names
from nmsweep.errors import DataError
from nmsweep.results.storage import whole_file, write_text


@dataclass(frozen=True)
class Need:
    """One file of a mirror.

    Attributes:
        task: the task that reads it.
        split: of the hub's data set.
        file: its place.
        state: ``"there"``, ``"damaged"`` (not what was fetched), or ``"missing"``.
        source: the task as the hub has it.
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
        """Whether the data set is a folder of this machine, which the data library reads like the hub's."""
        return Path(self.source.hub_name[0]).is_dir()


def needs(
    tasks: Iterable[str],
    mirror: Path,
    num_fewshot: int | None,
    include_path: Path | None,
    training_text: bool = False,
) -> list[Need]:
    """The files that tasks read from a mirror, and their state.

    Args:
        tasks: names; shipped ones and those whose YAML names local files need nothing.
        mirror: the folder; it need not exist.
        num_fewshot: as `eval.num_fewshot`: with examples, the split that they come from is needed too.
        include_path: the user's task YAMLs.
        training_text: whether methods are calibrated on WikiText-2's training text.

    Raises:
        DataError: no such task.
    """
    found = []
    for task in sorted({one for name in tasks for one in task_names(name, include_path)}):
        for leaf in find_task(task, None, include_path).leaves:
            if leaf.files:
                continue
            for split in _splits(leaf, leaf.shots(num_fewshot)):
                file = mirror / leaf.task / (f"{split}.txt" if leaf.kind == "text" else f"{split}.jsonl")
                found.append(Need(leaf.task, split, file, _state(file), leaf))
    if training_text:
        places = [mirror / "wikitext2" / name for name in TRAINING_FILES]
        file = next((place for place in places if place.is_file()), places[0])
        found.append(Need("wikitext2", "train", file, _state(file), find_task("wikitext2", None)))
    return found


def _splits(source: TaskSource, num_fewshot: int) -> list[str]:
    """The evaluated split, and the one that examples come from."""
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
        known = _digest_file(file).read_text().split()[0]
    except (OSError, ValueError, IndexError):  # it was put there by others
        return "there"
    return "there" if known == file_sha256(file) else "damaged"


def _digest_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def size(need: Need) -> int | None:
    """Bytes to download for a data set, all its splits; None where the hub does not say.

    Raises:
        DataError: the hub does not give it.
    """
    return hub_size(*need.source.hub_name, **need.source.hub_options)


def fetch(need: Need) -> int:
    """Write one file from the hub, with its digest beside it as `sha256sum` writes it; the file's number of rows.

    Raises:
        DataError: the hub does not give it, or gives nothing.
    """
    rows = hub_rows(*need.source.hub_name, need.split, **need.source.hub_options)
    if not rows:
        raise DataError(f"data {need.hub_name}: its split {need.split} is empty; {need.task} cannot be measured on it")
    with whole_file(need.file) as file:
        if need.source.kind == "text":
            _write_text(file, rows)
        else:
            _write_rows(file, rows)
    write_text(_digest_file(need.file), f"{file_sha256(need.file)}  {need.file.name}\n")
    return len(rows)


def away(wanted: Iterable[Need]) -> str:
    """Why the hub, which has some of this, cannot be reached; empty if it can, or if everything is on this machine."""
    from_hub = any(need.state != "there" and not need.is_local for need in wanted)
    return why_unreachable() if from_hub else ""


def _write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _write_text(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The raw file of WikiText: a blank line is a single space there, and an empty string on the hub."""
    with file.open("w", encoding="utf-8", newline="\n") as handle:
        handle.writelines(row["text"] or " \n" for row in rows)


Say = Callable[[str], None]


def fill(wanted: Sequence[Need], mirror: Path, say: Say) -> list[str]:
    """Fetch what is not there; go on after a failure, but not to a hub that cannot be reached.

    Returns:
        one line for each file that is still missing.
    """
    missing: list[str] = []
    if no_hub := away(wanted):
        say(f"  the hub cannot be reached ({no_hub})")
    for need in wanted:
        if need.state == "there":
            continue
        name = need.file.relative_to(mirror)
        lacking = f"{name} (task {need.task}, {need.hub_name}, split {need.split})"
        if no_hub and not need.is_local:
            missing.append(lacking)
            continue
        try:
            say(f"  {name}: {fetch(need)} rows")
        except DataError as error:
            missing.append(f"{lacking}: {error}")
            if no_hub := away([need]):
                say(f"  the hub cannot be reached any more ({no_hub})")
    return missing
