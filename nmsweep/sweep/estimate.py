"""How long cells take: means over the cells that were measured in the same results folder, never a guess."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from nmsweep.sweep.plan import PlannedCell

N_RECORDS = 1000
"""Records that are looked at; beyond it a mean does not change."""


@dataclass
class Throughput:
    """Seconds by what a cell is.

    Attributes:
        tasks: of a task, by model, dtype, kind of device, task, limit, and whether the cell is dense.
        overhead: of a cell beside its tasks (loading, calibration, writing), by model.
        n_cells: measured cells.
    """

    tasks: dict[tuple[Any, ...], list[float]] = field(default_factory=lambda: defaultdict(list))
    overhead: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    n_cells: int = 0

    def add(self, provenance: Mapping[str, Any], dense: bool) -> None:
        """Take a finished cell's provenance in."""
        model, tasks = str(provenance["model"]["name"]), provenance["tasks"]
        for task, about in tasks.items():
            key = (model, provenance["dtype"], task, provenance.get("limit"), dense)
            self.tasks[key].append(float(about["time_s"]))
        self.overhead[model].append(max(0.0, float(provenance.get("wall_s", 0)) - float(provenance["time_s"])))
        self.n_cells += 1

    def seconds(self, cell: PlannedCell) -> float | None:
        """Expected seconds of a cell; None where one of its tasks was never measured with its model.

        A dense cell may be judged by sparse ones, and the other way round, where nothing else is known.
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
    """The throughput of finished cells; records that cannot be read are passed over."""
    found = Throughput()
    for folder in list(folders)[:N_RECORDS]:
        try:
            provenance = json.loads((folder / "provenance.json").read_text())
            found.add(provenance, provenance["cell_id"] == provenance["dense_cell_id"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
