"""All records of a results folder at once, while a sweep may be writing to it."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from nmsweep.config.pattern import parse_pattern
from nmsweep.errors import InputError
from nmsweep.results.layout import CONFIG, FAILED, METRICS, PROVENANCE
from nmsweep.results.record import METRIC_COLUMNS, SCHEMA, cell_folders, is_newer

FIELDS = (
    "model", "revision", "operand", "pattern", "criterion", "mitigation", "targets", "scope", "profile", "dtype", "seed",
)  # fmt: skip
"""The settings that distinguish cells in a table."""

_FLOATS = ("value", "stderr", "sparsity", "flops_share")
_INTEGERS = ("n", "m", "n_items", "seed")
_NOT_A_SETTING = ("results_dir", "data.mirror", "baseline", "plugins", "force", "device", "eval.batch_tokens", "eval.skip_missing")  # fmt: skip
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Results:
    """The records of a results folder.

    Attributes:
        folder: the results folder.
        tidy: one row for each finished cell, task and metric, with the columns of metrics.csv.
        cells: one row per cell, indexed by cell id, failed ones too: `FIELDS`, `dense_cell_id`, `sparsity`, `flops_share`,
            `status`, `error`, `tasks` (joined by +), `variant` (settings that differ between cells with equal fields),
            `place` (its folder).
        configs: effective config by cell id.
        provenance: provenance.json by cell id.
        problems: a message for each record that could not be read.
    """

    folder: Path
    tidy: pd.DataFrame
    cells: pd.DataFrame
    configs: Mapping[str, Mapping[str, Any]]
    provenance: Mapping[str, Mapping[str, Any]]
    problems: Sequence[str] = field(default_factory=tuple)

    @property
    def done(self) -> pd.DataFrame:
        """The finished cells."""
        return self.cells[self.cells["status"] == "done"]


def read_results(results_dir: Path) -> Results:
    """Read the metrics, configs and provenance of every cell, and the failures; not the samples and layers.

    A folder that vanishes meanwhile (a cell that is being replaced) is left out; a damaged one is a problem.

    Raises:
        InputError: the folder has no finished cell.
    """
    problems: list[str] = []
    rows: list[dict[str, Any]] = []
    configs: dict[str, Mapping[str, Any]] = {}
    provenance: dict[str, Mapping[str, Any]] = {}
    places: dict[str, Path] = {}
    for folder in cell_folders(results_dir):
        try:
            known = json.loads((folder / PROVENANCE).read_bytes())
            if is_newer(known):
                raise InputError(
                    f"schema {known['schema']} of a newer nmsweep; this version reads up to {SCHEMA}; update nmsweep"
                )
            cell_id = str(known.get("cell_id") or folder.name.rpartition("_")[2])
            config = read_config(folder / CONFIG)
            metrics = read_rows(folder / METRICS)
        except (OSError, ValueError, AttributeError, csv.Error, InputError) as error:
            if folder.is_dir():
                problems.append(f"record {folder.name}: {_said(error)}")
            continue
        if cell_id not in configs:
            rows += [row for row in metrics if row["cell_id"] == cell_id]
            configs[cell_id], provenance[cell_id], places[cell_id] = config, known, folder
    if not rows:
        because = f" that can be read ({problems[0]})" if problems else ""
        raise InputError(
            f"results_dir: {results_dir} has no finished cell{because}; run `nmsweep` first or pass results_dir=DIR"
        )
    tidy = pd.DataFrame(rows, columns=list(METRIC_COLUMNS)).astype(
        dict.fromkeys(_FLOATS, float) | dict.fromkeys(_INTEGERS, "Int64")
    )
    tidy = tidy.drop_duplicates(["cell_id", "task", "metric"]).sort_values(
        ["model", "pattern", "criterion", "mitigation", "cell_id", "task", "metric"], ignore_index=True
    )
    cells = _cells(tidy, places)
    failed = pd.DataFrame(_failures(results_dir, set(cells.index), configs, provenance, problems))
    if len(failed):
        cells = pd.concat([cells, failed.set_index("cell_id")])
    return Results(results_dir, tidy, cells.assign(variant=variants(cells, configs)), configs, provenance, problems)


def _said(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    return f"{type(error).__name__}: {error}; remove the folder and run its cell again"


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read a metrics.csv; columns that an older version did not write are empty.

    Raises:
        ValueError: a column, a cell id or a number is missing.
        InputError: a row has a pattern that does not exist.
    """
    with open(file, newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        rows: list[dict[str, Any]] = list(reader)
    if missing := {"cell_id", "pattern", "task", "metric", "value"} - set(reader.fieldnames or ()):
        raise ValueError(f"metrics.csv has no column {', '.join(sorted(missing))}")
    for row in rows:
        for name in METRIC_COLUMNS:
            row.setdefault(name, "")
        if not row["cell_id"] or not row["value"]:
            raise ValueError("metrics.csv has a row without cell_id or value")
        _check_pattern(row["pattern"])
        row |= {name: float(row[name]) if row[name] else np.nan for name in _FLOATS}
        row |= {name: int(row[name]) if row[name] else None for name in _INTEGERS}
    return rows


@cache
def _check_pattern(text: str) -> None:
    parse_pattern(text)


def read_config(file: Path) -> Mapping[str, Any]:
    """Read a config.yaml; empty if it is damaged.

    Raises:
        OSError, ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def _cells(tidy: pd.DataFrame, places: Mapping[str, Path]) -> pd.DataFrame:
    cells = tidy.drop_duplicates("cell_id").set_index("cell_id")[[*FIELDS, "dense_cell_id", "sparsity", "flops_share"]]
    tasks = tidy.groupby("cell_id", sort=False)["task"].agg(lambda names: "+".join(names.unique()))
    return cells.assign(tasks=tasks, error="", place=pd.Series(places), status="done")


def _failures(
    results_dir: Path, finished: set[str], configs: dict[str, Any], provenance: dict[str, Any], problems: list[str]
) -> Iterator[dict[str, Any]]:
    """Cells that failed and did not finish later."""
    folder = results_dir / FAILED
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        cell_id = place.name.rpartition("_")[2]
        if cell_id in finished or place.name.startswith("."):
            continue
        try:
            config = read_config(place / CONFIG)
            parse_pattern(config.get("pattern", "dense"))
            provenance[cell_id] = json.loads((place / PROVENANCE).read_bytes())
        except (OSError, ValueError, InputError) as error:
            problems.append(f"failure {place.name}: {type(error).__name__}: {error}")
            continue
        configs[cell_id] = config
        yield {"cell_id": cell_id, "place": place, "status": "failed", "error": str(provenance[cell_id].get("error", "")), **fields_of(config)}  # fmt: skip


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table's fields for a cell without metrics."""
    model, criterion = config.get("model") or {}, config.get("criterion") or {}
    name = Path(str(model["path"])).name if model.get("path") and not model.get("keep_name") else model.get("name", "")
    return {
        "model": str(name), "revision": "", "operand": "", "pattern": str(config.get("pattern", "dense")),
        "criterion": str(criterion.get("name", "none")), "mitigation": str(config.get("mitigation", "none")),
        "targets": str(config.get("targets") or "none"), "scope": str(config.get("scope", "all")),
        "profile": str(config.get("profile", "strict")), "dtype": str(config.get("dtype", "")), "seed": config.get("seed", 0),
        "tasks": "+".join(sorted(config.get("tasks") or ())), "dense_cell_id": "",
    }  # fmt: skip


def variants(cells: pd.DataFrame, configs: Mapping[str, Mapping[str, Any]]) -> pd.Series:
    """Return the settings that differ between cells with equal fields (``eval.limit=32``); empty for the others."""
    words = dict.fromkeys(cells.index, "")
    for same in cells.groupby([*FIELDS, "tasks"], sort=False, dropna=False).indices.values():
        if len(same) < 2:
            continue
        settings = {str(cell_id): dict(flatten(configs.get(str(cell_id), {}))) for cell_id in cells.index[same]}
        keys = sorted({key for known in settings.values() for key in known} - set(_NOT_A_SETTING))
        differing = [key for key in keys if len({str(known.get(key)) for known in settings.values()}) > 1]
        for cell_id, known in settings.items():
            words[cell_id] = ", ".join(f"{key}={known.get(key)}" for key in differing) or cell_id
    return pd.Series(words, dtype=object)


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values of nested mappings."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
