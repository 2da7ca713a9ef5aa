"""The marks of a table: the best entry of a column, those not significantly worse, and intervals of means over seeds."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from nmsweep.report.numbers.quantities import Quantity
from nmsweep.report.numbers.scores import Scores
from nmsweep.report.show.spec import Entry
from nmsweep.statistics.intervals import LEVEL, Replicates, percentile_interval


def mark(frame: pd.DataFrame, n_front: int, quantity: Quantity, data: str, scores: Scores) -> pd.DataFrame:
    """Return the table with its entries marked.

    Rows are compared with those that have the same first `n_front` labels; dense is not compared.
    """
    cells = frame.to_numpy(dtype=object, copy=True)
    for (column, _), places in _rivals(frame, cells, n_front).items():
        names = list(frame.columns.names)
        task = str(frame.columns[column][names.index("task")]) if "task" in names else None
        entries = [cells[place] for place in places]
        if len(entries) > 1 or (quantity.low and len(entries[0].cells) > 1):
            known = scores.replicates(quantity, [entry.cells for entry in entries], data, task)
            if quantity.low:
                entries = [_with_interval(*pair) for pair in zip(entries, known, strict=True)]
            for place, entry in zip(places, _marked(entries, known, quantity), strict=True):
                cells[place] = entry
    return pd.DataFrame(cells, index=frame.index, columns=frame.columns, dtype=object)


def _rivals(frame: pd.DataFrame, cells: Any, n_front: int) -> dict[tuple[int, object], list[tuple[int, int]]]:
    """Places of finished sparse entries, by column and front labels."""
    dense_rows, dense_columns = _dense(frame.index), _dense(frame.columns)
    fronts = [key[:n_front] for key in frame.index]
    rivals: dict[tuple[int, object], list[tuple[int, int]]] = {}
    for (row, column), entry in np.ndenumerate(cells):
        if entry.status == "done" and not dense_rows[row] and not dense_columns[column]:
            rivals.setdefault((column, fronts[row]), []).append((row, column))
    return rivals


def _dense(labels: pd.Index) -> list[bool]:
    names = list(labels.names)
    return ["pattern" in names and key[names.index("pattern")] == "dense" for key in labels]


def _with_interval(entry: Entry, replicates: Replicates | None) -> Entry:
    """The entry; a mean over seeds gets its interval, from the same resampled items in all seeds."""
    if replicates is None or len(entry.cells) < 2:
        return entry
    low, high = percentile_interval(replicates)
    return replace(entry, low=float(low), high=float(high))


def _marked(entries: Sequence[Entry], known: Sequence[Replicates | None], quantity: Quantity) -> list[Entry]:
    """The entries with their marks; a single one is not marked."""
    if len(entries) < 2:
        return list(entries)
    values = [entry.value for entry in entries]
    top = min(values) if quantity.better == "lower" else max(values)
    best = known[values.index(top)]
    return [
        replace(entry, best=entry.value == top, tied=entry.value != top and not_worse(replicates, best, quantity))
        for entry, replicates in zip(entries, known, strict=True)
    ]


def not_worse(replicates: Replicates | None, best: Replicates | None, quantity: Quantity) -> bool:
    """Return whether the 95 % interval of the paired difference to the best reaches 0."""
    if replicates is None or best is None:
        return False
    with np.errstate(invalid="ignore"):  # relative to a dense score of 0 both may be infinite: no evidence, NaN
        worse = replicates - best if quantity.better == "lower" else best - replicates
    return bool(np.count_nonzero(worse <= 0) / worse.size >= (1 - LEVEL) / 2)
