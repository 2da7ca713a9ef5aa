"""A sparse cell against its dense one, item by item, from their `samples.parquet`. No torch."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nmsweep.errors import InputError
from nmsweep.statistics.statistics import Pairs, bootstrap_means, holm, interval, mcnemar, relative_drops

METRIC_PREFIX = "metric_"
"""Columns of samples.parquet that hold one item's value of a metric."""

WEIGHT_PREFIX = "weight_"
"""Columns that hold one item's weight in a metric of a group, where its subtasks count alike whatever their size."""


@dataclass(frozen=True)
class Comparison:
    """One metric of one task, sparse against dense. What does not apply is NaN.

    Attributes:
        n_items: items, or windows of a text.
        dense, value: the metric in the two cells.
        drop: dense − sparse, in the metric's unit, with its interval; NaN for perplexity.
        relative_drop: (dense − sparse) / dense, with its interval.
        ratio: sparse / dense perplexity, with its interval.
        lost, gained: share of items right only in the dense, only in the sparse cell; `flip_rate` is their sum.
        changed: share of items whose chosen answer is another one, wrong ones included.
        p_value: exact McNemar test of lost against gained, two-sided.
        mean_abs_delta: mean |log-likelihood sparse − dense| over all choices, in nats.
        kl: mean KL(dense ‖ sparse) of the next-token distributions on the text's first tokens, in nats.
        top1_agreement: share of those tokens for which both models' most likely next token is the same.
    """

    task: str
    metric: str
    n_items: int
    dense: float
    value: float
    drop: float = math.nan
    drop_low: float = math.nan
    drop_high: float = math.nan
    relative_drop: float = math.nan
    relative_low: float = math.nan
    relative_high: float = math.nan
    ratio: float = math.nan
    ratio_low: float = math.nan
    ratio_high: float = math.nan
    flip_rate: float = math.nan
    lost: float = math.nan
    gained: float = math.nan
    changed: float = math.nan
    p_value: float = math.nan
    mean_abs_delta: float = math.nan
    kl: float = math.nan
    top1_agreement: float = math.nan


COMPARISON_COLUMNS = tuple(field.name for field in fields(Comparison))


def compare(dense: pd.DataFrame, sparse: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Everything about a sparse cell and its dense one, from their samples.

    Args:
        dense, sparse: the `samples` of the two cells; tasks that one of them lacks are left out.
        seed: of the bootstrap.

    Returns:
        one row for each task and metric, with the columns of `Comparison`.

    Raises:
        InputError: the two cells did not see the same items.
    """
    rows = []
    for task in sorted(set(dense["task"]) & set(sparse["task"])):
        both = aligned(dense, sparse, task)
        if _has(both.first, "nll"):
            rows.append(compare_text(task, *both, seed))
        rows += [compare_metric(pairs, seed, *both) for pairs in metric_pairs(task, *both)]
    return pd.DataFrame([asdict(row) for row in rows], columns=list(COMPARISON_COLUMNS))


class Aligned(NamedTuple):
    """The rows of one task in the dense and the sparse cell, in the same order."""

    first: pd.DataFrame
    second: pd.DataFrame


def aligned(dense: pd.DataFrame, sparse: pd.DataFrame, task: str) -> Aligned:
    """The task's rows in two cells, sorted by item.

    Raises:
        InputError: the items are not the same.
    """
    keys = [key for key in ("item", "doc_hash") if key in dense and key in sparse]
    a, b = (
        samples[samples["task"] == task].sort_values("item", kind="stable").reset_index(drop=True)
        for samples in (dense, sparse)
    )
    if len(a) != len(b) or not a[keys].astype(str).equals(b[keys].astype(str)):
        raise InputError(
            f"task {task}: the dense and the sparse cell saw {len(a)} and {len(b)} items that are not the same ones; "
            "compare cells of one data set and one eval.limit"
        )
    return Aligned(a, b)


def metric_pairs(task: str, dense: pd.DataFrame, sparse: pd.DataFrame) -> list[Pairs]:
    """The metrics of a task that are means over items."""
    return [
        Pairs(
            task,
            column.removeprefix(METRIC_PREFIX),
            dense[column].to_numpy(np.float64),
            sparse[column].to_numpy(np.float64),
            _subtasks(dense, column.removeprefix(METRIC_PREFIX)),
        )
        for column in sorted(set(dense.columns) & set(sparse.columns))
        if column.startswith(METRIC_PREFIX) and "perplexity" not in column and dense[column].notna().all()
        if sparse[column].notna().all()
    ]


def _subtasks(samples: pd.DataFrame, metric: str) -> NDArray[np.str_] | None:
    """Each item's subtask where these count alike whatever their size; None where items do."""
    if not _has(samples, f"{WEIGHT_PREFIX}{metric}"):
        return None
    return samples["subtask"].to_numpy(np.str_)


def compare_metric(pairs: Pairs, seed: int, dense: pd.DataFrame, sparse: pd.DataFrame) -> Comparison:
    """One metric that is a mean over items."""
    means = bootstrap_means(pairs, seed)
    own_dense, own_sparse = pairs.means
    drop, relative = interval(means[:, 0] - means[:, 1]), interval(relative_drops(means))
    more: dict[str, float] = {}
    if pairs.is_binary:
        lost = int(((pairs.dense == 1) & (pairs.sparse == 0)).sum())
        gained = int(((pairs.dense == 0) & (pairs.sparse == 1)).sum())
        n = len(pairs)
        more = {
            "flip_rate": (lost + gained) / n,
            "lost": lost / n,
            "gained": gained / n,
            "p_value": mcnemar(lost, gained),
        }
    return Comparison(
        pairs.task, pairs.metric, len(pairs), own_dense, own_sparse,
        drop=own_dense - own_sparse, drop_low=drop.low, drop_high=drop.high,
        relative_drop=float(relative_drops(np.array([[own_dense, own_sparse]]))[0]),
        relative_low=relative.low, relative_high=relative.high,
        changed=changed(dense, sparse, pairs.metric), mean_abs_delta=mean_abs_delta(dense, sparse), **more,
    )  # fmt: skip


def compare_text(task: str, dense: pd.DataFrame, sparse: pd.DataFrame, seed: int) -> Comparison:
    """Perplexity of a text: the windows are the items, and the ratio is exp of the mean difference of their loss."""
    n_tokens = float(dense["n_tokens"].sum())
    losses = Pairs(task, "perplexity", dense["nll"].to_numpy(np.float64), sparse["nll"].to_numpy(np.float64))
    means = bootstrap_means(losses, seed)
    ends = interval(np.exp((means[:, 1] - means[:, 0]) * len(losses) / n_tokens))
    own_dense, own_sparse = (math.exp(float(loss.sum()) / n_tokens) for loss in (losses.dense, losses.sparse))
    return Comparison(
        task, "perplexity", len(losses), own_dense, own_sparse,
        ratio=own_sparse / own_dense, ratio_low=ends.low, ratio_high=ends.high,
        kl=_mean_of(sparse, "kl"), top1_agreement=_mean_of(sparse, "top1_agreement"),
    )  # fmt: skip


def _mean_of(samples: pd.DataFrame, column: str) -> float:
    """Mean over the tokens of the windows that have the number."""
    if column not in samples or not samples[column].notna().any():
        return math.nan
    have = samples[samples[column].notna()]
    return float(np.average(have[column], weights=have["n_compared"]))


def holm_by_task(table: pd.DataFrame) -> pd.Series:
    """Adjusted p-values of a report: one family for each task and metric, over all its sparse cells.

    Args:
        table: rows of `compare` of all sparse cells, with `task`, `metric`, `p_value`.
    """
    return table.groupby(["task", "metric"], sort=False)["p_value"].transform(lambda p: holm(p.to_numpy()))


def changed(dense: pd.DataFrame, sparse: pd.DataFrame, metric: str) -> float:
    """Share of items whose chosen answer differs; NaN where the task has no choices."""
    a, b = chosen(dense, metric), chosen(sparse, metric)
    return math.nan if a is None or b is None else float((a != b).mean())


def chosen(samples: pd.DataFrame, metric: str) -> NDArray[np.int64] | None:
    """Index of each item's most likely choice, per character for ``acc_norm``; None where the task has no choices."""
    if not _has(samples, "loglikelihoods") or not _has(samples, "choice_chars"):
        return None
    found = []
    for values, chars in zip(samples["loglikelihoods"], samples["choice_chars"], strict=True):
        score = np.asarray(values, dtype=np.float64)
        n_choices = len(chars)  # a metric that subtracts the unconditional likelihood has as many values again
        norm = np.asarray(chars, dtype=np.float64) if metric == "acc_norm" else 1.0
        found.append(int(np.argmax(score[:n_choices] / norm)))
    return np.array(found, dtype=np.int64)


def mean_abs_delta(dense: pd.DataFrame, sparse: pd.DataFrame) -> float:
    """Mean |Δ log-likelihood| over all choices of all items, in nats; NaN where the task has none."""
    if not _has(dense, "loglikelihoods") or not _has(sparse, "loglikelihoods"):
        return math.nan
    a, b = (np.concatenate(samples["loglikelihoods"].to_numpy()) for samples in (dense, sparse))
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).mean())


def _has(samples: pd.DataFrame, column: str) -> bool:
    return column in samples and bool(samples[column].notna().all()) and len(samples) > 0


def primary_metric(samples: pd.DataFrame, task: str) -> str | None:
    """The metric that decides whether an item is right: ``acc_norm`` where the task has it, else ``acc``, else the first."""
    rows = samples[samples["task"] == task]
    names = [
        column.removeprefix(METRIC_PREFIX)
        for column in sorted(rows.columns)
        if column.startswith(METRIC_PREFIX) and "perplexity" not in column and rows[column].notna().all()
    ]
    return min(names, key=lambda name: ({"acc_norm": 0, "acc": 1}.get(name, 2), name), default=None)


def flipped(dense: pd.DataFrame, sparse: pd.DataFrame, task: str, metric: str) -> pd.DataFrame:
    """The items that are right in one cell and wrong in the other.

    Returns:
        `item`, `doc_hash`, `kind` (``lost``: right only in the dense cell; ``gained``), `gold`, `dense_answer`, `answer`
        (index of the choice, or what was written), `dense_loglikelihoods`, `loglikelihoods` (None where there are none).
    """
    a, b = aligned(dense, sparse, task)
    column = f"{METRIC_PREFIX}{metric}"
    before, after = (samples[column].to_numpy(np.float64) for samples in (a, b))
    moved: list[int] = np.flatnonzero(before != after).tolist()
    first, second = _answers(a, metric), _answers(b, metric)
    rows = [
        {
            "item": a.at[at, "item"], "doc_hash": a.at[at, "doc_hash"],
            "kind": "lost" if before[at] > after[at] else "gained", "gold": a.at[at, "gold"],
            "dense_answer": first[at], "answer": second[at],
            "dense_loglikelihoods": _list_at(a, at), "loglikelihoods": _list_at(b, at),
        }
        for at in moved
    ]  # fmt: skip
    columns = ["item", "doc_hash", "kind", "gold", "dense_answer", "answer", "dense_loglikelihoods", "loglikelihoods"]
    return pd.DataFrame(rows, columns=columns)


def _answers(samples: pd.DataFrame, metric: str) -> list[str]:
    picked = chosen(samples, metric)
    if picked is not None:
        return [str(index) for index in picked]
    return [str(text) for text in samples["response"]] if _has(samples, "response") else [""] * len(samples)


def _list_at(samples: pd.DataFrame, at: int) -> list[float] | None:
    if not _has(samples, "loglikelihoods"):
        return None
    values: Any = samples.at[at, "loglikelihoods"]
    return [float(value) for value in values]
