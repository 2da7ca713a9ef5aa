"""The attention of transformers, without a bug of torch's kernel at certain numbers of queries."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

TILE = 32
"""Queries that the kernel processes together; it is wrong for a single query left over."""


class Attends(Protocol):
    """An implementation of attention that a forward pass takes as `segments=`."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Return [batch, queries, heads, width] for query, key and value as in `sdpa`."""


def register() -> None:
    """Replace the `sdpa` attention of every model in this process by the one below."""
    AttentionInterface.register("sdpa", sdpa)


def sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Attends | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Call `sdpa_attention_forward` of transformers, with one more query where torch's kernel would be wrong.

    On CUDA, with a mask and a single key head (as in Gemma-3-270M), torch's memory-efficient kernel mistakes the heads of a
    tile's only query for queries of one head, and gives each of them another row of the mask: pytorch issue 191937. If the
    number of queries is 1 more than a multiple of 32, a query is therefore added and its output dropped.

    Args:
        module: the attention layer.
        query: [batch, heads, queries, width].
        key, value: [batch, key heads, keys, width].
        attention_mask: [batch, 1 or heads, queries, keys]; boolean, or added to the scores; None for no or a causal mask.
        segments: computes the attention instead.

    Returns:
        [batch, queries, heads, width], and None for the attention weights.
    """
    if segments is not None:
        return segments.attend(query, key, value, kwargs.get("scaling")), None
    if attention_mask is None or not query.is_cuda or query.shape[2] % TILE != 1 or key.shape[1] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    output, weights = sdpa_attention_forward(module, *with_another_query(query, key, value, attention_mask), **kwargs)
    return output[:, :-1], weights


def with_another_query(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the arguments with one more query, which attends to the same keys as the last one."""
    return pad(query, (0, 0, 0, 1)), key, value, torch.cat([mask, mask[:, :, -1:]], dim=2)
