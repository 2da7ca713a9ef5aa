"""The items that are right in one cell and wrong in another."""

from typing import Any

import numpy as np
import pandas as pd

from nmsweep.results.samples import METRIC_PREFIX
from nmsweep.results.tidy import PERPLEXITY, metric_rank
from nmsweep.statistics.comparison import aligned, chosen, group_of_two


def primary_metric(samples: pd.DataFrame, task: str) -> str | None:
    """Return the metric that decides whether an item is right; None if the task has none."""
    rows = samples[samples["task"] == task].dropna(axis="columns")
    names = [name.removeprefix(METRIC_PREFIX) for name in rows.columns if name.startswith(METRIC_PREFIX)]
    return min((name for name in names if PERPLEXITY not in name), key=metric_rank, default=None)


def flipped(dense: pd.DataFrame, sparse: pd.DataFrame, task: str, metric: str) -> pd.DataFrame:
    """Return the items whose metric differs between two cells.

    Args:
        dense, sparse: `samples` of the two cells.

    Returns:
        `item`, `doc_hash`, `kind` (``lost``: right only in the dense cell; ``gained``), `gold`, `dense_answer`, `answer`
        (the index of the choice, or the generated text), `dense_loglikelihoods`, `loglikelihoods` (nats; None where not
        recorded).

    Raises:
        InputError: the two cells did not answer the same items.
    """
    first, second = aligned(dense, sparse, task)
    before, after = (side[f"{METRIC_PREFIX}{metric}"].to_numpy(np.float64) for side in (first, second))
    choices = chosen(group_of_two(first, second), metric, ("dense", "sparse"))
    table = first[["item", "doc_hash", "gold"]].assign(kind=np.where(before > after, "lost", "gained"))
    for row, (prefix, side) in enumerate((("dense_", first), ("", second))):
        table[f"{prefix}answer"] = side.get("response", "") if choices is None else choices[row].astype(str)
        table[f"{prefix}loglikelihoods"] = _lists(side)
    moved: pd.DataFrame = table[before != after].reset_index(drop=True)
    return moved


def _lists(samples: pd.DataFrame) -> pd.Series:
    if "loglikelihoods" not in samples or samples["loglikelihoods"].isna().any():
        return pd.Series([None] * len(samples), dtype=object)
    lists: Any = [list(map(float, values)) for values in samples["loglikelihoods"]]
    return pd.Series(lists, dtype=object)
