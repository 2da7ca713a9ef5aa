"""The numbers of a report: each cell on each task against dense, and its means over tasks, with paired intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from nmsweep.report.numbers.quantities import QUANTITIES, Quantity
from nmsweep.report.show.spec import metadata_bits_of
from nmsweep.results.read import FIELDS, Results
from nmsweep.results.samples import ItemGroup, read_groups
from nmsweep.results.tidy import PERPLEXITY, drops, primary
from nmsweep.statistics.comparison import (
    HAVE_REPLICATES,
    compare_cells,
    holm_by_task,
    quantity_intervals,
    quantity_replicates,
)
from nmsweep.statistics.flips import flipped_items
from nmsweep.statistics.intervals import Replicates

_Tasks = tuple[tuple[str, str], ...]
"""Tasks and their metrics."""

_Places = Mapping[tuple[str, str, str], int]
"""Number of the group that a cell is in, by task, metric and cell."""


@dataclass(frozen=True)
class Scores:
    """All numbers of a report.

    Attributes:
        per_task: one row for each cell and task, on the task's primary metric: the columns of metrics.csv, those of
            `drops` and of `compare_cells`, and `p_holm`.
        per_cell: one row for each cell and kind of data, unweighted means over tasks; `is_text` says whether over texts.
            The fields of a cell are in `Results.cells`.
        flips: by sparse cell and task, the items right only in the dense cell, and only in the sparse cell.
    """

    per_task: pd.DataFrame
    per_cell: pd.DataFrame
    flips: Mapping[tuple[str, str], tuple[list[int], list[int]]]
    _groups: Sequence[ItemGroup]
    _places: _Places
    _tasks: Mapping[tuple[str, str, bool], tuple[str, _Tasks]]
    """Dense cell and tasks behind a mean, by cell, kind of data, and whether over texts."""

    def replicates(
        self, quantity: Quantity, entries: Sequence[Sequence[str]], data: str, task: str | None
    ) -> list[Replicates | None]:
        """Return bootstrap replicates of a quantity, of one task or of the mean over tasks.

        Args:
            entries: the cells of each table entry. They differ by seed alone; the entry is their mean.

        Returns:
            [resamples] for each entry; None where one of its cells has none.
        """
        same: dict[tuple[tuple[int, str], ...], list[tuple[str, str]]] = {}
        for cell in dict.fromkeys(cell for cells in entries for cell in cells):
            dense, tasks = self._tasks.get((cell, data, quantity.text), ("", ()))
            wanted = [pair for pair in tasks if task in (None, pair[0])]
            numbers = _group_numbers(self._places, dense, cell, wanted)
            if numbers and quantity.name in HAVE_REPLICATES:
                same.setdefault(numbers, []).append((dense, cell))
        known: dict[str, Replicates] = {}
        for numbers, pairs in same.items():
            dense_ids, ids = zip(*pairs, strict=True)
            parts = [(self._groups[number], metric) for number, metric in numbers]
            known.update(zip(ids, quantity_replicates(quantity.name, parts, dense_ids, ids), strict=True))
        return [
            np.mean([known[cell] for cell in cells], axis=0) if all(cell in known for cell in cells) else None
            for cells in entries
        ]


def by_cell(results: Results, scores: Scores, data: str) -> pd.DataFrame:
    """Return one row for each finished cell with numbers of a kind of data, indexed by cell id.

    Returns:
        The cell's fields, `variant` and `place`; every quantity under its name, its interval as `<name>_low` and
        `<name>_high`; `density` of the target layers' inputs, `flops_density` (share of linear FLOPs kept), and `bits` of
        metadata an element.
    """
    numbers = scores.per_cell[scores.per_cell["data"] == data].set_index("cell_id")
    cells = results.done[[*FIELDS, "variant", "sparsity", "flops_share", "place"]]
    cells = cells[cells.index.isin(numbers.index)].copy()
    for quantity in QUANTITIES.values():
        of_kind = numbers[numbers["is_text"] == quantity.text]
        for end, column in (("", quantity.column), ("_low", quantity.low), ("_high", quantity.high)):
            if column:
                cells[f"{quantity.name}{end}"] = of_kind[column].reindex(cells.index)
    cells["density"] = 1 - cells["sparsity"]
    cells["flops_density"] = 1 - cells["flops_share"] * cells["sparsity"]
    cells["bits"] = cells["pattern"].map(metadata_bits_of).astype(float)
    return cells


def make_scores(results: Results, problems: list[str]) -> Scores:
    """Read the samples and compute every number.

    Args:
        results: the records.
        problems: receives a message for samples that cannot be read; their cells have no intervals.
    """
    per_task, groups = compared(results, primary(results.tidy), problems)
    flips = flipped_items(groups, _dense_of(results), dict(zip(per_task["task"], per_task["metric"], strict=True)))
    per_cell, tasks = _averages(per_task), _tasks_of(per_task)
    known = per_task[["task", "metric"]].drop_duplicates().itertuples(index=False, name=None)
    places = {
        (task, metric, cell): number
        for task, metric in known
        for number, group in enumerate(groups)
        if group.task == task
        for cell in group.cells_with(metric)
    }
    _add_intervals(per_cell, groups, places, tasks)
    return Scores(per_task, per_cell.reset_index(), flips, groups, places, tasks)


def compared(results: Results, tidy: pd.DataFrame, problems: list[str]) -> tuple[pd.DataFrame, list[ItemGroup]]:
    """Set rows of metrics.csv beside the dense numbers, with what their items say.

    Args:
        results: the records.
        tidy: rows of `Results.tidy`.
        problems: receives a message for samples that cannot be read.

    Returns:
        The rows of `drops` with the columns of `compare_cells` and `p_holm`, and the items of all cells.
    """
    done = results.done
    groups = read_groups({str(cell): place / "samples.parquet" for cell, place in done["place"].items()}, problems)
    metrics = {str(task): list(names.unique()) for task, names in tidy.groupby("task", sort=False)["metric"]}
    items = compare_cells(groups, _dense_of(results), metrics)
    items["p_holm"] = holm_by_task(items)
    table = drops(tidy)
    keys = ["cell_id", "task", "metric"]
    added = [name for name in items if name in keys or name not in table]
    return table.merge(items[added].astype(dict.fromkeys(added[3:], float)), on=keys, how="left"), groups


def _dense_of(results: Results) -> dict[str, str]:
    sparse = results.done[results.done["pattern"] != "dense"]
    return dict(zip(sparse.index, sparse["dense_cell_id"], strict=True))


_MEAN_OF = ("value", "dense", "drop", "relative_drop", "ratio", "kl", "top1_agreement", "flip_rate", "mean_abs_delta")

_ENDS = [end for name in ("drop", "relative", "ratio") for end in (QUANTITIES[name].low, QUANTITIES[name].high)]


def _averages(per_task: pd.DataFrame) -> pd.DataFrame:
    """Unweighted means over tasks; perplexity texts apart. Index: cell_id, data, is_text."""
    table = per_task.assign(is_text=per_task["metric"] == PERPLEXITY)
    grouped = table.groupby(["cell_id", "data", "is_text"], sort=False)
    means = grouped[list(_MEAN_OF)].mean()
    # a mean over fewer tasks than the other cells' would be another number
    is_text = means.index.get_level_values("is_text").to_numpy(dtype=bool)
    incomplete = (grouped["drop"].count() < grouped.size()) & ~is_text
    for name in ("drop", "relative_drop"):
        means[name] = means[name].mask(incomplete)
    means[_ENDS] = grouped[_ENDS].first().where(grouped.size() == 1)  # those of several tasks need the items
    tasks = grouped["task"].agg(lambda names: "+".join(sorted(names)))
    return means.assign(n_tasks=grouped.size(), tasks=tasks)


def _tasks_of(per_task: pd.DataFrame) -> dict[tuple[str, str, bool], tuple[str, _Tasks]]:
    tasks: dict[tuple[str, str, bool], tuple[str, _Tasks]] = {}
    columns = (per_task[name].tolist() for name in ("cell_id", "dense_cell_id", "data", "task", "metric"))
    for cell, dense, data, task, metric in zip(*columns, strict=True):
        key = (cell, data, metric == PERPLEXITY)
        tasks[key] = (dense, (*tasks.get(key, ("", ()))[1], (task, metric)))
    return tasks


def _group_numbers(
    places: _Places, dense: str, cell: str, tasks: Sequence[tuple[str, str]]
) -> tuple[tuple[int, str], ...]:
    """Number of the group that both cells are in, and the metric, of each task; empty where a task has none."""
    numbers = [(places.get((*pair, cell), -1), places.get((*pair, dense), -2)) for pair in tasks]
    if any(own != other for own, other in numbers):
        return ()
    return tuple((own, metric) for (own, _), (_, metric) in zip(numbers, tasks, strict=True))


def _add_intervals(
    per_cell: pd.DataFrame,
    groups: Sequence[ItemGroup],
    places: _Places,
    tasks: Mapping[tuple[str, str, bool], tuple[str, _Tasks]],
) -> None:
    """Put the intervals of means over several tasks into `per_cell`."""
    same: dict[tuple[bool, tuple[tuple[int, str], ...]], list[tuple[str, str, bool]]] = {}
    for key, (dense, wanted) in tasks.items():
        numbers = _group_numbers(places, dense, key[0], wanted)
        if key[0] != dense and len(wanted) > 1 and numbers:
            same.setdefault((key[2], numbers), []).append(key)
    for (is_text, numbers), keys in same.items():
        parts = [(groups[number], metric) for number, metric in numbers]
        dense_ids, cells = [tasks[key][0] for key in keys], [key[0] for key in keys]
        for name in ("ratio",) if is_text else ("drop", "relative"):
            low, high = quantity_intervals(name, parts, dense_ids, cells)
            per_cell.loc[keys, QUANTITIES[name].low] = low
            per_cell.loc[keys, QUANTITIES[name].high] = high
