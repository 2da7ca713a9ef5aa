"""The tables of a report: cells arranged by rows and columns."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from nmsweep.report.numbers.marks import mark
from nmsweep.report.numbers.quantities import QUANTITIES, Quantity
from nmsweep.report.numbers.scores import Scores
from nmsweep.report.show.spec import DIMENSIONS, MISSING, PRESETS, Entry, Table, TableSpec, order
from nmsweep.results.read import FIELDS, Results
from nmsweep.results.tidy import PERPLEXITY, data_kind


def preset_tables(results: Results, scores: Scores) -> list[Table]:
    """Return the presets that have numbers: drops, and perplexity ratios, for mini and for real data."""
    tables = []
    for spec in PRESETS:
        for metric in ("drop",) if "task" in spec.cols else ("drop", "ratio"):
            tables += make_tables(replace(spec, metric=metric), results, scores)
    return tables


def _worth_it(spec: TableSpec, long: pd.DataFrame) -> bool:
    """Whether there is a number, and for a table about weight pruning or targets, more than one of these."""
    special = {"operand_pattern": "operand", "targets_pattern": "targets"}.get(spec.name)
    return bool(long["value"].notna().any()) and (special is None or long[special].nunique() > 1)


def make_tables(spec: TableSpec, results: Results, scores: Scores) -> list[Table]:
    """Return the table for each kind of data that has numbers for it."""
    tables = []
    for data in ("real", "mini"):
        long = _long(spec, results, scores, data)
        if len(long):
            long = _allowed(spec, long)
            if _worth_it(spec, long):
                tables.append(_table(spec, long, data, scores))
    return tables


def _by_task(spec: TableSpec) -> bool:
    return "task" in (*spec.rows, *spec.cols)


def _long(spec: TableSpec, results: Results, scores: Scores, data: str) -> pd.DataFrame:
    """One row for each cell (and task) with the table's quantity; failed ones have an empty value."""
    quantity, by_task = QUANTITIES[spec.metric], _by_task(spec)
    labels = scores.per_cell[(scores.per_cell["data"] == data) & (scores.per_cell["is_text"] == quantity.text)]
    source = labels
    if by_task:
        is_text = scores.per_task["metric"] == PERPLEXITY
        source = scores.per_task[(scores.per_task["data"] == data) & (is_text == quantity.text)]
    numbers = source[source[quantity.column].notna()]
    if not len(numbers):
        return pd.DataFrame()
    long = numbers[["cell_id", *(["task"] if by_task else [])]].assign(value=numbers[quantity.column])
    for end, column in (("low", quantity.low), ("high", quantity.high)):
        long[end] = numbers[column] if column else np.nan
    long = long.join(results.cells[[*FIELDS, "variant", "status"]], on="cell_id")
    long["tasks"] = long["cell_id"].map(labels.set_index("cell_id")["tasks"])
    failed = _failed(results, data, quantity, long, by_task)
    return pd.concat([long, failed]) if len(failed) else long


def _failed(results: Results, data: str, quantity: Quantity, done: pd.DataFrame, by_task: bool) -> pd.DataFrame:
    """Failed cells that would have had such a number; fields that they lack are taken from finished ones."""
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
    """Fields that keep different cells apart; cells that differ by seed alone are averaged."""
    front: list[str] = []
    done = long[long["status"] == "done"]
    for name in DIMENSIONS:
        if name not in long or name in (*dims, "seed", "revision", "operand"):
            continue
        if (done.groupby([*dims, *front], sort=False, dropna=False)[name].nunique(dropna=False) > 1).any():
            front.append(name)
    return tuple(front)


def _slots(long: pd.DataFrame, fields: Sequence[str]) -> dict[tuple[object, ...], Entry]:
    """Entries by the values of their fields."""
    rows: dict[tuple[object, ...], list[Entry]] = {}
    keys = long[list(fields)].itertuples(index=False, name=None)
    columns = (long[name].tolist() for name in ("value", "low", "high", "status", "cell_id"))
    for key, (value, low, high, status, cell_id) in zip(keys, zip(*columns, strict=True), strict=True):
        rows.setdefault(key, []).append(Entry(value, low, high, status, cells=(cell_id,)))
    return {key: _merged(entries) for key, entries in rows.items()}


def _merged(entries: Sequence[Entry]) -> Entry:
    """The mean over seeds; `mark` adds its interval."""
    done = [entry for entry in entries if entry.status == "done"]
    if len(done) == 1:
        return done[0]
    cells = tuple(cell for entry in done or entries for cell in entry.cells)
    if not done:
        return Entry(status="failed", cells=cells)
    return Entry(sum(entry.value for entry in done) / len(done), status="done", cells=cells)


def _labels(long: pd.DataFrame, fields: Sequence[str]) -> list[tuple[object, ...]]:
    """Distinct keys in display order."""
    distinct = long[list(fields)].drop_duplicates().itertuples(index=False, name=None)
    return sorted(distinct, key=lambda key: [order(name, value) for name, value in zip(fields, key, strict=True)])
