"""Perplexity of a text: one tokenisation, non-overlapping windows, remainder dropped.

Source: the GPTQ (arXiv:2210.17323) and Wanda (arXiv:2306.11695) form of WikiText-2 perplexity.
"""

import math
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from nmsweep.data.tasks import TaskSource, read_text
from nmsweep.errors import DataError, NonFiniteError
from nmsweep.evaluate.logits import decoder, token_logprobs
from nmsweep.evaluate.result import Advance, TaskResult
from nmsweep.record import Metric


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS of its own before a text (Llama, Gemma)."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def windows(text: str, tokenizer: Any, seqlen: int, bos: bool) -> Tensor:
    """Cut a text into windows.

    Args:
        text: the whole text, tokenised once without special tokens.
        tokenizer: of transformers.
        seqlen: tokens in a window, a BOS included.
        bos: whether each window begins with the BOS token.

    Returns:
        ids [n_windows, seqlen], int64; the remainder is dropped.

    Raises:
        DataError: the text is shorter than one window.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    width = seqlen - 1 if bos else seqlen
    n_windows = len(ids) // width
    if n_windows == 0:
        raise DataError(f"eval.seqlen: {seqlen} tokens, but the text has only {len(ids)}; choose a smaller eval.seqlen")
    cut = ids[: n_windows * width].view(n_windows, width)
    return torch.cat([torch.full((n_windows, 1), tokenizer.bos_token_id), cut], dim=1) if bos else cut


@torch.inference_mode()
def perplexity(
    model: Any,
    tokenizer: Any,
    source: TaskSource,
    *,
    seqlen: int,
    limit: int | None,
    batch_tokens: int,
    bos: bool | None,
    advance: Advance,
) -> TaskResult:
    """exp(Σ nll / n) over the seqlen − 1 predicted tokens of each window.

    Args:
        model: a causal language model of transformers, dense or sparse.
        tokenizer: its tokenizer.
        source: the text.
        seqlen: tokens in a window.
        limit: windows at most; None for all.
        batch_tokens: tokens computed at once, at least one window.
        bos: whether windows begin with BOS; None for whether the tokenizer adds one.
        advance: progress.

    Raises:
        NonFiniteError: the model gives NaN or infinity.
        DataError: the text is shorter than one window.
    """
    has_bos = adds_bos(tokenizer) if bos is None else bos
    ids = windows(read_text(source), tokenizer, seqlen, has_bos)[:limit]
    batches = []
    for batch in ids.split(max(1, batch_tokens // seqlen)):
        batches.append(_window_nll(model, batch.to(model.device)).cpu())
        advance(batch.numel())
    nll = torch.cat(batches)
    if not torch.isfinite(nll).all():
        raise NonFiniteError(
            f"task {source.task}: the loss of window {int((~torch.isfinite(nll)).nonzero()[0])} is not finite"
        )
    n_predicted = ids.shape[1] - 1
    mean = float(nll.sum()) / (len(ids) * n_predicted)
    per_window = nll / n_predicted
    spread = float(per_window.std()) / math.sqrt(len(ids)) if len(ids) > 1 else None
    value = math.exp(mean)
    samples = pd.DataFrame(
        {
            "task": source.task,
            "item": range(len(ids)),
            "nll": nll.tolist(),
            "n_tokens": n_predicted,
        }
    )
    metric = Metric(source.task, "perplexity", value, None if spread is None else value * spread, len(ids))
    return TaskResult([metric], samples, ids.numel(), f"windows of {seqlen}" + (" with BOS" if has_bos else ""))


def _window_nll(model: Any, ids: Tensor) -> Tensor:
    """Σ nll of each window, float64 [batch], for ids [batch, seqlen]."""
    hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    logprobs, _ = token_logprobs(model, hidden.flatten(0, 1), ids[:, 1:].flatten())
    return -logprobs.double().view(len(ids), -1).sum(-1)
