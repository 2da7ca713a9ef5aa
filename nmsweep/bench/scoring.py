"""lm-eval's own scoring path against packed scoring, interleaved, with the same padded tokens at once."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from nmsweep.bench.timing import Contender, interleave, peak_memory, ratios
from nmsweep.data.tasks import TaskSource
from nmsweep.errors import InputError
from nmsweep.evaluate.lm import NMSweepLM, Prepared
from nmsweep.evaluate.packed.rows import Request
from nmsweep.evaluate.running import quiet, running_lm_eval
from nmsweep.evaluate.task import harness_task

WARM_UP = 32
"""Requests that are answered before the clock runs."""


def run(
    model: Any,
    tokenizer: Any,
    sources: Sequence[TaskSource],
    *,
    device: str,
    limit: int | None = 200,
    num_fewshot: int = 0,
    batch_tokens: int = 4096,
    rounds: int = 3,
) -> list[dict[str, Any]]:
    """Time the log-likelihood requests of tasks; building and encoding them is not timed.

    Args:
        model: a causal language model of transformers, dense or made sparse by the caller.
        tokenizer: its tokenizer.
        sources: harness tasks.
        device: what the model is on.
        limit: items of each task; None for all.
        num_fewshot: examples before each item.
        batch_tokens: padded tokens computed at once, by both.
        rounds: measured rounds, after a few requests that are not.

    Returns:
        one row a task: see `compare`.

    Raises:
        InputError: a task that generates text.
    """
    rows = []
    for source in sources:
        asked = task_requests(model, tokenizer, source, limit=limit, num_fewshot=num_fewshot)
        if not asked:
            raise InputError(f"tasks: {source.task} has no log-likelihood to compute; leave it out")
        row = compare(model, tokenizer, asked, device=device, batch_tokens=batch_tokens, rounds=rounds)
        rows.append({"task": source.task, "num_fewshot": num_fewshot, **row})
    return rows


def task_requests(
    model: Any, tokenizer: Any, source: TaskSource, *, limit: int | None, num_fewshot: int | None
) -> list[Request]:
    """The log-likelihood requests of a task, or of a group's tasks one after the other, encoded.

    Args:
        limit: items of each task; None for all.
        num_fewshot: examples before each item; None for each task's own number.
    """
    found: list[Request] = []
    lm = _Listener(model, tokenizer, found)
    with running_lm_eval():
        for leaf in source.leaves:
            instances = harness_task(leaf, leaf.shots(num_fewshot)).build(Prepared(), limit=limit)
            lm.loglikelihood([request for request in instances if request.request_type == "loglikelihood"])
    return found


class _Listener(NMSweepLM):
    """Keeps the requests instead of answering them."""

    def __init__(self, model: Any, tokenizer: Any, found: list[Request]) -> None:
        super().__init__(model, tokenizer, 1, lambda n_tokens: None)
        self.found = found

    def _loglikelihood_tokens(self, requests: Sequence[Request], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self.found.extend(requests)
        return []


def compare(
    model: Any, tokenizer: Any, asked: Sequence[Request], *, device: str, batch_tokens: int, rounds: int
) -> dict[str, Any]:
    """Both paths on the same requests.

    Returns:
        `speedup` (median over rounds of stock/packed time) and its quartiles; seconds; tokens fed by each, padding
        included for stock; peak memory in GB of the GPU, or on a CPU of the whole process, and its `memory_ratio`
        packed/stock; the largest difference of a log-likelihood in nats, and how many greedy flags differ.
    """
    answers: dict[str, list[tuple[float, bool]]] = {}
    n_tokens: dict[str, int] = {}

    memory: dict[str, int] = {}

    def answer(scoring: Any, requests: Sequence[Request]) -> None:
        lm = NMSweepLM(model, tokenizer, batch_tokens, lambda n_tokens: None, scoring)
        with quiet(), peak_memory(device) as peak:
            answers[scoring] = lm._loglikelihood_tokens(requests)
        n_tokens[scoring], memory[scoring] = lm.n_tokens, peak()

    for scoring in ("packed", "stock"):
        answer(scoring, asked[:WARM_UP])
    contenders = {scoring: Contender(partial(answer, scoring, asked)) for scoring in ("packed", "stock")}
    times = interleave(contenders, device, rounds, warm_up=0)
    middle, low, high = ratios(times, "packed")["stock"]
    pairs = list(zip(answers["packed"], answers["stock"], strict=True))
    return {
        "requests": len(asked),
        "batch_tokens": batch_tokens,
        "speedup": middle,
        "speedup_q1": low,
        "speedup_q3": high,
        "stock_s": times["stock"].median_s,
        "packed_s": times["packed"].median_s,
        "stock_tokens": n_tokens["stock"],
        "packed_tokens": n_tokens["packed"],
        "stock_gb": memory["stock"] / 1e9,
        "packed_gb": memory["packed"] / 1e9,
        "memory_ratio": memory["packed"] / memory["stock"] if memory["stock"] else None,
        "max_difference": max((abs(a - b) for (a, _), (b, _) in pairs), default=math.nan),
        "flags_differ": sum(a != b for (_, a), (_, b) in pairs),
        "rounds": rounds,
    }
