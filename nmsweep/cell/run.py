"""One cell, from its config to its record."""

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

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
from nmsweep.evaluate.base import TaskResult
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
    """Compute one cell, unless its record exists.

    Each task is kept on disk as soon as it is measured, so a cell that is interrupted goes on at its next task.

    Args:
        cfg: config of the cell.
        session: keeps the model of the previous cell.

    Returns:
        The record as it is on disk.

    Raises:
        Busy: another process is computing the cell or the calibrated state that it needs.
        NmsweepError: the cell cannot be computed; the tasks that are finished are kept.
    """
    cell = identify(cfg)  # skipped tasks were reported when the sweep was planned
    with claimed(cfg.results_dir, cell.part_id, cell.folder.name):
        if record := finished(cell, session):  # read under the claim: another process may be writing or moving it
            return record
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
            measured = [measure(cell, source, loaded, layers, parts, session) for source in cell.sources]
        record = write(cell, loaded, measured, calibrated, session.launch, time.perf_counter() - started)
    log_cell(cfg, record, session.sweep, session.display.say)
    for same in duplicates_of(cfg.results_dir, cell.folder):
        log.warning("%s", same)
        session.display.say(f"    {same}")
    session.display.finished(summary(record))
    return record


def finished(cell: Cell, session: Session) -> CellRecord | None:
    """Return the record of a finished cell, or None. A damaged record is reported and moved to quarantine.

    With `force`, only a record of this launch counts, so that its processes do not repeat each other's work.
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
    """Return a context that makes the model sparse and restores it; it yields None for a dense cell."""
    if cell.sparsification is None:
        return nullcontext()
    return install(loaded.model, cell.sparsification, cell.cfg.targets, calibrated.state, cell.cfg.scope)


def measure(
    cell: Cell, source: TaskSource, loaded: LoadedModel, layers: SparseModel | None, parts: Parts, session: Session
) -> Part:
    """Measure one task and write its part, unless an earlier run of the cell has."""
    identity = task_identity(source, cell.cfg)
    if part := sound_part(parts, source.task, identity, session.display.say):
        return part
    session.display.stage(source.task)
    if layers:
        layers.reset_counts()
    started = time.perf_counter()
    result = naming_the_layer(loaded.model, lambda: _evaluate(cell, source, loaded, layers))
    provenance = {
        "time_s": round(time.perf_counter() - started, 3),
        "tokens": result.n_tokens,
        "scoring": result.scoring,
        "batch_tokens": cell.cfg.eval.batch_tokens,
        SCORES: scores_sha256(result.samples),
    }
    if source.kind == "harness":
        _keep_items(cell, source, identity["data"], session)
    part = Part(source.task, identity, result.metrics, layers.counts() if layers else [], result.samples, provenance)
    parts.write(part)
    return part


def _evaluate(cell: Cell, source: TaskSource, loaded: LoadedModel, layers: SparseModel | None) -> TaskResult:
    cfg = cell.cfg
    model, tokenizer = loaded.model, loaded.tokenizer
    if source.kind == "text":
        bos = False if cfg.profile != "strict" else None

        def windows(batch_tokens: int) -> TaskResult:
            return perplexity.perplexity(
                model, tokenizer, source,
                seqlen=cfg.eval.seqlen, limit=cfg.eval.limit, batch_tokens=batch_tokens, bos=bos,
                as_dense=layers.as_dense if layers else None,
            )  # fmt: skip

        return within_memory(windows, cfg.eval.batch_tokens, cfg.eval.seqlen)
    return harness.measure(model, tokenizer, source, cfg.eval, cell.across_tokens)


def _keep_items(cell: Cell, source: TaskSource, data: str, session: Session) -> None:
    """Write the items of a task as text; an unreadable file of them is moved to quarantine first."""
    results_dir = cell.cfg.results_dir
    file = items_file(results_dir, source.task, data)
    if what := table_damage(file):
        put_aside(file, results_dir, what, session.display.say)
    keep_items(results_dir, source, data, cell.cfg.eval)


def write(
    cell: Cell, loaded: LoadedModel, parts: Sequence[Part], calibrated: Calibrated, launch: str, seconds: float
) -> CellRecord:
    """Write the record of a cell.

    Args:
        cell: the cell.
        loaded: its model.
        parts: its measured tasks.
        calibrated: its calibrated state.
        launch: id of the launch.
        seconds: wall-clock time of the cell in this process.
    """
    cfg, layers = cell.cfg, total_counts(parts)
    channels, kept = sum(layer.channels for layer in layers), sum(layer.kept for layer in layers)
    n_or_m = {key: None if cfg.pattern.policy else getattr(cfg.pattern, key) or None for key in ("n", "m")}
    shared = {
        "cell_id": cell.cell_id, "dense_cell_id": cell.dense_cell_id, "model": cfg.model_name, "revision": loaded.revision,
        "operand": cell.sparsification.criterion.operand if cell.sparsification else "none",
        "pattern": str(cfg.pattern), **n_or_m, "criterion": cfg.criterion_name, "mitigation": cfg.mitigation,
        "targets": "+".join(cfg.targets) or "none", "scope": cfg.scope, "profile": cfg.profile, "dtype": cfg.dtype,
        "sparsity": 1 - kept / channels if channels else 0.0,
        "flops_share": sum(layer.flops_share for layer in layers), "seed": cfg.seed, "status": "done",
    }  # fmt: skip
    own_patterns = cell.sparsification.patterns if cell.sparsification else {}
    patterns = {name: str(pattern) for name, pattern in own_patterns.items()}
    device = device_kind(cfg.device)
    provenance = {
        "cell_id": cell.cell_id, "dense_cell_id": cell.dense_cell_id, "part_id": cell.part_id, "status": "done",
        "model": {"name": cfg.model_name, "fingerprint": loaded.fingerprint, "revision": loaded.revision},
        "tasks": {part.task: {**part.identity, **part.provenance} for part in parts},
        "time_s": round(sum(part.provenance["time_s"] for part in parts), 3),
        "tokens": sum(part.provenance["tokens"] for part in parts),
        "peak_memory_bytes": peak_memory_bytes(device), "device": device_name(device), "dtype": cfg.dtype, "seed": cfg.seed,
        "patterns": patterns, "calibration": calibrated.provenance(), "limit": cfg.eval.limit,
        "launch": launch, "wall_s": round(seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        METHOD: method_id(cfg.dump(), patterns), **environment(),
    }  # fmt: skip
    samples = pd.concat([part.samples for part in parts], ignore_index=True)
    metrics = [metric for part in parts for metric in part.metrics]
    record = write_cell(cell.folder, cfg.dump(), shared, metrics, layers, samples, provenance)
    clear_failure(cell.folder)
    return record


def total_counts(parts: Sequence[Part]) -> list[LayerCount]:
    """Return the channel counts of each layer, summed over the tasks."""
    totals: dict[str, LayerCount] = {}
    for count in (count for part in parts for count in part.layers):
        total = totals.get(count.layer)
        totals[count.layer] = (
            count
            if total is None
            else replace(total, channels=total.channels + count.channels, kept=total.kept + count.kept)
        )
    return list(totals.values())


def summary(record: CellRecord) -> str:
    """Return the first metric of each task and the time taken, on one line."""
    first = record.metrics.drop_duplicates("task", keep="first")
    numbers = ", ".join(f"{row.task} {row.metric} {row.value:.4g}" for row in first.itertuples())
    return f"{numbers} ({record.provenance['time_s']:.0f} s)"
