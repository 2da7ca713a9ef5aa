"""One metric a task, and every sparse number next to its dense one."""

from pathlib import Path

import numpy as np
import pandas as pd

from nmsweep.results.storage import write_text

PERPLEXITY = "perplexity"

MINI_PREFIX = "mini_"
"""Tasks of the shipped data; their numbers are never put together with those of published tasks."""


def data_kind(task: str) -> str:
    """``mini`` or ``real``."""
    return "mini" if task.startswith(MINI_PREFIX) else "real"


def primary(tidy: pd.DataFrame) -> pd.DataFrame:
    """One metric a task: perplexity of a text, `acc_norm` where the task has it, else `acc`, else the first."""
    order = {PERPLEXITY: 0, "acc_norm": 1, "acc": 2}
    ranked = tidy.assign(_rank=tidy["metric"].map(order).fillna(3))
    return (
        ranked.sort_values(["_rank", "metric"]).drop_duplicates(["cell_id", "task"]).drop(columns="_rank").sort_index()
    )


def drops(tidy: pd.DataFrame) -> pd.DataFrame:
    """Every number beside its dense one.

    Returns:
        tidy's rows with `data` (mini or real), `dense`, `drop` (dense − sparse), `relative_drop` ((dense − sparse)/dense)
        and `ratio` (sparse/dense; for perplexity, which has no drop). They are NaN in a dense cell's own rows and where
        the dense cell is missing.
    """
    known = tidy[tidy["pattern"] == "dense"].set_index(["cell_id", "task", "metric"])["value"]
    table = tidy.assign(data=["mini" if task.startswith(MINI_PREFIX) else "real" for task in tidy["task"]])
    table["dense"] = known.reindex(pd.MultiIndex.from_frame(table[["dense_cell_id", "task", "metric"]])).to_numpy()
    text, own = table["metric"] == PERPLEXITY, table["pattern"] == "dense"
    table["drop"] = (table["dense"] - table["value"]).mask(text | own)
    table["relative_drop"] = table["drop"] / table["dense"].where(table["dense"] != 0)
    table["ratio"] = np.where(text & ~own, table["value"] / table["dense"], np.nan)
    return table


def write_csv(file: Path, table: pd.DataFrame) -> None:
    """A table as a file that is there whole or not at all."""
    write_text(file, table.to_csv(index=False))
