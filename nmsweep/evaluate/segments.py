"""Attention of rows that hold a prefix tree, each run of tokens without branches by itself: keys in the order of one plain sequence.

A mask over the whole row gives the same numbers but for the order in which a kernel adds them up: masked keys between those that
count move these to other places of its vectors and blocks. Here a token's keys stand where they stand when its sequence is
computed alone, as lm-eval's path does, so the two round alike: docs/evaluation.md has the figures.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nmsweep.evaluate.rows import Ints, Row


class Segments:
    """The runs of some rows of a batch.

    Args:
        rows: of one batch, none below a cached prefix.
        device: of the model.
        dtype: of its attention.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device, dtype: torch.dtype) -> None:
        runs = [(at, *run) for at, row in enumerate(rows) for run in _runs(row)]
        self.root = max(stop for _, start, stop, _ in runs if start == 0)
        below = [run for run in runs if run[1] > 0]
        n_queries = max((stop - start for _, start, stop, _ in below), default=0)
        n_keys = max((len(above) + stop - start for _, start, stop, above in below), default=0)
        queries, keys = np.zeros((len(below), n_queries), np.int64), np.zeros((len(below), n_keys), np.int64)
        sees = np.zeros((len(below), n_queries, n_keys), bool)
        real = np.zeros((len(below), n_queries), bool)
        for at, (_, start, stop, above) in enumerate(below):
            n, k = stop - start, len(above)
            queries[at, :n], real[at, :n] = np.arange(start, stop), True
            keys[at, : k + n] = np.concatenate([above, np.arange(start, stop)])
            sees[at] = np.arange(n_keys) <= k + np.minimum(np.arange(n_queries), n - 1)[:, None]
        of_row = np.array([run[0] for run in below], np.int64)[:, None]
        run, query = np.nonzero(real)
        self.of_row, self.queries, self.keys = (torch.from_numpy(each).to(device) for each in (of_row, queries, keys))
        self.answers = tuple(torch.from_numpy(each).to(device) for each in (run, query))
        self.places = tuple(torch.from_numpy(each).to(device) for each in (of_row[run, 0], queries[run, query]))
        hidden = torch.from_numpy(~sees)[:, None].to(device)
        self.mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """What `scaled_dot_product_attention` gives; zeros for padding.

        Args:
            query: [batch, heads, width, d].
            key, value: [batch, key heads, width, d].
            scaling: of the scores.

        Returns:
            [batch, width, heads, d].
        """
        common: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
        n = self.root
        found = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        root = F.scaled_dot_product_attention(query[:, :, :n], key[:, :, :n], value[:, :, :n], is_causal=True, **common)
        found[:, :n] = root.transpose(1, 2)
        if len(self.of_row):
            q, k, v = (
                _gathered(x, self.of_row, at) for x, at in ((query, self.queries), (key, self.keys), (value, self.keys))
            )
            below = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, **common).transpose(1, 2)
            found[self.places] = below[self.answers]
        return found


def _gathered(x: Tensor, of_row: Tensor, place: Tensor) -> Tensor:
    """x [batch, heads, width, d] at places [runs, n] of the runs' rows: [runs, heads, n, d]."""
    return x.transpose(1, 2)[of_row, place].transpose(1, 2).contiguous()


def _runs(row: Row) -> list[tuple[int, int, Ints]]:
    """Start and end of each run of a row, and the places of the tokens above it, first to last."""
    starts = np.flatnonzero(np.diff(row.depth, prepend=-2) != 1)
    stops = [*starts[1:].tolist(), len(row)]
    return [
        (start, stop, np.flatnonzero(row.end[:start] > start))
        for start, stop in zip(starts.tolist(), stops, strict=True)
    ]
