"""Results as data frames, for notebooks."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from nmsweep.report.numbers.scores import compared
from nmsweep.results.layout import SAMPLES
from nmsweep.results.read import Results, flatten, read_results
from nmsweep.results.record import METRIC_COLUMNS
from nmsweep.results.samples import METRIC_PREFIX, STATISTICS, read_samples
from nmsweep.results.tidy import primary

_ITEM_COLUMNS = (
    "cell_id", "dense_cell_id", "task", "subtask", "item", "doc_hash", "metric", "correct", "dense_correct", "prediction",
    "gold", "response", "loglikelihoods", "nll", "dense_nll", "n_tokens", "kl", "top1_agreement", "n_compared",
)  # fmt: skip


def load_results(results_dir: str | Path = "results", items: bool = False) -> pd.DataFrame:
    """Load the finished cells of a results folder as one tidy table.

    Args:
        results_dir: the results folder; a sweep may be writing to it.
        items: whether to return one row per item instead of one row per number.

    Returns:
        One row for each cell, task and metric, in the order of tidy.csv:

        * the columns of tidy.csv (docs/reading-results.md): `cell_id`, `dense_cell_id`, `model`, `revision`, `operand`,
          `pattern`, `n`, `m`, `criterion`, `mitigation`, `targets`, `scope`, `profile`, `dtype`, `task`, `metric`, `value`
          and `stderr` (in the metric's unit), `n_items` (items or windows), `sparsity` and `flops_share` (0 to 1), `seed`,
          `status`;
        * `criterion.<key>` and `mitigations.<stage>.<key>`: the parameters of the methods, where any cell has them;
        * `dense`: the value of the dense cell, in the metric's unit;
        * `drop`: dense − value, in the metric's unit, not in points; NaN for perplexity;
        * `relative_drop`: drop / dense;
        * `ratio`: value / dense of a perplexity; NaN for other metrics;
        * `low`, `high`: the paired 95 % interval of the drop, or of the ratio for perplexity.

        The numbers of a dense cell's own rows, and those that a cell does not have, are NaN.

        With `items`, one row for each cell, task and item (a window, for a text):

        * `cell_id`, `dense_cell_id`, `task`, `subtask` (of a group of tasks), `item` (its number), `doc_hash`;
        * `metric`: the metric that stands for the task; `correct`: its value for the item, 0 or 1 for accuracies;
          `dense_correct`: the same in the dense cell, NaN where that is missing or answered other items;
        * `prediction` (index of the most likely choice), `gold`, `response` (generated text);
        * `loglikelihoods`: one for each choice, nats;
        * `nll` and `dense_nll`: loss of a window, summed over its `n_tokens` tokens, nats; `kl` (nats per token) and
          `top1_agreement` (0 to 1) against the dense model, means over `n_compared` tokens.

    Raises:
        InputError: the folder has no finished cell.

    Warns:
        UserWarning: records that cannot be read are left out, or have no intervals.
    """
    results = read_results(Path(results_dir))
    problems = list(results.problems)
    frame = _item_frame(results, problems) if items else _cell_frame(results, problems)
    for problem in problems:
        warnings.warn(problem, stacklevel=2)
    return frame


def _cell_frame(results: Results, problems: list[str]) -> pd.DataFrame:
    table, _ = compared(results, results.tidy, problems)
    for end in ("low", "high"):
        table[end] = table[f"drop_{end}"].fillna(table[f"ratio_{end}"])
    cells = results.done.index
    parameters = pd.DataFrame([_parameters(results.configs[cell]) for cell in cells], index=cells)
    columns = [*METRIC_COLUMNS, "dense", "drop", "relative_drop", "ratio", "low", "high"]
    return table[columns].join(parameters.sort_index(axis=1), on="cell_id")


def _parameters(config: Any) -> dict[str, Any]:
    criterion = {key: value for key, value in (config.get("criterion") or {}).items() if key != "name"}
    return dict(flatten({"criterion": criterion, "mitigations": config.get("mitigations") or {}}))


def _item_frame(results: Results, problems: list[str]) -> pd.DataFrame:
    tables = []
    for cell_id, place in results.done["place"].items():
        try:
            table = read_samples(place / SAMPLES, {*STATISTICS, *_ITEM_COLUMNS})
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"record {place.name}: samples.parquet: {error}; it has no items")
            continue
        tables.append(table.append_column("cell_id", pa.array([str(cell_id)] * len(table), pa.string())))
    if not tables:
        return pd.DataFrame(columns=_ITEM_COLUMNS)
    frame = pa.concat_tables(tables, promote_options="default").to_pandas()
    shown = primary(results.tidy)[["cell_id", "dense_cell_id", "task", "metric"]]
    frame = frame.merge(shown, on=["cell_id", "task"], how="left").reindex(
        columns=dict.fromkeys([*frame, *_ITEM_COLUMNS])
    )
    frame["correct"] = np.nan
    for metric, rows in frame.groupby("metric").groups.items():
        if f"{METRIC_PREFIX}{metric}" in frame:
            frame.loc[rows, "correct"] = frame.loc[rows, f"{METRIC_PREFIX}{metric}"]
    keys = ["task", "item", "doc_hash"]
    dense = frame.loc[frame["cell_id"] == frame["dense_cell_id"], ["cell_id", *keys, "correct", "nll"]]
    dense = dense.rename(columns={"cell_id": "dense_cell_id", "correct": "dense_correct", "nll": "dense_nll"})
    frame = frame.drop(columns=["dense_correct", "dense_nll"]).merge(dense, on=["dense_cell_id", *keys], how="left")
    return pd.DataFrame(frame, columns=list(_ITEM_COLUMNS))
