"""A made-up results folder of any size, written through `record.write_cell`: plausible numbers, no model.

An item is right when a cell's skill beats the item's difficulty; a stricter pattern, a weaker criterion and no mitigation
cost skill. Everything follows from the seed.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nmsweep.config.pattern import parse_pattern
from nmsweep.config.schema import CalibrationConfig, DataConfig, EvalConfig, short_hash
from nmsweep.results.layout import failure_folder
from nmsweep.results.record import LayerCount, Metric, cell_folder, write_cell, write_failure
from nmsweep.statistics.identity import METHOD, SCORES, method_id

MINI = ("mini_cloze", "mini_continuation", "mini_prose", "mini_science", "mini_yesno")
REAL = ("arc_easy", "boolq", "hellaswag", "wikitext2")
TEXTS = ("mini_prose", "wikitext2")
HOSTILE = (
    "<script>alert(1)</script>",
    'a,b"\n|',
    "</script><img src=x onerror=alert(2)>",
    "100%_$x^{2}#&~\\",
    "=1+1 ‘η’ 模",
)
N_CHOICES = {"mini_yesno": 2, "boolq": 2, "mini_cloze": 2}
WEIGHT_CRITERIA = ("wt", "wanda", "sparsegpt")
LAYERS = tuple(f"model.layers.{block}.{name}" for block in range(2) for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"))  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The grid of a made-up sweep. Every `failed_every`-th sparse cell fails, every `missing_every`-th is left out."""

    models: Sequence[str] = ("alpha", "beta")
    patterns: Sequence[str] = ("2:4", "4:8", "8:16", "16:32", "50%")
    criteria: Sequence[str] = ("act",)
    mitigations: Sequence[str] = ("none", "shift", "var", "shift+var")
    tasks: Sequence[str] = MINI
    seeds: Sequence[int] = (0,)
    n_items: int = 32
    n_windows: int = 8
    failed_every: int = 0
    missing_every: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Columns of metrics.csv that are not the usual ones."""

    def sparse(self) -> Iterator[tuple[int, str, str, str, str]]:
        """Seed, model, pattern, criterion, mitigation of each sparse cell; weights are pruned without mitigation."""
        for key in itertools.product(self.seeds, self.models, self.patterns, self.criteria, self.mitigations):
            if key[3] not in WEIGHT_CRITERIA or key[4] == "none":
                yield key


def make_results(folder: Path, plan: Plan = Plan()) -> list[str]:
    """Write the cells of a plan; returns the ids of the finished ones."""
    ids = []
    for seed, model in itertools.product(plan.seeds, plan.models):
        ids.append(write_one(folder, plan, seed, model, "dense", "none", "none"))
    for number, key in enumerate(plan.sparse(), 1):
        if plan.missing_every and number % plan.missing_every == 0:
            continue
        if plan.failed_every and number % plan.failed_every == 0:
            fail_one(folder, plan, *key)
            continue
        ids.append(write_one(folder, plan, *key))
    return ids


def write_one(folder: Path, plan: Plan, seed: int, model: str, pattern: str, criterion: str, mitigation: str) -> str:
    config = config_of(plan, seed, model, pattern, criterion, mitigation)
    cell_id, dense_id = cell_id_of(config), cell_id_of(config_of(plan, seed, model, "dense", "none", "none"))
    parsed = parse_pattern(pattern)
    loss = damage(pattern, criterion, mitigation)
    tables = [samples_of(task, plan, seed, model, loss, cell_id) for task in plan.tasks]
    metrics = [metric for table in tables for metric in metrics_of(table)]
    layers = [] if parsed.is_dense else [layer_count(name, parsed.sparsity) for name in LAYERS]
    shared = {
        "cell_id": cell_id, "dense_cell_id": dense_id, "model": model, "revision": "r0", "pattern": pattern,
        "operand": "none" if parsed.is_dense else "weights" if criterion in WEIGHT_CRITERIA else "activations",
        "n": parsed.n or None, "m": parsed.m or None, "criterion": criterion, "mitigation": mitigation,
        "targets": "none" if parsed.is_dense else "all", "scope": "all", "profile": "strict", "dtype": "bfloat16",
        "sparsity": 1 - sum(x.kept for x in layers) / sum(x.channels for x in layers) if layers else 0.0,
        "flops_share": sum(layer.flops_share for layer in layers), "seed": seed, "status": "done", **plan.extra,
    }  # fmt: skip
    place = cell_folder(folder, model, parsed.slug, criterion, mitigation, cell_id)
    write_cell(
        place,
        config,
        shared,
        metrics,
        layers,
        pd.concat(tables, ignore_index=True),
        provenance_of(shared, plan, config, tables),
    )
    return cell_id


def fail_one(folder: Path, plan: Plan, seed: int, model: str, pattern: str, criterion: str, mitigation: str) -> None:
    config = config_of(plan, seed, model, pattern, criterion, mitigation)
    place = cell_folder(folder, model, parse_pattern(pattern).slug, criterion, mitigation, cell_id_of(config))
    write_failure(
        failure_folder(folder, place.name),
        config,
        {"error": "NonFiniteError: the loss of window 3 is not finite", "traceback": "…"},
    )


def cell_id_of(config: Mapping[str, Any]) -> str:
    return short_hash({key: value for key, value in config.items() if key != "results_dir"})


def config_of(plan: Plan, seed: int, model: str, pattern: str, criterion: str, mitigation: str) -> dict[str, Any]:
    """A config in the form of `RunConfig.dump`."""
    dense = pattern == "dense"
    return {
        "model": {"name": model, "source": "tiny", "path": None, "revision": None, "trust_remote_code": False},
        "pattern": pattern,
        "criterion": None if dense else {"name": criterion},
        "mitigation": mitigation,
        "mitigations": {name: {} for name in mitigation.split("+") if name != "none"},
        "targets": None if dense else "all",
        "scope": "all", "profile": "strict", "tasks": list(plan.tasks),
        "eval": {**EvalConfig().model_dump(mode="json"), "limit": plan.n_items, "seqlen": 512},
        "data": DataConfig().model_dump(mode="json"), "calibration": CalibrationConfig().model_dump(mode="json"),
        "dtype": "bfloat16", "device": "auto", "seed": seed, "baseline": True, "plugins": [], "results_dir": "results",
    }  # fmt: skip


def damage(pattern: str, criterion: str, mitigation: str) -> float:
    """Skill lost, 0 for dense."""
    parsed = parse_pattern(pattern)
    if parsed.is_dense:
        return 0.0
    group = {4: 1.6, 8: 1.25, 16: 1.0, 32: 0.85}.get(parsed.m, 0.75)
    rank = {"act": 1.0, "wt": 1.7, "wanda": 1.3, "sparsegpt": 1.2}.get(
        criterion, 1.0 + draw_of(criterion).uniform(0, 0.3)
    )
    return 2.2 * parsed.sparsity * group * rank * math.prod({"shift": 0.9, "var": 0.8}.get(s, 0.95) for s in mitigation.split("+") if s != "none")  # fmt: skip


def draw_of(*key: object) -> np.random.Generator:
    return np.random.default_rng(int(short_hash([str(part) for part in key], 8), 16))


def samples_of(task: str, plan: Plan, seed: int, model: str, loss: float, cell_id: str) -> pd.DataFrame:
    """The rows of one task in the form of samples.parquet; what the item or the model decides is shared by all cells."""
    noise = draw_of(cell_id, task)
    if task in TEXTS:
        level = (
            draw_of(model, task).normal(3.2, 0.1, plan.n_windows) + 0.4 * loss + noise.normal(0, 0.01, plan.n_windows)
        )
        return pd.DataFrame({
            "task": task, "item": range(plan.n_windows), "nll": level * 511, "n_tokens": 511.0,
            **({"kl": 0.3 * loss + noise.uniform(0, 0.02, plan.n_windows), "top1_agreement": np.clip(1 - 0.15 * loss - noise.uniform(0, 0.02, plan.n_windows), 0, 1), "n_compared": 511} if loss else {}),
        })  # fmt: skip
    width, n = N_CHOICES.get(task, 4), plan.n_items
    item = draw_of(task, "items")
    gold, chars = item.integers(width, size=n), item.integers(5, 40, size=(n, width))
    difficulty = item.normal(0, 1, n)
    base = draw_of(model, task).normal(1.2, 0.2) + 0.01 * seed
    scores = item.normal(-20, 2, (n, width)) + noise.normal(0, 0.3, (n, width))
    scores[np.arange(n), gold] = scores.max(axis=1) + base - loss - difficulty + noise.normal(0, 0.2, n)
    per_char = scores / chars
    return pd.DataFrame({
        "task": task, "item": range(n), "doc_hash": [short_hash([task, i], 64) for i in range(n)],
        "loglikelihoods": scores.tolist(), "greedy": [[False] * width] * n, "choice_chars": chars.tolist(),
        "prediction": scores.argmax(axis=1), "gold": gold.astype(str),
        "metric_acc": (scores.argmax(axis=1) == gold).astype(float),
        **({} if width == 2 else {"metric_acc_norm": (per_char.argmax(axis=1) == gold).astype(float)}),
    })  # fmt: skip


def metrics_of(table: pd.DataFrame) -> Iterable[Metric]:
    task, n = str(table["task"].iloc[0]), len(table)
    if "nll" in table:
        per_token = table["nll"] / table["n_tokens"]
        value = math.exp(table["nll"].sum() / table["n_tokens"].sum())
        yield Metric(task, "perplexity", value, value * float(per_token.std()) / math.sqrt(n), n)
        if "kl" in table:
            yield Metric(task, "kl_to_dense", float(table["kl"].mean()), None, n)
            yield Metric(task, "top1_agreement", float(table["top1_agreement"].mean()), None, n)
        return
    for column in (name for name in ("metric_acc", "metric_acc_norm") if name in table):
        yield Metric(task, column[7:], float(table[column].mean()), float(table[column].std()) / math.sqrt(n), n)


def layer_count(name: str, sparsity: float) -> LayerCount:
    width = 256 if name.endswith("down_proj") else 64
    channels = 4096 * width
    return LayerCount(
        name, width, 256 if name.endswith("up_proj") else 64, channels, round(channels * (1 - sparsity)), 0.09
    )


def provenance_of(
    shared: Mapping[str, Any], plan: Plan, config: Mapping[str, Any], tables: Sequence[pd.DataFrame]
) -> dict[str, Any]:
    scores = {str(table["task"].iloc[0]): short_hash(table.to_csv(), 64) for table in tables}
    tasks = {task: {"version": "1", "data": short_hash(task, 64), "time_s": 1.5, "tokens": 4000, "scoring": "packed", "batch_tokens": 4096, SCORES: scores[task]} for task in plan.tasks}  # fmt: skip
    return {
        "cell_id": shared["cell_id"], "dense_cell_id": shared["dense_cell_id"], "part_id": shared["cell_id"], "status": "done", METHOD: method_id(config),
        "model": {"name": shared["model"], "fingerprint": short_hash(shared["model"], 64), "revision": shared["revision"]},
        "tasks": tasks, "time_s": 1.5 * len(tasks), "tokens": 4000 * len(tasks), "peak_memory_bytes": 2**30,
        "device": "x86_64", "dtype": shared["dtype"], "seed": shared["seed"], "calibration": {},
        "finished": "2026-01-02T03:04:05Z", "versions": {"nmsweep": "0.1.0", "python": "3.12.1", "torch": "2.11.0"},
        "git": "abc1234", "command": "nmsweep -m pattern=2:4,8:16",
    }  # fmt: skip
