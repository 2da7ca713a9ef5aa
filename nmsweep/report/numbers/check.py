"""`nmsweep report --check`: every metric again from `samples.parquet`, by its definition, against `metrics.csv`."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nmsweep.results.layout import LAYERS, SAMPLES
from nmsweep.results.read import Results
from nmsweep.results.record import file_digest

Floats = NDArray[np.float64]

TOLERANCE = 1e-9
"""Relative: the numbers are written with all their digits."""


_OF_SLICE = {"kl_to_dense": "kl", "top1_agreement": "top1_agreement"}
"""Metrics of the first windows of a text, and the column each is the mean of, weighted by `n_compared`."""


@dataclass(frozen=True)
class Finding:
    """One number that is not what the samples say, or that they do not say."""

    cell_id: str
    task: str
    metric: str
    message: str


@dataclass(frozen=True)
class Checked:
    """What a check found: `n_equal` numbers confirmed, those that differ, those that cannot be recomputed."""

    n_equal: int
    wrong: list[Finding]
    unknown: list[Finding]


def check_results(results: Results) -> Checked:
    """Recompute value, standard error and number of items of every row of metrics.csv, and the cells' sparsity.

    A file whose digest is not the one in provenance.json is a finding too.
    """
    wrong: list[Finding] = []
    unknown: list[Finding] = []
    n_equal = 0
    rows = {str(cell_id): same for cell_id, same in results.tidy.groupby("cell_id", sort=False)}
    for cell_id, cell in results.done.iterrows():
        for finding in _check_cell(
            str(cell_id), cell["place"], rows[str(cell_id)], results.provenance[str(cell_id)].get("files") or {}
        ):
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
        items = samples[samples["task"] == task].dropna(axis=1, how="all")
        found = recompute(metric, items)
        if found is None:
            yield Finding(cell_id, task, metric, "cannot be recomputed from the samples: it is no mean over items")
            continue
        recorded = {key: row[key] for key in ("value", "stderr", "n_items")}
        yield _difference(cell_id, task, metric, recorded, found)
    channels = int(layers["channels"].sum())
    sparsity = 1 - int(layers["kept"].sum()) / channels if channels else 0.0
    yield _difference(cell_id, "", "sparsity", {"value": rows["sparsity"].iloc[0]}, {"value": sparsity})


def _difference(
    cell_id: str, task: str, metric: str, recorded: Mapping[str, Any], found: Mapping[str, Any]
) -> Finding | None:
    bad = [
        f"{key} is {recorded[key]}, the samples give {found[key]}"
        for key in recorded
        if not _equal(recorded[key], found[key])
    ]
    return Finding(cell_id, task, metric, "; ".join(bad)) if bad else None


def _equal(recorded: Any, found: float | None) -> bool:
    if found is None or pd.isna(recorded):
        return True  # a standard error that is not recorded, or not defined over items
    return math.isclose(float(recorded), found, rel_tol=TOLERANCE, abs_tol=1e-12)


def recompute(metric: str, items: pd.DataFrame) -> dict[str, float | None] | None:
    """A metric of one task from its rows of samples.parquet.

    Returns:
        `value`, `stderr` (None where the samples do not give it), `n_items`; None for a metric that is not recorded item
        by item.
    """
    n = len(items)
    if n == 0:
        return {"value": math.nan, "stderr": None, "n_items": 0}
    if metric == "perplexity" and "nll" in items:
        return _perplexity(items["nll"].to_numpy(float), items["n_tokens"].to_numpy(float))
    if (column := _OF_SLICE.get(metric)) and column in items:
        have = items[items["n_compared"] > 0]
        return {
            "value": float(np.average(have[column], weights=have["n_compared"])),
            "stderr": None,
            "n_items": len(have),
        }
    right = _right(metric, items)
    if right is None and f"metric_{metric}" in items:
        right = items[f"metric_{metric}"].to_numpy(float)
        if metric == "perplexity":  # of one continuation an item, as in LAMBADA: exp of the mean loss
            return {"value": math.exp(-float(right.mean())), "stderr": None, "n_items": n}
    if right is None or np.isnan(right).any():
        return None
    stderr = float(np.std(right, ddof=1)) / math.sqrt(n) if n > 1 else None
    return {"value": float(right.mean()), "stderr": stderr, "n_items": n}


def _perplexity(nll: Floats, n_tokens: Floats) -> dict[str, float | None]:
    value, n = math.exp(float(nll.sum()) / float(n_tokens.sum())), len(nll)
    stderr = value * float(np.std(nll / n_tokens, ddof=1)) / math.sqrt(n) if n > 1 else None
    return {"value": value, "stderr": stderr, "n_items": n}


def _right(metric: str, items: pd.DataFrame) -> Floats | None:
    """Whether the most likely choice is the right one, from log-likelihoods and gold alone; None where that does not apply."""
    if metric not in ("acc", "acc_norm") or not {"loglikelihoods", "choice_chars", "gold"} <= set(items):
        return None
    if (
        items[["loglikelihoods", "choice_chars"]].isna().any(axis=None)
        or not items["gold"].astype(str).str.isdigit().all()
    ):
        return None
    found = []
    for values, chars, gold in zip(items["loglikelihoods"], items["choice_chars"], items["gold"], strict=True):
        scores = np.asarray(values, dtype=float)[: len(chars)]
        if metric == "acc_norm":
            scores = scores / np.asarray(chars, dtype=float)
        found.append(float(int(np.argmax(scores)) == int(gold)))
    return np.array(found)
