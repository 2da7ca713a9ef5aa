"""Attention over a prefix tree, run by run, equals attention over each of its sequences alone."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nmsweep.evaluate.packed.rows import Request, Row, make_row, one_each, queries
from nmsweep.evaluate.packed.segments import Segments, runs_of

HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def drawn(seed: int) -> list[Row]:
    """Draw rows of sequences that share prefixes in every way, some without branches."""
    draw = random.Random(seed)
    requests: list[Request] = []
    for _ in range(12):
        context = [draw.randrange(1, 4) for _ in range(draw.randint(1, 30))]
        endings = [[draw.randrange(1, 4) for _ in range(draw.randint(1, 6))] for _ in range(draw.randint(1, 4))]
        requests += [(None, context, ending) for ending in endings]
    sequences = queries(requests, 10**6)
    return [make_row(sequences[at : at + 6], 0) for at in range(0, len(sequences), 6)]


def values(rows: list[Row], heads: int, dtype: torch.dtype) -> Tensor:
    """Draw a tensor [batch, heads, width, d]."""
    random = torch.Generator().manual_seed(heads)
    return torch.randn(len(rows), heads, max(map(len, rows)) + 3, WIDTH, generator=random, dtype=torch.float64).to(
        dtype
    )


def alone(row: Row, place: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute the output [heads, d] at one place of a row from its sequence alone."""
    path = [at for at in range(place + 1) if row.end[at] > place]
    q, k, v = (x[:, path] for x in (query, key, value))
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0, :, -1]


@pytest.mark.parametrize("by_block", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_each_token_attends_to_its_own_sequence(seed: int, by_block: bool) -> None:
    rows = drawn(seed)
    assert any(row.branches for row in rows)
    query, key, value = (values(rows, heads, torch.float64) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    found = Segments(rows, query.device, query.dtype, by_block).attend(query, key, value, None)
    assert found.shape == (len(rows), query.shape[2], HEADS, WIDTH)
    for at, row in enumerate(rows):
        for place in range(len(row)):
            expected = alone(row, place, query[at], key[at], value[at])
            torch.testing.assert_close(found[at, place], expected, rtol=0, atol=1e-13)


def test_the_keys_of_other_branches_and_padding_count_for_nothing() -> None:
    rows = drawn(1)
    query, key, value = (values(rows, heads, torch.float32) for heads in (HEADS, HEADS, HEADS))
    segments = Segments(rows, query.device, query.dtype, by_block=True)
    before = segments.attend(query, key, value, 0.3)
    for at, row in enumerate(rows):
        key[at, :, len(row) :], value[at, :, len(row) :] = 1e6, 1e6
    after = segments.attend(query, key, value, 0.3)
    for at, row in enumerate(rows):
        assert torch.equal(before[at, : len(row)], after[at, : len(row)])


def test_rows_without_branches_are_plain_causal_attention() -> None:
    requests: list[Request] = [(None, [at, *range(9)], [1, 2]) for at in range(3)]
    (group,) = one_each(queries(requests, 10**6))
    rows = group.rows
    assert not any(row.branches for row in rows)
    query, key, value = (values(rows, HEADS, torch.float32)[:, :, :11] for _ in range(3))
    found = Segments(rows, query.device, query.dtype, by_block=False).attend(query, key, value, None)
    n = max(map(len, rows))
    expected = F.scaled_dot_product_attention(query[:, :, :n], key[:, :, :n], value[:, :, :n], is_causal=True)
    torch.testing.assert_close(found[:, :n], expected.transpose(1, 2), rtol=0, atol=0)


@pytest.mark.parametrize("length", [5, 32, 33, 90, 191, 230, 800])
def test_by_block_a_run_ends_with_the_block_or_the_sequence(length: int) -> None:
    tokens = [3] * length
    requests: list[Request] = [(None, [*tokens, 1], [1]), (None, [*tokens[: length // 2], 2, 2], [1])]
    row = make_row(queries(requests, 10**6), 0)
    covered = []
    for run in runs_of(0, row, by_block=True):
        first, last = len(run.above), run.n_keys - 1
        longest = max(int(row.depth[at]) + 1 for at in range(run.start, row.end[run.start]))
        block = 32 if longest < 192 else 64 if longest < 768 else 256
        assert row.depth[run.start : run.stop].tolist() == [*range(first, last + 1)]
        assert first // block == last // block
        assert run.width == min((last // block + 1) * block, longest)
        assert all(row.end[at] > run.start for at in run.above)
        covered += range(run.start, run.stop)
    assert covered == [*range(len(row))]
