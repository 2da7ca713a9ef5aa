"""The sources of a report's numbers: versions, data, devices, and the cell and command behind each number."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from nmsweep import __version__
from nmsweep.report.page.rerun import rerun_command
from nmsweep.results.read import FIELDS, Results
from nmsweep.statistics.intervals import N_RESAMPLES


def manifest(results: Results) -> dict[str, Any]:
    """Return everything that the numbers depend on; each value with the number of cells that share it."""
    cells = [results.provenance[cell] for cell in results.done.index]
    versions = ((package, version) for cell in cells for package, version in (cell.get("versions") or {}).items())
    models = (cell.get("model") or {} for cell in cells)
    tasks = (pair for cell in cells for pair in (cell.get("tasks") or {}).items())
    return {
        "report": {"nmsweep": __version__, "bootstrap_resamples": N_RESAMPLES, "results_dir": str(results.folder)},
        "cells": {str(status): int(n) for status, n in results.cells["status"].value_counts().items()},
        "schema": _counted(cell.get("schema", 1) for cell in cells),
        "versions": _by_name(versions),
        "git": _counted(cell.get("git", "") for cell in cells),
        "device": _counted(cell.get("device", "") for cell in cells),
        "models": _by_name((model.get("name", ""), f"{model.get('fingerprint', '')} {model.get('revision', '')}".strip()) for model in models),
        "tasks": _by_name((task, f"{part.get('data', '')} version {part.get('version', '')}") for task, part in tasks),
        "problems": list(results.problems),
    }  # fmt: skip


def warnings_of(sources: Mapping[str, Any]) -> list[str]:
    """Warn of two versions of a model or of a task's data under one name.

    Args:
        sources: from `manifest`.
    """
    return [
        f"{kind} {name}: {len(known)} different fingerprints under one name; their numbers are not comparable"
        for kind in ("models", "tasks")
        for name, known in sources[kind].items()
        if len(known) > 1
    ]


def cell_provenance(results: Results) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield folder name and provenance of every finished cell, for the identity watch."""
    for cell_id, place in results.done["place"].items():
        yield place.name, results.provenance[str(cell_id)]


def _counted(values: Iterable[object]) -> dict[str, int]:
    return dict(Counter(map(str, values)).most_common())


def _by_name(pairs: Iterable[tuple[object, object]]) -> dict[str, dict[str, int]]:
    values: dict[str, list[object]] = {}
    for name, value in pairs:
        values.setdefault(str(name), []).append(value)
    return {name: _counted(same) for name, same in sorted(values.items())}


def cell_list(results: Results) -> pd.DataFrame:
    """Return one row per cell: its fields, its status, the command that runs it again and the command that made it."""
    cells = results.cells
    ids = [str(cell_id) for cell_id in cells.index]
    known = [results.provenance.get(cell_id, {}) for cell_id in ids]
    of_record = ("time_s", "tokens", "peak_memory_bytes", "device", "finished", "git")
    return pd.DataFrame(
        {
            "cell_id": ids,
            **{name: cells[name].array for name in (*FIELDS, "tasks", "variant", "dense_cell_id", "status", "error")},
            "folder": [place.name for place in cells["place"]],
            **{name: cells[name].array for name in ("sparsity", "flops_share")},
            **{name: [record.get(name) for record in known] for name in of_record},
            "rerun": [rerun_command(results.configs.get(cell_id, {})) for cell_id in ids],
            "made_by": [record.get("command", "") for record in known],
        }
    )
