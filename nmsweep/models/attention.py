"""Attention as transformers computes it, but for one length at which torch's kernel is wrong."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

TILE = 32
"""Keys that the kernel takes at once; one key left over is what it gets wrong."""


def register() -> None:
    """Make `sdpa` attention of every model of this process the one below."""
    AttentionInterface.register("sdpa", sdpa)


def sdpa(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`sdpa_attention_forward` of transformers.

    On CUDA, with a mask and with keys that all heads share (one key head, as in Gemma-3-270M), torch's memory-efficient
    kernel attends wrongly when the number of keys is 1 more than a multiple of 32: pytorch issue 191937. One more key, seen
    by no query, avoids it.

    Args:
        module: the attention layer.
        query: [batch, heads, queries, width].
        key, value: [batch, key heads, keys, width].
        attention_mask: [batch, 1 or heads, queries, keys]; boolean, or added to the scores; None for none or causal.
    """
    if attention_mask is not None and key.is_cuda and key.shape[2] % TILE == 1:
        key, value, attention_mask = with_unseen_key(key, value, attention_mask)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def with_unseen_key(key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and mask with one key more, that no query attends to."""
    unseen = False if mask.dtype == torch.bool else -math.inf
    return pad(key, (0, 0, 0, 1)), pad(value, (0, 0, 0, 1)), pad(mask, (0, 1), value=unseen)
