"""Records of cells and of their tasks: what they hold, how they are written whole or not at all, how they are read. No torch."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import pandas as pd
import yaml

from nmsweep.errors import InputError
from nmsweep.results.layout import CELLS, CONFIG, LAYERS, METRICS, PART, PARTS, PROVENANCE, SAMPLES, failure_folder
from nmsweep.results.storage import whole_folder

SCHEMA = 1
"""Version of the files of a cell; kept in provenance.json. Older versions stay readable."""

METRIC_COLUMNS = (
    "cell_id", "dense_cell_id", "model", "revision", "operand", "pattern", "n", "m", "criterion", "mitigation", "targets",
    "scope", "profile", "dtype", "task", "metric", "value", "stderr", "n_items", "sparsity", "flops_share", "seed", "status",
)  # fmt: skip
"""Columns of metrics.csv and tidy.csv, in order."""

LAYER_COLUMNS = ("cell_id", "layer", "in_features", "out_features", "channels", "kept", "sparsity", "flops_share")
"""Columns of layers.csv: `channels` seen and `kept` are counts over tokens; shares are 0 to 1."""


@dataclass(frozen=True)
class Metric:
    """One number about one task. `value` and `stderr` in the metric's own unit; `n_items` items or windows."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n_items: int


@dataclass(frozen=True)
class LayerCount:
    """Channels seen and kept by one target layer, summed over tokens; features of its weight."""

    layer: str
    in_features: int
    out_features: int
    channels: int
    kept: int
    flops_share: float


@dataclass(frozen=True)
class Part:
    """One task of one cell, measured.

    Attributes:
        identity: what the numbers depend on besides the part's id (data fingerprint, task version).
        metrics: the task's numbers.
        layers: channel counts of the target layers during this task; empty for a dense cell.
        samples: one row for each item or window.
        provenance: times, tokens, memory and whatever else changes no number.
    """

    task: str
    identity: Mapping[str, Any]
    metrics: Sequence[Metric]
    layers: Sequence[LayerCount]
    samples: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CellRecord:
    """A finished cell, as its folder holds it."""

    folder: Path
    config: Mapping[str, Any]
    metrics: pd.DataFrame
    layers: pd.DataFrame
    samples: pd.DataFrame
    provenance: Mapping[str, Any]

    @property
    def cell_id(self) -> str:
        return str(self.provenance["cell_id"])


def cell_folder(results_dir: Path, model: str, pattern: str, criterion: str, mitigation: str, cell_id: str) -> Path:
    """Return the folder of a cell; the words are for people, the id alone decides."""
    words = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", word)[:60] for word in (model, pattern, criterion, mitigation))
    return results_dir / CELLS / f"{words}_{cell_id}"


def find_cell(results_dir: Path, cell_id: str) -> Path | None:
    """Return the folder of a finished cell, given its id."""
    return next(iter((results_dir / CELLS).glob(f"*_{cell_id}")), None)


def cell_index(results_dir: Path) -> dict[str, Path]:
    """Return the folder of every finished cell by its id, from one listing of `cells/`."""
    return {folder.name.rpartition("_")[2]: folder for folder in cell_folders(results_dir)}


def _write_json(place: Path, value: Any) -> None:
    place.write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")


def write_cell(
    folder: Path,
    config: Mapping[str, Any],
    shared: Mapping[str, Any],
    metrics: Sequence[Metric],
    layers: Sequence[LayerCount],
    samples: pd.DataFrame,
    provenance: Mapping[str, Any],
) -> CellRecord:
    """Write a finished cell.

    Args:
        folder: its place, from `cell_folder`.
        config: the effective config.
        shared: the columns of metrics.csv that all its rows share (model, pattern, …).
        metrics: its numbers, one row each.
        layers: channel counts of the target layers.
        samples: the items of all tasks.
        provenance: the rest; `cell_id`, `schema` and `status` are in it.
    """
    rows = [{**shared, **asdict(metric)} for metric in metrics]
    table = pd.DataFrame(rows, columns=list(METRIC_COLUMNS))
    per_layer = [
        {
            **asdict(layer),
            "cell_id": shared["cell_id"],
            "sparsity": 1 - layer.kept / layer.channels if layer.channels else 0.0,
        }
        for layer in layers
    ]
    with whole_folder(folder) as place:
        (place / CONFIG).write_text(yaml.safe_dump(_plain(config), sort_keys=False))
        table.to_csv(place / METRICS, index=False)
        pd.DataFrame(per_layer, columns=list(LAYER_COLUMNS)).to_csv(place / LAYERS, index=False)
        samples.to_parquet(place / SAMPLES, index=False)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)} for file in sorted(place.iterdir())
        }
        _write_json(place / PROVENANCE, {"schema": SCHEMA, "files": files, **provenance})
    return read_cell(folder)


def file_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def read_cell(folder: Path) -> CellRecord:
    """Read a finished cell.

    Raises:
        InputError: a file is missing or unreadable, or a later version wrote it; the message names it.
    """
    try:
        provenance = json.loads((folder / PROVENANCE).read_text())
        if is_newer(provenance):
            raise InputError(
                f"record {folder}: its schema is {provenance['schema']}; this version reads up to {SCHEMA}; update nmsweep"
            )
        return CellRecord(
            folder=folder,
            config=yaml.safe_load((folder / CONFIG).read_text()),
            metrics=read_metrics(folder / METRICS),
            layers=pd.read_csv(folder / LAYERS),
            samples=pd.read_parquet(folder / SAMPLES),
            provenance=provenance,
        )
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise InputError(
            f"record {folder}: {type(error).__name__}: {error}; remove the folder and run its cell again"
        ) from error


def is_newer(provenance: Mapping[str, Any]) -> bool:
    """Return whether a later version wrote a record; its files may differ from those that this version knows."""
    schema = provenance.get("schema", 0)
    return isinstance(schema, int) and schema > SCHEMA


_NUMBERS = {
    "value": float,
    "stderr": float,
    "sparsity": float,
    "flops_share": float,
    "n": "Int64",
    "m": "Int64",
    "n_items": "Int64",
    "seed": "Int64",
}


def read_metrics(file: Path | IO[bytes]) -> pd.DataFrame:
    """Read a metrics.csv or tidy.csv; words such as ``none`` stay strings, an empty `n` stays empty."""
    types: dict[str, Any] = {column: _NUMBERS.get(column, str) for column in METRIC_COLUMNS}
    return pd.read_csv(file, dtype=types, keep_default_na=False, na_values={column: [""] for column in _NUMBERS})


def cell_folders(results_dir: Path) -> list[Path]:
    """Return the folders of all finished cells of a results folder, sorted by name."""
    cells = results_dir / CELLS
    folders = (folder for folder in cells.iterdir() if not folder.name.startswith(".")) if cells.is_dir() else ()
    return sorted(folders, key=lambda folder: folder.name)


class Parts:
    """The finished tasks of one cell; they survive a kill, which costs at most the task that was being computed.

    Args:
        results_dir: the results folder.
        part_id: identity of the cell without its task list.
    """

    def __init__(self, results_dir: Path, part_id: str) -> None:
        self.results_dir = results_dir
        self.folder = results_dir / PARTS / part_id

    def read(self, task: str, identity: Mapping[str, Any]) -> Part | None:
        """Read a task's part; None if there is none with this identity.

        Raises:
            OSError, ValueError, KeyError, TypeError, AttributeError: it is damaged.
        """
        place = self.folder / task
        if not place.exists():
            return None
        stored = json.loads((place / PART).read_text())
        if stored["identity"] != json.loads(json.dumps(identity)):
            return None
        samples = pd.read_parquet(place / SAMPLES)
        return Part(
            task,
            stored["identity"],
            [Metric(**metric) for metric in stored["metrics"]],
            [LayerCount(**layer) for layer in stored["layers"]],
            samples,
            stored["provenance"],
        )

    def write(self, part: Part) -> None:
        with whole_folder(self.folder / part.task) as place:
            part.samples.to_parquet(place / SAMPLES, index=False)
            rest = {key: value for key, value in asdict(part).items() if key != "samples"}
            _write_json(place / PART, rest)

    def forget(self) -> None:
        """Delete all parts, for a forced run."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_failure(place: Path, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Record a failed cell; a later success removes the record."""
    with whole_folder(place) as temporary:
        (temporary / CONFIG).write_text(yaml.safe_dump(_plain(config), sort_keys=False))
        _write_json(temporary / PROVENANCE, {"schema": SCHEMA, "status": "failed", **provenance})


def failure_of(place: Path, launch: str | None = None) -> str | None:
    """Return why a cell failed, in one launch or at all; None if it did not."""
    try:
        stored = json.loads((place / PROVENANCE).read_text())
        return str(stored["error"]) if launch in (None, stored.get("launch")) else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def clear_failure(folder: Path) -> None:
    """Remove the failure of a cell that has succeeded since."""
    shutil.rmtree(failure_folder(folder.parent.parent, folder.name), ignore_errors=True)
