"""Make a model of transformers compute rows of a prefix tree, in which each token attends to its ancestors only."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from nmsweep.evaluate.logits import decoder


def why_single_rows(model: Any, across_tokens: bool) -> str | None:
    """Explain why a model's continuations cannot share rows; None if they can.

    Args:
        model: a causal language model of transformers.
        across_tokens: whether pruning one token depends on other tokens of its sequence.
    """
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if across_tokens:
        return "pruning a token depends on other tokens of its sequence"
    if attention not in ("sdpa", "eager"):
        return f"{attention} attention takes no custom mask"
    if not hasattr(decoder(model), "rotary_emb") or _layer_types(config) - {"full_attention", "sliding_attention"}:
        return f"{config.model_type} does not attend by position id alone"
    return None


def _layer_types(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


class PrefixCache(DynamicCache):
    """Keys and values of one prefix: filled by one pass, then read by batches of rows, which do not add to it."""

    filled = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if not self.filled:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer: Any = self.layers[layer_idx]
        batch = len(key_states)
        return (
            torch.cat([layer.keys.expand(batch, -1, -1, -1), key_states], dim=2),
            torch.cat([layer.values.expand(batch, -1, -1, -1), value_states], dim=2),
        )

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Return 0 once filled: rows bring their own positions and masks and are not decoding steps."""
        return 0 if self.filled else int(super().get_seq_length(*args, **kwargs))


def attention_masks(model: Any, depth: Tensor, end: Tensor, n_prefix: int) -> Tensor | dict[str, Tensor]:
    """Return the mask by which each token attends to its ancestors, in the form that the model takes.

    Args:
        model: a causal language model of transformers with sdpa or eager attention.
        depth, end: [batch, width], as in `Row`.
        n_prefix: cached tokens before each row.

    Returns:
        [batch, 1, width, n_prefix + width] in the model's dtype, 0 where a token attends and -inf where not; a mask for each
        kind of layer if the model has several.
    """
    config = model.config.get_text_config()
    place = torch.arange(depth.shape[1], device=depth.device)
    sees = (place[:, None] >= place) & (place[:, None] < end[:, None, :])  # [batch, query, key]
    sees = torch.nn.functional.pad(sees, (n_prefix, 0), value=True)
    kinds = _layer_types(config)
    window = getattr(config, "sliding_window", None) if not kinds or "sliding_attention" in kinds else None
    near = sees
    if window is not None:
        cached = torch.arange(n_prefix, device=depth.device).expand(len(depth), -1)
        near = sees & (depth[:, :, None] - torch.cat([cached, depth], dim=1)[:, None, :] < window)
    if len(kinds) > 1:
        return {
            "full_attention": _additive(sees, model.dtype),
            "sliding_attention": _additive(near, model.dtype),
        }
    return _additive(near, model.dtype)


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert boolean [batch, query, key] to an additive mask [batch, 1, query, key], once instead of in every layer."""
    batch, n_queries, n_keys = sees.shape
    padded = -(-n_keys // 8) * 8  # the GPU kernel needs aligned rows, or copies the mask in every layer
    mask = torch.zeros(batch, 1, n_queries, padded, dtype=dtype, device=sees.device)[..., :n_keys]
    return mask.masked_fill_(~sees[:, None], -math.inf)
