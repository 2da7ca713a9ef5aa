"""`nmsweep inspect CELL [task=TASK] [limit=N] [results_dir=DIR]`: items answered differently than by the dense cell, with text."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nmsweep.commands.words import key_values, whole_number
from nmsweep.errors import InputError, nearest
from nmsweep.results.layout import items_file
from nmsweep.results.record import CellRecord, cell_folders, find_cell, read_cell
from nmsweep.statistics.comparison import compare
from nmsweep.statistics.flips import flipped, primary_metric


def main(words: Sequence[str]) -> int:
    """Show the items of one cell whose answer turned right or wrong.

    Raises:
        InputError: no cell or several are named, or one that does not exist.
    """
    cells = [word for word in words if "=" not in word]
    values = key_values([word for word in words if "=" in word], ["results_dir", "task", "limit"])
    if len(cells) != 1:
        raise InputError(
            f"inspect: {len(cells)} cells were named; name one, by its id or folder: `nmsweep inspect CELL limit=20`"
        )
    limit = whole_number(values, "limit", 10)
    show_flips(Path(values.get("results_dir", "results")), cells[0], values.get("task"), limit)
    return 0


def show_flips(results_dir: Path, cell: str, task: str | None, limit: int) -> None:
    """Print the items that a cell answers differently than its dense cell.

    Args:
        results_dir: the results folder.
        cell: a cell's id, folder name or folder.
        task: one task; None for all.
        limit: items shown for each task.

    Raises:
        InputError: no such cell or task, or a dense cell that is missing.
    """
    sparse, dense = pair(results_dir, cell)
    tasks = [name for name in dict.fromkeys(sparse.samples["task"]) if primary_metric(sparse.samples, name)]
    if task is not None and task not in tasks:
        raise InputError(f"task: {task!r} has no items in {sparse.folder.name}; {nearest(task, tasks)}")
    print(f"{sparse.folder.name} against {dense.folder.name}")
    for name in [task] if task else tasks:
        for line in task_lines(results_dir, sparse, dense, name, limit):
            print(line)


def pair(results_dir: Path, cell: str) -> tuple[CellRecord, CellRecord]:
    """Return a cell's record and that of its dense cell.

    Raises:
        InputError: one of them is not there, or the cell is dense itself.
    """
    names = {folder.name: folder for folder in cell_folders(results_dir)}
    folder = names.get(Path(cell).name) or find_cell(results_dir, cell)
    if folder is None:
        raise InputError(f"inspect: {results_dir} has no cell {cell!r}; {nearest(cell, names)}")
    record = read_cell(folder)
    dense_id = str(record.provenance["dense_cell_id"])
    if dense_id == record.cell_id:
        raise InputError(f"inspect: {folder.name} is dense; name a sparse cell, which is shown against its dense one")
    dense = find_cell(results_dir, dense_id)
    if dense is None:
        raise InputError(
            f"inspect: the dense cell {dense_id} of {folder.name} is not in {results_dir}; run it with pattern=dense"
        )
    return record, read_cell(dense)


def task_lines(results_dir: Path, sparse: CellRecord, dense: CellRecord, task: str, limit: int) -> Iterator[str]:
    """Yield the lines of one task: a summary, then its flipped items."""
    metric = primary_metric(sparse.samples, task)
    assert metric is not None
    table = compare(dense.samples[dense.samples["task"] == task], sparse.samples[sparse.samples["task"] == task])
    row: Any = next(table[table["metric"] == metric].itertuples())
    is_right = not math.isnan(row.lost)  # NaN of a metric that is not right or wrong
    shares = f"{100 * row.lost:.1f} % lost, {100 * row.gained:.1f} % gained of " if is_right else ""
    yield (
        f"\n{task} {metric}: {row.dense:.3f} → {row.value:.3f} (drop {row.drop:.3f}, 95 % {row.drop_low:.3f} to "
        f"{row.drop_high:.3f}); {shares}{row.n_items} items"
    )
    moved = flipped(dense.samples, sparse.samples, task, metric)
    items = _items(results_dir, sparse, task)
    flips: Iterator[Any] = moved[:limit].itertuples()
    for flip in flips:
        yield from _item_lines(flip, items.get(flip.doc_hash))
    if len(moved) > limit:
        yield f"  … {len(moved) - limit} more; limit={len(moved)} shows them"


def _items(results_dir: Path, record: CellRecord, task: str) -> dict[str, Any]:
    """Return a task's items by their hash, which unlike their number does not depend on the file; empty where no text was kept."""
    place = items_file(results_dir, task, str(record.provenance["tasks"][task]["data"]))
    rows: Iterator[Any] = pd.read_parquet(place).itertuples() if place.is_file() else iter(())
    return {row.doc_hash: row for row in rows}


def _item_lines(flip: Any, item: Any) -> Iterator[str]:
    yield f"\n  item {flip.item}: {flip.kind}"
    if item is None:
        yield "    (its text is not in results/items)"
        return
    yield from (f"    {line}" for line in str(item.text).strip().splitlines())
    if flip.loglikelihoods is None:
        yield f"    dense: {flip.dense_answer!r}"
        yield f"    sparse: {flip.answer!r}; right: {flip.gold}"
        return
    moved = [
        f"{before:8.2f} → {after:8.2f}"
        for before, after in zip(flip.dense_loglikelihoods, flip.loglikelihoods, strict=True)
    ]
    if not len(item.choices):  # one continuation, right where it is what the model would write
        yield f"    {', '.join(moved)}  {str(flip.gold).strip()}  [right]"
    for at, choice in enumerate(item.choices):
        marks = [
            mark
            for mark, index in (("right", flip.gold), ("dense", flip.dense_answer), ("sparse", flip.answer))
            if str(index) == str(at)
        ]
        yield f"    {moved[at]}  {choice.strip()}" + (f"  [{', '.join(marks)}]" if marks else "")
