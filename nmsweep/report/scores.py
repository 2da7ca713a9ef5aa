"""The numbers of a report: each cell on each task against dense, and its means over tasks, with paired intervals."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from nmsweep.report.changes import Pair
from nmsweep.report.load import Results
from nmsweep.report.paired import Matrix, PairedResults, chunks, ends, paired
from nmsweep.report.samples import Floats, Found, read_many
from nmsweep.report.tidy import PERPLEXITY, drops, primary
from nmsweep.report.workers import Here, in_threads


@dataclass(frozen=True)
class Quantity:
    """Something a table can show.

    Attributes:
        name: the word of ``report.metric=``.
        title: for captions and axes.
        column: of `Scores.per_task` and `Scores.per_cell`.
        low, high: columns of its interval; empty without one.
        better: which direction is better.
        scale: what a value is multiplied by to be shown (100 for points and percent).
        text: whether it is about perplexity texts.
        digits: shown after the point.
    """

    name: str
    title: str
    column: str
    low: str
    high: str
    better: Literal["lower", "higher"]
    scale: float
    text: bool
    digits: int


QUANTITIES = {
    quantity.name: quantity
    for quantity in (
        Quantity("drop", "drop (points)", "drop", "drop_low", "drop_high", "lower", 100, False, 1),
        Quantity("relative", "relative drop (%)", "relative_drop", "relative_low", "relative_high", "lower", 100, False, 1),
        Quantity("accuracy", "accuracy (%)", "value", "", "", "higher", 100, False, 1),
        Quantity("ratio", "perplexity / dense", "ratio", "ratio_low", "ratio_high", "lower", 1, True, 3),
        Quantity("perplexity", "perplexity", "value", "", "", "lower", 1, True, 2),
        Quantity("kl", "KL(dense ‖ sparse) (nats)", "kl", "", "", "lower", 1, True, 4),
        Quantity("agreement", "top-1 agreement (%)", "top1_agreement", "", "", "higher", 100, True, 1),
        Quantity("flips", "flip rate (%)", "flip_rate", "", "", "lower", 100, False, 1),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """All numbers of a report.

    Attributes:
        per_task: one row for each cell and task, on the task's primary metric: the columns of metrics.csv, `data`, those of
            `drops` and of `paired`.
        per_cell: one row for each cell and kind of data, unweighted means over tasks; `is_text` says whether over texts.
            Cell fields are left out: they are in `Results.cells`.
        paired: the pairs behind them.
    """

    per_task: pd.DataFrame
    per_cell: pd.DataFrame
    paired: PairedResults
    _tasks: Mapping[tuple[str, str, bool], tuple[str, Sequence[tuple[str, str]]]]
    _known: dict[tuple[str, str, str, str | None], Matrix | None] = field(default_factory=dict)

    def replicates(self, quantity: Quantity, cell: str, data: str, task: str | None) -> Matrix | None:
        """Bootstrap replicates [resamples] of a quantity: of one task, or the mean over tasks; None where there are none."""
        self.prepare(quantity, [cell], data, task)
        return self._known[quantity.name, cell, data, task]

    def prepare(self, quantity: Quantity, cells: Sequence[str], data: str, task: str | None) -> None:
        """Work out the replicates of many cells at once, for `replicates` to find."""
        same: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = {}
        for cell in cells:
            if (quantity.name, cell, data, task) not in self._known:
                dense, tasks = self._tasks.get((cell, data, quantity.text), ("", ()))
                same.setdefault((dense, tuple(one for one in tasks if task in (None, one[0]))), []).append(cell)
        for (dense, chosen), together in same.items():
            found = mean_replicates(self.paired, quantity.name, dense, together, chosen)
            for place, cell in enumerate(together):
                self._known[quantity.name, cell, data, task] = None if found is None else found[place]


def make_scores(
    results: Results, problems: list[str], pool: Executor | None = None, begun: Callable[[], Found] | None = None
) -> Scores:
    """Read the samples and work out every number; a samples file that cannot be read is a problem, and has no intervals.

    Args:
        results: whose cells.
        problems: is told of samples that cannot be read.
        pool: reads them; without one this process does.
        begun: of `begin_reading`, where that was started before the cells were known.
    """
    done = results.done
    dense_ids = set(done["dense_cell_id"])
    samples = read_many(
        {str(cell): place / "samples.parquet" for cell, place in done["place"].items()},
        dense_ids,
        problems,
        pool or Here(),
        begun,
    )
    chosen = primary(results.tidy)
    metrics = {str(task): list(dict.fromkeys(names)) for task, names in chosen.groupby("task", sort=False)["metric"]}
    sparse = done[done["pattern"] != "dense"]
    pairs = [Pair(dense, str(cell)) for cell, dense in sparse["dense_cell_id"].items()]
    found = paired(samples, pairs, metrics)
    per_task = drops(chosen)
    if len(found.table):
        extra = found.table.drop(columns=["first", "n_items"]).rename(columns={"second": "cell_id"})
        per_task = per_task.merge(extra, on=["cell_id", "task", "metric"], how="left")
    for column in {name for q in QUANTITIES.values() for name in (q.column, q.low, q.high) if name} - set(per_task):
        per_task[column] = np.nan
    per_cell = _averages(per_task)
    tasks = _tasks_of(per_task)
    _intervals(per_cell, found, tasks)
    return Scores(per_task, per_cell.reset_index(), found, tasks)


_MEAN_OF = ("value", "dense", "drop", "relative_drop", "ratio", "kl", "top1_agreement", "flip_rate", "mean_abs_delta")


def _averages(per_task: pd.DataFrame) -> pd.DataFrame:
    """Unweighted means over tasks; perplexity texts apart. Index: cell_id, data, is_text."""
    table = per_task.assign(is_text=per_task["metric"] == PERPLEXITY)
    keys = ["cell_id", "data", "is_text"]
    grouped = table.groupby(keys, sort=False)
    means = grouped[[name for name in _MEAN_OF if name in table]].mean()
    # a mean over fewer tasks than the others' is another number
    no_text = ~means.index.get_level_values("is_text").to_numpy(dtype=bool)
    incomplete = (grouped["drop"].count() < grouped.size()).to_numpy() & no_text
    for name in ("drop", "relative_drop"):
        means[name] = means[name].mask(incomplete)
    names: dict[tuple[str, str, bool], list[str]] = {}
    for *key, task in zip(*(table[name].tolist() for name in (*keys, "task")), strict=True):
        names.setdefault((key[0], key[1], key[2]), []).append(task)
    return means.assign(n_tasks=grouped.size(), tasks=["+".join(sorted(names[key])) for key in means.index])


_FORMULAS: Mapping[str, Callable[[Matrix, Matrix], Matrix]] = {
    "drop": lambda dense, own: dense - own,
    "relative": lambda dense, own: (dense - own) / dense,
    "accuracy": lambda dense, own: own,
    "ratio": lambda dense, own: np.exp(own - dense),
    "perplexity": lambda dense, own: np.exp(own),
}


def _tasks_of(per_task: pd.DataFrame) -> dict[tuple[str, str, bool], tuple[str, list[tuple[str, str]]]]:
    """The dense cell, and tasks with their metrics, behind a mean; by cell, kind of data, and whether it is of texts."""
    found: dict[tuple[str, str, bool], tuple[str, list[tuple[str, str]]]] = {}
    columns = (per_task[name].tolist() for name in ("cell_id", "dense_cell_id", "data", "task", "metric"))
    for cell, dense, data, task, metric in zip(*columns, strict=True):
        found.setdefault((cell, data, metric == PERPLEXITY), (dense, []))[1].append((task, metric))
    return found


def mean_replicates(
    found: PairedResults, name: str, dense: str, cells: Sequence[str], tasks: Sequence[tuple[str, str]]
) -> Matrix | None:
    """Replicates [cells, resamples] of a quantity's mean over tasks, of cells with one dense cell; None if one lacks a task."""
    if name not in _FORMULAS or not tasks:
        return None
    total: Matrix | None = None
    for task, metric in tasks:
        group = found.group(task, metric, cells[0])
        if group is None or any(cell not in group.rows for cell in (dense, *cells)):
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            one = _FORMULAS[name](group.of([dense]), group.of(cells))
        total = one if total is None else total + one
    return None if total is None else total / np.float32(len(tasks))


def _intervals(
    per_cell: pd.DataFrame,
    found: PairedResults,
    tasks: Mapping[tuple[str, str, bool], tuple[str, Sequence[tuple[str, str]]]],
) -> None:
    """Intervals of the means over tasks, added to `per_cell`."""
    same: dict[tuple[str, bool, tuple[tuple[str, str], ...]], list[Pair]] = {}
    for (cell, data, is_text), (dense, chosen) in tasks.items():
        if cell != dense:
            same.setdefault((data, is_text, tuple(chosen)), []).append(Pair(dense, cell))
    jobs = [
        (quantity, data, is_text, chosen, chunk)
        for (data, is_text, chosen), pairs in same.items()
        for quantity in (QUANTITIES[name] for name in (("ratio",) if is_text else ("drop", "relative")))
        for chunk in chunks(pairs)
    ]
    ends_of: dict[str, dict[tuple[str, str, bool], float]] = {}
    for (quantity, data, is_text, _, chunk), both in zip(
        jobs, in_threads(lambda job: _ends(found, job), jobs), strict=True
    ):
        keys = [(pair.second, data, is_text) for pair in chunk]
        for column, values in zip((quantity.low, quantity.high), both, strict=False):
            ends_of.setdefault(column, {}).update(zip(keys, values.tolist(), strict=True))
    for name in ("drop", "relative", "ratio"):
        for column in (QUANTITIES[name].low, QUANTITIES[name].high):
            per_cell[column] = [ends_of.get(column, {}).get(key, np.nan) for key in per_cell.index]


def _ends(
    found: PairedResults, job: tuple[Quantity, str, bool, Sequence[tuple[str, str]], Sequence[Pair]]
) -> tuple[Floats, ...]:
    """Both ends of a mean's interval, of pairs with one dense cell; nothing where there are no replicates."""
    quantity, _, _, chosen, chunk = job
    replicates = mean_replicates(found, quantity.name, chunk[0].first, [pair.second for pair in chunk], chosen)
    return () if replicates is None else ends(replicates)
