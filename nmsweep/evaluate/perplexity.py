"""Measure the perplexity of a text: one tokenisation, non-overlapping windows, the remainder dropped.

Source: WikiText-2 perplexity as in GPTQ (arXiv:2210.17323) and Wanda (arXiv:2306.11695).
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nmsweep.calibration.text import cut
from nmsweep.data.tasks import TaskSource, read_text
from nmsweep.errors import DataError, NonFiniteError
from nmsweep.evaluate.base import TaskResult
from nmsweep.evaluate.logits import decoder, divergence, target_logprobs
from nmsweep.models import adds_bos
from nmsweep.results.record import Metric

COMPARED_TOKENS = 8192
"""Tokens, from the beginning of a text, on which the sparse model is compared with the dense one."""

AsDense = Callable[[], AbstractContextManager[None]]
"""Returns a context in which a sparse model is dense."""


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
    as_dense: AsDense | None = None,
) -> TaskResult:
    """Compute exp(Σ nll / n) over the seqlen − 1 predicted tokens of each window.

    Args:
        model: a causal language model of transformers, dense or sparse.
        tokenizer: its tokenizer.
        source: the text.
        seqlen: tokens of a window.
        limit: number of windows; None for all.
        batch_tokens: tokens computed at once, at least one window.
        bos: whether windows begin with BOS; None for what the tokenizer does.
        as_dense: for a sparse model; the dense model then runs the first `COMPARED_TOKENS` tokens too, for the metrics
            ``kl_to_dense`` (mean KL of the next-token distributions, nats) and ``top1_agreement`` (0 to 1).

    Raises:
        NonFiniteError: the model returns NaN or infinity.
        DataError: the text is shorter than one window.
    """
    has_bos = adds_bos(tokenizer) if bos is None else bos
    ids = cut(read_text(source), tokenizer, seqlen, has_bos)[:limit]
    if not len(ids):
        raise DataError(f"eval.seqlen: {seqlen} tokens, but {source.task} has fewer; choose a smaller eval.seqlen")
    losses, comparisons, n_left = [], [], COMPARED_TOKENS if as_dense else 0
    for batch in ids.split(max(1, batch_tokens // seqlen)):
        on_device = batch.to(model.device)
        hidden = _hidden(model, on_device)
        losses.append(_window_nll(model, hidden, batch).cpu())
        if as_dense and n_left >= 2:
            comparisons += _compared(model, hidden, on_device, n_left, as_dense)
            n_left -= batch.numel()
    nll = torch.cat(losses)
    if not torch.isfinite(nll).all():
        raise NonFiniteError(
            f"task {source.task}: the loss of window {int((~torch.isfinite(nll)).nonzero()[0])} is not finite"
        )
    samples = pd.DataFrame(
        {"task": source.task, "item": range(len(ids)), "nll": nll.tolist(), "n_tokens": ids.shape[1] - 1}
    )
    metrics = [_perplexity(source.task, nll, ids.shape[1] - 1)]
    if comparisons:
        samples = samples.join(pd.DataFrame(comparisons, columns=["kl", "top1_agreement", "n_compared"]))
        samples["n_compared"] = samples["n_compared"].fillna(0).astype(int)
        metrics += _comparison_metrics(source.task, samples[: len(comparisons)])
    return TaskResult(metrics, samples, ids.numel(), f"windows of {seqlen}" + (" with BOS" if has_bos else ""))


def _perplexity(task: str, nll: Tensor, n_predicted: int) -> Metric:
    """Return exp of the mean loss; its standard error is that of the windows' mean losses, by the delta method."""
    value = math.exp(float(nll.sum()) / (len(nll) * n_predicted))
    spread = float((nll / n_predicted).std()) / math.sqrt(len(nll)) if len(nll) > 1 else None
    return Metric(task, "perplexity", value, None if spread is None else value * spread, len(nll))


def _comparison_metrics(task: str, compared: pd.DataFrame) -> list[Metric]:
    weights = compared["n_compared"] / compared["n_compared"].sum()
    return [
        Metric(task, name, float((compared[column] * weights).sum()), None, len(compared))
        for name, column in (("kl_to_dense", "kl"), ("top1_agreement", "top1_agreement"))
    ]


def _hidden(model: Any, ids: Tensor) -> Tensor:
    """Compute the last hidden states [batch, seqlen, hidden] of ids [batch, seqlen]."""
    hidden: Tensor = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def _window_nll(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    """Compute Σ nll of each window, float64 [batch], for ids [batch, seqlen] on the CPU and their hidden states."""
    targets = ids[:, 1:].flatten().numpy()
    logprobs, _ = target_logprobs(model, hidden[:, :-1].flatten(0, 1), np.arange(len(targets)), targets)
    return -logprobs.double().view(len(ids), -1).sum(-1)


def _compared(
    model: Any, hidden: Tensor, ids: Tensor, n_left: int, as_dense: AsDense
) -> list[tuple[float, float, int]]:
    """Compare windows with the dense model, `n_left` tokens at most.

    Returns:
        KL in nats, top-1 agreement and number of predictions of each window.
    """
    rows = []
    for window, sparse in zip(ids, hidden, strict=True):
        n = min(len(window), n_left) - 1
        if n < 1:
            break
        dense = _dense_hidden(model, window[: n + 1], as_dense)
        kl, same = divergence(model, dense[:n], sparse[:n])
        rows.append((float(kl.mean()), float(same.double().mean()), n))
        n_left -= len(window)
    return rows


_dense: WeakKeyDictionary[Any, dict[bytes, Tensor]] = WeakKeyDictionary()  # shared by the cells of a process


def _dense_hidden(model: Any, window: Tensor, as_dense: AsDense) -> Tensor:
    """Return the dense model's last hidden states [tokens, hidden] of a window [tokens].

    They are kept on the CPU for the next sparse cell, at most `COMPARED_TOKENS` tokens of one text.
    """
    kept = _dense.setdefault(model, {})
    key = window.cpu().numpy().tobytes()
    if key not in kept:
        if sum(map(len, kept.values())) + len(window) > COMPARED_TOKENS:
            kept.clear()
        with as_dense():
            kept[key] = _hidden(model, window[None])[0].cpu()
    return kept[key].to(model.device)
