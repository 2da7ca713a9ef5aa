"""The numbers of a report: each cell on each task against dense, and its means over tasks, with paired intervals."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import groupby, islice

import numpy as np
import pandas as pd

from nmsweep.report.numbers.quantities import QUANTITIES, Quantity
from nmsweep.report.numbers.samples import Floats, Found, read_many
from nmsweep.report.workers import Here, in_threads
from nmsweep.results.layout import SAMPLES
from nmsweep.results.read import Results
from nmsweep.results.tidy import PERPLEXITY, drops, primary
from nmsweep.statistics.changes import Pair
from nmsweep.statistics.paired import Matrix, PairedResults, Replicates, chunks, ends, paired

_Part = tuple[str, str, tuple[tuple[str, str], ...]]
"""A dense cell, a cell, and tasks with their metrics."""


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
    _kept: dict[tuple[str, tuple[_Part, ...]], Matrix | None] = field(default_factory=dict)
    """Means over seeds, which several tables show."""

    def replicates(
        self, quantity: Quantity, entries: Sequence[Sequence[str]], data: str, task: str | None
    ) -> list[Matrix | None]:
        """Bootstrap replicates [resamples] of a quantity, of one task or the mean over tasks.

        Args:
            entries: the cells of each: those that differ by seed alone, whose mean is wanted.

        Returns:
            those of each entry; None where one of its cells has none.
        """
        keys = [(quantity.name, tuple(self._part(quantity, cell, data, task) for cell in cells)) for cells in entries]
        new = [key for key in dict.fromkeys(keys) if key not in self._kept]
        rows = iter(_rows(self.paired, quantity.name, [part for _, parts in new for part in parts]))
        found = {key: _mean(list(islice(rows, len(key[1])))) for key in new}
        self._kept.update((key, mean) for key, mean in found.items() if len(key[1]) > 1)
        return [found[key] if key in found else self._kept[key] for key in keys]

    def _part(self, quantity: Quantity, cell: str, data: str, task: str | None) -> _Part:
        dense, tasks = self._tasks.get((cell, data, quantity.text), ("", ()))
        return dense, cell, tuple(one for one in tasks if task in (None, one[0]))


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
        {str(cell): place / SAMPLES for cell, place in done["place"].items()},
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

_ENDS = [end for name in ("drop", "relative", "ratio") for end in (QUANTITIES[name].low, QUANTITIES[name].high)]


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
    one = grouped.size() == 1
    means[_ENDS] = grouped[_ENDS].first().where(one)  # those of several are found from the items
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


def _rows(found: PairedResults, name: str, parts: Sequence[_Part]) -> Iterator[Matrix | None]:
    """Replicates of a quantity's mean over tasks, of each cell; None where there are none."""
    for groups, run in groupby(parts, key=lambda part: found.groups(*part)):
        dense, cells, _ = zip(*run, strict=True)
        if groups and name in _FORMULAS:
            yield from mean_replicates(name, groups, dense, cells)
        else:
            yield from [None] * len(cells)


def _mean(rows: Sequence[Matrix | None]) -> Matrix | None:
    known = [row for row in rows if row is not None]
    if len(known) < len(rows):
        return None
    return known[0] if len(known) == 1 else sum(known[1:], known[0]) / np.float32(len(known))


def mean_replicates(name: str, groups: Sequence[Replicates], dense: Sequence[str], cells: Sequence[str]) -> Matrix:
    """Replicates [cells, resamples] of a quantity's mean over tasks.

    Args:
        name: of the quantity.
        groups: of each task, the replicates among which all the cells are.
        dense: the dense cell of each cell, or the one of all.
        cells: whose quantity it is.
    """
    total: Matrix | None = None
    for group in groups:
        with np.errstate(divide="ignore", invalid="ignore"):
            one = _FORMULAS[name](group.of(dense), group.of(cells))
        total = one if total is None else total + one
    assert total is not None
    return total if len(groups) == 1 else total / np.float32(len(groups))


def _intervals(
    per_cell: pd.DataFrame,
    found: PairedResults,
    tasks: Mapping[tuple[str, str, bool], tuple[str, Sequence[tuple[str, str]]]],
) -> None:
    """Intervals of the means over several tasks, put into `per_cell`."""
    same: dict[tuple[bool, str, tuple[Replicates, ...]], list[tuple[str, str, bool]]] = {}
    for key, (dense, chosen) in tasks.items():
        if key[0] != dense and len(chosen) > 1 and (groups := found.groups(dense, key[0], chosen)):
            same.setdefault((key[2], dense, groups), []).append(key)
    jobs = [
        (QUANTITIES[name], dense, groups, chunk)
        for (is_text, dense, groups), keys in same.items()
        for name in (("ratio",) if is_text else ("drop", "relative"))
        for chunk in chunks(keys)
    ]
    known: dict[str, dict[tuple[str, str, bool], float]] = {}
    for (quantity, _, _, chunk), both in zip(jobs, in_threads(_ends, jobs), strict=True):
        for column, values in zip((quantity.low, quantity.high), both, strict=True):
            known.setdefault(column, {}).update(zip(chunk, values.tolist(), strict=True))
    for column, found_ends in known.items():
        per_cell[column] = [found_ends.get(key, end) for key, end in zip(per_cell.index, per_cell[column], strict=True)]


def _ends(job: tuple[Quantity, str, tuple[Replicates, ...], Sequence[tuple[str, str, bool]]]) -> tuple[Floats, Floats]:
    """Both ends of a mean's interval, of cells with one dense cell."""
    quantity, dense, groups, keys = job
    return ends(mean_replicates(quantity.name, groups, [dense], [key[0] for key in keys]))
