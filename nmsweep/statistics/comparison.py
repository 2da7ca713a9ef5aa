"""Sparse cells against their dense cell, item by item."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nmsweep.errors import InputError
from nmsweep.results.samples import Floats, ItemGroup, item_groups, typed
from nmsweep.results.tidy import PERPLEXITY
from nmsweep.statistics.intervals import Replicates, percentile_interval, resample_counts, resampled_means
from nmsweep.statistics.tests import holm, mcnemar

COLUMNS = {
    "n_items": "items, or windows of a text",
    "dense": "the metric in the dense cell",
    "value": "the metric in the sparse cell",
    "drop": "dense − sparse, in the metric's unit; NaN for perplexity",
    "drop_low": "its 95 % interval",
    "drop_high": "",
    "relative_drop": "(dense − sparse) / dense",
    "relative_low": "its 95 % interval",
    "relative_high": "",
    "ratio": "sparse / dense perplexity; NaN for other metrics",
    "ratio_low": "its 95 % interval",
    "ratio_high": "",
    "flip_rate": "share of items that changed between right and wrong, lost + gained; NaN unless all items are 0 or 1",
    "lost": "share of items right only in the dense cell",
    "gained": "share of items right only in the sparse cell",
    "changed": "share of items whose chosen answer differs, from one wrong answer to another included; NaN without choices",
    "p_value": "exact two-sided McNemar test of lost against gained",
    "mean_abs_delta": "mean |log-likelihood sparse − dense| over all choices, nats",
    "kl": "mean KL(dense ‖ sparse) of the next-token distributions of a text's first tokens, nats",
    "top1_agreement": "share of those tokens for which both models have the same most likely next token",
}
"""Columns of a comparison and their meaning; NaN where one does not apply."""

_CHUNK = 256
"""Cells compared at once: bounds the memory of their replicates."""

_FORMULAS: Mapping[str, Callable[[Any, Any], Any]] = {
    "drop": lambda dense, sparse: dense - sparse,
    "relative": lambda dense, sparse: (dense - sparse) / dense,
    "accuracy": lambda dense, sparse: sparse,
    "ratio": lambda dense, sparse: np.exp(sparse - dense),
    "perplexity": lambda dense, sparse: np.exp(sparse),
}
"""Quantities as functions of the mean in the dense and in the sparse cell; for a text the mean is the loss per token, nats."""

HAVE_REPLICATES = frozenset(_FORMULAS)
"""Names of the quantities that can be resampled."""


def compare(dense: pd.DataFrame, sparse: pd.DataFrame) -> pd.DataFrame:
    """Compare a sparse cell with its dense one.

    Args:
        dense, sparse: `samples` of the two cells; tasks that only one of them has are left out.

    Returns:
        One row for each task and metric: `task`, `metric` and the `COLUMNS`.

    Raises:
        InputError: the two cells did not answer the same items.
    """
    parts = []
    for task in sorted(set(dense["task"]) & set(sparse["task"])):
        group = group_of_two(*aligned(dense, sparse, task))
        parts.append(compare_cells([group], {"sparse": "dense"}, {task: group.metrics}))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(dtype=object)
    return table.reindex(columns=["task", "metric", *COLUMNS])


def group_of_two(dense: pd.DataFrame, sparse: pd.DataFrame) -> ItemGroup:
    """Return the rows of one task in two cells, from `aligned`, as a group of the cells ``dense`` and ``sparse``.

    Raises:
        InputError: the windows have other numbers of tokens.
    """
    sides = {"dense": dense, "sparse": sparse}
    groups = list(item_groups({name: typed(side.assign(item=range(len(side)))) for name, side in sides.items()}))
    if len(groups) > 1:
        raise InputError(_other_items(groups[0].task, dense, sparse))
    return groups[0]


def aligned(dense: pd.DataFrame, sparse: pd.DataFrame, task: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the task's rows in two cells, sorted by item.

    Raises:
        InputError: the items differ.
    """
    keys = [key for key in ("item", "doc_hash") if key in dense and key in sparse]
    first, second = (
        samples[samples["task"] == task].sort_values("item", kind="stable").reset_index(drop=True)
        for samples in (dense, sparse)
    )
    if len(first) != len(second) or not first[keys].astype(str).equals(second[keys].astype(str)):
        raise InputError(_other_items(task, first, second))
    return first, second


def _other_items(task: str, dense: pd.DataFrame, sparse: pd.DataFrame) -> str:
    return (
        f"task {task}: the dense and the sparse cell answered {len(dense)} and {len(sparse)} items that are not the "
        "same ones; compare cells with the same data and eval.limit"
    )


def compare_cells(
    groups: Sequence[ItemGroup], dense_of: Mapping[str, str], metrics: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Compare many cells with their dense cells.

    Args:
        groups: the items of all cells.
        dense_of: the dense cell of each sparse one. Pairs that did not answer the same items are left out.
        metrics: those to compare, by task.

    Returns:
        One row for each sparse cell, task and metric: `cell_id`, `task`, `metric` and the `COLUMNS`.
    """
    parts = []
    for group in groups:
        for metric in metrics.get(group.task, ()):
            known = group.cells_with(metric)
            cells = [cell for cell in group.rows if cell in known and dense_of.get(cell) in known]
            for start in range(0, len(cells), _CHUNK):
                chunk = cells[start : start + _CHUNK]
                dense = [dense_of[cell] for cell in chunk]
                compared = _compare_text if metric == PERPLEXITY else _compare_metric
                head = {"cell_id": chunk, "task": group.task, "metric": metric, "n_items": len(group.item)}
                parts.append(pd.DataFrame(head | compared(group, metric, dense, chunk)))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(dtype=object)
    return table.reindex(columns=["cell_id", "task", "metric", *COLUMNS])


def _compare_text(group: ItemGroup, metric: str, dense: Sequence[str], cells: Sequence[str]) -> dict[str, Floats]:
    """Perplexity of a text: the windows are the items."""
    n_tokens = group.of("n_tokens", cells).sum(axis=1)
    before, after = (np.exp(group.of("nll", side).sum(axis=1) / n_tokens) for side in (dense, cells))
    low, high = percentile_interval(quantity_replicates("ratio", [(group, metric)], dense, cells))
    ratio = {"ratio": after / before, "ratio_low": low, "ratio_high": high}
    of_slice = {name: _mean_of_slice(group, name, cells) for name in ("kl", "top1_agreement")}
    return {"dense": before, "value": after} | ratio | of_slice


def _mean_of_slice(group: ItemGroup, name: str, cells: Sequence[str]) -> Floats:
    """Means over the tokens of the windows that have the number; NaN where none has."""
    if name not in group.values or "n_compared" not in group.values:
        return np.full(len(cells), np.nan)
    values, tokens = group.of(name, cells), group.of("n_compared", cells)
    weights = np.where(np.isnan(values), 0, np.nan_to_num(tokens))
    with np.errstate(invalid="ignore"):
        means: Floats = (np.nan_to_num(values) * weights).sum(axis=1) / weights.sum(axis=1)
    return means


def _compare_metric(group: ItemGroup, metric: str, dense: Sequence[str], cells: Sequence[str]) -> dict[str, Floats]:
    """A metric that is a mean over items."""
    a, b = group.of(metric, dense), group.of(metric, cells)
    before, after = (_means(group, metric, side) for side in (a, b))
    columns = {"dense": before, "value": after}
    for name, column in (("drop", "drop"), ("relative", "relative_drop")):
        with np.errstate(divide="ignore", invalid="ignore"):
            columns[column] = _FORMULAS[name](before, after)
        replicates = quantity_replicates(name, [(group, metric)], dense, cells)
        columns[f"{name}_low"], columns[f"{name}_high"] = percentile_interval(replicates)
    columns["relative_drop"][before == 0] = np.nan
    right_or_wrong = np.isin(a, (0, 1)).all(axis=1) & np.isin(b, (0, 1)).all(axis=1)
    lost, gained = (a > b).sum(axis=1), (a < b).sum(axis=1)
    n_items = a.shape[1]
    flips = {
        "lost": lost / n_items, "gained": gained / n_items, "flip_rate": (lost + gained) / n_items,
        "p_value": mcnemar(lost, gained),
    }  # fmt: skip
    columns |= {name: np.where(right_or_wrong, value, np.nan) for name, value in flips.items()}
    return columns | _moved(group, metric, dense, cells)


def _means(group: ItemGroup, metric: str, values: Floats) -> Floats:
    """Means [cells] of values [cells, items], over items or over subtasks."""
    parts = [values]
    if metric in group.equal_subtasks and group.subtask is not None:
        parts = [values[:, np.array(group.subtask) == name] for name in dict.fromkeys(group.subtask)]
    means: Floats = np.mean([part.mean(axis=1) for part in parts], axis=0)
    return means


def _moved(group: ItemGroup, metric: str, dense: Sequence[str], cells: Sequence[str]) -> dict[str, Floats]:
    """The share of items with another chosen answer, and the mean |Δ log-likelihood|."""
    if group.loglikelihoods is None:
        return {}
    a, b = (group.loglikelihoods[[group.rows[cell] for cell in side]] for side in (dense, cells))
    same_choices = (np.isnan(a) == np.isnan(b)).all(axis=(1, 2)) & ~np.isnan(b).all(axis=(1, 2))
    n_choices = (~np.isnan(a)).sum(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        delta = np.nansum(np.abs(b - a), axis=(1, 2)) / n_choices
    columns = {"mean_abs_delta": np.where(same_choices, delta, np.nan)}
    before, after = (chosen(group, metric, side) for side in (dense, cells))
    if before is not None and after is not None:
        columns["changed"] = np.where(same_choices, (before != after).mean(axis=1), np.nan)
    return columns


def chosen(group: ItemGroup, metric: str, cells: Sequence[str]) -> NDArray[np.int64] | None:
    """Return the most likely choice of each item, per character for ``acc_norm``.

    Returns:
        Indices of choices, [cells, items]; None where the task has no choices.
    """
    if group.loglikelihoods is None or group.choice_chars is None:
        return None
    n_choices = group.choice_chars.shape[
        1
    ]  # a metric that subtracts unconditional likelihoods has as many values again
    scores = group.loglikelihoods[[group.rows[cell] for cell in cells]][..., :n_choices]
    if metric == "acc_norm":
        scores = scores / group.choice_chars
    index: NDArray[np.int64] = np.where(np.isnan(group.choice_chars) | np.isnan(scores), -np.inf, scores).argmax(axis=2)
    return index


def item_weights(group: ItemGroup, metric: str) -> Floats:
    """Return each item's weight in a metric, [items]: 1, or where subtasks count alike, 1 / the size of its subtask."""
    if metric not in group.equal_subtasks or group.subtask is None:
        return np.ones(len(group.item))
    _, number, sizes = np.unique(group.subtask, return_inverse=True, return_counts=True)
    weights: Floats = 1 / sizes[number]
    return weights


def mean_replicates(group: ItemGroup, metric: str, cells: Sequence[str]) -> Replicates:
    """Return bootstrap replicates of a metric's mean, [cells, resamples]; of perplexity, of the mean loss per token in nats."""
    if metric == PERPLEXITY:
        counts = resample_counts(group.task, len(group.item))
        return resampled_means(group.of("nll", cells), group.of("n_tokens", cells[:1])[0], counts)
    subtask = group.subtask if metric in group.equal_subtasks else None
    weights = item_weights(group, metric)
    counts = resample_counts(group.task, len(group.item), subtask)
    return resampled_means(group.of(metric, cells) * weights, weights, counts)


def quantity_replicates(
    name: str, tasks: Sequence[tuple[ItemGroup, str]], dense: Sequence[str], cells: Sequence[str]
) -> Replicates:
    """Return bootstrap replicates of a quantity's unweighted mean over tasks, [cells, resamples].

    The items of each task are resampled by themselves. The tasks are not: they are not a sample of tasks.

    Args:
        name: one of `HAVE_REPLICATES`.
        tasks: of each task, the group that all the cells are in, and the metric.
        dense: the dense cell of each cell.
        cells: the sparse cells.
    """
    total: Any = 0.0
    distinct = list(dict.fromkeys([*dense, *cells]))
    place = {cell: row for row, cell in enumerate(distinct)}
    rows = [[place[cell] for cell in side] for side in (dense, cells)]
    for group, metric in tasks:
        means = mean_replicates(group, metric, distinct)
        with np.errstate(divide="ignore", invalid="ignore"):
            total = total + _FORMULAS[name](means[rows[0]], means[rows[1]])
    replicates: Replicates = total / np.float32(len(tasks))
    return replicates


def quantity_intervals(
    name: str, tasks: Sequence[tuple[ItemGroup, str]], dense: Sequence[str], cells: Sequence[str]
) -> tuple[Floats, Floats]:
    """Return both ends of the 95 % interval of each cell's mean over tasks; arguments as for `quantity_replicates`."""
    ends = [
        percentile_interval(quantity_replicates(name, tasks, dense[at : at + _CHUNK], cells[at : at + _CHUNK]))
        for at in range(0, len(cells), _CHUNK)
    ]
    low, high = (np.concatenate(side) for side in zip(*ends, strict=True))
    return low, high


def holm_by_task(table: pd.DataFrame) -> pd.Series:
    """Adjust the p-values of a report: one family for each task and metric, over all its sparse cells.

    Args:
        table: rows of comparisons, with `task`, `metric`, `p_value`.
    """
    return table.groupby(["task", "metric"], sort=False)["p_value"].transform(lambda p: holm(p.to_numpy()))
