"""Log-probabilities of given tokens without ever holding `[tokens, vocab]` for more than a slice."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

SLICE_ELEMENTS = 2**26
"""Logits held at once, tokens × vocabulary: 256 MiB in fp32."""

CACHE_ELEMENTS = 2**21
"""Logits read at once on a CPU: few enough to stay in its cache from one operation to the next."""


def decoder(model: nn.Module) -> nn.Module:
    """The part of a causal language model that gives hidden states."""
    return model.get_decoder()  # type: ignore[operator, no-any-return]


def token_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits [tokens, vocab] of hidden states [tokens, hidden], fp32 (float64 for a float64 model)."""
    return _widened(model, model.get_output_embeddings()(hidden))


def _widened(model: Any, logits: Tensor) -> Tensor:
    """What an output embedding gives, as logits in fp32 or float64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    config = model.config.get_text_config()
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits


def slice_tokens(model: Any) -> int:
    """How many tokens' logits are held at once."""
    vocab = int(model.get_output_embeddings().weight.shape[0])
    return max(1, SLICE_ELEMENTS // vocab)


def _part_tokens(model: Any) -> int:
    """How many tokens' logits are read at once."""
    vocab = int(model.get_output_embeddings().weight.shape[0])
    return max(1, CACHE_ELEMENTS // vocab) if model.device.type == "cpu" else slice_tokens(model)


def _parts(model: Any, hidden: Tensor) -> Iterator[Tensor]:
    """Logits of [tokens, hidden], a few tokens at a time; they may be overwritten."""
    part = _part_tokens(model)
    for states in hidden.split(max(1, slice_tokens(model) // part) * part):
        yield from (_widened(model, logits) for logits in model.get_output_embeddings()(states).split(part))


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
    parts = zip(_parts(model, hidden), targets.split(_part_tokens(model)), strict=True)
    found = [_read(logits, torch.arange(len(wanted), device=hidden.device), wanted) for logits, wanted in parts]
    logprobs, greedy = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(greedy)


def target_logprobs(
    model: Any, hidden: Tensor, cells: NDArray[np.int64], targets: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` where several targets may share a cell, as the first tokens of an item's choices do.

    Args:
        model: a causal language model of transformers.
        hidden: [tokens, hidden], last hidden states.
        cells: [k], places in `hidden`; the logits of each are computed once.
        targets: [k], tokens.

    Returns:
        log-probabilities [k]; greedy [k].
    """
    places, back = np.unique(cells, return_inverse=True)
    order = np.argsort(back, kind="stable")
    part, device = _part_tokens(model), hidden.device
    which, target, position = torch.from_numpy(np.stack([back[order], targets[order], np.argsort(order)])).to(device)
    starts = np.searchsorted(back[order], np.arange(0, len(places) + part, part)).tolist()
    found = []
    for at, logits in enumerate(_parts(model, hidden[torch.from_numpy(places).to(device)])):
        of = slice(starts[at], starts[at + 1])
        found.append(_read(logits, which[of] - at * part, target[of]))
    logprobs, greedy = zip(*found, strict=True)
    return torch.cat(logprobs)[position], torch.cat(greedy)[position]


def _read(logits: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of tokens [k] by rows [k] of logits [n, vocab], and whether each is the most likely; overwrites logits."""
    top, likeliest = logits.max(-1)
    chosen = logits[rows, tokens]
    total = logits.sub_(top[:, None]).exp_().sum(-1).log_() + top
    return chosen - total[rows], likeliest[rows] == tokens
