"""Tables of numbers: the metric that stands for a task, and every number beside its dense one."""

from pathlib import Path

import numpy as np
import pandas as pd

from nmsweep.results.storage import write_text

PERPLEXITY = "perplexity"

MINI_PREFIX = "mini_"
"""Tasks of the shipped data; their numbers are never combined with those of published tasks."""


def data_kind(task: str) -> str:
    """Return ``mini`` or ``real``."""
    return "mini" if task.startswith(MINI_PREFIX) else "real"


def metric_rank(metric: str) -> tuple[int, str]:
    """Rank the metrics of a task: perplexity, `acc_norm`, `acc`, then by name. The first is shown."""
    return {PERPLEXITY: 0, "acc_norm": 1, "acc": 2}.get(metric, 3), metric


def primary(tidy: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the first metric of each cell and task by `metric_rank`."""
    ranked = tidy.assign(_rank=tidy["metric"].map(metric_rank)).sort_values("_rank", kind="stable")
    return ranked.drop_duplicates(["cell_id", "task"]).drop(columns="_rank").sort_index()


def drops(tidy: pd.DataFrame) -> pd.DataFrame:
    """Set every number beside its dense one.

    Returns:
        tidy's rows with `data` (mini or real), `dense`, `drop` (dense − sparse), `relative_drop` ((dense − sparse) / dense)
        and `ratio` (sparse / dense; for perplexity, which has no drop). They are NaN in a dense cell's own rows and where
        the dense cell is missing.
    """
    known = tidy[tidy["pattern"] == "dense"].set_index(["cell_id", "task", "metric"])["value"]
    table = tidy.assign(data=tidy["task"].map(data_kind))
    table["dense"] = known.reindex(pd.MultiIndex.from_frame(table[["dense_cell_id", "task", "metric"]])).to_numpy()
    is_text, is_dense = table["metric"] == PERPLEXITY, table["pattern"] == "dense"
    table["drop"] = (table["dense"] - table["value"]).mask(is_text | is_dense)
    table["relative_drop"] = table["drop"] / table["dense"].where(table["dense"] != 0)
    table["ratio"] = np.where(is_text & ~is_dense, table["value"] / table["dense"], np.nan)
    return table


def write_csv(file: Path, table: pd.DataFrame) -> None:
    """Write a table atomically."""
    write_text(file, table.to_csv(index=False))
