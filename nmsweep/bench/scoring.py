"""Time lm-eval's own scoring path against packed scoring, interleaved, with the same padded tokens at once."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from nmsweep.bench.options import Count, Device, Dtype
from nmsweep.bench.timing import Contender, interleave, median_ms, peak_memory, ratios
from nmsweep.cell.identity import identify, model_spec
from nmsweep.config.compose import cells_of
from nmsweep.data.tasks import TaskSource
from nmsweep.errors import InputError
from nmsweep.evaluate.lm import NMSweepLM, Prepared, Scoring
from nmsweep.evaluate.packed.rows import Request
from nmsweep.evaluate.running import quiet, running_lm_eval
from nmsweep.evaluate.task import harness_task
from nmsweep.models import load_model

WARM_UP = 32
"""Requests that are answered before the clock runs."""


def run(
    *,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    model: str = "smollm2",
    tasks: str = "mini",
    mirror: str = "",
    limit: Count = 32,
    shots: Annotated[int, Field(ge=0)] = 0,
    batch_tokens: Count = 4096,
    rounds: Count = 7,
) -> list[dict[str, Any]]:
    """Time the log-likelihood requests of tasks; building and encoding them is not timed.

    Args:
        model, dtype: by name; the model is dense.
        device: where it runs.
        tasks, mirror: as `tasks` and `data.mirror` of a run.
        limit: items of each task.
        shots: examples before each item.
        batch_tokens: padded tokens computed at once, by both paths.
        rounds: measured rounds, after a few requests that are not.

    Returns:
        One row a task: see `compare`.

    Raises:
        InputError: a task that generates text.
    """
    words = [f"model={model}", f"dtype={dtype}", "pattern=dense", f"tasks={tasks}"]
    words += [f"data.mirror={mirror}"] if mirror else []
    (cfg,) = cells_of(words, multirun=False, config_dir=None)
    sources = [source for source in identify(cfg).sources if source.kind == "harness"]
    loaded = load_model(model_spec(cfg), dtype=cfg.dtype, device=device)
    rows = []
    for source in sources:
        requests = task_requests(loaded.model, loaded.tokenizer, source, limit=limit, num_fewshot=shots)
        if not requests:
            raise InputError(f"tasks: {source.task} has no log-likelihood to compute; leave it out")
        row = compare(loaded.model, loaded.tokenizer, requests, device=device, batch_tokens=batch_tokens, rounds=rounds)
        rows.append({"model": model, "dtype": dtype, "task": source.task, "num_fewshot": shots, **row})
    return rows


def task_requests(
    model: Any, tokenizer: Any, source: TaskSource, *, limit: int | None, num_fewshot: int | None
) -> list[Request]:
    """Return the encoded log-likelihood requests of a task, or of a group's tasks one after the other.

    Args:
        model: a causal language model of transformers; nothing is computed.
        tokenizer: its tokenizer.
        source: the task and its data.
        limit: items of each task; None for all.
        num_fewshot: examples before each item; None for each task's own number.
    """
    lm = _Recorder(model, tokenizer)
    with running_lm_eval():
        for leaf in source.leaves:
            instances = harness_task(leaf, leaf.shots(num_fewshot)).build(Prepared(), limit=limit)
            lm.loglikelihood([request for request in instances if request.request_type == "loglikelihood"])
    return lm.requests


class _Recorder(NMSweepLM):
    """Records the requests instead of answering them."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer, 1)
        self.requests: list[Request] = []

    def _loglikelihood_tokens(self, requests: Sequence[Request], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self.requests.extend(requests)
        return []


def compare(
    model: Any, tokenizer: Any, requests: Sequence[Request], *, device: str, batch_tokens: int, rounds: int
) -> dict[str, Any]:
    """Time both paths on the same requests.

    Returns:
        `speedup` (median over rounds of stock/packed time) and its quartiles; seconds; tokens fed by each, padding
        included for stock; peak memory in GB of the GPU, or on a CPU of the whole process, and its `memory_ratio`
        packed/stock; the largest difference of a log-likelihood in nats, and how many greedy flags differ.
    """
    paths: tuple[Scoring, Scoring] = ("packed", "stock")
    answers: dict[str, list[tuple[float, bool]]] = {}
    n_tokens: dict[str, int] = {}
    memory: dict[str, int] = {}

    def answer(scoring: Scoring, requests: Sequence[Request]) -> None:
        lm = NMSweepLM(model, tokenizer, batch_tokens, scoring)
        with quiet(), peak_memory(device) as peak:
            answers[scoring] = lm._loglikelihood_tokens(requests)
        n_tokens[scoring], memory[scoring] = lm.n_tokens, peak()

    for scoring in paths:
        answer(scoring, requests[:WARM_UP])
    contenders: dict[str, Contender] = {scoring: Contender(partial(answer, scoring, requests)) for scoring in paths}
    times = interleave(contenders, device, rounds, warm_up=0)
    middle, low, high = ratios(times, "packed")["stock"]
    pairs = list(zip(answers["packed"], answers["stock"], strict=True))
    return {
        "requests": len(requests), "batch_tokens": batch_tokens,
        "speedup": middle, "speedup_q1": low, "speedup_q3": high,
        **{f"{scoring}_s": median_ms(times[scoring]) / 1e3 for scoring in reversed(paths)},
        **{f"{scoring}_tokens": n_tokens[scoring] for scoring in reversed(paths)},
        **{f"{scoring}_gb": memory[scoring] / 1e9 for scoring in reversed(paths)},
        "memory_ratio": memory["packed"] / memory["stock"] if memory["stock"] else None,
        "max_difference": max((abs(a - b) for (a, _), (b, _) in pairs), default=math.nan),
        "flags_differ": sum(a != b for (_, a), (_, b) in pairs), "rounds": rounds,
    }  # fmt: skip
