"""Where the numbers of a report come from: versions, data, devices, and the cell and command behind each number."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from nmsweep import __version__
from nmsweep.report.page.rerun import rerun_command
from nmsweep.results.read import FIELDS, Results


def manifest(results: Results, n_resamples: int) -> dict[str, Any]:
    """Everything that the numbers depend on; every value with the number of cells that share it."""
    cells = [results.provenance[cell] for cell in results.done.index]
    return {
        "report": {"nmsweep": __version__, "bootstrap_resamples": n_resamples, "results_dir": str(results.folder)},
        "cells": {str(status): int(n) for status, n in results.cells["status"].value_counts().items()},
        "schema": _counted(cell.get("schema", 1) for cell in cells),
        "versions": _versions(cells),
        "git": _counted(cell.get("git", "") for cell in cells),
        "device": _counted(cell.get("device", "") for cell in cells),
        "models": _by_name(_model(cell) for cell in cells),
        "tasks": _by_name(one for cell in cells for one in _tasks(cell)),
        "problems": list(results.problems),
    }  # fmt: skip


def warnings_of(made: Mapping[str, Any]) -> list[str]:
    """What makes numbers of one folder not comparable: two versions of a model or of a task's data under one name."""
    return [
        f"{kind} {name}: {len(known)} different fingerprints under one name; their numbers are not comparable"
        for kind in ("models", "tasks")
        for name, known in made[kind].items()
        if len(known) > 1
    ]


def cell_provenance(results: Results) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Folder name and provenance of every finished cell, for the identity watch."""
    for cell_id, place in results.done["place"].items():
        yield place.name, results.provenance[str(cell_id)]


def _counted(values: Iterable[object]) -> dict[str, int]:
    return dict(Counter(str(value) for value in values).most_common())


def _versions(cells: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for cell in cells:
        for package, version in (cell.get("versions") or {}).items():
            found.setdefault(str(package), Counter())[str(version)] += 1
    return {package: dict(counts.most_common()) for package, counts in sorted(found.items())}


def _model(cell: Mapping[str, Any]) -> tuple[str, str]:
    model = cell.get("model") or {}
    return str(model.get("name", "")), f"{model.get('fingerprint', '')} {model.get('revision', '')}".strip()


def _tasks(cell: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for task, part in (cell.get("tasks") or {}).items():
        yield str(task), f"{part.get('data', '')} version {part.get('version', '')}"


def _by_name(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for name, value in pairs:
        found.setdefault(name, Counter())[value] += 1
    return {name: dict(counts.most_common()) for name, counts in sorted(found.items())}


def cell_list(results: Results) -> pd.DataFrame:
    """One row a cell: what it is, how it went, the command that runs it again and the command that made it."""
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
            **{name: [one.get(name) for one in known] for name in of_record},
            "rerun": [rerun_command(results.configs.get(cell_id, {})) for cell_id in ids],
            "made_by": [one.get("command", "") for one in known],
        }
    )
