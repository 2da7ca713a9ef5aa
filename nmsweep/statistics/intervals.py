"""Bootstrap intervals over a task's items.

The resamples follow from the task's name and its number of items alone. So all cells that answered the same items are
resampled together, any two of them can be compared item by item, and a number has the same interval wherever it is computed.
"""

import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Replicates = NDArray[np.float32]
"""Bootstrap replicates, [rows, resamples]."""

N_RESAMPLES = 10_000
LEVEL = 0.95
"""Coverage of every interval."""

_BLOCK = 2**22
"""Items × resamples drawn or multiplied at once: bounds the memory."""


@lru_cache(maxsize=32)
def resample_counts(task: str, n_items: int, subtasks: tuple[str, ...] | None = None) -> NDArray[np.uint8]:
    """Draw bootstrap resamples of a task's items.

    Args:
        task: seeds the draw, together with the number of items.
        n_items: items to draw from, and to draw.
        subtasks: the subtask of each item, [items], where each subtask is resampled by itself; None draws from all items.

    Returns:
        How often each item occurs in each resample, [items, resamples].
    """
    if subtasks is None:
        return _drawn(task, n_items)
    counts = np.empty((n_items, N_RESAMPLES), dtype=np.uint8)
    for subtask in dict.fromkeys(subtasks):
        members = np.flatnonzero(np.array(subtasks) == subtask)
        counts[members] = _drawn(f"{task}/{subtask}", len(members))
    return counts


def _drawn(name: str, n_items: int) -> NDArray[np.uint8]:
    generator = np.random.default_rng([zlib.crc32(name.encode()), n_items])
    counts = np.empty((N_RESAMPLES, n_items), dtype=np.uint8)
    step = max(1, _BLOCK // n_items)
    for start in range(0, N_RESAMPLES, step):
        size = min(step, N_RESAMPLES - start)
        items = generator.integers(n_items, size=(size, n_items)) + n_items * np.arange(size)[:, None]
        counts[start : start + size] = np.bincount(items.ravel(), minlength=size * n_items).reshape(size, n_items)
    return np.ascontiguousarray(counts.T)


def resampled_means(sums: ArrayLike, weights: ArrayLike, counts: NDArray[np.uint8]) -> Replicates:
    """Compute the weighted mean of each row in every resample.

    Args:
        sums: [rows, items], each item's value times its weight; for a window of a text, the loss summed over its tokens.
        weights: [items], such as a window's number of tokens.
        counts: [items, resamples], from `resample_counts`.

    Returns:
        [rows, resamples].
    """
    sums, weights = np.asarray(sums, dtype=np.float32), np.asarray(weights, dtype=np.float32)
    means = np.empty((len(sums), counts.shape[1]), dtype=np.float32)
    step = max(1, _BLOCK // len(counts))
    for start in range(0, counts.shape[1], step):
        block = counts[:, start : start + step].astype(np.float32)
        means[:, start : start + step] = (sums @ block) / (weights @ block)
    return means


def percentile_interval(replicates: ArrayLike) -> tuple[Floats, Floats]:
    """Return both ends of the 95 % percentile interval.

    Args:
        replicates: [rows, resamples].

    Returns:
        The lower and the upper ends, [rows]; NaN where one of the row's replicates is NaN.
    """
    with np.errstate(invalid="ignore"):  # a relative drop from 0 is infinite
        low, high = np.quantile(np.asarray(replicates), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=-1)
    return low, high
