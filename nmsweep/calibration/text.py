"""The calibration text: find it, cut it into windows, and check that it has nothing in common with the evaluated text."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmsweep.data.tasks import MINI_FOLDER, MINI_TASKS, TRAINING_FILES, TaskSource, read_text
from nmsweep.errors import DataError
from nmsweep.methods.sparsification import Sparsification

SHARED_WORDS = 13
"""Two texts overlap if they share this many consecutive words; the contamination test of arXiv:2005.14165."""


def find_source(source: str, tasks: Sequence[str], mirror: Path | None) -> TaskSource:
    """Find the calibration text.

    Args:
        source: ``auto`` (mini where only mini tasks are evaluated, else WikiText-2), ``mini``, ``wikitext2`` (its training
            split, from the mirror or the hub), or a text file.
        tasks: the evaluated tasks.
        mirror: the folder of local data; None for the hub.

    Raises:
        DataError: it does not exist.
    """
    source = source_name(source, tasks)
    if source == "mini":
        return TaskSource("mini_calibration", "text", {}, None, {"train": MINI_FOLDER / "calibration.txt"}, "train")
    if source == "wikitext2":
        return TaskSource("wikitext2", "text", {}, None, _train_file(mirror) if mirror else {}, "train")
    file = Path(source).expanduser()
    if not file.is_file():
        raise DataError(f"calibration.source: {source!r} is no file; allowed: auto, mini, wikitext2, or a text file")
    return TaskSource("text_file", "text", {}, None, {"train": file}, "train")


def source_name(source: str, tasks: Sequence[str]) -> str:
    """Return ``mini``, ``wikitext2`` or a text file; ``auto`` goes by the evaluated tasks."""
    if source != "auto":
        return source
    return "mini" if all(task in MINI_TASKS or task == "mini_prose" for task in tasks) else "wikitext2"


def _train_file(mirror: Path) -> dict[str, Path]:
    for name in TRAINING_FILES:
        if (file := mirror / "wikitext2" / name).is_file():
            return {"train": file}
    raise DataError(
        f"calibration.source: {mirror} has no wikitext2/train.txt or train_head.txt; "
        "fill the mirror with `nmsweep prefetch`, or pass calibration.source=mini or a text file"
    )


def default_samples(sparsification: Sparsification) -> int:
    """Return the number of windows where the user gives none."""
    return 256 if sparsification.learned else 32


def cut(text: str, tokenizer: Any, seqlen: int, bos: bool) -> Tensor:
    """Cut a text into windows without overlap.

    Args:
        text: tokenised as a whole, without special tokens.
        tokenizer: of transformers.
        seqlen: tokens in a window, including a BOS.
        bos: whether each window begins with the BOS token.

    Returns:
        ids [n_windows, seqlen], int64; the remainder is dropped.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    width = seqlen - 1 if bos else seqlen
    n_windows = len(ids) // width
    windows = ids[: n_windows * width].view(n_windows, width)
    return torch.cat([torch.full((n_windows, 1), tokenizer.bos_token_id), windows], dim=1) if bos else windows


def windows(
    text: str, tokenizer: Any, *, n_samples: int, seqlen: int, seed: int, bos: bool, exact: bool = True
) -> Tensor:
    """Draw windows from those of `cut`.

    Args:
        text, tokenizer, seqlen, bos: as for `cut`.
        n_samples: number of windows.
        seed: of the draw.
        exact: refuse a text with fewer windows, instead of taking all it has.

    Returns:
        ids [n_windows, seqlen], int64.

    Raises:
        DataError: the text is too short.
    """
    available = cut(text, tokenizer, seqlen, bos)
    if len(available) < (n_samples if exact else 1):
        raise DataError(
            f"calibration.n_samples: {n_samples} windows of {seqlen} tokens, but the text has {len(available)}; "
            "lower n_samples or seqlen, or choose a longer calibration.source"
        )
    order = torch.randperm(len(available), generator=torch.Generator().manual_seed(seed))[:n_samples]
    return available[order]


def check_disjoint(calibration: TaskSource, evaluated: Sequence[TaskSource]) -> None:
    """Check that the calibration text does not overlap with the evaluated data.

    Items of the harness that only the hub has are not compared here (see `check_items`).

    Raises:
        DataError: both contain the same 13 consecutive words; the message shows them.
    """
    for source in evaluated:
        if source.kind == "text" or source.split in source.files:
            _refuse(calibration, source.task, _shared(_Hashable(calibration), _Hashable(source)))


def check_items(calibration: TaskSource, task: str, items: Iterable[Any]) -> None:
    """Check that the calibration text does not overlap with the items of a task.

    Raises:
        DataError: both contain the same 13 consecutive words; the message shows them.
    """
    _refuse(calibration, task, _first_shared(_phrases(_Hashable(calibration)), map(_joined, items)))


def _refuse(calibration: TaskSource, task: str, shared: str) -> None:
    if shared:
        raise DataError(
            f"calibration.source: {calibration.task} has text in common with the evaluated task {task}: {shared!r}; "
            "choose another calibration.source"
        )


class _Hashable:
    """A source as a cache key, by its content."""

    def __init__(self, source: TaskSource) -> None:
        self.source = source
        self.key = (source.task, source.split, source.fingerprint())

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and self.key == other.key


@cache
def _shared(calibration: _Hashable, evaluated: _Hashable) -> str:
    return _first_shared(_phrases(calibration), _texts(evaluated.source))


def _first_shared(known: frozenset[tuple[str, ...]], texts: Iterable[str]) -> str:
    """Return the first known phrase of the texts; empty without one."""
    return next((" ".join(phrase) for text in texts for phrase in _runs(text) if phrase in known), "")


@cache
def _phrases(calibration: _Hashable) -> frozenset[tuple[str, ...]]:
    return frozenset(_runs(read_text(calibration.source)))


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return zip(*(words[start:] for start in range(SHARED_WORDS)), strict=False)


def _texts(source: TaskSource) -> Iterator[str]:
    if source.kind == "text":
        yield read_text(source)
        return
    with source.files[source.split].open(encoding="utf-8") as lines:
        for line in lines:
            yield _joined(json.loads(line))


def _joined(item: Any) -> str:
    """Join all strings of an item, separated so that no phrase spans two of them."""
    return " . ".join(_strings(item))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
