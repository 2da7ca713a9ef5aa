"""How far packed scoring is from lm-eval's own path, that from itself, and both from float64: docs/evaluation.md.

Columns: ``packed`` packed against lm-eval's path; ``stock`` lm-eval's path against itself with a quarter of the tokens a
batch, ``single`` with one request a batch; ``packed_exact``, ``stock_exact`` each against packed float64; ``replayed`` packed against lm-eval's path, both with
the masks that the latter had; ``budget`` the furthest of packed with an eighth, with all and with eight times the tokens.

python -m nmsweep.bench.agreement model=smollm2 tasks=arc_easy+boolq data.mirror=DIR eval.limit=40 device=cpu
python -m nmsweep.bench.agreement model=smollm2 tasks=hellaswag data.mirror=DIR eval.limit=40 device=cpu rounded=only
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pandas as pd

from nmsweep.bench.exact import keep_float64
from nmsweep.bench.replay import Masks
from nmsweep.bench.scoring import task_requests
from nmsweep.bench.timing import machine
from nmsweep.cell.identity import device_kind, identify, model_spec
from nmsweep.config.compose import cells_of
from nmsweep.config.schema import RunConfig
from nmsweep.data.tasks import TaskSource
from nmsweep.errors import InputError
from nmsweep.evaluate.lm import NMSweepLM, Scoring
from nmsweep.evaluate.packed.rows import Request
from nmsweep.evaluate.running import quiet
from nmsweep.models import LoadedModel, load_model
from nmsweep.sparsity.api import sparsify
from nmsweep.sparsity.install import Installed

Answers = list[tuple[float, bool]]

METHODS = (("act", "none"), ("act", "shift+var"), ("amber", "none"), ("clact_causal", "none"), ("clact", "none"))
"""Criteria and mitigations at 8:16, calibrated ones left out."""

ROUNDED = (None, ("act", "none"))
"""Methods that are scored in bf16 too; None is the dense model."""

ACROSS_TOKENS = ("clact", "clact_causal")

FLOAT64_ITEMS = 20
"""Items of each task that are scored in float64."""


def rows(
    model32: LoadedModel, model64: LoadedModel, asked: Sequence[Request], n_float64: int, batch_tokens: int,
    method: tuple[str, str] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One method (None: dense) on both paths, in float64 and in fp32.

    Args:
        model32, model64: one model in float32 and in float64.
        asked: the requests.
        n_float64: how many of them, from the first, are scored in float64 too.
        batch_tokens: padded tokens computed at once; lm-eval's path also runs with a quarter of them and with one request.
        method: criterion and mitigation at 8:16.
    """
    first, across = asked[:n_float64], method is not None and method[0] in ACROSS_TOKENS
    words = _named(method)
    with _sparse(model64, method):
        exact = _answers(model64, first, "packed", batch_tokens, across)
        row64 = _differences("packed", exact, _answers(model64, first, "stock", batch_tokens, across))
    with _sparse(model32, method) as layers:
        packed = _answers(model32, asked, "packed", batch_tokens, across)
        masks = Masks(layers) if layers and not across else None
        with masks.recording() if masks else nullcontext():
            stock = _answers(model32, asked, "stock", batch_tokens, across)
        row32 = _differences("packed", packed, stock)
        if not across:  # which takes one request a batch, whatever the budget
            row32 |= _differences("stock", _answers(model32, asked, "stock", batch_tokens // 4), stock)
            row32 |= _differences("single", _answers(model32, asked, "stock", 1), stock)
        if method is None:
            row32 |= _budgets(model32, asked, batch_tokens)
        row32 |= _differences("packed_exact", packed[: len(first)], exact)
        row32 |= _differences("stock_exact", stock[: len(first)], exact)
        if masks:
            with masks.replaying():
                replayed = [_answers(model32, asked, scoring, batch_tokens) for scoring in ("packed", "stock")]
            row32 |= _differences("replayed", *replayed)
    return [
        {**words, "dtype": "float64", "requests": len(first), **row64},
        {**words, "dtype": "float32", "requests": len(asked), **row32},
    ]


def rounded(
    model: LoadedModel, asked: Sequence[Request], batch_tokens: int, method: tuple[str, str] | None
) -> dict[str, Any]:
    """One method (None: dense) in bf16, where even lm-eval's path depends on the batch size."""
    with _sparse(model, method):
        packed, stock = (_answers(model, asked, scoring, batch_tokens) for scoring in ("packed", "stock"))
        return {
            **_named(method), "dtype": "bfloat16", "requests": len(asked),
            **_differences("packed", packed, stock),
            **_differences("stock", _answers(model, asked, "stock", batch_tokens // 4), stock),
            **_budgets(model, asked, batch_tokens),
        }  # fmt: skip


def _named(method: tuple[str, str] | None) -> dict[str, str]:
    criterion, mitigation = method or ("none", "none")
    return {"pattern": "8:16" if method else "dense", "criterion": criterion, "mitigation": mitigation}


def _budgets(model: LoadedModel, asked: Sequence[Request], batch_tokens: int) -> dict[str, Any]:
    """Packed with an eighth of the tokens a batch, with all and with eight times as many."""
    return _differences(
        "budget",
        *(_answers(model, asked, "packed", tokens) for tokens in (batch_tokens // 8, batch_tokens, batch_tokens * 8)),
    )


def _sparse(loaded: LoadedModel, method: tuple[str, str] | None) -> AbstractContextManager[Installed | None]:
    if method is None:
        return nullcontext()
    return sparsify(loaded.model, pattern="8:16", criterion=method[0], mitigation=method[1])


def _answers(
    loaded: LoadedModel, asked: Sequence[Request], scoring: Scoring, batch_tokens: int, across_tokens: bool = False
) -> Answers:
    lm = NMSweepLM(loaded.model, loaded.tokenizer, batch_tokens, lambda n_tokens: None, scoring, across_tokens)
    with quiet():
        return lm._loglikelihood_tokens(asked)


def _differences(name: str, *answers: Answers) -> dict[str, Any]:
    """Between the furthest of two or more answers to each request.

    Largest, mean and 99th percentile |Δ log-likelihood| in nats, requests beyond 1e-3, requests whose greedy flags differ.
    """
    delta = np.ptp([[value for value, _ in each] for each in answers], axis=0)
    flags = [[flag for _, flag in each] for each in answers]
    return {
        f"{name}_max": float(delta.max()),
        f"{name}_mean": float(delta.mean()),
        f"{name}_p99": float(np.quantile(delta, 0.99)),
        f"{name}_beyond": int((delta > 1e-3).sum()),
        f"{name}_flags": int(np.ptp(np.array(flags, dtype=int), axis=0).sum()),
    }


def measure(
    cfg: RunConfig, sources: Sequence[TaskSource], methods: Sequence[tuple[str, str]], say: Callable[[str], None],
    only_rounded: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every row of every task; those in bf16 alone if asked."""
    found: list[dict[str, Any]] = []
    dtypes = ("bfloat16",) if only_rounded else ("bfloat16", "float32", "float64")
    loaded = {dtype: load_model(model_spec(cfg), dtype=dtype, device=device_kind(cfg.device)) for dtype in dtypes}
    if not only_rounded:
        keep_float64(loaded["float64"].model)
    tokens, model = cfg.eval.batch_tokens, loaded["bfloat16"]
    for source in sources:
        about = {"model": cfg.model_name, "task": source.task}

        def keep(rows: Sequence[dict[str, Any]], about: dict[str, str] = about) -> None:
            for row in rows:
                found.append({**about, **row})
                say(_line(found[-1]))

        shots = source.num_fewshot(cfg.eval.num_fewshot)
        asked = task_requests(model.model, model.tokenizer, source, limit=cfg.eval.limit, num_fewshot=shots)
        few = min(FLOAT64_ITEMS, cfg.eval.limit or FLOAT64_ITEMS)
        first = task_requests(model.model, model.tokenizer, source, limit=few, num_fewshot=shots)
        for method in (None, *methods):
            if not only_rounded:
                keep(rows(loaded["float32"], loaded["float64"], asked, len(first), tokens, method))
            if method in ROUNDED:
                keep([rounded(model, asked, tokens, method)])
    return found


def _line(row: dict[str, Any]) -> str:
    text = " ".join(str(row[key]) for key in ("model", "task", "dtype", "pattern", "criterion", "mitigation"))
    names = [key.removesuffix("_max") for key in row if key.endswith("_max")]
    parts = [
        f"{name} {row[f'{name}_max']:.1e} (mean {row[f'{name}_mean']:.1e}, {row[f'{name}_beyond']} beyond 1e-3, "
        f"{row[f'{name}_flags']} flags)"
        for name in names
    ]
    return f"{text} ({row['requests']} requests): {'; '.join(parts)}"


def main(words: Sequence[str]) -> int:
    """Print every row.

    Args:
        words: overrides of a run; `methods=act,shift+var|amber,none` narrows the methods, `rounded=only` the rows to those
            in bf16.
    """
    own = {key: value for key, _, value in (word.partition("=") for word in words) if key in ("methods", "rounded")}
    given = [word for word in words if word.partition("=")[0] not in own]
    pairs = [pair.partition(",") for pair in own.get("methods", "").split("|") if pair]
    methods = [(criterion, mitigation or "none") for criterion, _, mitigation in pairs] if "methods" in own else METHODS
    try:
        if own.get("rounded", "only") != "only":
            raise InputError(f"rounded: {own['rounded']!r}; only is allowed; leave the word out for every dtype")
        (cfg,) = cells_of(["pattern=dense", *given], multirun=False, config_dir=None)
        sources = [source for source in identify(cfg).sources if source.kind == "harness"]
    except InputError as error:
        print(f"nmsweep: {error}", file=sys.stderr)
        return error.exit_code
    print(machine(device_kind(cfg.device)), flush=True)
    found = measure(cfg, sources, methods, lambda line: print(line, flush=True), only_rounded="rounded" in own)
    print(pd.DataFrame(found).to_csv(index=False, float_format="%.3g"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
