"""How long cells take: means over the finished cells of the same results folder, never a guess."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from nmsweep.results.layout import PROVENANCE
from nmsweep.sweep.plan import PlannedCell

N_RECORDS = 1000
"""Records that are read; more would not change the means."""


@dataclass
class Throughput:
    """Measured seconds.

    Attributes:
        tasks: of a task, by model, dtype, task, limit, and whether the cell is dense.
        overhead: of a cell besides its tasks (loading, calibration, writing), by model.
        n_cells: number of measured cells.
    """

    tasks: dict[tuple[Any, ...], list[float]] = field(default_factory=lambda: defaultdict(list))
    overhead: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    n_cells: int = 0

    def add(self, provenance: Mapping[str, Any], dense: bool) -> None:
        """Add a finished cell."""
        model, tasks = str(provenance["model"]["name"]), provenance["tasks"]
        for task, about in tasks.items():
            key = (model, provenance["dtype"], task, provenance.get("limit"), dense)
            self.tasks[key].append(float(about["time_s"]))
        self.overhead[model].append(max(0.0, float(provenance.get("wall_s", 0)) - float(provenance["time_s"])))
        self.n_cells += 1

    def seconds(self, cell: PlannedCell) -> float | None:
        """Return the expected seconds of a cell; None if one of its tasks was never measured with its model.

        Where there are no cells of its kind, a dense cell is judged by sparse ones and the other way round.
        """
        config = cell.config
        model, dense = str(config["model"]["name"]), cell.cell_id == cell.dense_cell_id
        total = fmean(self.overhead[model]) if model in self.overhead else 0.0
        for task in config["tasks"]:
            key = (model, config["dtype"], task, config["eval"]["limit"])
            known = self.tasks.get((*key, dense)) or self.tasks.get((*key, not dense))
            if known is None:
                return None
            total += fmean(known)
        return total


def measured(folders: Iterable[Path]) -> Throughput:
    """Return the throughput of finished cells; skip records that cannot be read."""
    throughput = Throughput()
    for folder in list(folders)[:N_RECORDS]:
        try:
            provenance = json.loads((folder / PROVENANCE).read_text())
            throughput.add(provenance, provenance["cell_id"] == provenance["dense_cell_id"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return throughput


def duration(seconds: float) -> str:
    """Format seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
