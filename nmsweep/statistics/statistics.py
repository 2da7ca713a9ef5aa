"""Statistics of paired items: the dense and the sparse cell saw the same ones, so their noise cancels. No torch.

What each number means, and what it does not: docs/evaluation.md. From records to these: `comparison`.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc

Floats = NDArray[np.float64]

N_RESAMPLES = 10_000
"""Bootstrap resamples."""

LEVEL = 0.95
"""Of every interval."""


class Interval(NamedTuple):
    """Ends of a 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Pairs:
    """One metric of one task, item by item.

    Attributes:
        dense, sparse: [n], each item's value in the dense and in the sparse cell; higher is better, the metric is the mean.
        subtask: [n], what each item belongs to, where the metric is the mean over subtasks of their means; None where it is
            that over items.
    """

    task: str
    metric: str
    dense: Floats
    sparse: Floats
    subtask: NDArray[np.str_] | None = None

    def __len__(self) -> int:
        return len(self.dense)

    @property
    def parts(self) -> "list[Pairs]":
        """What counts alike: the subtasks, or all items together."""
        if self.subtask is None:
            return [self]
        return [
            Pairs(
                f"{self.task}/{name}", self.metric, self.dense[self.subtask == name], self.sparse[self.subtask == name]
            )
            for name in np.unique(self.subtask)
        ]

    @property
    def means(self) -> tuple[float, float]:
        """The metric in the dense and in the sparse cell."""
        dense, sparse = np.mean([[part.dense.mean(), part.sparse.mean()] for part in self.parts], axis=0)
        return float(dense), float(sparse)

    @property
    def is_binary(self) -> bool:
        """Whether every value is 0 or 1, right or wrong."""
        return bool(np.isin(self.dense, (0, 1)).all() and np.isin(self.sparse, (0, 1)).all())


@dataclass(frozen=True)
class Average:
    """Unweighted mean over tasks of one cell's drops, with 95 % intervals; `n_tasks` tasks."""

    drop: float
    drop_low: float
    drop_high: float
    relative_drop: float
    relative_low: float
    relative_high: float
    n_tasks: int


def average(pairs: Sequence[Pairs], seed: int = 0) -> Average:
    """Mean over tasks; the items of each task are resampled by themselves, the tasks are not: they are no sample.

    Args:
        pairs: one metric for each task.
        seed: of the bootstrap.
    """
    means = np.stack([bootstrap_means(one, seed) for one in pairs])  # [tasks, resamples, 2]
    own = np.array([one.means for one in pairs])
    drop = interval((means[..., 0] - means[..., 1]).mean(axis=0))
    relative = interval(relative_drops(means).mean(axis=0))
    return Average(
        float((own[:, 0] - own[:, 1]).mean()), *drop, float(relative_drops(own).mean()), *relative, n_tasks=len(pairs)
    )


def relative_drops(means: Floats) -> Floats:
    """(dense − sparse) / dense of means [*, 2]; NaN where dense is 0."""
    dense, sparse = means[..., 0], means[..., 1]
    return np.divide(dense - sparse, dense, out=np.full_like(dense, math.nan), where=dense != 0)


def bootstrap_means(pairs: Pairs, seed: int = 0, n_resamples: int = N_RESAMPLES) -> Floats:
    """Means of the dense and the sparse values of resampled items, [n_resamples, 2].

    A resample of items is a multinomial draw of how often each distinct pair of values comes up, so right-or-wrong
    metrics cost four numbers a resample however many items there are. Tasks have streams of their own; subtasks that count
    alike are resampled each by itself.
    """
    if pairs.subtask is not None:
        means: Floats = np.mean([bootstrap_means(part, seed, n_resamples) for part in pairs.parts], axis=0)
        return means
    values, counts = np.unique(np.stack([pairs.dense, pairs.sparse], axis=1), axis=0, return_counts=True)
    draw = np.random.default_rng([seed, zlib.crc32(pairs.task.encode())])
    n = len(pairs)
    if len(values) <= 64:
        return draw.multinomial(n, counts / n, size=n_resamples) @ values / n
    both = np.stack([pairs.dense, pairs.sparse], axis=1)
    step = max(1, 2**22 // n)
    sizes = [min(step, n_resamples - at) for at in range(0, n_resamples, step)]
    return np.concatenate([both[draw.integers(n, size=(size, n))].mean(axis=1) for size in sizes])


def interval(replicates: ArrayLike) -> Interval:
    """The 95 % percentile interval of bootstrap replicates; NaN where one of them is not a number."""
    low, high = np.quantile(np.asarray(replicates, dtype=np.float64), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value for as many items lost as gained: a sign test on the items that changed.

    Twice the smaller tail, at most 1. Source: McNemar 1947, with the binomial distribution instead of χ².
    """
    fewer, more = sorted((lost, gained))
    return (
        min(1.0, 2 * float(betainc(more, fewer + 1, 0.5))) if more else 1.0
    )  # P(at most `fewer` of both), as `stats.binomtest` has it


def holm(p_values: ArrayLike) -> Floats:
    """Holm's adjusted p-values of one family, in the order given; NaN stays NaN and is no member.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full_like(p, math.nan)
    members = np.flatnonzero(~np.isnan(p))
    order = members[np.argsort(p[members], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted
