"""Identity watch: cells whose configs differ and whose items have bit-identical scores. No torch.

A method that does nothing, or a label that runs another method, shows in nothing else.
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
"""Key of a cell's provenance: hash of what should have made a difference."""

_NO_METHOD = ("eval", "data", "tasks", "results_dir", "baseline", "device", "plugins", "force")


@dataclass(frozen=True)
class Identical:
    """Cells of different methods with one set of scores on a task; `cells` are folder names, sorted."""

    task: str
    cells: tuple[str, ...]

    def __str__(self) -> str:
        return f"identity watch: {self.task} has bit-identical scores in {' and '.join(self.cells)}"


def scores_sha256(samples: pd.DataFrame) -> str:
    """Hash of everything that the model answered to a task's items."""
    digest = hashlib.sha256()
    for column in ("item", "loglikelihoods", "nll", "response"):
        if column not in samples:
            continue
        digest.update(column.encode())
        for value in samples[column]:
            digest.update(value.encode() if isinstance(value, str) else np.asarray(value, dtype=np.float64).tobytes())
    return digest.hexdigest()


def method_id(config: Mapping[str, Any], patterns: Mapping[str, str] | None = None) -> str:
    """Hash of a cell's config without what is no method: tasks, places, how items are asked.

    Args:
        config: as it is written down.
        patterns: of each layer, where they have patterns of their own: these count then, not how they were found, so that
            a greedy cell and its recipe are one method.
    """
    found = {key: value for key, value in config.items() if key not in _NO_METHOD}
    return short_hash({**found, "policy": dict(patterns), "allocation": None} if patterns else found)


def identical(cells: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Identical]:
    """Find cells with the same scores and different methods.

    Args:
        cells: folder name and provenance of each; those written before scores were hashed are passed over.
    """
    groups: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
    for name, provenance in cells:
        for task, entry in provenance.get("tasks", {}).items():
            if SCORES in entry and METHOD in provenance:
                about = (str(provenance[METHOD]), str(provenance["part_id"]))
                groups.setdefault((task, entry[SCORES]), {})[name] = about
    return [
        Identical(task, tuple(sorted(same)))
        for (task, _), same in sorted(groups.items())
        if len({method for method, _ in same.values()}) > 1 and len({part for _, part in same.values()}) > 1
    ]


_read: dict[Path, Mapping[str, Any]] = {}  # provenance of cells, which never changes once it is there


def twins(results_dir: Path, folder: Path) -> list[Identical]:
    """Finished cells that have a new cell's scores and another method; one entry a task."""
    for other in cell_folders(results_dir):
        if other not in _read or other == folder:
            try:
                _read[other] = json.loads((other / PROVENANCE).read_text())
            except (OSError, ValueError):  # it was removed, or is damaged: `nmsweep status` says so
                continue
    cells = [(place.name, provenance) for place, provenance in _read.items() if place.parent == folder.parent]
    return [found for found in identical(cells) if folder.name in found.cells]
