"""Tables of a report, filled: which cells stand in which row and column."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from nmsweep.report.numbers.marks import mark
from nmsweep.report.numbers.quantities import QUANTITIES, Quantity
from nmsweep.report.numbers.scores import Scores
from nmsweep.report.show.spec import DIMENSIONS, MISSING, PRESETS, Entry, Table, TableSpec, order
from nmsweep.results.read import FIELDS, Results
from nmsweep.results.tidy import data_kind


def preset_tables(results: Results, scores: Scores) -> list[Table]:
    """Every preset that has something to show: drops, and perplexity ratios, for mini and for real data."""
    tables = []
    for spec in PRESETS:
        for metric in ("drop",) if "task" in spec.cols else ("drop", "ratio"):
            tables += make_tables(replace(spec, metric=metric), results, scores)
    return tables


def _worth_it(spec: TableSpec, long: pd.DataFrame) -> bool:
    """Whether there is a number; a form about weight pruning or targets says nothing where only one is there."""
    special = {"operand_pattern": "operand", "targets_pattern": "targets"}.get(spec.name)
    return bool(long["value"].notna().any()) and (special is None or long[special].nunique() > 1)


def make_tables(spec: TableSpec, results: Results, scores: Scores) -> list[Table]:
    """The table for each kind of data that has numbers for it."""
    tables = []
    for data in ("real", "mini"):
        found = _numbers(spec, scores, data)
        if len(found):
            long = _allowed(spec, _long(spec, found, results, scores, data))
            if _worth_it(spec, long):
                tables.append(_table(spec, long, data, scores))
    return tables


def _numbers(spec: TableSpec, scores: Scores, data: str) -> pd.DataFrame:
    """The rows of `scores` that have a number of the table's quantity: a task's where tasks have rows or columns."""
    quantity = QUANTITIES[spec.metric]
    by_task = _by_task(spec)
    source = scores.per_task if by_task else scores.per_cell
    kind = source["metric"].eq("perplexity") if by_task else source["is_text"]
    return source[(source["data"] == data) & (kind == quantity.text) & source[quantity.column].notna()]


def _by_task(spec: TableSpec) -> bool:
    return "task" in (*spec.rows, *spec.cols)


def _long(spec: TableSpec, found: pd.DataFrame, results: Results, scores: Scores, data: str) -> pd.DataFrame:
    """One row for each cell (and task), failed ones with an empty value; dense ones where they have a value."""
    quantity, by_task = QUANTITIES[spec.metric], _by_task(spec)
    columns: dict[str, Any] = {"value": found[quantity.column]}
    for end in ("low", "high"):
        columns[end] = found[getattr(quantity, end)] if getattr(quantity, end) else np.nan
    if by_task:
        columns["task"] = found["task"]
    long = pd.DataFrame({"cell_id": found["cell_id"], **columns})
    fields = results.cells[[*FIELDS, "variant", "status"]]
    long = long.join(fields, on="cell_id")
    labels = scores.per_cell[(scores.per_cell["data"] == data) & (scores.per_cell["is_text"] == quantity.text)]
    long["tasks"] = long["cell_id"].map(labels.set_index("cell_id")["tasks"])
    failed = _failed(results, data, quantity, long, by_task)
    return pd.concat([long, failed]) if len(failed) else long


def _failed(results: Results, data: str, quantity: Quantity, done: pd.DataFrame, by_task: bool) -> pd.DataFrame:
    """Failed cells that would have had such a number; what a failed cell cannot know is taken from finished ones."""
    cells = results.cells[results.cells["status"] == "failed"]
    rows = []
    for cell_id, cell in zip(cells.index, cells.to_dict("records"), strict=True):
        tasks = [
            task
            for task in str(cell["tasks"]).split("+")
            if data_kind(task) == data and _is_text(task) == quantity.text
        ]
        row = {
            **{name: cell[name] for name in (*FIELDS, "variant", "status")},
            "cell_id": cell_id,
            "tasks": "+".join(tasks),
        }
        rows += [{**row, "task": task} for task in tasks] if by_task else [row] if tasks else []
    failed = pd.DataFrame(rows)
    if len(failed):
        for name, key in (("operand", "criterion"), ("revision", "model")):
            known = done.drop_duplicates(key).set_index(key)[name]
            failed[name] = failed[key].map(known).fillna("")
    return failed


def _is_text(task: str) -> bool:
    return task in ("wikitext2", "mini_prose")


def _allowed(spec: TableSpec, long: pd.DataFrame) -> pd.DataFrame:
    keep = np.ones(len(long), dtype=bool)
    for name, values in spec.where.items():
        keep &= long[name].isin(values).to_numpy()
    return long[keep | (long["pattern"] == "dense").to_numpy()].reset_index(drop=True)


def _table(spec: TableSpec, long: pd.DataFrame, data: str, scores: Scores) -> Table:
    dims = (*spec.rows, *spec.cols)
    front = _front(dims, long)
    sparse = long[long["pattern"] != "dense"]
    constants = {
        name: str(sparse[name].iloc[0])
        for name in FIELDS
        if len(sparse) and name not in (*dims, *front, "operand", "revision", "seed") and sparse[name].nunique() == 1
    }
    index, columns = [*front, *spec.rows], list(spec.cols)
    quantity = QUANTITIES[spec.metric]
    slots = _slots(long, [*index, *columns])
    row_keys, col_keys = _labels(long, index), _labels(long, columns)
    grid = [[slots.get((*row, *col), MISSING) for col in col_keys] for row in row_keys]
    frame = pd.DataFrame(
        grid,
        index=pd.MultiIndex.from_tuples(row_keys, names=index),
        columns=pd.MultiIndex.from_tuples(col_keys, names=columns),
        dtype=object,
    )
    frame = frame.loc[[any(entry.status != "missing" for entry in row) for row in grid]]
    return Table(spec, quantity, data, front, constants, mark(frame, len(front), quantity, data, scores))


def _front(dims: Sequence[str], long: pd.DataFrame) -> tuple[str, ...]:
    """Fields without which two different cells would share a place; cells that differ by seed alone are averaged."""
    front: list[str] = []
    done = long[long["status"] == "done"]
    keys = list(zip(*(done[name].tolist() for name in dims), strict=True))
    for name in (one for one in DIMENSIONS if one in long and one not in (*dims, "seed", "revision", "operand")):
        known: dict[tuple[object, ...], object] = {}
        values = done[name].tolist()
        if any(known.setdefault(key, value) != value for key, value in zip(keys, values, strict=True)):
            front.append(name)
            keys = [(*key, value) for key, value in zip(keys, values, strict=True)]
    return tuple(front)


def _slots(long: pd.DataFrame, fields: Sequence[str]) -> dict[tuple[object, ...], Entry]:
    """Entries by the values of their fields."""
    rows: dict[tuple[object, ...], list[tuple[str, str, float, float, float]]] = {}
    numbers = zip(*(long[name].tolist() for name in ("status", "cell_id", "value", "low", "high")), strict=True)
    for key, one in zip(zip(*(long[name].tolist() for name in fields), strict=True), numbers, strict=True):
        rows.setdefault(key, []).append(one)
    return {key: _entry(same) for key, same in rows.items()}


def _entry(same: Sequence[tuple[str, str, float, float, float]]) -> Entry:
    """The mean over seeds; their interval is found later, from all of them."""
    done = [one for one in same if one[0] == "done"]
    if not done:
        return Entry(status="failed", cells=tuple(one[1] for one in same))
    ids = tuple(one[1] for one in done)
    if len(done) == 1:
        return Entry(*done[0][2:], status="done", cells=ids)
    return Entry(sum(one[2] for one in done) / len(done), status="done", cells=ids)


def _labels(long: pd.DataFrame, fields: Sequence[str]) -> list[tuple[object, ...]]:
    """Distinct keys in reading order."""
    distinct = long[list(fields)].drop_duplicates().itertuples(index=False, name=None)
    return sorted(distinct, key=lambda key: [order(name, value) for name, value in zip(fields, key, strict=True)])
