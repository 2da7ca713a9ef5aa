"""Log-likelihoods of many continuations with no token computed twice: `packing` says what to run, this runs it."""

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from nmsweep.evaluate.logits import decoder, slice_tokens, token_logits
from nmsweep.evaluate.packing import Group, Ints, Query, Request, Row, make_row, one_each, pack, queries
from nmsweep.evaluate.result import Advance

MASKED_SLOWDOWN = 4
"""Masked attention in narrow heads does about this many times fewer operations a second than the linear layers."""

PREFIX_SHARE = 4
"""A cached prefix token takes about this part of a computed one's memory: keys and values, but no MLP."""


@dataclass
class Budget:
    """Padded tokens computed at once; halved when memory runs out, never raised again."""

    tokens: int
    asked: int = field(init=False)

    def __post_init__(self) -> None:
        self.asked = self.tokens

    def halve(self, tried: int) -> None:
        """A batch of `tried` tokens was too much."""
        self.tokens = max(1, min(self.tokens, tried) // 2)

    def __str__(self) -> str:
        fell = f", {self.tokens} after memory ran out" if self.tokens < self.asked else ""
        return f"{self.asked} tokens a batch{fell}"


def why_single_rows(model: Any, across_tokens: bool) -> str | None:
    """Why a model's continuations cannot share rows; None if they can.

    Args:
        model: a causal language model of transformers.
        across_tokens: whether the criterion's choice for one token depends on others.
    """
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if across_tokens:
        return "the criterion looks across tokens"
    if attention not in ("sdpa", "eager"):
        return f"{attention} attention takes no mask of its own"
    if not hasattr(decoder(model), "rotary_emb") or _layer_types(config) - {"full_attention", "sliding_attention"}:
        return f"{config.model_type} does not attend by position id alone"
    return None


def _layer_types(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


def attention_ratio(model: Any) -> float:
    """The context length at which attention takes a token as long as all linear layers do."""
    config = model.config.get_text_config()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    weights = sum(p.numel() for p in decoder(model).parameters() if p.ndim == 2 and p.shape[0] != vocabulary)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return float(weights / config.num_hidden_layers / (2 * width) / MASKED_SLOWDOWN)


@torch.inference_mode()
def score(
    model: Any, requests: Sequence[Request], *, max_length: int, budget: Budget, single_rows: bool, advance: Advance
) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, and whether greedy decoding would give it.

    Args:
        model: a causal language model of transformers, dense or sparse.
        requests: context and continuation tokens.
        max_length: tokens that the model takes; longer sequences are cut on the left.
        budget: padded tokens computed at once; halved in place.
        single_rows: one sequence a row, and the model is told which tokens are padding.
        advance: progress.

    Returns:
        Σ log p in nats for each request, NaN where anything is not finite; and the flag.

    Raises:
        DataError: a request that the model cannot take.
        torch.OutOfMemoryError: there is no memory for one sequence alone.
    """
    sequences = queries(requests, max_length)
    groups = one_each(sequences) if single_rows else pack(sequences, attention_ratio(model), budget.tokens)
    scorer = _Scorer(model, budget, single_rows, advance)
    answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
    for rows, logprobs, greedy in [done for group in groups for done in scorer.run(group)]:
        _collect(rows, logprobs.double().cpu().numpy(), greedy.cpu().numpy(), answers)
    return answers


def _collect(
    rows: Sequence[Row], logprobs: np.ndarray[Any, Any], greedy: np.ndarray[Any, Any], answers: list[tuple[float, bool]]
) -> None:
    """Sum the tokens of each question and put it where its requests are."""
    at = 0
    for question in (question for row in rows for question in row.questions):
        tokens = slice(at, at + len(question.targets))
        total = float(logprobs[tokens].sum())
        answer = (total if math.isfinite(total) else math.nan, bool(greedy[tokens].all()))
        for request in question.requests:
            answers[request] = answer
        at = tokens.stop


class PrefixCache(DynamicCache):
    """Keys and values of one prefix: filled by one pass, then read by batches of rows that leave nothing behind."""

    filled = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if not self.filled:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer, batch = self.layers[layer_idx], len(key_states)
        return (
            torch.cat([layer.keys.expand(batch, -1, -1, -1), key_states], dim=2),
            torch.cat([layer.values.expand(batch, -1, -1, -1), value_states], dim=2),
        )

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """0 once filled: rows are given their positions and masks, and are no decoding steps."""
        return 0 if self.filled else int(super().get_seq_length(*args, **kwargs))


Scored = tuple[Sequence[Row], Tensor, Tensor]
"""Rows, and for each of their targets, in order, its log-probability and whether it is the most likely token."""


@dataclass(frozen=True)
class _Scorer:
    """Runs groups of rows, batch by batch."""

    model: Any
    budget: Budget
    single_rows: bool
    advance: Advance

    def run(self, group: Group) -> Iterator[Scored]:
        """Run a group's rows, longest first, as many at once as the budget allows."""
        cache = None
        if len(group.prefix):
            cache = self._guarded(lambda: self._fill(group.prefix))
            if cache is None:  # no memory for the prefix alone: each sequence has to try for itself
                yield from self.run(one_each([query for row in group.rows for query in row.queries])[0])
                return
        n_prefix = len(group.prefix)
        waiting = list(group.rows)
        while waiting:
            batch = waiting[: _n_fitting(waiting, self.budget.tokens, n_prefix)]
            found = self._score(batch, n_prefix, cache)
            if found is None:
                self.budget.halve(_size(batch, n_prefix))
                if len(batch) == 1:
                    waiting[:1] = _split(batch[0], n_prefix)
                continue
            self.advance(sum(map(len, batch)))
            yield batch, *found
            del waiting[: len(batch)]

    def _fill(self, prefix: Ints) -> PrefixCache | None:
        """Compute a prefix; None if memory runs out."""
        cache = PrefixCache()
        try:
            ids = torch.from_numpy(prefix)[None].to(self.model.device)
            decoder(self.model)(input_ids=ids, past_key_values=cache, use_cache=True)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None
        cache.filled = True
        self.advance(len(prefix))
        return cache

    def _score(self, rows: Sequence[Row], n_prefix: int, cache: PrefixCache | None) -> tuple[Tensor, Tensor] | None:
        """Log-probability and greedy flag of the rows' targets; None if memory runs out and a smaller batch is possible."""
        try:
            return self._forward(rows, n_prefix, cache)
        except RuntimeError as error:
            if not out_of_memory(error) or (len(rows) == 1 and len(rows[0].queries) == 1):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _forward(self, rows: Sequence[Row], n_prefix: int, cache: PrefixCache | None) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        ids, depth, end = self._lay_out(rows, width)
        if self.single_rows:
            hidden = _hidden_with_padding(self.model, ids, end > torch.arange(width, device=end.device) + 1)
        elif cache is None and not any(row.branches for row in rows):
            hidden = decoder(self.model)(input_ids=ids, use_cache=False).last_hidden_state  # causal is all that is needed
        else:
            hidden = decoder(self.model)(
                input_ids=ids,
                attention_mask=attention_masks(self.model, depth, end, n_prefix),
                position_ids=depth,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        cells = np.concatenate([row.cells + at * width for at, row in enumerate(rows)])
        targets = np.concatenate([row.targets for row in rows])
        return _target_logprobs(self.model, hidden.flatten(0, 1), cells, targets)
