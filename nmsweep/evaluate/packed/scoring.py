"""Log-likelihoods of many continuations with no token computed twice: `packing` says what to run, this runs it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmsweep.evaluate.base import Advance
from nmsweep.evaluate.logits import decoder, target_logprobs
from nmsweep.evaluate.packed.attention import PrefixCache, attention_masks
from nmsweep.evaluate.packed.packing import PREFIX_SHARE, Cost, batches, cut, pack
from nmsweep.evaluate.packed.rows import Group, Request, Row, one_each, queries
from nmsweep.evaluate.packed.segments import Segments
from nmsweep.methods.base import counting

MASKED_SLOWDOWN = 4
"""Masked attention in narrow heads does about this many times fewer operations a second than the linear layers."""

PASS_TOKENS = {"cpu": 64, "cuda": 2048}
"""A forward pass takes about as long as this many tokens before it has computed any: a GPU waits for its launches."""


LEAST_FP32_PREFIX = 64
"""A pass over fewer tokens saves next to nothing, and matrix products of few rows round in another way: in fp32 that is seen."""


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


def cost_of(model: Any) -> Cost:
    """What a model's forward passes cost where it is."""
    config = model.config.get_text_config()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    weights = sum(p.numel() for p in decoder(model).parameters() if p.ndim == 2 and p.shape[0] != vocabulary)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    ratio = weights / config.num_hidden_layers / (2 * width) / MASKED_SLOWDOWN
    least_prefix = LEAST_FP32_PREFIX if model.dtype == torch.float32 else 1
    return Cost(float(ratio), PASS_TOKENS.get(model.device.type, PASS_TOKENS["cpu"]), least_prefix)


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
    return one_each(sequences) if single_rows else pack(sequences, cost_of(model), budget.tokens)


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
    scorer = _Scorer(model, cost_of(model), budget, single_rows, advance)
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


Scored = tuple[Sequence[Row], Tensor, Tensor]
"""Rows, and for each of their targets, in order, its log-probability and whether it is the most likely token."""


@dataclass(frozen=True)
class _Scorer:
    """Runs groups of rows, batch by batch."""

    model: Any
    cost: Cost
    budget: Budget
    single_rows: bool
    advance: Advance

    def run(self, group: Group) -> Iterator[Scored]:
        """Run a group's rows, longest first, as many at once as the budget allows."""
        cache = None
        if len(group.prefix):
            cache = self._fill(group)
            if cache is None:  # no memory for the prefix alone: each sequence has to try for itself
                yield from self.run(one_each([query for row in group.rows for query in row.queries])[0])
                return
        n_prefix = len(group.prefix)
        waiting = batches(group.rows, n_prefix, self.cost, self.budget.tokens)
        while waiting:
            found = self._score(waiting[0], n_prefix, cache)
            if found is None:
                self._halve(waiting[0], n_prefix)
                rows = self._narrower([row for batch in waiting for row in batch], n_prefix)
                waiting = batches(rows, n_prefix, self.cost, self.budget.tokens)
                continue
            self.advance(sum(map(len, waiting[0])))
            yield waiting.pop(0), *found

    def _halve(self, batch: Sequence[Row], n_prefix: int) -> None:
        """Lower the budget below what this batch takes, its padding and prefix counted as the memory they take."""
        width = len(batch[0])
        tried = len(batch) * (width + n_prefix // PREFIX_SHARE) if len(batch) > 1 else width
        self.budget.halve(tried, batch[0].longest)

    def _narrower(self, rows: Sequence[Row], n_prefix: int) -> list[Row]:
        """The same sequences in rows that keep to the budget, as far as single sequences do."""
        most = self.budget.tokens
        parts = [cut(row.queries, n_prefix, self.cost, most) if len(row) > most else [row] for row in rows]
        return sorted((row for part in parts for row in part), key=len, reverse=True)

    def _fill(self, group: Group) -> PrefixCache | None:
        """Compute a group's prefix; None if memory runs out."""
        cache = PrefixCache()
        try:
            ids = torch.from_numpy(group.prefix)[None]
            with counting(torch.full_like(ids, group.n_sequences)):
                decoder(self.model)(input_ids=ids.to(self.model.device), past_key_values=cache, use_cache=True)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None
        cache.filled = True
        self.advance(len(group.prefix))
        return cache

    def _score(self, rows: Sequence[Row], n_prefix: int, cache: PrefixCache | None) -> tuple[Tensor, Tensor] | None:
        """Log-probability and greedy flag of the rows' targets; None if memory runs out and a smaller batch is possible."""
        try:
            with counting(_weights(rows)):
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
                **({} if cache else self._segments(rows)),
            ).last_hidden_state
        cells = np.concatenate([row.cells + at * width for at, row in enumerate(rows)])
        targets = np.concatenate([row.targets for row in rows])
        return target_logprobs(self.model, hidden.flatten(0, 1), cells, targets)

    def _segments(self, rows: Sequence[Row]) -> dict[str, Segments]:
        """What makes attention round as on lm-eval's path, in fp32: bf16 rounds more than any order of sums, float64 less."""
        model, config = self.model, self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None) or math.inf
        in_reach = max(int(row.depth.max()) for row in rows) < window
        if model.dtype != torch.float32 or config._attn_implementation != "sdpa" or not in_reach:
            return {}
        return {"segments": Segments(rows, model.device, model.dtype, by_block=model.device.type == "cpu")}


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _weights(rows: Sequence[Row]) -> Tensor:
    """How many sequences each place of a batch is part of, [batch, width] int64; 0 for padding."""
    weights = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for at, row in enumerate(rows):
        weights[at, : len(row)] = row.weight
    return torch.from_numpy(weights)


def _lay_out(rows: Sequence[Row], width: int) -> Tensor:
    """Token, depth and end of each place, [3, batch, width] int64; padding is token 0 at depth 0 that sees only itself."""
    layout = np.zeros((3, len(rows), width), dtype=np.int64)
    layout[2] = np.arange(1, width + 1)
    for at, row in enumerate(rows):
        layout[:, at, : len(row)] = row.ids, row.depth, row.end
    return torch.from_numpy(layout)
