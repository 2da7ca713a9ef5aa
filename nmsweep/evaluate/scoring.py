"""Log-likelihoods of many continuations with no token computed twice: `packing` says what to run, this runs it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from nmsweep.evaluate.logits import decoder, slice_tokens, token_logits
from nmsweep.evaluate.packing import Group, Ints, Request, Row, cut, one_each, pack, queries
from nmsweep.evaluate.result import Advance

MASKED_SLOWDOWN = 4
"""Masked attention in narrow heads does about this many times fewer operations a second than the linear layers."""

PREFIX_SHARE = 4
"""A cached prefix token takes about this part of a computed one's memory: keys and values, but no MLP."""

PADDING_SHARE = 1 / 16
"""Padding that a batch may have, as a share of the budget; beyond it a smaller batch is sooner."""


@dataclass
class Budget:
    """Padded tokens computed at once; halved when memory runs out, never raised again."""

    tokens: int
    asked: int = field(init=False)

    def __post_init__(self) -> None:
        self.asked = self.tokens

    def halve(self, tried: int, least: int) -> None:
        """A batch of `tried` tokens was too much; fewer than `least` cannot be tried."""
        self.tokens = min(self.tokens, max(tried // 2, least))

    def __str__(self) -> str:
        fell = f", {self.tokens} after memory ran out" if self.tokens < self.asked else ""
        return f"{self.asked} tokens a batch{fell}"


def why_single_rows(model: Any, across_tokens: bool) -> str | None:
    """Why a model's continuations cannot share rows; None if they can.

    Args:
        model: a causal language model of transformers.
        across_tokens: whether what is pruned of one token depends on other tokens of its sequence.
    """
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if across_tokens:
        return "what is pruned depends on other tokens of the sequence"
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


def plan(model: Any, requests: Sequence[Request], *, max_length: int, budget: Budget, single_rows: bool) -> list[Group]:
    """Arrange requests in rows; no weight is looked at.

    Args:
        model: a causal language model of transformers, dense or sparse.
        requests: context and continuation tokens.
        max_length: tokens that the model takes; longer sequences are cut on the left.
        budget: padded tokens computed at once.
        single_rows: one sequence a row.

    Raises:
        DataError: a request that the model cannot take.
    """
    sequences = queries(requests, max_length)
    return one_each(sequences) if single_rows else pack(sequences, attention_ratio(model), budget.tokens)


@torch.inference_mode()
def score(
    model: Any, groups: Sequence[Group], n_requests: int, *, budget: Budget, single_rows: bool, advance: Advance
) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, and whether greedy decoding would give it.

    Args:
        model: a causal language model of transformers, dense or sparse.
        groups: of `plan`.
        n_requests: how many requests the groups answer.
        budget: padded tokens computed at once; halved in place.
        single_rows: one sequence a row, and the model is told which tokens are padding.
        advance: progress.

    Returns:
        Σ log p in nats for each request, NaN where anything is not finite; and the flag.

    Raises:
        torch.OutOfMemoryError: there is no memory for one sequence alone.
    """
    scorer = _Scorer(model, budget, single_rows, advance)
    answers: list[tuple[float, bool]] = [(math.nan, False)] * n_requests
    for rows, logprobs, greedy in [done for group in groups for done in scorer.run(group)]:
        _collect(rows, logprobs.double().cpu().numpy(), greedy.cpu().numpy(), answers)
    return answers


def _collect(
    rows: Sequence[Row], logprobs: np.ndarray[Any, Any], greedy: np.ndarray[Any, Any], answers: list[tuple[float, bool]]
) -> None:
    """Sum the tokens of each question and put it where its requests are."""
    sizes = [size for row in rows for size in row.sizes]
    starts = np.cumsum([0, *sizes[:-1]])
    totals = np.add.reduceat(logprobs, starts)
    totals[~np.isfinite(totals)] = math.nan
    flags = np.logical_and.reduceat(greedy, starts)
    questions = (question for row in rows for question in row.questions)
    for question, total, flag in zip(questions, totals.tolist(), flags.tolist(), strict=True):
        for request in question.requests:
            answers[request] = (total, flag)


class PrefixCache(DynamicCache):
    """Keys and values of one prefix: filled by one pass, then read by batches of rows that leave nothing behind."""

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
            cache = self._fill(group.prefix)
            if cache is None:  # no memory for the prefix alone: each sequence has to try for itself
                yield from self.run(one_each([query for row in group.rows for query in row.queries])[0])
                return
        n_prefix = len(group.prefix)
        waiting = list(group.rows)
        while waiting:
            batch = waiting[: _n_fitting(waiting, self.budget.tokens, n_prefix)]
            found = self._score(batch, n_prefix, cache)
            if found is None:
                tried = _size(batch, n_prefix) if len(batch) > 1 else len(batch[0])
                self.budget.halve(tried, batch[0].longest)
                waiting = self._narrower(waiting, n_prefix)
                continue
            self.advance(sum(map(len, batch)))
            yield batch, *found
            del waiting[: len(batch)]

    def _narrower(self, rows: Sequence[Row], n_prefix: int) -> list[Row]:
        """The same sequences in rows that keep to the budget, as far as single sequences do."""
        parts = [
            part
            for row in rows
            for part in (
                cut(row.queries, n_prefix, math.inf, self.budget.tokens) if len(row) > self.budget.tokens else [row]
            )
        ]
        return sorted(parts, key=len, reverse=True)

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
            if not out_of_memory(error) or (len(rows) == 1 and len(rows[0]) == rows[0].longest):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _forward(self, rows: Sequence[Row], n_prefix: int, cache: PrefixCache | None) -> tuple[Tensor, Tensor]:
        device, width = self.model.device, max(map(len, rows))
        ids, depth, end = _lay_out(rows, width).to(device)
        if self.single_rows:
            lengths = torch.tensor([len(row) for row in rows], device=device)
            real = (torch.arange(width, device=device) < lengths[:, None]).long()
            hidden = decoder(self.model)(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
        elif cache is None and not any(row.branches for row in rows):  # the model's own causal mask is all it needs
            hidden = decoder(self.model)(input_ids=ids, use_cache=False).last_hidden_state
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


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _size(rows: Sequence[Row], n_prefix: int) -> int:
    """Padded tokens of a batch, those of its prefix counted as the memory they take."""
    return len(rows) * (max(map(len, rows)) + n_prefix // PREFIX_SHARE)


def _n_fitting(rows: Sequence[Row], budget: int, n_prefix: int) -> int:
    """How many of the rows, longest first, fit a budget; fewer where padding would take too much of it."""
    longest = len(rows[0])
    most = max(1, budget // (longest + n_prefix // PREFIX_SHARE))
    padding = 0
    for n, row in enumerate(rows[:most]):
        padding += longest - len(row)
        if padding > budget * PADDING_SHARE:
            return max(1, n)
    return min(most, len(rows))


def _lay_out(rows: Sequence[Row], width: int) -> Tensor:
    """Token, depth and end of each place, [3, batch, width] int64; padding is token 0 at depth 0 that sees only itself."""
    layout = np.zeros((3, len(rows), width), dtype=np.int64)
    layout[2] = np.arange(1, width + 1)
    for at, row in enumerate(rows):
        layout[:, at, : len(row)] = row.ids, row.depth, row.end
    return torch.from_numpy(layout)


def attention_masks(model: Any, depth: Tensor, end: Tensor, n_prefix: int) -> Tensor | dict[str, Tensor]:
    """What each token of some rows attends to, in the form that the model takes.

    Args:
        model: a causal language model of transformers with sdpa or eager attention.
        depth, end: [batch, width], as in `Row`.
        n_prefix: cached tokens before each row.

    Returns:
        [batch, 1, width, n_prefix + width] in the model's dtype, 0 where a token attends and -inf where not; one for each
        kind of layer where the model has several.
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
    """Boolean [batch, query, key] as a mask to add, [batch, 1, query, key]; a boolean one is converted by every layer."""
    batch, n_queries, n_keys = sees.shape
    padded = -(-n_keys // 8) * 8  # the GPU's kernel wants rows aligned and would copy the mask in every layer
    mask = torch.zeros(batch, 1, n_queries, padded, dtype=dtype, device=sees.device)[..., :n_keys]
    return mask.masked_fill_(~sees[:, None], -math.inf)


def _target_logprobs(model: Any, hidden: Tensor, cells: Ints, targets: Ints) -> tuple[Tensor, Tensor]:
    """Log-probability of each target at its cell, and whether it is the most likely token.

    Several targets may share a cell, which is the first token of an item's choices: its logits are computed once.

    Args:
        model: a causal language model of transformers.
        hidden: [tokens, hidden], last hidden states.
        cells: [k], places in `hidden`.
        targets: [k], tokens.
    """
    places, back = np.unique(cells, return_inverse=True)
    order = np.argsort(back, kind="stable")
    step = slice_tokens(model)
    device = hidden.device
    wanted = hidden[torch.from_numpy(places).to(device)]
    which, target = torch.from_numpy(np.stack([back[order], targets[order]])).to(device)
    starts = np.searchsorted(back[order], np.arange(0, len(places) + step, step)).tolist()
    logprobs, greedy = [], []
    for at, (begin, stop) in enumerate(pairwise(starts)):
        logits = token_logits(model, wanted[at * step : (at + 1) * step])
        rows, tokens = which[begin:stop] - at * step, target[begin:stop]
        logprobs.append(logits[rows, tokens] - logits.logsumexp(-1)[rows])
        greedy.append(logits.argmax(-1)[rows] == tokens)
    position = torch.from_numpy(np.argsort(order)).to(device)
    return torch.cat(logprobs)[position], torch.cat(greedy)[position]
