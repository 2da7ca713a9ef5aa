"""The numbers of a report: each cell on each task against dense, and its means over tasks, with paired intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from nmsweep.report.load import Results
from nmsweep.report.paired import Matrix, Pair, PairedResults, ends, paired
from nmsweep.report.samples import read_many
from nmsweep.report.tidy import PERPLEXITY, drops, primary


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
    _means: Mapping[tuple[str, str, str], Mapping[str, Matrix]]

    def replicates(self, quantity: Quantity, cell: str, data: str, task: str | None) -> Matrix | None:
        """Bootstrap replicates [resamples] of a quantity: of one task, or the mean over tasks; None where there are none."""
        found = self._means.get((quantity.name, data, task or ""), {})
        return found.get(cell)


def make_scores(results: Results, problems: list[str]) -> Scores:
    """Read the samples and work out every number; a samples file that cannot be read is a problem, and has no intervals."""
    done = results.done
    dense_ids = set(done["dense_cell_id"])
    samples = read_many(
        {str(cell): place / "samples.parquet" for cell, place in done["place"].items()}, dense_ids, problems
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
    means: dict[tuple[str, str, str], dict[str, Matrix]] = {}
    per_cell = _averages(per_task)
    _intervals(per_task, per_cell, found, means)
    return Scores(per_task, per_cell.reset_index(), found, means)


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
    return means.assign(n_tasks=grouped.size(), tasks=grouped["task"].agg(lambda tasks: "+".join(sorted(tasks))))


_FORMULAS: Mapping[str, Callable[[Matrix, Matrix], Matrix]] = {
    "drop": lambda dense, own: dense - own,
    "relative": lambda dense, own: (dense - own) / dense,
    "accuracy": lambda dense, own: own,
    "ratio": lambda dense, own: np.exp(own - dense),
    "perplexity": lambda dense, own: np.exp(own),
}


def _intervals(
    per_task: pd.DataFrame,
    per_cell: pd.DataFrame,
    found: PairedResults,
    means: dict[tuple[str, str, str], dict[str, Matrix]],
) -> None:
    """Replicates and intervals of every quantity, for each task and for the means over tasks; fills `per_cell` and `means`."""
    table = per_task.assign(is_text=per_task["metric"] == PERPLEXITY, n=per_task["n_items"].astype(str))
    table["key"] = table["task"] + "\x1f" + table["metric"] + "\x1f" + table["n"]
    kinds = (
        table.groupby(["cell_id", "data", "is_text", "dense_cell_id"], sort=False)["key"].agg("\x1e".join).reset_index()
    )
    for name in ("drop", "relative", "ratio"):
        for end in (QUANTITIES[name].low, QUANTITIES[name].high):
            per_cell[end] = np.nan
    for (data, is_text, key), same in kinds.groupby(["data", "is_text", "key"], sort=False):
        tasks = [tuple(one.split("\x1f")[:2]) for one in str(key).split("\x1e")]
        for name in ("ratio", "perplexity") if is_text else ("drop", "relative", "accuracy"):
            _mean_interval(name, str(data), bool(is_text), tasks, same, found, per_cell, means)


def _mean_interval(
    name: str,
    data: str,
    is_text: bool,
    tasks: Sequence[tuple[str, ...]],
    cells: pd.DataFrame,
    found: PairedResults,
    per_cell: pd.DataFrame,
    means: dict[tuple[str, str, str], dict[str, Matrix]],
) -> None:
    if name in ("drop", "relative", "ratio"):
        cells = cells[cells["cell_id"] != cells["dense_cell_id"]]
    own, dense = cells["cell_id"].tolist(), cells["dense_cell_id"].tolist()
    if name in ("accuracy", "perplexity"):
        dense = own
    total: Matrix | None = None
    for task, metric in tasks:
        a, b = found.of(task, metric, dense), found.of(task, metric, own)
        if a is None or b is None:
            return
        with np.errstate(divide="ignore", invalid="ignore"):
            one = _FORMULAS[name](a, b)
        means.setdefault((name, data, task), {}).update(zip(own, one, strict=True))
        total = one if total is None else total + one
    if total is None or not own:
        return
    total = total / np.float32(len(tasks))
    means.setdefault((name, data, ""), {}).update(zip(own, total, strict=True))
    if name in ("drop", "relative", "ratio"):
        low, high = ends(total)
        rows = pd.MultiIndex.from_arrays([own, [data] * len(own), [is_text] * len(own)])
        per_cell.loc[rows, QUANTITIES[name].low], per_cell.loc[rows, QUANTITIES[name].high] = low, high
