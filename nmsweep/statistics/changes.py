"""What changed between a dense cell and others on the items that both saw: flips, answers, log-likelihoods, KL. No resampling."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from nmsweep.report.numbers.samples import Floats, TaskItems
from nmsweep.statistics.statistics import mcnemar

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Pair:
    """Two cells that are compared: `first` is the reference (the dense cell), `second` the other."""

    first: str
    second: str


def stacked(group: Mapping[str, TaskItems], cells: Sequence[str], name: str) -> Floats:
    """One column of cells that saw the same items, [cells, items]."""
    return np.stack([group[cell].values[name] for cell in cells])


def kl(group: Mapping[str, TaskItems], cells: Sequence[str]) -> dict[str, Floats]:
    """KL to the dense model and agreement with it, means over the tokens that were compared; NaN where not recorded."""
    return {name: np.array([_weighted(group[cell], name) for cell in cells]) for name in ("kl", "top1_agreement")}


def _weighted(items: TaskItems, name: str) -> float:
    values, weights = items.values.get(name), items.values.get("n_compared")
    if values is None or weights is None:
        return math.nan
    have = ~np.isnan(values) & (weights > 0)
    if not have.any():
        return math.nan
    if not have.all():
        values, weights = values[have], weights[have]
    return float((values * weights).sum() / weights.sum())


def changes(
    metric: str, group: Mapping[str, TaskItems], first: Sequence[str], second: Sequence[str]
) -> dict[str, Floats]:
    """Flips between right and wrong with their test, answers changed, and how far log-likelihoods moved."""
    a, b = stacked(group, first, metric), stacked(group, second, metric)
    found: dict[str, Floats] = {}
    if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        lost, gained = ((a > b).sum(axis=1), (a < b).sum(axis=1))
        n = a.shape[1]
        found = {
            "lost": lost / n, "gained": gained / n, "flip_rate": (lost + gained) / n,
            "p_value": np.array([_mcnemar(x, y) for x, y in zip(lost.tolist(), gained.tolist(), strict=True)]),
        }  # fmt: skip
    return found | _moved(metric, group[first[0]], [group[cell] for cell in second])


_mcnemar = cache(mcnemar)


def _moved(metric: str, first: TaskItems, second: Sequence[TaskItems]) -> dict[str, Floats]:
    """Share of items whose chosen answer is another one, and mean |Δ log-likelihood| in nats."""
    a = first.loglikelihoods
    if a is None or any(one.loglikelihoods is None or one.loglikelihoods.shape != a.shape for one in second):
        return {}
    b = np.stack([one.loglikelihoods for one in second if one.loglikelihoods is not None])
    real = np.isfinite(a)
    delta = np.abs(b[:, real] - a[real]).mean(axis=1)
    if metric == "acc_norm" and first.chars is None:
        return {"mean_abs_delta": delta}
    n_choices = a.shape[1] if first.chars is None else first.chars.shape[1]
    per = first.chars if metric == "acc_norm" and first.chars is not None else 1.0
    chosen = (b[:, :, :n_choices] / per).argmax(axis=2) != (a[:, :n_choices] / per).argmax(axis=1)
    return {"changed": chosen.mean(axis=1), "mean_abs_delta": delta}


def flips_of(
    task: str, metric: str, group: Mapping[str, TaskItems], pairs: Sequence[Pair]
) -> Iterator[tuple[tuple[str, str], tuple[list[int], list[int]]]]:
    """Items that changed between right and wrong."""
    if metric == PERPLEXITY:
        return
    for pair in pairs:
        a, b, item = group[pair.first].values[metric], group[pair.second].values[metric], group[pair.first].item
        yield (pair.second, task), (item[a > b].tolist(), item[a < b].tolist())
