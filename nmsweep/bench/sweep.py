"""What a sweep costs beside its cells: time against their number, one process against two, and the commands on thousands."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nmsweep.record import cell_folders, file_digest
from nmsweep.sweep.plan import Plan, PlannedCell, load, plan_ids, store

PATTERNS = ("2:4", "4:8", "8:16", "16:32", "1:4", "3:4", "1:8", "3:8")
MITIGATIONS = ("none", "shift", "var", "shift+var")
CRITERIA = ("act", "wina")
COMMON = (
    "--multirun", "model=tiny-llama", "dtype=float32", "device=cpu", "eval.limit=8", "eval.seqlen=64",
    "tasks=mini_science+mini_prose", "baseline=false",
)  # fmt: skip


def grid(n_cells: int) -> list[str]:
    """The words of a sweep of 8, 16, 32 or 64 cells of the tiny model."""
    n_mitigations = min(len(MITIGATIONS), max(1, n_cells // len(PATTERNS)))
    n_criteria = max(1, n_cells // (len(PATTERNS) * len(MITIGATIONS)))
    return [
        *COMMON,
        f"pattern={','.join(PATTERNS)}",
        f"mitigation={','.join(MITIGATIONS[:n_mitigations])}",
        f"criterion={','.join(CRITERIA[:n_criteria])}",
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
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "nmsweep", *words], check=True, capture_output=True)
    return time.perf_counter() - started


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
    return json.loads((cell / "provenance.json").read_text())


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
    results = folder / "many"
    multiply(folder / "n64-0", results, n_records)
    return [
        {"what": f"nmsweep {name}", "cells": n_records, "seconds": _timed(name, f"results_dir={results}")}
        for name in ("status", "report")
    ]


def multiply(source: Path, results: Path, n_records: int) -> Plan:
    """Fill a results folder with copies of another one's cells under new ids, and with the plan that they are of."""
    plan = load(source, plan_ids(source)[0])
    folders = {folder.name: folder for folder in cell_folders(source)}
    cells: list[PlannedCell] = []
    (results / "cells").mkdir(parents=True)
    for at in range(n_records):
        cell = plan.cells[at % len(plan.cells)]
        new = secrets.token_hex(6)
        name = cell.name.replace(cell.cell_id, new)
        _copy(folders[cell.name], results / "cells" / name, cell.cell_id, new)
        cells.append(replace(cell, cell_id=new, part_id=secrets.token_hex(6), name=name))
    if (source / "items").is_dir():
        shutil.copytree(source / "items", results / "items")
    made = Plan(plan.words, tuple(cells), results)
    store(made)
    return made


def _copy(source: Path, place: Path, old: str, new: str) -> None:
    place.mkdir()
    for name in ("config.yaml", "samples.parquet"):
        os.link(source / name, place / name)
    for name in ("metrics.csv", "layers.csv"):
        (place / name).write_text((source / name).read_text().replace(old, new))
    provenance = json.loads((source / "provenance.json").read_text().replace(old, new))
    for name in ("metrics.csv", "layers.csv"):
        provenance["files"][name]["sha256"] = file_digest(place / name)
    (place / "provenance.json").write_text(json.dumps(provenance))
