"""Identity watch: cells whose configs differ and whose items have bit-identical scores.

Nothing else shows a method without effect, or a label that runs another method.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nmsweep.config.schema import short_hash
from nmsweep.results.layout import PROVENANCE
from nmsweep.results.record import cell_folders

SCORES = "scores_sha256"
"""Key of a task's provenance: hash of its items' scores."""

METHOD = "method_id"
"""Key of a cell's provenance: hash of the settings that should make a difference."""

_NO_METHOD = ("eval", "data", "tasks", "results_dir", "baseline", "device", "plugins", "force")


@dataclass(frozen=True)
class Duplicates:
    """Cells of different methods with the same scores on a task; `cells` are folder names, sorted."""

    task: str
    cells: tuple[str, ...]

    def __str__(self) -> str:
        return f"identity watch: {self.task} has bit-identical scores in {' and '.join(self.cells)}"


def scores_sha256(samples: pd.DataFrame) -> str:
    """Hash all answers of the model to a task's items."""
    digest = hashlib.sha256()
    for column in ("item", "loglikelihoods", "nll", "response"):
        if column not in samples:
            continue
        digest.update(column.encode())
        for value in samples[column]:
            digest.update(value.encode() if isinstance(value, str) else np.asarray(value, dtype=np.float64).tobytes())
    return digest.hexdigest()


def method_id(config: Mapping[str, Any], patterns: Mapping[str, str] | None = None) -> str:
    """Hash a cell's config without its tasks, its places and the way items are asked.

    Args:
        config: as it is recorded.
        patterns: the pattern of each layer, where layers have their own: these count instead of the way they were found,
            so that a greedy cell and its recipe are one method.
    """
    method = {key: value for key, value in config.items() if key not in _NO_METHOD}
    return short_hash({**method, "policy": dict(patterns), "allocation": None} if patterns else method)


def find_duplicates(cells: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Duplicates]:
    """Find cells with the same scores and different methods.

    Args:
        cells: folder name and provenance of each; records without hashes of their scores are skipped.
    """
    groups: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
    for name, provenance in cells:
        for task, entry in provenance.get("tasks", {}).items():
            if SCORES in entry and METHOD in provenance:
                ids = (str(provenance[METHOD]), str(provenance["part_id"]))
                groups.setdefault((task, entry[SCORES]), {})[name] = ids
    return [
        Duplicates(task, tuple(sorted(same)))
        for (task, _), same in sorted(groups.items())
        if len({method for method, _ in same.values()}) > 1 and len({part for _, part in same.values()}) > 1
    ]


_provenance: dict[Path, Mapping[str, Any]] = {}  # of finished cells, whose records do not change


def duplicates_of(results_dir: Path, folder: Path) -> list[Duplicates]:
    """Find finished cells with the scores of a new cell and another method.

    Args:
        results_dir: the results folder.
        folder: the new cell's.

    Returns:
        One entry for each task with such cells.
    """
    for place in cell_folders(results_dir):
        if place not in _provenance or place == folder:
            try:
                _provenance[place] = json.loads((place / PROVENANCE).read_text())
            except (OSError, ValueError):  # removed meanwhile, or damaged, which `nmsweep status` reports
                continue
    cells = [(place.name, provenance) for place, provenance in _provenance.items() if place.parent == folder.parent]
    return [duplicates for duplicates in find_duplicates(cells) if folder.name in duplicates.cells]
