"""Which entry of a column is the best, which are not told apart from it, and the intervals of means over seeds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nmsweep.evaluate.statistics import LEVEL
from nmsweep.report.paired import Matrix, ends
from nmsweep.report.scores import Quantity, Scores
from nmsweep.report.spec import Entry


@dataclass(frozen=True)
class Column:
    """What the entries of one column are: a quantity of one kind of data, on one task or the mean over tasks."""

    quantity: Quantity
    data: str
    task: str | None
    scores: Scores

    def prepare(self, entries: Iterable[Entry]) -> None:
        """Work out the replicates of many entries at once."""
        cells = [cell for entry in entries for cell in entry.cells]
        self.scores.prepare(self.quantity, cells, self.data, self.task)

    def replicates(self, entry: Entry) -> Matrix | None:
        """Bootstrap replicates of an entry, the mean over its seeds; None where there are none."""
        found = [self.scores.replicates(self.quantity, cell, self.data, self.task) for cell in entry.cells]
        known = [one for one in found if one is not None]
        if not known or len(known) < len(found):
            return None
        return known[0] if len(known) == 1 else np.asarray(np.mean(known, axis=0))


def mark(frame: pd.DataFrame, n_front: int, quantity: Quantity, data: str, scores: Scores) -> pd.DataFrame:
    """The table with its entries marked. Rows that differ in their first `n_front` labels are no rivals, nor is dense."""
    rows: dict[tuple[object, ...], list[int]] = {}
    at_pattern, column_pattern, at_task = (
        _place(names, name)
        for names, name in (
            (frame.index.names, "pattern"),
            (frame.columns.names, "pattern"),
            (frame.columns.names, "task"),
        )
    )
    for place, key in enumerate(frame.index):
        if at_pattern is None or key[at_pattern] != "dense":
            rows.setdefault(tuple(key[:n_front]), []).append(place)
    cells = frame.to_numpy(dtype=object, copy=True)
    for number, key in enumerate(frame.columns):
        if column_pattern is not None and key[column_pattern] == "dense":
            continue
        column = Column(quantity, data, None if at_task is None else str(key[at_task]), scores)
        for places in rows.values():
            _mark_rivals(cells[:, number], places, column)
    return pd.DataFrame(cells, index=frame.index, columns=frame.columns, dtype=object)


def _place(names: Sequence[Any], name: str) -> int | None:
    return list(names).index(name) if name in names else None


def _mark_rivals(cells: NDArray[Any], places: list[int], column: Column) -> None:
    entries: dict[int, Entry] = {place: cells[place] for place in places}
    column.prepare(entry for entry in entries.values() if entry.status == "done")
    done = {place: over_seeds(entry, column) for place, entry in entries.items() if entry.status == "done"}
    for place, entry in marked(done, column).items():
        cells[place] = entry


def marked(entries: Mapping[int, Entry], column: Column) -> dict[int, Entry]:
    """The entries with their marks; a single one has no rivals."""
    if len(entries) < 2:
        return dict(entries)
    choose: Callable[..., float] = min if column.quantity.better == "lower" else max
    top = choose(entry.value for entry in entries.values())
    best = next(entry for entry in entries.values() if entry.value == top)
    return {
        place: replace(entry, best=entry.value == top, tied=entry.value != top and not_worse(entry, best, column))
        for place, entry in entries.items()
    }


def over_seeds(entry: Entry, column: Column) -> Entry:
    """The entry with the interval of its mean over seeds: the same items, resampled in all of them at once."""
    mean = column.replicates(entry) if len(entry.cells) > 1 and column.quantity.low else None
    if mean is None:
        return entry
    low, high = ends(mean[None])
    return replace(entry, low=float(low[0]), high=float(high[0]))


def not_worse(entry: Entry, best: Entry, column: Column) -> bool:
    """Whether the 95 % interval of how much worse it is than the best, on the same resampled items, reaches 0."""
    a, b = column.replicates(entry), column.replicates(best)
    if a is None or b is None or a.shape != b.shape:
        return False
    with np.errstate(invalid="ignore"):  # relative to a dense score of 0 both may be infinite: no evidence, NaN
        worse = a - b if column.quantity.better == "lower" else b - a
    return bool(np.count_nonzero(worse <= 0) / worse.size >= (1 - LEVEL) / 2)  # sooner than a mean
