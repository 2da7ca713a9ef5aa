"""Paired statistics of many cells at once: one set of resampled items serves all cells that saw the same items.

So the difference between any two cells is paired too, not only that with the dense cell, and thousands of cells cost one
matrix product a task. The statistics are those of `nmsweep.statistics.statistics`; only the resamples are others.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nmsweep.report.numbers.samples import Floats, Samples, TaskItems
from nmsweep.report.workers import in_threads
from nmsweep.statistics.changes import PERPLEXITY, Pair, changes, flips_of, kl, stacked
from nmsweep.statistics.comparison import holm_by_task
from nmsweep.statistics.statistics import LEVEL

Matrix = NDArray[np.float32]
_T = TypeVar("_T")

_FEW, _FEW_CELLS = 500_000, 1_000
"""Items × cells, and cells, up to which 10,000 resamples are drawn; 2,000 beyond."""


_FEW_ITEMS = 64
"""Items up to which replicates are sooner worked out whenever they are wanted than kept."""

_CHUNK = 128


@dataclass(frozen=True, eq=False)
class Replicates:
    """Bootstrap replicates of cells that saw the same items, float32.

    Attributes:
        rows: row of a cell.
        means: [cells, resamples] of some rows, mean of the metric; for a text, mean loss a token in nats.
    """

    rows: Mapping[str, int]
    means: Callable[[Sequence[int]], Matrix]

    def of(self, cells: Sequence[str]) -> Matrix:
        """Replicates of cells, [cells, resamples]; may be a view."""
        return self.means([self.rows[cell] for cell in cells])


@dataclass(frozen=True)
class PairedResults:
    """What items say about pairs of cells.

    Attributes:
        table: one row a pair, task and metric: `first`, `second`, `task`, `metric`, `n_items`, and what `compare` of
            `nmsweep.statistics.comparison` gives, with Holm's `p_holm`.
        replicates: of the cells in pairs, by task and metric; a cell is in one of the list's elements (cells with other
            items are in others).
        flips: by second cell and task, of the pair's metric: items right in the first cell only, in the second only.
        n_resamples: of every interval.
    """

    table: pd.DataFrame
    replicates: Mapping[tuple[str, str], Sequence[Replicates]]
    flips: Mapping[tuple[str, str], tuple[list[int], list[int]]] = field(default_factory=dict)
    n_resamples: int = 0

    def groups(self, dense: str, cell: str, tasks: Sequence[tuple[str, str]]) -> tuple[Replicates, ...] | None:
        """Of each task and metric, the replicates among which both cells are; None where a task has none."""
        found = [
            next((one for one in self.replicates.get(task, ()) if cell in one.rows and dense in one.rows), None)
            for task in tasks
        ]
        known = tuple(one for one in found if one is not None)
        return known if found and len(known) == len(found) else None


def paired(
    samples: Mapping[str, Samples], pairs: Sequence[Pair], metrics: Mapping[str, Sequence[str]]
) -> PairedResults:
    """Compare pairs of cells on each task.

    Args:
        samples: by cell id; a cell that is missing has no rows.
        pairs: what is compared with what. The second cell is in one pair only.
        metrics: of each task, those that are compared; flips are those of the first.
    """
    pairs = [pair for pair in pairs if pair.first in samples and pair.second in samples]
    n_items = sum(len(items.item) for one in samples.values() for items in one.values())
    n_resamples = 10_000 if n_items <= _FEW and len(samples) <= _FEW_CELLS else 2_000
    jobs: list[tuple[str, str, Mapping[str, TaskItems], Replicates, Sequence[Pair]]] = []
    replicates: dict[tuple[str, str], list[Replicates]] = {}
    flips: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
    for task, names in metrics.items():
        for place, metric in enumerate(names):
            drawn = replicates.setdefault((task, metric), [])
            for group in _same_items(samples, task, metric):
                here = [pair for pair in pairs if pair.first in group and pair.second in group]
                if not here:
                    continue
                cells = list(dict.fromkeys(cell for pair in here for cell in (pair.first, pair.second)))
                drawn.append(_resampled(task, metric, group, cells, n_resamples))
                for chunk in _by_first(here):
                    jobs.append((task, metric, group, drawn[-1], chunk))
                    if place == 0:
                        flips.update(flips_of(task, metric, group, chunk))
    table = _joined(in_threads(_rows, jobs))
    if len(table):
        table["p_holm"] = holm_by_task(table) if "p_value" in table else np.nan  # texts alone have no test
    return PairedResults(table, replicates, flips, n_resamples)


def _joined(parts: Sequence[Mapping[str, Sequence[Any] | Floats]]) -> pd.DataFrame:
    """Columns of many parts, one below the other; a column that a part lacks is NaN there."""
    if not parts:
        return pd.DataFrame(columns=["first", "second", "task", "metric"])
    names = dict.fromkeys(name for part in parts for name in part)
    columns = {name: [part.get(name, np.full(len(part["first"]), np.nan)) for part in parts] for name in names}
    return pd.DataFrame({name: np.concatenate(column) for name, column in columns.items()})


def chunks(cells: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """Few enough that their replicates stay in the processor's cache."""
    return (cells[at : at + _CHUNK] for at in range(0, len(cells), _CHUNK))


def _by_first(pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    """Pairs with one first cell, chunk by chunk."""
    by_first: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_first.setdefault(pair.first, []).append(pair)
    return (chunk for same in by_first.values() for chunk in chunks(same))


def _same_items(samples: Mapping[str, Samples], task: str, metric: str) -> Iterator[dict[str, TaskItems]]:
    """Cells by the items that they saw."""
    column = "nll" if metric == PERPLEXITY else metric
    groups: dict[bytes, dict[str, TaskItems]] = {}
    for cell, tasks in samples.items():
        items = tasks.get(task)
        if items is not None and column in items.values and len(items.item):
            groups.setdefault(items.item.tobytes(), {})[cell] = items
    yield from groups.values()


def _resampled(
    task: str, metric: str, group: Mapping[str, TaskItems], cells: Sequence[str], n_resamples: int
) -> Replicates:
    """Means over resampled items; a text's windows are its items, weighted by their tokens."""
    name = "nll" if metric == PERPLEXITY else metric
    sums = stacked(group, cells, name).astype(np.float32)
    weights = np.ones(sums.shape[1], dtype=np.float32)
    if metric == PERPLEXITY:
        weights = group[cells[0]].values["n_tokens"].astype(np.float32)
    draws = _draws(task, sums.shape[1], n_resamples)
    rows = {cell: row for row, cell in enumerate(cells)}
    if sums.shape[1] <= _FEW_ITEMS:
        counts = np.ascontiguousarray(np.concatenate(list(draws)).T)
        return Replicates(rows, lambda chosen: _means(sums[chosen], counts, weights))
    means = np.empty((len(cells), n_resamples), dtype=np.float32)
    at = 0
    for some in draws:
        means[:, at : at + len(some)] = _means(sums, some.T, weights)
        at += len(some)
    return Replicates(rows, lambda chosen: means[_as_slice(chosen)])


def _means(sums: Matrix, counts: Matrix, weights: Matrix) -> Matrix:
    """Means [cells, resamples] of items that each resample has some times, [items, resamples]."""
    two = np.repeat(sums, 2, axis=0) if len(sums) == 1 else sums  # the product of a single row is rounded otherwise
    means = two @ counts
    means /= weights @ counts
    return means[: len(sums)]


def _as_slice(rows: Sequence[int]) -> slice | Sequence[int]:
    """Rows that lie together as a slice, which copies nothing."""
    start = rows[0]
    return slice(start, start + len(rows)) if list(rows) == list(range(start, start + len(rows))) else rows


def _draws(task: str, n: int, n_resamples: int) -> Iterator[Matrix]:
    """How often each of n items is in a resample, [some resamples, n] at a time; the same for the same task and n."""
    draw = np.random.default_rng([zlib.crc32(task.encode()), n])
    step = max(1, 2**22 // n)
    for at in range(0, n_resamples, step):
        size = min(step, n_resamples - at)
        chosen = draw.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(chosen.ravel(), minlength=size * n).reshape(size, n).astype(np.float32)


def ends(replicates: Matrix) -> tuple[Floats, Floats]:
    """Percentile interval of each row, NaN where one of its replicates is; as `numpy.quantile` has it."""
    last = replicates.shape[1] - 1
    places = [last * (1 - LEVEL) / 2, last * (1 + LEVEL) / 2]
    part = np.sort(replicates, axis=1)  # vectorised, and sooner than a partition at four places
    bad = np.isnan(part[:, -1])
    found = []
    for place in places:
        below, above = (part[:, rounded(place)].astype(np.float64) for rounded in (math.floor, math.ceil))
        with np.errstate(invalid="ignore"):  # a relative drop from 0 is infinite
            found.append(np.where(bad, np.nan, below + (above - below) * (place - math.floor(place))))
    return found[0], found[1]


def _rows(
    job: tuple[str, str, Mapping[str, TaskItems], Replicates, Sequence[Pair]],
) -> dict[str, Sequence[Any] | Floats]:
    """Columns, of a task, a metric, the cells that saw the same items, their replicates, and at least one pair of them."""
    task, metric, group, drawn, pairs = job
    first, second = [pair.first for pair in pairs], [pair.second for pair in pairs]
    a, b = drawn.of(first[:1]), drawn.of(second)
    n = len(pairs)
    found: dict[str, Sequence[Any] | Floats] = {
        "first": np.array(first, dtype=object), "second": np.array(second, dtype=object),
        "task": np.full(n, task, dtype=object), "metric": np.full(n, metric, dtype=object),
        "n_items": np.full(n, len(group[first[0]].item)),
    }  # fmt: skip
    if metric == PERPLEXITY:
        low, high = ends(np.exp(b - a))
        return found | {"ratio_low": low, "ratio_high": high} | kl(group, second)
    low, high = ends(a - b)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative_low, relative_high = ends((a - b) / a)
    found |= {"drop_low": low, "drop_high": high, "relative_low": relative_low, "relative_high": relative_high}
    return found | changes(metric, group, first, second)
