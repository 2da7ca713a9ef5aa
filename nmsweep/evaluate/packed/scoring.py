"""Score many continuations with no token computed twice: `packing` plans the forward passes, this runs them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmsweep.evaluate.logits import decoder, target_logprobs
from nmsweep.evaluate.packed.attention import PrefixCache, attention_masks
from nmsweep.evaluate.packed.packing import PREFIX_SHARE, Cost, batches, cut, pack
from nmsweep.evaluate.packed.rows import Group, Request, Row, one_each, queries
from nmsweep.evaluate.packed.segments import Segments
from nmsweep.methods.base import counting

MASKED_SLOWDOWN = 4
"""Masked attention in narrow heads is about this many times slower, per operation, than the linear layers."""

PASS_TOKENS = {"cpu": 64, "cuda": 2048}
"""Fixed cost of a forward pass, in tokens: a GPU waits for kernel launches."""

LEAST_FP32_PREFIX = 64
"""Least prefix worth caching in fp32: less saves next to nothing, and products of few rows round differently, which shows."""


@dataclass
class Budget:
    """Padded tokens computed at once; halved when memory runs out, never raised again."""

    tokens: int
    initial: int = field(init=False)

    def __post_init__(self) -> None:
        self.initial = self.tokens

    def halve(self, tried: int, least: int) -> None:
        """Lower the budget after a batch of `tried` tokens ran out of memory, but not below `least`."""
        self.tokens = min(self.tokens, max(tried // 2, least))

    def __str__(self) -> str:
        lowered = f", {self.tokens} after memory ran out" if self.tokens < self.initial else ""
        return f"{self.initial} tokens a batch{lowered}"


def cost_of(model: Any) -> Cost:
    """Estimate the cost of a model's forward passes on its device."""
    config = model.config.get_text_config()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    weights = sum(p.numel() for p in decoder(model).parameters() if p.ndim == 2 and p.shape[0] != vocabulary)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    ratio = weights / config.num_hidden_layers / (2 * width) / MASKED_SLOWDOWN
    least_prefix = LEAST_FP32_PREFIX if model.dtype == torch.float32 else 1
    return Cost(float(ratio), PASS_TOKENS.get(model.device.type, PASS_TOKENS["cpu"]), least_prefix)


def plan(model: Any, requests: Sequence[Request], *, max_length: int, budget: Budget, single_rows: bool) -> list[Group]:
    """Arrange requests in rows, from the sizes of the model alone.

    Args:
        model: a causal language model of transformers, dense or sparse.
        requests: context and continuation tokens.
        max_length: tokens that the model takes; longer sequences lose tokens on the left.
        budget: padded tokens computed at once.
        single_rows: one sequence a row.

    Raises:
        DataError: the model cannot take a request.
    """
    sequences = queries(requests, max_length)
    return one_each(sequences) if single_rows else pack(sequences, cost_of(model), budget.tokens)


@torch.inference_mode()
def score(
    model: Any,
    groups: Sequence[Group],
    n_requests: int,
    *,
    budget: Budget,
    single_rows: bool,
    count: Callable[[int], None],
) -> list[tuple[float, bool]]:
    """Compute the log-likelihood of each continuation, and whether greedy decoding would produce it.

    Args:
        model: a causal language model of transformers, dense or sparse.
        groups: of `plan`.
        n_requests: number of requests that the groups answer.
        budget: padded tokens computed at once; lowered in place when memory runs out.
        single_rows: one sequence a row, and the model is told which tokens are padding.
        count: called with the number of tokens of each batch.

    Returns:
        Σ log p in nats for each request, NaN where any term is not finite; the greedy flag.

    Raises:
        RuntimeError: memory is too small for a single sequence (`torch.OutOfMemoryError` on a GPU).
    """
    scorer = _Scorer(model, cost_of(model), budget, single_rows, count)
    answers: list[tuple[float, bool]] = [(math.nan, False)] * n_requests
    for rows, logprobs, greedy in [done for group in groups for done in scorer.run(group)]:
        _collect(rows, logprobs.double().cpu().numpy(), greedy.cpu().numpy(), answers)
    return answers


def _collect(
    rows: Sequence[Row], logprobs: np.ndarray[Any, Any], greedy: np.ndarray[Any, Any], answers: list[tuple[float, bool]]
) -> None:
    """Sum the targets of each question, and write the sum to its requests' `answers`."""
    questions = [question for row in rows for question in row.questions]
    starts = np.cumsum([0, *(len(question.targets) for question in questions[:-1])])
    totals = np.add.reduceat(logprobs, starts)
    totals[~np.isfinite(totals)] = math.nan
    flags = np.logical_and.reduceat(greedy, starts)
    for question, total, flag in zip(questions, totals.tolist(), flags.tolist(), strict=True):
        for request in question.requests:
            answers[request] = (total, flag)


Scored = tuple[Sequence[Row], Tensor, Tensor]
"""Rows, and the log-probability and greedy flag of each of their targets, in order."""


@dataclass(frozen=True)
class _Scorer:
    """Runs groups of rows, batch by batch."""

    model: Any
    cost: Cost
    budget: Budget
    single_rows: bool
    count: Callable[[int], None]

    def run(self, group: Group) -> Iterator[Scored]:
        """Run the rows of a group, longest first, as many at once as the budget allows."""
        cache = None
        if len(group.prefix):
            cache = self._fill(group)
            if cache is None:  # no memory for the prefix: each sequence computes it again
                yield from self.run(one_each([query for row in group.rows for query in row.queries])[0])
                return
        n_prefix = len(group.prefix)
        waiting = batches(group.rows, n_prefix, self.cost, self.budget.tokens)
        while waiting:
            scored = self._score(waiting[0], n_prefix, cache)
            if scored is None:
                self._halve(waiting[0], n_prefix)
                rows = self._narrower([row for batch in waiting for row in batch], n_prefix)
                waiting = batches(rows, n_prefix, self.cost, self.budget.tokens)
                continue
            self.count(sum(map(len, waiting[0])))
            yield waiting.pop(0), *scored

    def _halve(self, batch: Sequence[Row], n_prefix: int) -> None:
        """Lower the budget below this batch, with its padding and prefix counted by the memory they take."""
        width = len(batch[0])
        tried = len(batch) * (width + n_prefix // PREFIX_SHARE) if len(batch) > 1 else width
        self.budget.halve(tried, batch[0].longest)

    def _narrower(self, rows: Sequence[Row], n_prefix: int) -> list[Row]:
        """Cut rows that exceed the budget, as far as their sequences allow."""
        most = self.budget.tokens
        parts = [cut(row.queries, n_prefix, self.cost, most) if len(row) > most else [row] for row in rows]
        return sorted((row for part in parts for row in part), key=len, reverse=True)

    def _fill(self, group: Group) -> PrefixCache | None:
        """Compute the prefix of a group; None if memory runs out."""
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
        self.count(len(group.prefix))
        return cache

    def _score(self, rows: Sequence[Row], n_prefix: int, cache: PrefixCache | None) -> tuple[Tensor, Tensor] | None:
        """Return log-probability and greedy flag of the rows' targets; None if memory runs out and a smaller batch is possible."""
        try:
            layout = _lay_out(rows)
            with counting(layout[3]):
                return self._forward(rows, layout, n_prefix, cache)
        except RuntimeError as error:
            if not out_of_memory(error) or (len(rows) == 1 and len(rows[0]) == rows[0].longest):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _forward(
        self, rows: Sequence[Row], layout: Tensor, n_prefix: int, cache: PrefixCache | None
    ) -> tuple[Tensor, Tensor]:
        device, width = self.model.device, layout.shape[2]
        ids, depth, end = layout[:3].to(device)
        if self.single_rows:
            lengths = torch.tensor([len(row) for row in rows], device=device)
            real = (torch.arange(width, device=device) < lengths[:, None]).long()
            hidden = decoder(self.model)(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
        elif cache is None and not any(row.branches for row in rows):  # the model's own causal mask is enough
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
        """Return the argument that makes attention round as on lm-eval's path, where that shows.

        It is for fp32 only: in bf16 other roundings are larger, in float64 all of them are negligible.
        """
        model, config = self.model, self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None) or math.inf
        in_reach = max(int(row.depth.max()) for row in rows) < window
        if model.dtype != torch.float32 or config._attn_implementation != "sdpa" or not in_reach:
            return {}
        return {"segments": Segments(rows, model.device, model.dtype, by_block=model.device.type == "cpu")}


def out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _lay_out(rows: Sequence[Row]) -> Tensor:
    """Return token, depth, end and weight of each place, [4, batch, width] int64.

    Padding is token 0 at depth 0 that sees only itself, and counts for no sequence.
    """
    width = max(map(len, rows))
    layout = np.zeros((4, len(rows), width), dtype=np.int64)
    layout[2] = np.arange(1, width + 1)
    for at, row in enumerate(rows):
        layout[:, at, : len(row)] = row.ids, row.depth, row.end, row.weight
    return torch.from_numpy(layout)
