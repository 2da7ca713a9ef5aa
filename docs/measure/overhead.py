"""Measure the overhead of a sweep: its time by number of cells, one worker against two, and commands on many records.

    python docs/measure/overhead.py records=5000 rounds=7

Prints one row a measurement.
"""

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
from nmsweep.results.record import cell_folders, file_digest
from nmsweep.sweep.plan import Plan, PlannedCell, load, plan_ids, store

PATTERNS = ("2:4", "4:8", "8:16", "16:32", "1:4", "3:4", "1:8", "3:8")
MITIGATIONS = ("none", "shift", "var", "shift+var")
CRITERIA = ("act", "wina")
COMMON = (
    "--multirun", "model=tiny-llama", "dtype=float32", "device=cpu", "eval.limit=8", "eval.seqlen=64",
    "tasks=mini_science+mini_prose",
)  # fmt: skip
SIZES = (8, 16, 32, 64)
"""Cells of the sweeps that are timed."""

N_MODELS = 8
"""Models of a folder of many records."""


def run(*, records: int = 5000, rounds: int = 7) -> list[dict[str, Any]]:
    """Run sweeps of a tiny model, and `status` and `report`, as subprocesses.

    Args:
        records: cells of the results folder that `status` and `report` are timed on.
        rounds: repetitions of every sweep, interleaved.

    Returns:
        One row a measurement; `seconds` of wall time from the start of the command to its end. The line is fitted to the
        medians of the rounds.
    """
    with tempfile.TemporaryDirectory() as folder:
        return [*_scaling(Path(folder), rounds), *_workers(Path(folder), rounds), *_commands(Path(folder), records)]


def _grid(n_cells: int, baseline: bool = False) -> list[str]:
    """Return the words of a sweep of `SIZES` cells of the tiny model, and of their dense cell if `baseline`."""
    n_mitigations = min(len(MITIGATIONS), max(1, n_cells // len(PATTERNS)))
    n_criteria = max(1, n_cells // (len(PATTERNS) * len(MITIGATIONS)))
    return [
        *COMMON,
        f"pattern={','.join(PATTERNS)}",
        f"mitigation={','.join(MITIGATIONS[:n_mitigations])}",
        f"criterion={','.join(CRITERIA[:n_criteria])}",
        f"baseline={str(baseline).lower()}",
    ]


def _timed(*words: str) -> float:
    """Return the seconds until a command ends. Its output goes to a file: processes that outlive it would hold a pipe open."""
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", "nmsweep", *words], stdout=output, stderr=output).returncode
        seconds = time.perf_counter() - started
        if code != 0:
            output.seek(0)
            raise NmsweepError(f"overhead: nmsweep {words[0]} ended with {code}: {output.read().decode()[-2000:]}")
    return seconds


def _scaling(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Time sweeps of several sizes, and fit a line."""
    seconds, measuring = np.zeros((rounds, len(SIZES))), np.zeros((rounds, len(SIZES)))
    for turn in range(rounds):
        for at, n_cells in enumerate(SIZES):
            results = folder / f"n{n_cells}-{turn}"
            seconds[turn, at] = _timed(*_grid(n_cells), f"results_dir={results}")
            measuring[turn, at] = sum(_provenance(cell)["time_s"] for cell in cell_folders(results))
    times, overhead = np.median(seconds, axis=0), np.median(seconds - measuring, axis=0)
    per_cell, start = np.polyfit(SIZES, times, 1)
    residual = times - (per_cell * np.array(SIZES) + start)
    rows = [
        {"what": "sweep", "cells": n_cells, "workers": 1, "seconds": total, "measuring_s": inside}
        for n_cells, total, inside in zip(SIZES, times, np.median(measuring, axis=0), strict=True)
    ]
    fit = {
        "what": "line through them", "seconds_per_cell": per_cell, "start_s": start,
        "overhead_per_cell_s": np.polyfit(SIZES, overhead, 1)[0],
        "r2": 1 - float((residual**2).sum() / ((times - times.mean()) ** 2).sum()),
    }  # fmt: skip
    return [*rows, fit]


def _provenance(cell: Path) -> Any:
    return json.loads((cell / "provenance.json").read_text())


def _workers(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Time one joblib worker against two on the largest sweep, in turn."""
    rows, ratios = [], []
    for turn in range(rounds):
        seconds = {}
        for workers in (1, 2):
            words = (*_grid(SIZES[-1]), "hydra/launcher=joblib", f"cluster.workers={workers}")
            seconds[workers] = _timed(*words, f"results_dir={folder / f'w{turn}-{workers}'}")
            rows.append({"what": "joblib", "cells": SIZES[-1], "workers": workers, "seconds": seconds[workers]})
        ratios.append(seconds[2] / seconds[1])
    return [*rows, {"what": "2 workers / 1 worker", "cells": SIZES[-1], "ratio": float(np.median(ratios))}]


def _commands(folder: Path, n_records: int) -> list[dict[str, Any]]:
    """Time `status` and `report` on a results folder of many records."""
    source, results = folder / "source", folder / "many"
    _timed(*_grid(SIZES[-1], baseline=True), f"results_dir={source}")
    multiply(source, results, n_records)
    return [
        {"what": f"nmsweep {name}", "cells": n_records, "seconds": _timed(name, f"results_dir={results}")}
        for name in ("status", "report")
    ]


def multiply(source: Path, results: Path, n_records: int) -> Plan:
    """Fill a results folder as a sweep over models and seeds would: with copies of another folder's cells.

    Each copy of all of them, the dense cell included, has its own model and seed in every file but the samples.

    Args:
        source: of one complete sweep.
        results: is created.
        n_records: cells; the last copy may lack some.

    Returns:
        The plan of the new cells.
    """
    plan = load(source, plan_ids(source)[0])
    (results / "cells").mkdir(parents=True)
    cells: list[PlannedCell] = []
    for number in range(-(-n_records // len(plan.cells))):
        ids = {cell.cell_id: secrets.token_hex(6) for cell in plan.cells}
        for cell in plan.cells[: n_records - len(cells)]:
            cells.append(_renamed(cell, ids, number))
            _copy(source / "cells" / cell.name, results / "cells" / cells[-1].name, cells[-1])
    if (source / "items").is_dir():
        shutil.copytree(source / "items", results / "items")
    copied = Plan(plan.words, tuple(cells), results)
    store(copied)
    return copied


def _renamed(cell: PlannedCell, ids: Mapping[str, str], number: int) -> PlannedCell:
    """Return a planned cell with the names and ids of the copy of that number."""
    name, seed = cell.config["model"]["name"], number // N_MODELS
    model = f"{name}-{number % N_MODELS}"
    return replace(
        cell,
        name=cell.name.replace(name, model).replace(cell.cell_id, ids[cell.cell_id]),
        cell_id=ids[cell.cell_id],
        part_id=secrets.token_hex(6),
        dense_cell_id=ids[cell.dense_cell_id],
        config={**cell.config, "model": {**cell.config["model"], "name": model}, "seed": seed},
    )


def _copy(source: Path, folder: Path, cell: PlannedCell) -> None:
    """Write the files of a finished cell as those of another one."""
    folder.mkdir()
    os.link(source / "samples.parquet", folder / "samples.parquet")
    provenance = _provenance(source)
    model, seed, old = cell.config["model"]["name"], cell.config["seed"], provenance["model"]["name"]
    config = (source / "config.yaml").read_text().replace(f"\nseed: {provenance['seed']}\n", f"\nseed: {seed}\n")
    (folder / "config.yaml").write_text(config.replace(f"\n  name: {old}\n", f"\n  name: {model}\n"))
    ids = {"cell_id": cell.cell_id, "dense_cell_id": cell.dense_cell_id}
    for name in ("metrics.csv", "layers.csv"):
        (folder / name).write_text(_with((source / name).read_text(), {**ids, "model": model, "seed": seed}))
    provenance |= {**ids, "part_id": cell.part_id, "seed": seed, "model": {**provenance["model"], "name": model}}
    for name in provenance["files"]:
        provenance["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1))


def _with(table: str, values: Mapping[str, object]) -> str:
    """Return CSV text with other values in those columns that it has."""
    rows = csv.DictReader(io.StringIO(table))
    columns, text = rows.fieldnames or (), io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {name: values[name] for name in values if name in columns} for row in rows)
    return text.getvalue()


if __name__ == "__main__":
    for row in run(**{key: int(value) for key, _, value in (word.partition("=") for word in sys.argv[1:])}):
        print(row, flush=True)
