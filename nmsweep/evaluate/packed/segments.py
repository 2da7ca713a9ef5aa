"""Attention of rows that hold a prefix tree, each run of tokens without branches by itself: keys in the order of one plain sequence.

A mask over the whole row gives the same numbers but for the order in which a kernel adds them up: masked keys between those that
count move these to other places of its vectors and blocks. Here a token's keys stand where they stand when its sequence is
computed alone. On a CPU they also end where they end there: its causal kernel takes queries in blocks, and gives each the
keys up to the end of its block. Elsewhere all runs below a row's first are taken at once. So packed scoring rounds as one of the batch sizes of lm-eval's path does; docs/evaluation.md has the figures.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nmsweep.evaluate.packed.rows import Ints, Row


class Run(NamedTuple):
    """Tokens `start` to `stop` of row `row`, each the successor of the one before.

    Attributes:
        above: the places of the tokens above them, first to last.
        width: keys that a kernel is given, of which `len(above) + stop - start` are there.
    """

    row: int
    start: int
    stop: int
    above: Ints
    width: int

    @property
    def n_keys(self) -> int:
        return len(self.above) + self.stop - self.start


class Segments:
    """The runs of some rows of a batch.

    Args:
        rows: of one batch, none below a cached prefix.
        device: of the model.
        dtype: of its attention.
        by_block: keys end where the CPU's kernel ends them.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device, dtype: torch.dtype, by_block: bool) -> None:
        runs = [run for at, row in enumerate(rows) for run in runs_of(at, row, by_block)]
        self.root = 0 if by_block else max(run.stop for run in runs if run.start == 0)
        below = [run for run in runs if by_block or run.start > 0]
        widest = max((run.width for run in below), default=0)
        by_width: dict[int, list[Run]] = {}
        for run in below:
            by_width.setdefault(run.width if by_block else widest, []).append(run)
        self.alike = [_Alike(same, width, device, dtype) for width, same in by_width.items()]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """What `scaled_dot_product_attention` gives; anything finite for padding.

        Args:
            query: [batch, heads, width, d].
            key, value: [batch, key heads, width, d].
            scaling: of the scores.

        Returns:
            [batch, width, heads, d].
        """
        common: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
        found = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        if n := self.root:
            root = F.scaled_dot_product_attention(
                query[:, :, :n], key[:, :, :n], value[:, :, :n], is_causal=True, **common
            )
            found[:, :n] = root.transpose(1, 2)
        for runs in self.alike:
            runs.attend(query, key, value, found, common)
        return found


class _Alike:
    """Runs that are given `width` keys each."""

    def __init__(self, runs: Sequence[Run], width: int, device: torch.device, dtype: torch.dtype) -> None:
        lengths = np.array([run.stop - run.start for run in runs])
        n_queries = int(lengths.max())
        queries, keys = np.zeros((len(runs), n_queries), np.int64), np.zeros((len(runs), width), np.int64)
        for at, run in enumerate(runs):
            own = np.arange(run.start, run.stop)
            queries[at, : len(own)] = own
            keys[at, : run.n_keys] = np.concatenate([run.above, own])
        n_above = np.array([len(run.above) for run in runs])[:, None]
        last = n_above + np.minimum(np.arange(n_queries), lengths[:, None] - 1)  # the last key that a query sees
        hidden = np.arange(width) > last[:, :, None]
        run_at, query_at = np.nonzero(np.arange(n_queries) < lengths[:, None])
        row = np.array([run.row for run in runs])

        def there(x: Ints) -> Tensor:
            return torch.from_numpy(x).to(device)

        self.row, self.queries, self.keys = there(row[:, None]), there(queries), there(keys)
        self.answers = (there(run_at), there(query_at))
        self.places = (there(row[run_at]), there(queries[run_at, query_at]))
        self.mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)
        self.mask = self.mask[:, None].to(device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, found: Tensor, common: dict[str, Any]) -> None:
        """Put the runs' outputs into `found` [batch, width, heads, d]."""
        q, k, v = self._gathered(query, self.queries), self._gathered(key, self.keys), self._gathered(value, self.keys)
        below = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, **common).transpose(1, 2)
        found[self.places] = below[self.answers]

    def _gathered(self, x: Tensor, places: Tensor) -> Tensor:
        """x [batch, heads, width, d] at places [runs, n] of the runs' rows: [runs, heads, n, d]."""
        return x.transpose(1, 2)[self.row, places].transpose(1, 2).contiguous()


def block_of(length: int) -> int:
    """Queries that torch's causal kernel for CPUs takes at once in a sequence (`cpu_flash_attention`)."""
    return 256 if length >= 768 else 64 if length >= 192 else 32


def runs_of(at: int, row: Row, by_block: bool) -> list[Run]:
    """The runs of a row, first to last; `by_block` cut where the kernel's blocks of the longest sequence through them end."""
    starts = np.flatnonzero(np.diff(row.depth, prepend=-2) != 1).tolist()
    found = []
    for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
        above = np.flatnonzero(row.end[:start] > start)
        longest = int(row.depth[start : row.end[start]].max()) + 1
        block, first = block_of(longest), len(above)
        last = first + stop - start
        cuts = range((first // block + 1) * block, last, block) if by_block else ()
        for low, high in zip([first, *cuts], [*cuts, last], strict=True):
            before = np.concatenate([above, np.arange(start, start + low - first)])
            width = min(-(-high // block) * block, longest) if by_block else high
            found.append(Run(at, start + low - first, start + high - first, before, width))
    return found
