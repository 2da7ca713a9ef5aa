"""The numbers of a report: each cell on each task against dense, and its means over tasks, with paired intervals."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from nmsweep.report.numbers.quantities import QUANTITIES, Quantity
from nmsweep.report.show.spec import metadata_bits_of
from nmsweep.results.layout import SAMPLES
from nmsweep.results.read import FIELDS, Results
from nmsweep.results.samples import ItemGroup, read_groups
from nmsweep.results.tidy import PERPLEXITY, data_kind, drops, primary
from nmsweep.statistics.comparison import (
    HAVE_REPLICATES,
    compare_cells,
    holm_by_task,
    quantity_intervals,
    quantity_replicates,
)
from nmsweep.statistics.intervals import Replicates

_Tasks = tuple[tuple[ItemGroup, str], ...]
"""The items and the metric of each task."""

_Key = tuple[str, str, bool]
"""A cell, the kind of data, and whether its texts are meant."""


@dataclass(frozen=True)
class Scores:
    """All numbers of a report.

    Attributes:
        per_task: one row for each cell and task, on the task's primary metric: the columns of metrics.csv, those of
            `drops` and of `compare_cells`, and `p_holm`.
        per_cell: one row for each cell and kind of data, unweighted means over tasks; `is_text` says whether over texts.
            The fields of a cell are in `Results.cells`.
    """

    per_task: pd.DataFrame
    per_cell: pd.DataFrame
    _parts: Mapping[_Key, tuple[str, _Tasks]]
    """The dense cell, and the items and metrics of the tasks behind a mean; cells without samples are left out."""

    def replicates(
        self, quantity: Quantity, entries: Sequence[Sequence[str]], data: str, task: str | None
    ) -> list[Replicates | None]:
        """Return bootstrap replicates of a quantity, of one task or of the mean over tasks.

        Args:
            entries: the cells of each table entry. They differ by seed alone; the entry is their mean.

        Returns:
            [resamples] for each entry; None where one of its cells has none.
        """
        cells = dict.fromkeys(cell for cells in entries for cell in cells)
        known: dict[str, Replicates] = {}
        for parts, ids, dense in _by_parts(self._parts, [(cell, data, quantity.text) for cell in cells], task):
            if quantity.name in HAVE_REPLICATES:
                known.update(zip(ids, quantity_replicates(quantity.name, parts, dense, ids), strict=True))
        return [
            np.mean([known[cell] for cell in cells], axis=0) if all(cell in known for cell in cells) else None
            for cells in entries
        ]


def by_cell(results: Results, scores: Scores, data: str) -> pd.DataFrame:
    """Return one row for each finished cell with numbers of a kind of data, indexed by cell id.

    Returns:
        The cell's fields, `variant` and `place`; every quantity under its name, its interval as `<name>_low` and
        `<name>_high`; `density` of the target layers' inputs, `flops_density` (share of linear FLOPs kept), and `bits` of
        metadata per element.
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
    per_cell, parts = _averages(per_task), _parts_of(per_task, groups)
    several = [key for key, (_, tasks) in parts.items() if len(tasks) > 1]
    for name in ("drop", "relative", "ratio"):
        quantity = QUANTITIES[name]
        for tasks, cells, dense in _by_parts(parts, [key for key in several if key[2] == quantity.text]):
            low, high = quantity_intervals(name, tasks, dense, cells)
            rows = [(cell, data_kind(tasks[0][0].task), quantity.text) for cell in cells]
            per_cell.loc[rows, quantity.low], per_cell.loc[rows, quantity.high] = low, high
    return Scores(per_task, per_cell.reset_index(), parts)


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
    groups = read_groups({str(cell): place / SAMPLES for cell, place in done["place"].items()}, problems)
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


def _parts_of(per_task: pd.DataFrame, groups: Sequence[ItemGroup]) -> dict[_Key, tuple[str, _Tasks]]:
    """The items behind every mean of a sparse cell and of its dense cell, where all its tasks have them."""
    shown = per_task[["task", "metric"]].drop_duplicates().itertuples(index=False, name=None)
    items = {
        (task, metric, cell): group
        for task, metric in shown
        for group in groups
        if group.task == task
        for cell in group.cells_with(metric)
    }
    parts: dict[_Key, tuple[str, _Tasks]] = {}
    columns = ["cell_id", "dense_cell_id", "data", "task", "metric"]
    sparse = per_task.loc[per_task["cell_id"] != per_task["dense_cell_id"], columns]
    incomplete: set[_Key] = set()
    for cell, dense, data, task, metric in sparse.itertuples(index=False, name=None):
        key, group = (cell, data, metric == PERPLEXITY), items.get((task, metric, cell))
        if group is None or items.get((task, metric, dense)) is not group:
            incomplete.add(key)
        else:
            parts[key] = (dense, (*parts.get(key, ("", ()))[1], (group, metric)))
    return {key: part for key, part in parts.items() if key not in incomplete}


def _by_parts(
    parts: Mapping[_Key, tuple[str, _Tasks]], keys: Iterable[_Key], task: str | None = None
) -> Iterator[tuple[_Tasks, list[str], list[str]]]:
    """Yield the items of one task or of all, with the cells that have them and the dense cell of each."""
    same: dict[_Tasks, tuple[list[str], list[str]]] = {}
    for key in keys:
        dense, tasks = parts.get(key, ("", ()))
        if wanted := tuple(part for part in tasks if task in (None, part[0].task)):
            cells, dense_cells = same.setdefault(wanted, ([], []))
            cells.append(key[0])
            dense_cells.append(dense)
    yield from ((tasks, *cells) for tasks, cells in same.items())
