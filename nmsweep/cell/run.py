"""One cell, from its config to its record: read `run` aloud."""

import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pandas as pd

from nmsweep.calibration.store import Calibrated
from nmsweep.cell.identity import Cell, device_kind, identify, task_identity
from nmsweep.cell.loggers import log_cell
from nmsweep.cell.prepare import allocated, calibration
from nmsweep.cell.provenance import device_name, environment, peak_memory_bytes
from nmsweep.cell.session import Session
from nmsweep.config.schema import RunConfig
from nmsweep.data.tasks import TaskSource
from nmsweep.evaluate import harness, perplexity
from nmsweep.evaluate.base import Prompting, TaskResult
from nmsweep.evaluate.items import keep_items
from nmsweep.evaluate.recovery import naming_the_layer, within_memory
from nmsweep.models import LoadedModel
from nmsweep.results.claims import claimed
from nmsweep.results.layout import items_file
from nmsweep.results.quarantine import damage, put_aside, sound_part, table_damage
from nmsweep.results.record import (
    CellRecord,
    LayerCount,
    Part,
    Parts,
    clear_failure,
    find_cell,
    read_cell,
    write_cell,
)
from nmsweep.sparsity.install import SparseModel, install
from nmsweep.statistics.identity import METHOD, SCORES, duplicates_of, method_id, scores_sha256

log = logging.getLogger(__name__)


def run(cfg: RunConfig, session: Session) -> CellRecord:
    """Run one cell, unless its record exists already.

    The flow: identity → claim → model → allocate → calibrate → sparsify → measure each task, keeping it → record.

    Args:
        cfg: the cell.
        session: what is kept from the cell before.

    Returns:
        The cell's record, as its folder holds it.

    Raises:
        Busy: another process is computing it, or the calibrated state that it needs.
        NmsweepError: the cell cannot be computed; what was finished of it is kept.
    """
    cell = identify(cfg)  # what is left out was said when the sweep was planned
    with claimed(cfg.results_dir, cell.part_id, cell.folder.name):
        if kept := finished(cell, session):  # not before it is ours: others may be writing it or putting it aside
            return kept
        session.display.cell(cell.folder.name)
        log.info("cell begins: %s", cell.folder.name)
        started = time.perf_counter()
        parts = Parts(cfg.results_dir, cell.part_id)
        if cfg.force:
            parts.forget()
        loaded = session.model(cfg)
        cell = allocated(cell, loaded, session)
        calibrated = calibration(cell, loaded, session)
        with sparse(cell, loaded, calibrated) as layers:
            done = [measure(cell, source, loaded, layers, parts, session) for source in cell.sources]
        about = {"launch": session.launch, "wall_s": round(time.perf_counter() - started, 3)}
        record = write(cell, loaded, done, calibrated, about)
    log_cell(cfg, record, session.sweep, session.display.say)
    for same in duplicates_of(cfg.results_dir, cell.folder):
        log.warning("%s", same)
        session.display.say(f"    {same}")
    session.display.finished(summary(record))
    return record


def finished(cell: Cell, session: Session) -> CellRecord | None:
    """The record of a cell that needs no computing; a damaged one is put aside and named.

    With `force` only a record of this launch counts, so that the processes of one launch do not repeat each other's work.
    """
    cfg = cell.cfg
    folder = find_cell(cfg.results_dir, cell.cell_id)
    if folder is None:
        return None
    if what := damage(folder, deep=True):
        put_aside(folder, cfg.results_dir, what, session.display.say)
        return None
    record = read_cell(folder)
    return None if cfg.force and record.provenance.get("launch") != session.launch else record


def sparse(cell: Cell, loaded: LoadedModel, calibrated: Calibrated) -> AbstractContextManager[SparseModel | None]:
    """The model made sparse as the cell says, for as long as the block lasts."""
    if cell.sparsification is None:
        return nullcontext()
    return install(loaded.model, cell.sparsification, cell.cfg.targets, calibrated.state, cell.cfg.scope)


def measure(
    cell: Cell, source: TaskSource, loaded: LoadedModel, layers: SparseModel | None, parts: Parts, session: Session
) -> Part:
    """Measure one task, unless an earlier run of this cell has; keep it on disk at once."""
    identity = task_identity(source, cell.cfg)
    if kept := sound_part(parts, source.task, identity, session.display.say):
        return kept
    session.display.stage(source.task)
    if layers:
        layers.reset_counts()
    started = time.perf_counter()
    result = naming_the_layer(loaded.model, lambda: _evaluate(cell, source, loaded, layers, session))
    seconds = time.perf_counter() - started
    provenance = {
        "time_s": round(seconds, 3),
        "tokens": result.n_tokens,
        "scoring": result.scoring,
        "batch_tokens": cell.cfg.eval.batch_tokens,
        SCORES: scores_sha256(result.samples),
    }
    if source.kind == "harness":
        keep_sound_items(cell, source, identity["data"], session)
    part = Part(source.task, identity, result.metrics, layers.counts() if layers else [], result.samples, provenance)
    parts.write(part)
    return part


def _evaluate(
    cell: Cell, source: TaskSource, loaded: LoadedModel, layers: SparseModel | None, session: Session
) -> TaskResult:
    cfg = cell.cfg
    model, tokenizer, advance = loaded.model, loaded.tokenizer, session.display.tokens
    if source.kind == "text":
        bos = False if cfg.profile != "strict" else None

        def windows(batch_tokens: int) -> TaskResult:
            return perplexity.perplexity(
                model, tokenizer, source,
                seqlen=cfg.eval.seqlen, limit=cfg.eval.limit, batch_tokens=batch_tokens, bos=bos, advance=advance,
                as_dense=layers.as_dense if layers else None,
            )  # fmt: skip

        return within_memory(windows, cfg.eval.batch_tokens, cfg.eval.seqlen)
    return harness.measure(
        model, tokenizer, source,
        prompting=prompting(cell, source), batch_tokens=cfg.eval.batch_tokens, advance=advance,
        scoring=cfg.eval.scoring, across_tokens=cell.across_tokens,
    )  # fmt: skip


def keep_sound_items(cell: Cell, source: TaskSource, data: str, session: Session) -> None:
    """Keep a task's items as text; a file of them that cannot be read is put aside first."""
    results_dir = cell.cfg.results_dir
    file = items_file(results_dir, source.task, data)
    if what := table_damage(file):
        put_aside(file, results_dir, what, session.display.say)
    keep_items(results_dir, source, data, prompting(cell, source))


def prompting(cell: Cell, source: TaskSource) -> Prompting:
    """How a task's items become prompts in this cell."""
    asked = cell.cfg.eval
    return Prompting(
        limit=asked.limit,
        num_fewshot=source.num_fewshot(asked.num_fewshot),
        apply_chat_template=asked.apply_chat_template,
        fewshot_as_multiturn=asked.fewshot_as_multiturn,
        system_instruction=asked.system_instruction,
    )


def write(
    cell: Cell, loaded: LoadedModel, parts: Sequence[Part], calibrated: Calibrated, about: Mapping[str, Any]
) -> CellRecord:
    """Put a cell's parts together and write its record; `about` goes into its provenance."""
    cfg = cell.cfg
    layers = total_counts(parts)
    channels, kept = sum(layer.channels for layer in layers), sum(layer.kept for layer in layers)
    shared = {
        "cell_id": cell.cell_id, "dense_cell_id": cell.dense_cell_id, "model": cfg.model_name, "revision": loaded.revision,
        "operand": cell.sparsification.criterion.operand if cell.sparsification else "none",
        "pattern": str(cfg.pattern),
        **{key: None if cfg.pattern.policy else getattr(cfg.pattern, key) or None for key in ("n", "m")},
        "criterion": cfg.criterion.name if cfg.criterion else "none", "mitigation": cfg.mitigation,
        "targets": "+".join(cfg.targets) or "none", "scope": cfg.scope, "profile": cfg.profile, "dtype": cfg.dtype,
        "sparsity": 1 - kept / channels if channels else 0.0,
        "flops_share": sum(layer.flops_share for layer in layers), "seed": cfg.seed, "status": "done",
    }  # fmt: skip
    provenance = {
        "cell_id": cell.cell_id, "dense_cell_id": cell.dense_cell_id, "part_id": cell.part_id, "status": "done",
        "model": {"name": cfg.model_name, "fingerprint": loaded.fingerprint, "revision": loaded.revision},
        "tasks": {part.task: {**part.identity, **part.provenance} for part in parts},
        "time_s": round(sum(part.provenance["time_s"] for part in parts), 3),
        "tokens": sum(part.provenance["tokens"] for part in parts),
        "peak_memory_bytes": peak_memory_bytes(device_kind(cfg.device)),
        "device": device_name(device_kind(cfg.device)), "dtype": cfg.dtype, "seed": cfg.seed,
        "patterns": patterns_of(cell),
        "calibration": calibrated.provenance(), "limit": cfg.eval.limit, **about,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        METHOD: method_id(cfg.dump(), patterns_of(cell)),
        **environment(),
    }  # fmt: skip
    samples = pd.concat([part.samples for part in parts], ignore_index=True)
    metrics = [metric for part in parts for metric in part.metrics]
    record = write_cell(cell.folder, cfg.dump(), shared, metrics, layers, samples, provenance)
    clear_failure(cell.folder)
    return record


def patterns_of(cell: Cell) -> dict[str, str]:
    """Each layer's own pattern, where they differ."""
    return {name: str(own) for name, own in cell.sparsification.patterns.items()} if cell.sparsification else {}


def total_counts(parts: Sequence[Part]) -> list[LayerCount]:
    """The layers' channel counts summed over a cell's tasks."""
    by_layer: dict[str, list[LayerCount]] = defaultdict(list)
    for part in parts:
        for layer in part.layers:
            by_layer[layer.layer].append(layer)
    return [
        LayerCount(
            name,
            same[0].in_features,
            same[0].out_features,
            sum(c.channels for c in same),
            sum(c.kept for c in same),
            same[0].flops_share,
        )
        for name, same in by_layer.items()
    ]


def summary(record: CellRecord) -> str:
    """A cell's numbers on one line."""
    main = record.metrics.drop_duplicates("task", keep="first")
    numbers = ", ".join(f"{row.task} {row.metric} {row.value:.4g}" for row in main.itertuples())
    return f"{numbers} ({record.provenance['time_s']:.0f} s)"
