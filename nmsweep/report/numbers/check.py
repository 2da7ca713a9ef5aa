"""`nmsweep report --check`: recompute every metric from `samples.parquet` by its definition."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nmsweep.results.layout import LAYERS, SAMPLES
from nmsweep.results.read import Results
from nmsweep.results.record import file_digest
from nmsweep.results.samples import METRIC_PREFIX, WEIGHT_PREFIX, Floats

TOLERANCE = 1e-9
"""Relative: the numbers are written with all their digits."""

_OF_SLICE = {"kl_to_dense": "kl", "top1_agreement": "top1_agreement"}
"""Metrics of the first windows of a text, and the column each is the mean of, weighted by `n_compared`."""


@dataclass(frozen=True)
class Finding:
    """One number that differs from its samples, or that they do not give."""

    cell_id: str
    task: str
    metric: str
    message: str


@dataclass(frozen=True)
class Checked:
    """The result of a check: `n_equal` confirmed numbers, those that differ, and those that cannot be recomputed."""

    n_equal: int
    wrong: list[Finding]
    unknown: list[Finding]


def check_results(results: Results) -> Checked:
    """Recompute value, standard error and number of items of every row of metrics.csv, and the cells' sparsity.

    A file whose digest differs from provenance.json is a finding too.
    """
    wrong: list[Finding] = []
    unknown: list[Finding] = []
    n_equal = 0
    rows = {str(cell_id): same for cell_id, same in results.tidy.groupby("cell_id", sort=False)}
    for cell_id, place in results.done["place"].items():
        files = results.provenance[str(cell_id)].get("files") or {}
        for finding in _check_cell(str(cell_id), place, rows[str(cell_id)], files):
            if finding is None:
                n_equal += 1
            elif finding.message.startswith("cannot"):
                unknown.append(finding)
            else:
                wrong.append(finding)
    return Checked(n_equal, wrong, unknown)


def _check_cell(
    cell_id: str, place: Path, rows: pd.DataFrame, files: Mapping[str, Mapping[str, Any]]
) -> Iterator[Finding | None]:
    for name, written in files.items():
        if (place / name).is_file() and file_digest(place / name) != written.get("sha256"):
            yield Finding(cell_id, name, "sha256", "is not the file that was written with the cell")
    if not (place / SAMPLES).is_file():
        yield Finding(cell_id, "", "", "cannot be recomputed: it has no samples.parquet")
        return
    try:
        samples = pd.read_parquet(place / SAMPLES)
        layers = pd.read_csv(place / LAYERS)
    except (OSError, ValueError) as error:
        yield Finding(cell_id, "", "", f"{type(error).__name__}: {error}")
        return
    for row in rows.to_dict("records"):
        task, metric = str(row["task"]), str(row["metric"])
        again = recompute(metric, samples[samples["task"] == task].dropna(axis=1, how="all"))
        if again is None:
            yield Finding(cell_id, task, metric, "cannot be recomputed from the samples: it is no mean over items")
            continue
        yield _difference(cell_id, task, metric, {key: row[key] for key in ("value", "stderr", "n_items")}, again)
    channels = int(layers["channels"].sum())
    sparsity = 1 - int(layers["kept"].sum()) / channels if channels else 0.0
    yield _difference(cell_id, "", "sparsity", {"value": rows["sparsity"].iloc[0]}, {"value": sparsity})


def _difference(
    cell_id: str, task: str, metric: str, recorded: Mapping[str, Any], again: Mapping[str, Any]
) -> Finding | None:
    wrong = [
        f"{key} is {recorded[key]}, the samples give {again[key]}"
        for key in recorded
        if not _equal(recorded[key], again[key])
    ]
    return Finding(cell_id, task, metric, "; ".join(wrong)) if wrong else None


def _equal(recorded: Any, again: float | None) -> bool:
    if again is None or pd.isna(recorded):
        return True  # a standard error that is not recorded, or not defined over items
    return math.isclose(float(recorded), again, rel_tol=TOLERANCE, abs_tol=1e-12)


def recompute(metric: str, items: pd.DataFrame) -> dict[str, float | None] | None:
    """Compute a metric of one task from its rows of samples.parquet.

    Returns:
        `value`, `stderr` (None where the samples do not give it), `n_items`; None for a metric that is not recorded item
        by item.
    """
    n_items = len(items)
    if n_items == 0:
        return {"value": math.nan, "stderr": None, "n_items": 0}
    if metric == "perplexity" and "nll" in items:
        nll, n_tokens = items["nll"].to_numpy(float), items["n_tokens"].to_numpy(float)
        value = math.exp(float(nll.sum()) / float(n_tokens.sum()))
        stderr = _stderr(nll / n_tokens)
        return {"value": value, "stderr": None if stderr is None else value * stderr, "n_items": n_items}
    if (column := _OF_SLICE.get(metric)) and column in items:
        compared = items[items["n_compared"] > 0]
        value = float(np.average(compared[column], weights=compared["n_compared"]))
        return {"value": value, "stderr": None, "n_items": len(compared)}
    values = _right(metric, items)
    if values is None and f"{METRIC_PREFIX}{metric}" in items:
        values = items[f"{METRIC_PREFIX}{metric}"].to_numpy(float)
        if metric == "perplexity":  # of one continuation an item, as in LAMBADA: exp of the mean loss
            return {"value": math.exp(-float(values.mean())), "stderr": None, "n_items": n_items}
    if values is None:
        return None
    if "subtask" in items:
        return _pooled(values, items["subtask"].to_numpy(), f"{WEIGHT_PREFIX}{metric}" in items)
    if np.isnan(values).any():
        return None
    return {"value": float(values.mean()), "stderr": _stderr(values), "n_items": n_items}


def _stderr(values: Floats) -> float | None:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def _pooled(values: Floats, subtask: Any, alike: bool) -> dict[str, float | None] | None:
    """A metric of a group, over the subtasks that have it.

    Args:
        values: [items], NaN in subtasks without the metric.
        subtask: [items].
        alike: whether subtasks count alike, not by their size.

    Source: `pooled_sample_stderr` and `unweighted_mean_stderr` of lm-eval 0.4.13.
    """
    parts = [values[subtask == name] for name in dict.fromkeys(subtask)]
    parts = [part for part in parts if not np.isnan(part).all()]
    if not parts or any(np.isnan(part).any() for part in parts):
        return None
    sizes = np.array([len(part) for part in parts])
    errors = [_stderr(part) for part in parts]
    value = np.average([part.mean() for part in parts], weights=None if alike else sizes)
    stderr = None
    if all(error is not None for error in errors):
        variances = np.array(errors, dtype=float) ** 2
        if alike:
            stderr = math.sqrt(variances.sum()) / len(parts)
        else:
            stderr = math.sqrt(((sizes - 1) * variances * sizes).sum() / (sizes.sum() - len(sizes)) / sizes.sum())
    return {"value": float(value), "stderr": stderr, "n_items": int(sizes.sum())}


def _right(metric: str, items: pd.DataFrame) -> Floats | None:
    """Whether each item's most likely choice is right, from log-likelihoods and gold; None where that does not apply."""
    if metric not in ("acc", "acc_norm") or not {"loglikelihoods", "choice_chars", "gold"} <= set(items):
        return None
    if items[["loglikelihoods", "choice_chars"]].isna().any(axis=None):
        return None
    if not items["gold"].astype(str).str.isdigit().all():
        return None
    right = []
    for values, chars, gold in zip(items["loglikelihoods"], items["choice_chars"], items["gold"], strict=True):
        scores = np.asarray(values, dtype=float)[: len(chars)]
        if metric == "acc_norm":
            scores = scores / np.asarray(chars, dtype=float)
        right.append(float(int(np.argmax(scores)) == int(gold)))
    return np.array(right)
