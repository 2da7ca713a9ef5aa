"""What a sweep costs beside its cells: time against their number, one process against two, and the commands on thousands."""

import csv
import io
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nmsweep.errors import NmsweepError
from nmsweep.results.layout import CELLS, CONFIG, ITEMS, LAYERS, METRICS, PROVENANCE, SAMPLES
from nmsweep.results.record import cell_folders, file_digest
from nmsweep.sweep.plan import Plan, PlannedCell, load, plan_ids, store

PATTERNS = ("2:4", "4:8", "8:16", "16:32", "1:4", "3:4", "1:8", "3:8")
MITIGATIONS = ("none", "shift", "var", "shift+var")
CRITERIA = ("act", "wina")
COMMON = (
    "--multirun", "model=tiny-llama", "dtype=float32", "device=cpu", "eval.limit=8", "eval.seqlen=64",
    "tasks=mini_science+mini_prose",
)  # fmt: skip
N_MODELS = 8
"""Models of a folder of many records."""


def grid(n_cells: int, *, baseline: bool = False) -> list[str]:
    """The words of a sweep of 8, 16, 32 or 64 cells of the tiny model, and their dense cell if `baseline`."""
    n_mitigations = min(len(MITIGATIONS), max(1, n_cells // len(PATTERNS)))
    n_criteria = max(1, n_cells // (len(PATTERNS) * len(MITIGATIONS)))
    return [
        *COMMON,
        f"pattern={','.join(PATTERNS)}",
        f"mitigation={','.join(MITIGATIONS[:n_mitigations])}",
        f"criterion={','.join(CRITERIA[:n_criteria])}",
        f"baseline={str(baseline).lower()}",
    ]


def run(n_records: int, rounds: int) -> list[dict[str, Any]]:
    """Measure.

    Args:
        n_records: cells of the results folder that `status` and `report` are timed on.
        rounds: repetitions of every sweep, interleaved.

    Returns:
        one row a measurement; `seconds` of wall time, everything from the command's start to its end included. The line goes
        through the medians of the rounds.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        return [*_scaling(folder, rounds), *_workers(folder, rounds), *_commands(folder, n_records)]


def _timed(*words: str) -> float:
    """Seconds until the command has ended; what it says goes to a file, since processes that it leaves would hold a pipe open."""
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", "nmsweep", *words], stdout=said, stderr=said).returncode
        seconds = time.perf_counter() - started
        if code != 0:
            said.seek(0)
            raise NmsweepError(f"bench sweep: nmsweep {words[0]} ended with {code}: {said.read().decode()[-2000:]}")
    return seconds


def _scaling(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """A sweep's time against its number of cells, and the line through it."""
    sizes = (8, 16, 32, 64)
    seconds, computing = np.zeros((rounds, len(sizes))), np.zeros((rounds, len(sizes)))
    for turn in range(rounds):
        for at, n_cells in enumerate(sizes):
            results = folder / f"n{n_cells}-{turn}"
            seconds[turn, at] = _timed(*grid(n_cells), f"results_dir={results}")
            computing[turn, at] = sum(_provenance(cell)["time_s"] for cell in cell_folders(results))
    times, overhead = np.median(seconds, axis=0), np.median(seconds - computing, axis=0)
    per_cell, start = np.polyfit(sizes, times, 1)
    residual = times - (per_cell * np.array(sizes) + start)
    rows = [
        {"what": "sweep", "cells": n, "workers": 1, "seconds": time, "measuring_s": measuring}
        for n, time, measuring in zip(sizes, times, np.median(computing, axis=0), strict=True)
    ]
    fit = {
        "what": "line through them", "seconds_per_cell": per_cell, "start_s": start,
        "overhead_per_cell_s": np.polyfit(sizes, overhead, 1)[0],
        "r2": 1 - float((residual**2).sum() / ((times - times.mean()) ** 2).sum()),
    }  # fmt: skip
    return [*rows, fit]


def _provenance(cell: Path) -> Any:
    return json.loads((cell / PROVENANCE).read_text())


def _workers(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """One joblib worker against two on 64 cells, in turns; the ratio of each turn."""
    rows, ratios = [], []
    for turn in range(rounds):
        seconds = {}
        for workers in (1, 2):
            words = (*grid(64), "hydra/launcher=joblib", f"cluster.workers={workers}")
            seconds[workers] = _timed(*words, f"results_dir={folder / f'w{turn}-{workers}'}")
            rows.append({"what": "joblib", "cells": 64, "workers": workers, "seconds": seconds[workers]})
        ratios.append(seconds[2] / seconds[1])
    return [*rows, {"what": "2 workers / 1 worker", "cells": 64, "ratio": float(np.median(ratios))}]


def _commands(folder: Path, n_records: int) -> list[dict[str, Any]]:
    """`status` and `report` on a results folder of many records."""
    source, results = folder / "source", folder / "many"
    _timed(*grid(64, baseline=True), f"results_dir={source}")
    multiply(source, results, n_records)
    return [
        {"what": f"nmsweep {name}", "cells": n_records, "seconds": _timed(name, f"results_dir={results}")}
        for name in ("status", "report")
    ]


def multiply(source: Path, results: Path, n_records: int) -> Plan:
    """Fill a results folder as a sweep over models and seeds would: with another folder's cells, over and over.

    Each copy of all of them, the dense cell included, has a model and a seed of its own in every file but the samples.

    Args:
        source: of one sweep, whole.
        results: is made.
        n_records: cells; the last copy may lack some.

    Returns:
        The plan that the new cells are of.
    """
    plan = load(source, plan_ids(source)[0])
    (results / CELLS).mkdir(parents=True)
    cells: list[PlannedCell] = []
    for number in range(-(-n_records // len(plan.cells))):
        ids = {cell.cell_id: secrets.token_hex(6) for cell in plan.cells}
        for cell in plan.cells[: n_records - len(cells)]:
            cells.append(_renamed(cell, ids, number))
            _copy(source / CELLS / cell.name, results / CELLS / cells[-1].name, cells[-1])
    if (source / ITEMS).is_dir():
        shutil.copytree(source / ITEMS, results / ITEMS)
    made = Plan(plan.words, tuple(cells), results)
    store(made)
    return made


def _renamed(cell: PlannedCell, ids: Mapping[str, str], number: int) -> PlannedCell:
    """A planned cell in the copy of that number."""
    old, seed = cell.config["model"]["name"], number // N_MODELS
    model = f"{old}-{number % N_MODELS}"
    return replace(
        cell,
        name=cell.name.replace(old, model).replace(cell.cell_id, ids[cell.cell_id]),
        cell_id=ids[cell.cell_id],
        part_id=secrets.token_hex(6),
        dense_cell_id=ids[cell.dense_cell_id],
        config={**cell.config, "model": {**cell.config["model"], "name": model}, "seed": seed},
    )


def _copy(source: Path, place: Path, cell: PlannedCell) -> None:
    """The files of a finished cell as those of another one."""
    place.mkdir()
    os.link(source / SAMPLES, place / SAMPLES)
    provenance = _provenance(source)
    model, seed = cell.config["model"]["name"], cell.config["seed"]
    config = (source / CONFIG).read_text().replace(f"\nseed: {provenance['seed']}\n", f"\nseed: {seed}\n")
    old = provenance["model"]["name"]
    (place / CONFIG).write_text(config.replace(f"\n  name: {old}\n", f"\n  name: {model}\n"))
    ids = {"cell_id": cell.cell_id, "dense_cell_id": cell.dense_cell_id}
    for name in (METRICS, LAYERS):
        (place / name).write_text(_with((source / name).read_text(), {**ids, "model": model, "seed": seed}))
    provenance |= {**ids, "part_id": cell.part_id, "seed": seed, "model": {**provenance["model"], "name": model}}
    for name in provenance["files"]:
        provenance["files"][name] = {"bytes": (place / name).stat().st_size, "sha256": file_digest(place / name)}
    (place / PROVENANCE).write_text(json.dumps(provenance, indent=1))


def _with(table: str, values: Mapping[str, object]) -> str:
    """CSV text with other values in the columns that it has."""
    rows = csv.DictReader(io.StringIO(table))
    columns, text = rows.fieldnames or (), io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {name: values[name] for name in values if name in columns} for row in rows)
    return text.getvalue()
