"""Log-probabilities of given tokens without ever holding `[tokens, vocab]` for more than a slice."""

from typing import Any

import torch
from torch import Tensor, nn

SLICE_ELEMENTS = 2**26
"""Logits held at once, tokens × vocabulary: 256 MiB in fp32."""


def decoder(model: nn.Module) -> nn.Module:
    """The part of a causal language model that gives hidden states."""
    return model.get_decoder()  # type: ignore[operator, no-any-return]


def token_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits [tokens, vocab] of hidden states [tokens, hidden], fp32 (float64 for a float64 model)."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    config = model.config.get_text_config()
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits


def slice_tokens(model: Any) -> int:
    """How many tokens' logits are held at once."""
    vocab = int(model.get_output_embeddings().weight.shape[0])
    return max(1, SLICE_ELEMENTS // vocab)


def divergence(model: Any, dense: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    """How far the next-token distributions of two hidden states are apart.

    Args:
        model: a causal language model of transformers; its output embedding is used for both.
        dense, sparse: [tokens, hidden], last hidden states.

    Returns:
        KL(dense ‖ sparse) [tokens] in nats, float64; whether the most likely tokens are the same, [tokens] bool.
    """
    step = max(1, slice_tokens(model) // 4)  # four tensors of this size are alive
    found, same = [], []
    for one, other in zip(dense.split(step), sparse.split(step), strict=True):
        p, q = (token_logits(model, hidden).log_softmax(-1) for hidden in (one, other))
        same.append(p.argmax(-1) == q.argmax(-1))
        found.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
    return torch.cat(found), torch.cat(same)


def token_logprobs(model: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and whether it is the most likely token.

    Args:
        model: a causal language model of transformers.
        hidden: [tokens, hidden], last hidden states.
        targets: [tokens], the token that each position should predict.

    Returns:
        log-probabilities [tokens], fp32 (float64 for a float64 model), natural logarithm; greedy [tokens] bool.
    """
    logprobs, greedy = [], []
    for rows, wanted in zip(hidden.split(slice_tokens(model)), targets.split(slice_tokens(model)), strict=True):
        logits = token_logits(model, rows)
        chosen = logits.gather(-1, wanted[:, None])[:, 0]
        logprobs.append(chosen - logits.logsumexp(-1))
        greedy.append(logits.argmax(-1) == wanted)
    return torch.cat(logprobs), torch.cat(greedy)
