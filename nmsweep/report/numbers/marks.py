"""Which entry of a column is the best, which are not told apart from it, and the intervals of means over seeds."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from nmsweep.report.numbers.quantities import Quantity
from nmsweep.report.numbers.scores import Scores
from nmsweep.report.show.spec import Entry
from nmsweep.statistics.paired import Matrix, chunks, ends
from nmsweep.statistics.statistics import LEVEL


def mark(frame: pd.DataFrame, n_front: int, quantity: Quantity, data: str, scores: Scores) -> pd.DataFrame:
    """The table with its entries marked. Rows that differ in their first `n_front` labels are no rivals, nor is dense."""
    cells = frame.to_numpy(dtype=object, copy=True)
    at_task = _place(frame.columns.names, "task")
    for (column, _), places in _rivals(frame, cells, n_front).items():
        if len(places) > 1 or (quantity.low and len(cells[places[0]].cells) > 1):
            task = None if at_task is None else str(frame.columns[column][at_task])
            entries = [cells[place] for place in places]
            known = scores.replicates(quantity, [entry.cells for entry in entries], data, task)
            if quantity.low:
                entries = _with_intervals(entries, known)
            for place, entry in zip(places, _marked(entries, known, quantity), strict=True):
                cells[place] = entry
    return pd.DataFrame(cells, index=frame.index, columns=frame.columns, dtype=object)


def _rivals(frame: pd.DataFrame, cells: Any, n_front: int) -> dict[tuple[int, object], list[tuple[int, int]]]:
    """Rows and columns of finished sparse entries, by what they have in common with their rivals."""
    dense_rows, dense_columns = _dense(frame.index), _dense(frame.columns)
    fronts = [key[:n_front] for key in frame.index]
    found: dict[tuple[int, object], list[tuple[int, int]]] = {}
    for (row, column), entry in np.ndenumerate(cells):
        if entry.status == "done" and not dense_rows[row] and not dense_columns[column]:
            found.setdefault((column, fronts[row]), []).append((row, column))
    return found


def _dense(labels: pd.Index) -> list[bool]:
    at = _place(labels.names, "pattern")
    return [at is not None and key[at] == "dense" for key in labels]


def _place(names: Sequence[Any], name: str) -> int | None:
    return list(names).index(name) if name in names else None


def _with_intervals(entries: Sequence[Entry], known: Sequence[Matrix | None]) -> list[Entry]:
    """The entries, those that are means over seeds with intervals: the same items, resampled in all seeds at once."""
    found = list(entries)
    several = [(at, one) for at, one in enumerate(known) if one is not None and len(entries[at].cells) > 1]
    for chunk in chunks(several):
        lows, highs = ends(np.stack([one for _, one in chunk]))
        for (at, _), low, high in zip(chunk, lows.tolist(), highs.tolist(), strict=True):
            found[at] = replace(entries[at], low=low, high=high)
    return found


def _marked(entries: Sequence[Entry], known: Sequence[Matrix | None], quantity: Quantity) -> list[Entry]:
    """The entries with their marks; a single one has no rivals."""
    if len(entries) < 2:
        return list(entries)
    values = [entry.value for entry in entries]
    top = min(values) if quantity.better == "lower" else max(values)
    best = known[values.index(top)]
    return [
        replace(entry, best=entry.value == top, tied=entry.value != top and not_worse(own, best, quantity))
        for entry, own in zip(entries, known, strict=True)
    ]


def not_worse(own: Matrix | None, best: Matrix | None, quantity: Quantity) -> bool:
    """Whether the 95 % interval of how much worse it is than the best, on the same resampled items, reaches 0."""
    if own is None or best is None or own.shape != best.shape:
        return False
    with np.errstate(invalid="ignore"):  # relative to a dense score of 0 both may be infinite: no evidence, NaN
        worse = own - best if quantity.better == "lower" else best - own
    return bool(np.count_nonzero(worse <= 0) / worse.size >= (1 - LEVEL) / 2)  # sooner than a mean
