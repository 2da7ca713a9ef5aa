"""How far packed scoring is from lm-eval's own path, and that from itself: the table of docs/evaluation.md.

python -m nmsweep.bench.agreement model=smollm2 tasks=arc_easy+boolq data.mirror=DIR eval.limit=40 device=cpu
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch

from nmsweep.bench.replay import Masks
from nmsweep.bench.scoring import task_requests
from nmsweep.cell import device_kind, identify, model_spec
from nmsweep.compose import cells_of
from nmsweep.config import RunConfig
from nmsweep.data.tasks import TaskSource
from nmsweep.errors import InputError
from nmsweep.evaluate.lm import NMSweepLM, Scoring, quiet
from nmsweep.evaluate.packing import Request
from nmsweep.models import LoadedModel, load_model
from nmsweep.sparsity.install import sparsify

Answers = list[tuple[float, bool]]

METHODS = (("act", "none"), ("act", "shift+var"), ("amber", "none"), ("clact_causal", "none"), ("clact", "none"))
"""Criteria and mitigations at 8:16, calibrated ones left out."""

ACROSS_TOKENS = ("clact", "clact_causal")

FLOAT64_ITEMS = 20
"""Items of each task that are scored in float64."""


def dense(loaded: LoadedModel, asked: Sequence[Request], batch_tokens: int) -> dict[str, Any]:
    """The dense model on both paths, and the harness's path at two batch sizes."""
    packed = _answers(loaded, asked, "packed", batch_tokens)
    stock, other = (_answers(loaded, asked, "stock", tokens) for tokens in (batch_tokens, batch_tokens // 4))
    return {
        "pattern": "dense", "criterion": "none", "mitigation": "none", "dtype": str(loaded.dtype).removeprefix("torch."),
        **_differences("packed", packed, stock), **_differences("stock", other, stock),
    }  # fmt: skip


def sparse(loaded: LoadedModel, asked: Sequence[Request], batch_tokens: int, criterion: str, mitigation: str) -> Any:
    """A sparse model at 8:16 on both paths, free and with one set of masks for both."""
    across = criterion in ACROSS_TOKENS
    with sparsify(loaded.model, pattern="8:16", criterion=criterion, mitigation=mitigation) as layers:
        packed = _answers(loaded, asked, "packed", batch_tokens, across)
        other = _answers(loaded, asked, "stock", batch_tokens // 4, across)
        masks = None if across or loaded.dtype == torch.float64 else Masks(layers)
        with masks.recording() if masks else nullcontext():
            stock = _answers(loaded, asked, "stock", batch_tokens, across)
        row = {
            "pattern": "8:16", "criterion": criterion, "mitigation": mitigation,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            **_differences("packed", packed, stock), **_differences("stock", other, stock),
        }  # fmt: skip
        if masks:
            with masks.replaying():
                packed = _answers(loaded, asked, "packed", batch_tokens)
                stock = _answers(loaded, asked, "stock", batch_tokens)
            row |= _differences("replayed", packed, stock)
    return row


def _answers(
    loaded: LoadedModel, asked: Sequence[Request], scoring: Scoring, batch_tokens: int, across_tokens: bool = False
) -> Answers:
    lm = NMSweepLM(loaded.model, loaded.tokenizer, batch_tokens, lambda n_tokens: None, scoring, across_tokens)
    with quiet():
        return lm._loglikelihood_tokens(asked)


def _differences(name: str, ours: Answers, theirs: Answers) -> dict[str, Any]:
    """Largest and 99th percentile |Δ log-likelihood| in nats, requests beyond 1e-3, greedy flags that differ."""
    delta = np.abs([a - b for (a, _), (b, _) in zip(ours, theirs, strict=True)])
    return {
        f"{name}_max": float(delta.max()),
        f"{name}_p99": float(np.quantile(delta, 0.99)),
        f"{name}_beyond": int((delta > 1e-3).sum()),
        f"{name}_flags": sum(a != b for (_, a), (_, b) in zip(ours, theirs, strict=True)),
    }


def measure(cfg: RunConfig, source: TaskSource, methods: Sequence[tuple[str, str]], say: Callable[[str], None]) -> Any:
    """Every row of one task: dense fp32 and bf16, sparse fp32, sparse float64 on its first items."""
    rows = []
    for dtype, limit in (("float32", cfg.eval.limit), ("bfloat16", cfg.eval.limit), ("float64", FLOAT64_ITEMS)):
        loaded = load_model(model_spec(cfg), dtype=dtype, device=device_kind(cfg.device))
        asked = task_requests(
            loaded.model, loaded.tokenizer, source, limit=limit, num_fewshot=source.num_fewshot(cfg.eval.num_fewshot)
        )
        shared = {"model": cfg.model_name, "task": source.task, "requests": len(asked)}
        if dtype != "float64":
            rows.append({**shared, **dense(loaded, asked, cfg.eval.batch_tokens)})
            say(_line(rows[-1]))
        for criterion, mitigation in methods if dtype != "bfloat16" else ():
            rows.append({**shared, **sparse(loaded, asked, cfg.eval.batch_tokens, criterion, mitigation)})
            say(_line(rows[-1]))
    return rows


def _line(row: dict[str, Any]) -> str:
    text = " ".join(str(row[key]) for key in ("model", "task", "dtype", "pattern", "criterion", "mitigation"))
    parts = [
        f"{name} max {row[f'{name}_max']:.1e} p99 {row[f'{name}_p99']:.1e} beyond 1e-3 {row[f'{name}_beyond']}, flags {row[f'{name}_flags']}"
        for name in ("packed", "stock", "replayed")
        if f"{name}_max" in row
    ]
    return f"{text} ({row['requests']} requests): {'; '.join(parts)}"


def main(words: Sequence[str]) -> int:
    """Print every row; words are overrides of a run, and `methods=act,shift+var|amber,none` narrows the methods."""
    given = [word for word in words if not word.startswith("methods=")]
    chosen = [word.removeprefix("methods=") for word in words if word.startswith("methods=")]
    methods = [tuple(pair.split(",")) for pair in chosen[0].split("|") if pair] if chosen else list(METHODS)
    try:
        (cfg,) = cells_of(["pattern=dense", *given], multirun=False, config_dir=None)
        sources = [source for source in identify(cfg).sources if source.kind == "harness"]
    except InputError as error:
        print(f"nmsweep: {error}", file=sys.stderr)
        return error.exit_code
    rows = [row for source in sources for row in measure(cfg, source, methods, lambda line: print(line, flush=True))]  # type: ignore[arg-type]
    print(pd.DataFrame(rows).to_csv(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
