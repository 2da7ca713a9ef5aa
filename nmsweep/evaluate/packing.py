"""Which tokens have to be computed for a set of log-likelihood requests, each of them once. No torch.

All token sequences of a task, sorted, form a prefix tree. A *row* is a part of that tree, its tokens in depth-first order:
token j is an ancestor of token i exactly if ``j <= i < end[j]``, which is all that an attention mask needs. The choices of
an item, items about one passage, and WinoGrande's two contexts are all the same case: sequences that share a beginning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nmsweep.errors import DataError

Ints = NDArray[np.int64]

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""A log-likelihood request of the harness: its texts, context tokens, continuation tokens."""

ROW_TOKENS = 512
"""A subtree that needs more tokens than this is not worth one row; its prefix may be worth the key-value cache."""

PREFIX_TOKENS = 512
"""Tokens that caching a prefix has to save: what a forward pass of its own costs."""


@dataclass(frozen=True)
class Question:
    """What is asked of a sequence.

    Attributes:
        first: the position whose output predicts the first target.
        targets: [k], the continuation's tokens.
        requests: which requests this answers: equal ones are computed once.
    """

    first: int
    targets: Ints
    requests: list[int]


@dataclass(frozen=True)
class Query:
    """A token sequence that is fed, ``ids`` [n], and the questions asked of it."""

    ids: Ints
    questions: list[Question]

    @property
    def first(self) -> int:
        """The first position whose output is needed."""
        return min(question.first for question in self.questions)


@dataclass(frozen=True)
class Row:
    """A part of the prefix tree below a prefix that is computed elsewhere.

    Attributes:
        queries: its sequences, sorted.
        ids, depth, end: [n], each token, its position in its sequence, and where the tokens below it end.
        cells: [k], the tokens of the row that predict something.
        targets: [k], what they should predict.
        sizes: number of targets of each question, in the order of the queries' questions.
        branches: whether any token has two successors; else the row is one plain sequence.
    """

    queries: Sequence[Query]
    ids: Ints
    depth: Ints
    end: Ints
    cells: Ints
    targets: Ints
    sizes: list[int]
    branches: bool

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def longest(self) -> int:
        """The tokens of its longest sequence: no part of the row can be shorter and hold it. At most `len(self)`."""
        return len(self.ids) if not self.branches else int(self.depth.max() - self.depth[0]) + 1

    @property
    def questions(self) -> list[Question]:
        return [question for query in self.queries for question in query.questions]


@dataclass(frozen=True)
class Group:
    """Rows below one prefix, `prefix` [p] (empty for none), longest row first."""

    prefix: Ints
    rows: list[Row]


def queries(requests: Sequence[Request], max_length: int) -> list[Query]:
    """The distinct sequences of `requests`, sorted by their tokens.

    The last token of a continuation is only predicted. A sequence that is too long loses tokens on the left, each
    continuation for itself, as in lm-eval: ``(context + continuation)[-(max_length + 1):][:-1]``.

    Raises:
        DataError: an empty context or continuation, or a continuation longer than the model allows.
    """
    found: dict[bytes, tuple[Ints, dict[tuple[int, bytes], Question]]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        n_targets = len(continuation)
        if not context or not 0 < n_targets <= max_length:
            raise DataError(
                f"request {index}: a context of {len(context)} and a continuation of {n_targets} tokens; "
                f"both need one token, and the continuation at most the model's {max_length}"
            )
        whole = np.array((context + continuation)[-(max_length + 1) :], dtype=np.int64)
        ids, targets = whole[:-1], whole[-n_targets:]
        key = ids.astype(">u4").tobytes()  # sorts as the tokens do
        _, asked = found.setdefault(key, (ids, {}))
        first = len(ids) - n_targets
        asked.setdefault((first, targets.tobytes()), Question(first, targets, [])).requests.append(index)
    return [Query(ids, list(asked.values())) for _, (ids, asked) in sorted(found.items())]


def shared(a: Ints, b: Ints) -> int:
    """Length of the common beginning of two sequences."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(different.argmax()) if different.any() else n


def pack(sequences: Sequence[Query], attention_ratio: float, max_tokens: int) -> list[Group]:
    """Arrange sorted sequences in rows so that little is computed twice.

    Args:
        sequences: sorted, distinct.
        attention_ratio: length of a context whose attention costs a token as much as all linear layers do.
        max_tokens: tokens that a row should not exceed.

    Returns:
        Groups of rows; the group without a prefix first.
    """
    cached = prefixes(sequences)
    bounds = [0, *(bound for start, stop, _ in cached for bound in (start, stop)), len(sequences)]
    rest = [sequences[start:stop] for start, stop in zip(bounds[::2], bounds[1::2], strict=True)]
    alone = [row for part in rest for row in cut(part, 0, attention_ratio, max_tokens)]
    groups = [Group(np.empty(0, np.int64), alone)]
    for start, stop, depth in cached:
        rows = cut(sequences[start:stop], depth, attention_ratio, max_tokens)
        groups.append(Group(sequences[start].ids[:depth], rows))
    return [Group(group.prefix, sorted(group.rows, key=len, reverse=True)) for group in groups if group.rows]


def one_each(sequences: Sequence[Query]) -> list[Group]:
    """One sequence a row, longest first."""
    return [Group(np.empty(0, np.int64), sorted((make_row([query], 0) for query in sequences), key=len, reverse=True))]


def prefixes(sequences: Sequence[Query]) -> list[tuple[int, int, int]]:
    """Ranges of sequences whose shared prefix is worth computing once: (start, stop, depth), disjoint, in order.

    Every node of the prefix tree is a range of the sorted sequences. A node saves its depth for every row but one that
    the tokens below it would fill. Of a node and those inside it, what saves more is taken.
    """
    if len(sequences) < 2:
        return []
    common = _common(sequences)
    first = np.array([query.first for query in sequences])
    depths = np.minimum(common, np.minimum(first[:-1], first[1:])).tolist()
    lengths = [len(query.ids) for query in sequences]
    new = np.concatenate([[0], np.cumsum(lengths - np.concatenate([[0], common]))])  # tree tokens before sequence i
    # Intervals of equal depth, by a stack: each entry is open on the right and carries the best choice inside it.
    stack: list[tuple[int, int, float, list[tuple[int, int, int]]]] = []  # depth, start, saved, chosen
    best: tuple[float, list[tuple[int, int, int]]] = (0.0, [])
    for i, depth in enumerate([*depths, -1]):
        start, inner = i, (0.0, list[tuple[int, int, int]]())
        while stack and stack[-1][0] > depth:
            node_depth, start, saved, chosen = stack.pop()
            inner = (saved + inner[0], chosen + inner[1])
            below = float(new[i + 1] - new[start + 1]) + lengths[start] - node_depth
            own = node_depth * (below / ROW_TOKENS - 1) - PREFIX_TOKENS
            if own > inner[0]:
                inner = (own, [(start, i + 1, node_depth)])
        if stack and stack[-1][0] == depth:
            node_depth, node_start, saved, chosen = stack.pop()
            stack.append((node_depth, node_start, saved + inner[0], chosen + inner[1]))
        elif depth >= 0:
            stack.append((depth, start, *inner))
        else:
            best = inner
    return best[1]


def cut(sequences: Sequence[Query], prefix: int, attention_ratio: float, max_tokens: int) -> list[Row]:
    """Cut sorted sequences into rows: the next one joins if the tokens it saves outweigh its attention's width."""
    rows: list[Row] = []
    members: list[Query] = []
    length = 0
    for query, depth in zip(sequences, [prefix, *_common(sequences).tolist()], strict=False):
        alone, added = len(query.ids) - prefix, len(query.ids) - depth
        wider = (length + added) ** 2 - length**2 - alone**2
        if members and (wider > attention_ratio * (depth - prefix) or length + added > max_tokens):
            rows.append(make_row(members, prefix))
            members, length = [], 0
        length += added if members else alone
        members.append(query)
    return [*rows, make_row(members, prefix)] if members else []


def _common(sequences: Sequence[Query]) -> Ints:
    """Length of the common beginning of each sequence and the next, [n - 1]."""
    return np.array([shared(a.ids, b.ids) for a, b in pairwise(sequences)], dtype=np.int64)


def make_row(members: Sequence[Query], prefix: int) -> Row:
    """Lay out sorted sequences that share their first `prefix` tokens, without these."""
    ids, depth, starts = [], [], [0]
    path = np.empty(0, np.int64)
    end = np.zeros(sum(len(query.ids) - prefix for query in members), dtype=np.int64)
    cells, targets, sizes = [], [], []
    before: Ints | None = None
    branches = False
    for query in members:
        kept = (shared(before, query.ids) if before is not None else prefix) - prefix
        at = starts[-1]
        end[path[kept:]] = at
        branches |= kept < len(path)
        new = query.ids[prefix + kept :]
        path = np.concatenate([path[:kept], np.arange(at, at + len(new))])
        ids.append(new)
        depth.append(np.arange(prefix + kept, len(query.ids)))
        starts.append(at + len(new))
        for question in query.questions:
            n_targets = len(question.targets)
            cells.append(path[question.first - prefix : question.first - prefix + n_targets])
            targets.append(question.targets)
            sizes.append(n_targets)
        before = query.ids
    end[path] = starts[-1]
    return Row(
        members,
        np.concatenate(ids),
        np.concatenate(depth),
        end[: starts[-1]],
        np.concatenate(cells),
        np.concatenate(targets),
        sizes,
        branches,
    )
