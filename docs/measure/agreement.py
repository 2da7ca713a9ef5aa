"""Measure how far packed scoring is from lm-eval's own path, that path from itself, and both from float64.

Columns: ``packed`` packed against lm-eval's path; ``stock`` lm-eval's path against itself with a quarter of the tokens a
batch, ``single`` with one request a batch; ``packed_exact``, ``stock_exact`` each against packed float64; ``replayed`` packed
against lm-eval's path, both with the masks that the latter had; ``budget`` the furthest of packed with an eighth, with all
and with eight times the tokens. docs/evaluation.md has the numbers.

    python docs/measure/agreement.py model=smollm2 tasks=arc_easy data.mirror=DIR eval.limit=40

Writes agreement.csv here. `methods=act,none|amber,shift` chooses the methods; `rounded=only` scores in bf16 only.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import numpy as np
import pandas as pd
import torch
from replay import Masks
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nmsweep.bench.scoring import task_requests
from nmsweep.cell.identity import identify, model_spec
from nmsweep.config.compose import cells_of
from nmsweep.evaluate.lm import NMSweepLM, Scoring
from nmsweep.evaluate.packed.rows import Request
from nmsweep.evaluate.running import quiet
from nmsweep.models import LoadedModel, load_model
from nmsweep.sparsity.api import sparsify
from nmsweep.sparsity.install import SparseModel

Answers = list[tuple[float, bool]]

Method = tuple[str, str] | None
"""Criterion and mitigation at 8:16; None for the dense model."""

ACROSS_TOKENS = ("clact", "clact_causal")

FLOAT64_ITEMS = 20
"""Items of each task that are scored in float64."""


METHODS = "act,none|act,shift+var|amber,none|clact_causal,none|clact,none"


def run(
    overrides: Sequence[str], methods: Sequence[tuple[str, str]], *, rounded: bool = False
) -> Iterator[dict[str, Any]]:
    """Compare the paths on every task of a run, for the dense model and each method.

    Args:
        overrides: of a run; its tasks, device, limit and budget count.
        methods: criteria and mitigations at 8:16.
        rounded: whether to score in bf16 only.

    Yields:
        One row a task, method and dtype, printed as it comes; in bf16 only for the dense model and `act`.
    """
    words = ["pattern=dense", *overrides]
    (cfg,) = cells_of(words, multirun=False, config_dir=None)
    sources = [source for source in identify(cfg).sources if source.kind == "harness"]
    dtypes = ("bfloat16",) if rounded else ("float64", "float32", "bfloat16")
    models = {dtype: load_model(model_spec(cfg), dtype=dtype, device=cfg.device) for dtype in dtypes}
    if not rounded:
        keep_float64(models["float64"].model)
    for source in sources:
        few = min(FLOAT64_ITEMS, cfg.eval.limit or FLOAT64_ITEMS)
        loaded = models["bfloat16"]
        requests, first = (
            task_requests(loaded.model, loaded.tokenizer, source, limit=limit, num_fewshot=cfg.eval.num_fewshot)
            for limit in (cfg.eval.limit, few)
        )
        for method in (None, *methods):
            exact: Answers = []
            for dtype, loaded in models.items():
                if dtype == "bfloat16" and method not in (None, ("act", "none")):
                    continue
                row, packed = compare(
                    loaded, first if dtype == "float64" else requests, cfg.eval.batch_tokens, method, exact
                )
                exact = packed if dtype == "float64" else []
                row = {"model": cfg.model_name, "task": source.task, **row}
                shown = (f"{key} {value:.1e}" if isinstance(value, float) else str(value) for key, value in row.items())
                print(" ".join(shown), flush=True)
                yield row


def compare(
    loaded: LoadedModel, requests: Sequence[Request], batch_tokens: int, method: Method, exact: Answers
) -> tuple[dict[str, Any], Answers]:
    """Score requests on both paths.

    Args:
        loaded: the dense model.
        requests: encoded.
        batch_tokens: padded tokens computed at once. Except in float64, each path also runs with others: see the columns.
        method: what makes the model sparse.
        exact: packed answers in float64 to the first of the requests; empty for none.

    Returns:
        The row of the table; packed answers.
    """
    dtype, across = loaded.model.dtype, method is not None and method[0] in ACROSS_TOKENS
    criterion, mitigation = method or ("none", "none")
    row = {
        "dtype": str(dtype).removeprefix("torch."), "pattern": "8:16" if method else "dense", "criterion": criterion,
        "mitigation": mitigation, "requests": len(requests),
    }  # fmt: skip
    with _sparse(loaded, method) as layers:
        packed = answers(loaded, requests, "packed", batch_tokens, across)
        masks = Masks(layers) if layers and not across and dtype == torch.float32 else None
        with masks.recording() if masks else nullcontext():
            stock = answers(loaded, requests, "stock", batch_tokens, across)
        row |= differences("packed", packed, stock)
        if dtype == torch.float64:
            return row, packed
        if not across:  # else the budget has no effect: lm-eval's path takes one request a batch
            row |= differences("stock", answers(loaded, requests, "stock", batch_tokens // 4), stock)
            if dtype == torch.float32:
                row |= differences("single", answers(loaded, requests, "stock", 1), stock)
        if method is None or dtype == torch.bfloat16:
            row |= budget_differences(loaded, requests, batch_tokens)
        if exact:
            row |= differences("packed_exact", packed[: len(exact)], exact)
            row |= differences("stock_exact", stock[: len(exact)], exact)
        if masks:
            with masks.replaying():
                replayed = [answers(loaded, requests, scoring, batch_tokens) for scoring in ("packed", "stock")]
            row |= differences("replayed", *replayed)
    return row, packed


def budget_differences(model: LoadedModel, requests: Sequence[Request], batch_tokens: int) -> dict[str, Any]:
    """Compare packed with an eighth of the tokens a batch, with all and with eight times as many."""
    budgets = (batch_tokens // 8, batch_tokens, batch_tokens * 8)
    return differences("budget", *(answers(model, requests, "packed", tokens) for tokens in budgets))


def _sparse(loaded: LoadedModel, method: Method) -> AbstractContextManager[SparseModel | None]:
    if method is None:
        return nullcontext()
    return sparsify(loaded.model, pattern="8:16", criterion=method[0], mitigation=method[1])


def answers(
    loaded: LoadedModel, requests: Sequence[Request], scoring: Scoring, batch_tokens: int, across_tokens: bool = False
) -> Answers:
    """Score requests on one path."""
    lm = NMSweepLM(loaded.model, loaded.tokenizer, batch_tokens, scoring, across_tokens)
    with quiet():
        return lm._loglikelihood_tokens(requests)


def differences(name: str, *alternatives: Answers) -> dict[str, Any]:
    """Compare the furthest of two or more answers to each request.

    Returns:
        Largest, mean and 99th percentile |Δ log-likelihood| in nats, requests beyond 1e-3, requests whose greedy flags differ.
    """
    delta = np.ptp([[value for value, _ in answers] for answers in alternatives], axis=0)
    flags = np.array([[flag for _, flag in answers] for answers in alternatives], dtype=int)
    return {
        f"{name}_max": float(delta.max()),
        f"{name}_mean": float(delta.mean()),
        f"{name}_p99": float(np.quantile(delta, 0.99)),
        f"{name}_beyond": int((delta > 1e-3).sum()),
        f"{name}_flags": int(np.ptp(flags, axis=0).sum()),
    }


class _KeepFloat64(TorchFunctionMode):
    """Ignore casts of float64 tensors to fp32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_float32 = func is Tensor.float or (func is Tensor.to and torch.float32 in (*args[1:], kwargs.get("dtype")))
        if to_float32 and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **kwargs)


def keep_float64(model: nn.Module) -> None:
    """Make the norms of a float64 model compute in float64, in place: transformers' norms go through fp32 in any dtype.

    That rounding turns a difference in the last bit of a float64 number into 1e-7 now and then, and so a near-tie of the mask
    into another channel: two correct paths would differ by that much.
    """
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            module.forward = _in_float64(module.forward)


def _in_float64(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        with _KeepFloat64():
            return forward(*args, **kwargs)

    return wrapped


def main(words: Sequence[str]) -> None:
    """Measure what the words say and write the table."""
    options = dict(word.split("=", 1) for word in words if word.startswith(("methods=", "rounded=")))
    pairs = [pair.partition(",") for pair in options.get("methods", METHODS).split("|")]
    methods = [(criterion, mitigation or "none") for criterion, _, mitigation in pairs]
    overrides = [word for word in words if word.partition("=")[0] not in options]
    rows = run(overrides, methods, rounded=options.get("rounded") == "only")
    pd.DataFrame(rows).to_csv("agreement.csv", index=False, float_format="%.5g")


if __name__ == "__main__":
    main(sys.argv[1:])
