"""Attention over rows that hold a prefix tree, one run of tokens without branches at a time.

A mask over the whole row gives the same numbers except for the order of the sums: masked keys shift the others to different
lanes and blocks of the kernel. Here the keys of a token are laid side by side, as when its sequence is computed alone. On a
CPU they also end at the same place: its causal kernel takes queries in blocks, and gives each block the keys up to its end.
Elsewhere all runs below the first of each row are computed at once. So packed scoring rounds as lm-eval's path does at some
batch size; docs/evaluation.md has the figures.
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
        above: the places of their common ancestors, first to last.
        width: keys given to the kernel, padding included.
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
        rows: of one batch, without a cached prefix.
        device: of the model.
        dtype: of its attention.
        by_block: whether keys end where the CPU's kernel ends them.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device, dtype: torch.dtype, by_block: bool) -> None:
        runs = [run for at, row in enumerate(rows) for run in runs_of(at, row, by_block)]
        self.root = 0 if by_block else max(run.stop for run in runs if run.start == 0)
        below = [run for run in runs if by_block or run.start > 0]
        widest = max((run.width for run in below), default=0)
        by_width: dict[int, list[Run]] = {}
        for run in below:
            by_width.setdefault(run.width if by_block else widest, []).append(run)
        self.equally_wide = [_EquallyWide(same, width, device, dtype) for width, same in by_width.items()]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Compute `scaled_dot_product_attention`; padding gets any finite value.

        Args:
            query: [batch, heads, width, d].
            key, value: [batch, key heads, width, d].
            scaling: of the scores.

        Returns:
            [batch, width, heads, d].
        """
        common: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
        output = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        if n := self.root:
            root = F.scaled_dot_product_attention(
                query[:, :, :n], key[:, :, :n], value[:, :, :n], is_causal=True, **common
            )
            output[:, :n] = root.transpose(1, 2)
        for runs in self.equally_wide:
            runs.attend(query, key, value, output, common)
        return output


class _EquallyWide:
    """Runs with `width` keys each, computed in one call."""

    def __init__(self, runs: Sequence[Run], width: int, device: torch.device, dtype: torch.dtype) -> None:
        lengths = np.array([run.stop - run.start for run in runs])
        n_queries = int(lengths.max())
        queries, keys = np.zeros((len(runs), n_queries), np.int64), np.zeros((len(runs), width), np.int64)
        for at, run in enumerate(runs):
            tokens = np.arange(run.start, run.stop)
            queries[at, : len(tokens)] = tokens
            keys[at, : run.n_keys] = np.concatenate([run.above, tokens])
        n_above = np.array([len(run.above) for run in runs])[:, None]
        last = n_above + np.minimum(np.arange(n_queries), lengths[:, None] - 1)  # the last key that a query sees
        hidden = np.arange(width) > last[:, :, None]
        run_at, query_at = np.nonzero(np.arange(n_queries) < lengths[:, None])
        row = np.array([run.row for run in runs])

        def on_device(x: Ints) -> Tensor:
            return torch.from_numpy(x).to(device)

        self.row, self.queries, self.keys = on_device(row[:, None]), on_device(queries), on_device(keys)
        self.answers = (on_device(run_at), on_device(query_at))
        self.places = (on_device(row[run_at]), on_device(queries[run_at, query_at]))
        self.mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)
        self.mask = self.mask[:, None].to(device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, common: dict[str, Any]) -> None:
        """Write the outputs of the runs into `output` [batch, width, heads, d]."""
        q, k, v = self._gathered(query, self.queries), self._gathered(key, self.keys), self._gathered(value, self.keys)
        below = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, **common).transpose(1, 2)
        output[self.places] = below[self.answers]

    def _gathered(self, x: Tensor, places: Tensor) -> Tensor:
        """Gather x [batch, heads, width, d] at places [runs, n] of the runs' rows: [runs, heads, n, d]."""
        return x.transpose(1, 2)[self.row, places].transpose(1, 2).contiguous()


def block_of(length: int) -> int:
    """Return how many queries of a sequence torch's causal kernel for CPUs takes at once (`cpu_flash_attention`)."""
    return 256 if length >= 768 else 64 if length >= 192 else 32


def runs_of(at: int, row: Row, by_block: bool) -> list[Run]:
    """Return the runs of a row, in order; `by_block` cuts them where the kernel's blocks end in the longest sequence through them."""
    starts = np.flatnonzero(np.diff(row.depth, prepend=-2) != 1).tolist()
    runs = []
    for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
        above = np.flatnonzero(row.end[:start] > start)
        longest = int(row.depth[start : row.end[start]].max()) + 1
        block, first = block_of(longest), len(above)
        last = first + stop - start
        cuts = range((first // block + 1) * block, last, block) if by_block else ()
        for low, high in zip([first, *cuts], [*cuts, last], strict=True):
            before = np.concatenate([above, np.arange(start, start + low - first)])
            width = min(-(-high // block) * block, longest) if by_block else high
            runs.append(Run(at, start + low - first, start + high - first, before, width))
    return runs
