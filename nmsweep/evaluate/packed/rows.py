"""Turn requests into token sequences, and lay several of them out in one row with no token twice. No torch.

The token sequences of a task, sorted, form a prefix tree. A *row* is a part of that tree with its tokens in depth-first
order: token j is an ancestor of token i exactly if ``j <= i < end[j]``, which is all that an attention mask needs. The
choices of an item, items about one passage, and WinoGrande's two contexts are the same case: sequences that share a prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nmsweep.errors import DataError

Ints = NDArray[np.int64]

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""A log-likelihood request of lm-eval: its texts, context tokens, continuation tokens."""


@dataclass(frozen=True)
class Question:
    """A continuation whose log-likelihood is to be read from a sequence.

    Attributes:
        first: the position whose output predicts the first target.
        targets: [k], the tokens of the continuation.
        requests: indices of the requests that this answers; equal ones are computed once.
    """

    first: int
    targets: Ints
    requests: list[int]


@dataclass(frozen=True)
class Query:
    """A token sequence that is fed, ``ids`` [n], and its questions."""

    ids: Ints
    questions: list[Question]

    @property
    def first(self) -> int:
        """Return the first position whose output is needed."""
        return min(question.first for question in self.questions)


@dataclass(frozen=True)
class Row:
    """A part of the prefix tree, below a prefix that is computed separately.

    Attributes:
        queries: its sequences, sorted.
        ids: [n], tokens.
        depth: [n], the position of each token in its sequence.
        end: [n], where the tokens below each token end.
        weight: [n], how many of the sequences each token is part of.
        cells: [k], for each of its `targets`, the place whose output should predict it.
        branches: whether any token has two successors; else the row is one plain sequence.
    """

    queries: Sequence[Query]
    ids: Ints
    depth: Ints
    end: Ints
    weight: Ints
    cells: Ints
    branches: bool

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def longest(self) -> int:
        """Return the tokens of its longest sequence, below which the row cannot be cut."""
        return len(self.ids) if not self.branches else int(self.depth.max() - self.depth[0]) + 1

    @property
    def questions(self) -> list[Question]:
        return [question for query in self.queries for question in query.questions]

    @property
    def targets(self) -> Ints:
        """Return the targets [k] of its questions, in order."""
        return np.concatenate([question.targets for question in self.questions])


@dataclass(frozen=True)
class Group:
    """Rows below one prefix `prefix` [p], which may be empty; longest row first."""

    prefix: Ints
    rows: list[Row]

    @property
    def n_sequences(self) -> int:
        """Return how many sequences begin with the prefix."""
        return sum(len(row.queries) for row in self.rows)


def queries(requests: Sequence[Request], max_length: int) -> list[Query]:
    """Return the distinct sequences of `requests`, sorted by their tokens.

    The last token of a continuation is predicted but not fed. A sequence that is too long loses tokens on the left,
    separately for each continuation, as in lm-eval: ``(context + continuation)[-(max_length + 1):][:-1]``.

    Raises:
        DataError: an empty context or continuation, or a continuation longer than the model allows.
    """
    sequences: dict[bytes, tuple[Ints, dict[tuple[int, bytes], Question]]] = {}
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
        _, questions = sequences.setdefault(key, (ids, {}))
        first = len(ids) - n_targets
        questions.setdefault((first, targets.tobytes()), Question(first, targets, [])).requests.append(index)
    return [Query(ids, list(questions.values())) for _, (ids, questions) in sorted(sequences.items())]


def shared(a: Ints, b: Ints) -> int:
    """Return the length of the common prefix of two sequences."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(different.argmax()) if different.any() else n


def one_each(sequences: Sequence[Query]) -> list[Group]:
    """Put one sequence in each row, longest first."""
    return [Group(np.empty(0, np.int64), sorted((make_row([query], 0) for query in sequences), key=len, reverse=True))]


def make_row(members: Sequence[Query], prefix: int) -> Row:
    """Lay out sorted sequences that share their first `prefix` tokens, without that prefix."""
    ids, depth, starts = [], [], [0]
    path = np.empty(0, np.int64)
    end = np.zeros(sum(len(query.ids) - prefix for query in members), dtype=np.int64)
    weight = np.zeros_like(end)
    cells = []
    before: Ints | None = None
    branches = False
    for query in members:
        kept = (shared(before, query.ids) if before is not None else prefix) - prefix
        at = starts[-1]
        end[path[kept:]] = at
        branches |= kept < len(path)
        new = query.ids[prefix + kept :]
        path = np.concatenate([path[:kept], np.arange(at, at + len(new))])
        weight[path] += 1
        ids.append(new)
        depth.append(np.arange(prefix + kept, len(query.ids)))
        starts.append(at + len(new))
        for question in query.questions:
            first = question.first - prefix
            cells.append(path[first : first + len(question.targets)])
        before = query.ids
    end[path] = starts[-1]
    return Row(
        members,
        np.concatenate(ids),
        np.concatenate(depth),
        end[: starts[-1]],
        weight[: starts[-1]],
        np.concatenate(cells),
        branches,
    )
