"""Arrange sequences in rows, and rows in batches, so that scoring takes the least time. No torch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmsweep.evaluate.packed.rows import Group, Ints, Query, Row, make_row, shared

PREFIX_SHARE = 4
"""A cached prefix token takes about a fourth of the memory of a computed one: keys and values, but no MLP."""


@dataclass(frozen=True)
class Cost:
    """An estimate of time. Its unit is a token: the time that all linear layers take for one.

    Attributes:
        attention_ratio: context length at which attention takes as long as all linear layers.
        pass_tokens: cost of a forward pass besides its tokens.
        least_prefix: length below which a prefix is not cached.
    """

    attention_ratio: float
    pass_tokens: float
    least_prefix: int = 1

    def row(self, width: Any, prefix: int = 0) -> Any:
        """Return the cost of a row of `width` tokens after a cached prefix; numbers or arrays of them."""
        return width * (1 + (width + prefix) / self.attention_ratio)

    def saved(self, prefix: int, below: float, n: int, max_tokens: int) -> float:
        """Estimate what caching a prefix saves; 0 or less if it saves nothing.

        Args:
            prefix: its tokens.
            below: tokens of the prefix tree below it, of `n` sequences.
            max_tokens: width that a row should not exceed.
        """
        if prefix < self.least_prefix:
            return 0.0
        alone = below / n
        cheapest = math.sqrt(prefix * (prefix + self.attention_ratio))  # best length below, if rows repeat the prefix
        length = max(min(cheapest, below, max_tokens - prefix), alone)
        apart = below / length * self.row(prefix + length)
        together = self.row(prefix) + n * self.row(alone, prefix)
        return float(apart - together - 2 * self.pass_tokens)  # of the prefix, and of a batch that is not full


def pack(sequences: Sequence[Query], cost: Cost, max_tokens: int) -> list[Group]:
    """Arrange sorted sequences in rows at the least cost.

    Args:
        sequences: sorted, distinct.
        cost: what rows cost.
        max_tokens: width that a row should not exceed.

    Returns:
        Groups of rows; the group without a prefix first.
    """
    cached = prefixes(sequences, cost, max_tokens)
    bounds = [0, *(bound for start, stop, _ in cached for bound in (start, stop)), len(sequences)]
    rest = [sequences[start:stop] for start, stop in zip(bounds[::2], bounds[1::2], strict=True)]
    alone = [row for part in rest for row in cut(part, 0, cost, max_tokens)]
    groups = [Group(np.empty(0, np.int64), alone)]
    for start, stop, depth in cached:
        rows = cut(sequences[start:stop], depth, cost, max_tokens)
        groups.append(Group(sequences[start].ids[:depth], rows))
    return [Group(group.prefix, sorted(group.rows, key=len, reverse=True)) for group in groups if group.rows]


def prefixes(sequences: Sequence[Query], cost: Cost, max_tokens: int) -> list[tuple[int, int, int]]:
    """Find the ranges of sequences whose shared prefix is worth caching.

    Every node of the prefix tree is a range of the sorted sequences. Either the node or the best choice inside it is
    taken, whichever saves more.

    Returns:
        (start, stop, depth) of disjoint ranges, in order.
    """
    if len(sequences) < 2:
        return []
    common = _common(sequences)
    first = np.array([query.first for query in sequences])
    depths = np.minimum(common, np.minimum(first[:-1], first[1:])).tolist()
    lengths = [len(query.ids) for query in sequences]
    new = np.concatenate([[0], np.cumsum(lengths - np.concatenate([[0], common]))])  # tree tokens before sequence i
    # A stack of the nodes that are open on the right, each with the best choice inside it so far.
    stack: list[tuple[int, int, float, list[tuple[int, int, int]]]] = []  # depth, start, saved, chosen
    best: tuple[float, list[tuple[int, int, int]]] = (0.0, [])
    for i, depth in enumerate([*depths, -1]):
        start, inner = i, (0.0, list[tuple[int, int, int]]())
        while stack and stack[-1][0] > depth:
            node_depth, start, saved, chosen = stack.pop()
            inner = (saved + inner[0], chosen + inner[1])
            below = float(new[i + 1] - new[start + 1]) + lengths[start] - node_depth
            node_saved = cost.saved(node_depth, below, i + 1 - start, max_tokens)
            if node_saved > inner[0]:
                inner = (node_saved, [(start, i + 1, node_depth)])
        if stack and stack[-1][0] == depth:
            node_depth, node_start, saved, chosen = stack.pop()
            stack.append((node_depth, node_start, saved + inner[0], chosen + inner[1]))
        elif depth >= 0:
            stack.append((depth, start, *inner))
        else:
            best = inner
    return best[1]


def cut(sequences: Sequence[Query], prefix: int, cost: Cost, max_tokens: int) -> list[Row]:
    """Cut sorted sequences into rows at the least cost: wide rows compute fewer tokens twice, but attend to more."""
    lengths = np.array([len(query.ids) - prefix for query in sequences])
    grown = np.concatenate([[0], np.cumsum(lengths[1:] - _common(sequences) + prefix)])  # width if all were one row

    def costs(start: int) -> NDArray[np.float64]:
        room = max(max_tokens - lengths[start], 0)
        stop = np.searchsorted(grown, grown[start] + room, side="right")
        return np.asarray(cost.row(lengths[start] + grown[start:stop] - grown[start], prefix), dtype=np.float64)

    bounds = cheapest(len(sequences), costs)
    return [make_row(sequences[start:stop], prefix) for start, stop in pairwise(bounds)]


def batches(rows: Sequence[Row], prefix: int, cost: Cost, budget: int) -> list[list[Row]]:
    """Divide rows into batches at the least cost: large batches need fewer forward passes, but more padding.

    Args:
        rows: longest first.
        prefix: cached tokens before each.
        cost: what batches cost.
        budget: padded tokens of a batch; only a single row may exceed it.
    """
    lengths = [len(row) for row in rows]
    counts = np.arange(1, len(rows) + 1)

    def costs(start: int) -> NDArray[np.float64]:
        width = lengths[start]
        n_fitting = max(1, budget // (width + prefix // PREFIX_SHARE))
        return np.asarray(
            counts[: min(n_fitting, len(rows) - start)] * cost.row(width, prefix) + cost.pass_tokens, dtype=np.float64
        )

    return [list(rows[start:stop]) for start, stop in pairwise(cheapest(len(rows), costs))]


def cheapest(n: int, costs: Callable[[int], NDArray[np.float64]]) -> list[int]:
    """Divide `n` items into consecutive parts at the least total cost.

    Args:
        n: number of items.
        costs: for a first item, the costs [k] of the parts of 1, 2, … k items that start there; longer parts are not
            possible.

    Returns:
        The bounds of the parts, 0 and `n` included.
    """
    best = np.full(n + 1, np.inf)
    best[0] = 0
    origin = np.zeros(n + 1, dtype=np.int64)
    for start in range(n):
        totals = best[start] + costs(start)
        reached = slice(start + 1, start + 1 + len(totals))
        origin[reached][totals < best[reached]] = start
        best[reached] = np.minimum(best[reached], totals)
    bounds = [n]
    while bounds[-1]:
        bounds.append(int(origin[bounds[-1]]))
    return bounds[::-1]


def _common(sequences: Sequence[Query]) -> Ints:
    """Return the length of the common prefix of each sequence and the next, [n - 1]."""
    return np.array([shared(a.ids, b.ids) for a, b in pairwise(sequences)], dtype=np.int64)
