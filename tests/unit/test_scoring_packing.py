"""Requests are packed into rows without losing or repeating anything."""

import math
import random
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest

from nmsweep.errors import DataError
from nmsweep.evaluate.packed.packing import Cost, batches, cheapest, pack, prefixes
from nmsweep.evaluate.packed.rows import Group, Request, one_each, queries

ANY = 10**6


def drawn(seed: int, n_items: int = 20, n_tokens: int = 5) -> list[Request]:
    """Draw items with choices, from an alphabet so small that they share prefixes in every way."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(1, n_tokens) for _ in range(draw.randint(low, high))]

    found: list[Request] = []
    for _ in range(n_items):
        context = tokens(1, 12)
        found += [(None, context, tokens(1, 5)) for _ in range(draw.randint(1, 4))]
    return found


def paths(group: Group) -> list[tuple[list[int], list[int], list[int]]]:
    """Return, for each target of a group's rows, the tokens that its cell sees in order, their positions, and the target."""
    found = []
    for row in group.rows:
        for cell, target in zip(row.cells.tolist(), row.targets.tolist(), strict=True):
            seen = [j for j in range(cell + 1) if cell < row.end[j]]
            ids = [*group.prefix.tolist(), *row.ids[seen].tolist()]
            found.append((ids, [*range(len(group.prefix)), *row.depth[seen].tolist()], [target]))
    return found


def wanted(requests: Sequence[Request], max_length: int = ANY) -> set[tuple[tuple[int, ...], int]]:
    """Return every (preceding tokens, token) that must be predicted."""
    found = set()
    for _, context, continuation in requests:
        whole = (context + continuation)[-(max_length + 1) :]
        for at in range(len(whole) - len(continuation), len(whole)):
            found.add((tuple(whole[:at]), whole[at]))
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ratio", [0.01, 3.0, 1e9])
@pytest.mark.parametrize("max_tokens", [7, 10**6])
def test_every_target_sees_exactly_its_own_sequence(seed: int, ratio: float, max_tokens: int) -> None:
    requests = drawn(seed)
    groups = pack(queries(requests, ANY), Cost(ratio, 0), max_tokens)
    seen = [path for group in groups for path in paths(group)]
    assert all(positions == list(range(len(ids))) for ids, positions, _ in seen)
    assert {(tuple(ids), target) for ids, _, [target] in seen} == wanted(requests)


def test_every_request_is_asked_once() -> None:
    requests = drawn(3)
    rows = [row for group in pack(queries(requests, ANY), Cost(5.0, 0), 40) for row in group.rows]
    asked = sorted(request for row in rows for question in row.questions for request in question.requests)
    assert asked == list(range(len(requests)))


def test_choices_of_an_item_share_one_row() -> None:
    context = [1, 2, 3, 4]
    (group,) = pack(
        queries([(None, context, [5, 6]), (None, context, [7, 8, 9]), (None, context, [7])], ANY), Cost(1e9, 64), ANY
    )
    (row,) = group.rows
    assert sorted(row.ids.tolist()) == [1, 2, 3, 4, 5, 7, 8]  # last tokens are only predicted
    assert row.branches


def test_one_row_each_feeds_nothing_twice() -> None:
    requests: list[Request] = [(None, [1, 2], [3]), (None, [1, 2], [4]), (None, [1], [2, 3]), (None, [9], [9])]
    (group,) = one_each(queries(requests, ANY))
    assert [row.ids.tolist() for row in group.rows] == [[1, 2], [9]]
    assert not any(row.branches for row in group.rows)


def test_a_prefix_of_many_is_cached() -> None:
    draw = random.Random(0)
    shots = [draw.randrange(50) for _ in range(400)]
    items: list[Request] = [
        (None, [*shots, 51 + i % 7, *[draw.randrange(50) for _ in range(40)]], [5, 6]) for i in range(100)
    ]
    groups = pack(queries(items, ANY), Cost(3000.0, 64), ANY)
    assert [group.prefix.tolist() for group in groups] == [shots]
    assert sum(len(row) for group in groups for row in group.rows) < 100 * 43


def test_of_nested_prefixes_the_one_that_saves_more_is_cached() -> None:
    draw = random.Random(1)
    start = [draw.randrange(50) for _ in range(60)]
    items: list[Request] = []
    for _ in range(2):
        subject = [*start, *[draw.randrange(50) for _ in range(600)]]
        items += [(None, [*subject, *[draw.randrange(50) for _ in range(40)]], [5]) for _ in range(100)]
    groups = pack(queries(items, ANY), Cost(3000.0, 64), ANY)
    assert sorted(len(group.prefix) for group in groups) in ([660, 660], [661, 661])


def test_no_prefix_reaches_beyond_the_first_prediction() -> None:
    context = list(range(1, 300))
    items: list[Request] = [(None, context[:-2], [*context[-2:], 400 + i, *range(i, i + 30)]) for i in range(100)]
    assert [depth for _, _, depth in prefixes(queries(items, ANY), Cost(3000.0, 64), ANY)] == [len(context) - 3]


@pytest.mark.parametrize("max_length", [3, 6, 9])
def test_long_sequences_are_cut_on_the_left_each_for_itself(max_length: int) -> None:
    requests = [r for r in drawn(5) if len(r[2]) <= max_length]
    groups = pack(queries(requests, max_length), Cost(5.0, 0), ANY)
    seen = [path for group in groups for path in paths(group)]
    assert {(tuple(ids), target) for ids, _, [target] in seen} == wanted(requests, max_length)


@pytest.mark.parametrize("request_", [([], [1]), ([1], []), ([1], [1, 2, 3, 4])])
def test_requests_that_cannot_be_scored_are_refused(request_: tuple[list[int], list[int]]) -> None:
    with pytest.raises(DataError, match="request 0"):
        queries([(None, *request_)], 3)


def test_nothing_gives_nothing() -> None:
    assert pack(queries([], ANY), Cost(1.0, 0), ANY) == []


@pytest.mark.parametrize("seed", range(6))
def test_the_cheapest_division_is_the_cheapest(seed: int) -> None:
    draw, n = random.Random(seed), 8
    costs = [np.array([draw.random() for _ in range(min(n - start, 4))]) for start in range(n)]

    def total(bounds: Sequence[int]) -> float:
        parts = list(pairwise(bounds))
        return sum(costs[a][b - a - 1] if b - a <= 4 else math.inf for a, b in parts)

    every = [(0, *inner, n) for k in range(n) for inner in combinations(range(1, n), k)]
    found = cheapest(n, costs.__getitem__)
    assert (found[0], found[-1]) == (0, n)
    assert total(found) == pytest.approx(min(map(total, every)))


def test_batches_hold_every_row_in_order_and_keep_to_the_budget() -> None:
    rows = pack(queries(drawn(2), ANY), Cost(5.0, 0), 40)[0].rows
    for cost in (Cost(5.0, 0), Cost(768.0, 64), Cost(768.0, 1e9)):
        divided = batches(rows, 0, cost, 40)
        assert [id(row) for batch in divided for row in batch] == [id(row) for row in rows]
        assert all(len(batch) * len(batch[0]) <= 40 or len(batch) == 1 for batch in divided)
    assert batches([], 0, Cost(5.0, 0), 40) == []


def test_costly_passes_are_few_and_cheap_ones_pad_nothing() -> None:
    rows = pack(queries(drawn(2), ANY), Cost(5.0, 0), ANY)[0].rows
    assert len(batches(rows, 0, Cost(768.0, 1e9), ANY)) == 1
    assert all(len({len(row) for row in batch}) == 1 for batch in batches(rows, 0, Cost(768.0, 0), ANY))
