"""Attention as transformers computes it, but for numbers of queries at which torch's kernel is wrong."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

TILE = 32
"""Queries that the kernel takes at once (or a multiple); a single one that is left over is what it gets wrong."""


class Attends(Protocol):
    """Computes attention in an order of its own; a forward pass is given it as `segments=`."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """[batch, queries, heads, width], of query, key and value as `sdpa` takes them."""


def register() -> None:
    """Make `sdpa` attention of every model of this process the one below."""
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
    """`sdpa_attention_forward` of transformers.

    On CUDA, with a mask and with one key head for all (as in Gemma-3-270M), torch's memory-efficient kernel takes the heads of
    a tile's only query for queries of one head, and gives each of them another row of the mask: pytorch issue 191937. So
    where the number of queries is 1 more than a multiple of 32, there is one query more, whose answer is dropped.

    Args:
        module: the attention layer.
        query: [batch, heads, queries, width].
        key, value: [batch, key heads, keys, width].
        attention_mask: [batch, 1 or heads, queries, keys]; boolean, or added to the scores; None for none or causal.
        segments: computes it instead.
    """
    if segments is not None:
        return segments.attend(query, key, value, kwargs.get("scaling")), None
    if attention_mask is None or not query.is_cuda or query.shape[2] % TILE != 1 or key.shape[1] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    found, nothing = sdpa_attention_forward(module, *with_another_query(query, key, value, attention_mask), **kwargs)
    return found[:, :-1], nothing


def with_another_query(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same attention with one query more, that attends to what the last one does."""
    return pad(query, (0, 0, 0, 1)), key, value, torch.cat([mask, mask[:, :, -1:]], dim=2)
