"""All cells of a results folder as one tidy table, and every sparse number next to its dense one."""

from pathlib import Path

import numpy as np
import pandas as pd

from nmsweep.errors import InputError
from nmsweep.record import METRIC_COLUMNS, cell_folders, read_metrics

PERPLEXITY = "perplexity"


def read_tidy(results_dir: Path) -> pd.DataFrame:
    """One row for each cell, task and metric.

    Raises:
        InputError: the folder has no finished cell, or one that cannot be read.
    """
    folders = cell_folders(results_dir)
    if not folders:
        raise InputError(
            f"results_dir: {results_dir} has no finished cell; run `nmsweep` first or pass results_dir=DIR"
        )
    tables = []
    for folder in folders:
        try:
            tables.append(read_metrics(folder / "metrics.csv"))
        except (OSError, ValueError) as error:
            raise InputError(f"record {folder}: {error}; remove the folder and run its cell again") from error
    tidy = pd.concat([table for table in tables if len(table)], ignore_index=True)[list(METRIC_COLUMNS)]
    return tidy.sort_values(
        ["model", "pattern", "criterion", "mitigation", "cell_id", "task", "metric"], ignore_index=True
    )


def primary(tidy: pd.DataFrame) -> pd.DataFrame:
    """One metric a task: perplexity of a text, `acc_norm` where the task has it, else `acc`, else the first."""
    order = {PERPLEXITY: 0, "acc_norm": 1, "acc": 2}
    ranked = tidy.assign(_rank=tidy["metric"].map(order).fillna(3))
    return (
        ranked.sort_values(["_rank", "metric"]).drop_duplicates(["cell_id", "task"]).drop(columns="_rank").sort_index()
    )


def drops(tidy: pd.DataFrame) -> pd.DataFrame:
    """Every sparse number beside its dense one.

    Returns:
        tidy's rows of sparse cells with `dense`, `drop` (dense − sparse), `relative_drop` ((dense − sparse)/dense)
        and `ratio` (sparse/dense; for perplexity, which has no drop). A missing dense cell leaves them NaN.
    """
    dense = tidy[tidy["pattern"] == "dense"].set_index(["cell_id", "task", "metric"])["value"]
    sparse = tidy[tidy["pattern"] != "dense"].copy()
    keys = pd.MultiIndex.from_frame(sparse[["dense_cell_id", "task", "metric"]])
    sparse["dense"] = dense.reindex(keys).to_numpy()
    text = sparse["metric"] == PERPLEXITY
    sparse["drop"] = np.where(text, np.nan, sparse["dense"] - sparse["value"])
    sparse["relative_drop"] = sparse["drop"] / sparse["dense"].where(sparse["dense"] != 0)
    sparse["ratio"] = np.where(text, sparse["value"] / sparse["dense"], np.nan)
    return sparse


def averages(table: pd.DataFrame) -> pd.DataFrame:
    """Unweighted means over tasks of a cell's drops, perplexity left out.

    Args:
        table: rows of `drops(primary(tidy))`.

    Returns:
        one row a cell: `drop`, `relative_drop`, `n_tasks`, and `ratio` of its text.
    """
    cells = table.groupby("cell_id", sort=False)
    tasks = table[table["metric"] != PERPLEXITY].groupby("cell_id", sort=False)
    means = pd.DataFrame(
        {"drop": tasks["drop"].mean(), "relative_drop": tasks["relative_drop"].mean(), "n_tasks": tasks.size()}
    )
    means = means.reindex(cells.size().index)
    means["ratio"] = cells["ratio"].mean()
    return means.reset_index()
