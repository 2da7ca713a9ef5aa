"""Fill a mirror with the data of tasks: what there is to fetch and how large it is, fetching, checking. No torch.

`<mirror>/<task>/<split>.jsonl` as `find_task` reads it, and `<mirror>/sha256.json` with the digest of every file fetched, by
which a file that changed since is told and fetched again.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled

from nmsweep.data.hub import hub_rows, hub_size, unreachable
from nmsweep.data.tasks import TaskSource, file_sha256, find_task, task_names
from nmsweep.disk.storage import whole_file, write_text
from nmsweep.errors import DataError

MANIFEST = "sha256.json"

_TIMEOUT_S = 10.0


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


def needs(tasks: Iterable[str], mirror: Path, num_fewshot: int | None, include_path: Path | None) -> list[Need]:
    """The files that tasks read from a mirror, and their state.

    Args:
        tasks: names; shipped ones and those whose YAML names local files need nothing.
        mirror: the folder; it need not exist.
        num_fewshot: as `eval.num_fewshot`: with examples, the split that they come from is needed too.
        include_path: the user's task YAMLs.

    Raises:
        DataError: no such task.
    """
    digests = _manifest(mirror)
    found = []
    for task in sorted({one for name in tasks for one in task_names(name, include_path)}):
        for leaf in find_task(task, None, include_path).leaves:
            if leaf.files:
                continue
            for split in _splits(leaf, leaf.num_fewshot(num_fewshot)):
                file = mirror / leaf.task / (f"{split}.txt" if leaf.kind == "text" else f"{split}.jsonl")
                found.append(Need(leaf.task, split, file, _state(file, mirror, digests), leaf))
    return found


def _splits(source: TaskSource, num_fewshot: int) -> list[str]:
    """The evaluated split, and the one that examples come from; of a text also what calibration reads."""
    if source.kind == "text":
        return [source.split, "valid"]
    wanted = [source.config.get(key) for key in ("fewshot_split", "training_split", "validation_split")]
    others = [str(split) for split in wanted if split and split != source.split]
    return [source.split, *(others[:1] if num_fewshot else [])]


def _state(file: Path, mirror: Path, digests: Mapping[str, str]) -> str:
    if not file.is_file():
        return "missing"
    known = digests.get(file.relative_to(mirror).as_posix())
    return "there" if known is None or known == file_sha256(file) else "damaged"


def size(need: Need) -> int | None:
    """Bytes to download for a data set, all its splits; None where the hub does not say.

    Raises:
        DataError: the hub cannot be reached.
    """
    check_reachable(need)
    return hub_size(*need.source.hub_name)


def fetch(need: Need, mirror: Path) -> int:
    """Write one file from the hub; its number of rows.

    Raises:
        DataError: the hub does not give it, or gives nothing.
    """
    check_reachable(need)
    rows = hub_rows(*need.source.hub_name, {"valid": "validation"}.get(need.split, need.split))
    if not rows:
        raise DataError(f"data {need.hub_name}: its split {need.split} is empty; {need.task} cannot be measured on it")
    with whole_file(need.file) as file:
        if need.source.kind == "text":
            _write_text(file, rows)
        else:
            _write_rows(file, rows)
    _remember(mirror, need.file)
    return len(rows)


def check_reachable(need: Need) -> None:
    """Ask the hub once for anything at all, where the data library would try for half a minute each time.

    Raises:
        DataError: it cannot be reached.
    """
    path = need.source.hub_name[0]
    if not Path(path).is_dir() and (error := _why_unreachable()):
        raise unreachable(path, error)


@cache
def _why_unreachable() -> Exception | None:
    if constants.HF_HUB_OFFLINE:
        return OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    try:
        urlopen(constants.ENDPOINT, timeout=_TIMEOUT_S).close()
    except HTTPError:  # it answers
        return None
    except OSError as error:
        return error
    return None


def _write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _write_text(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The raw file of WikiText: a blank line is a single space there, and an empty string on the hub."""
    with file.open("w", encoding="utf-8", newline="\n") as handle:
        handle.writelines(row["text"] or " \n" for row in rows)


def _manifest(mirror: Path) -> dict[str, str]:
    try:
        return dict(json.loads((mirror / MANIFEST).read_text()))
    except (OSError, ValueError):
        return {}


def _remember(mirror: Path, file: Path) -> None:
    known = _manifest(mirror) | {file.relative_to(mirror).as_posix(): file_sha256(file)}
    write_text(mirror / MANIFEST, json.dumps(known, indent=1, sort_keys=True) + "\n")


Say = Callable[[str], None]


def fill(wanted: Iterable[Need], mirror: Path, say: Say) -> list[str]:
    """Fetch what is not there; go on after a failure, but ask a hub that cannot be reached only once.

    Returns:
        one line for each file that is still missing.
    """
    missing: list[str] = []
    away = ""
    for need in wanted:
        name = need.file.relative_to(mirror)
        if need.state == "there":
            continue
        try:
            if away:
                raise DataError(away)
            say(f"  {name}: {fetch(need, mirror)} rows")
        except DataError as error:
            away = away or (str(error) if "does not give it" in str(error) else "")
            missing.append(f"{name} (task {need.task}, {need.hub_name}, split {need.split})")
    return missing
