"""Time whole cells, one after the other in one process, and the dense cell on lm-eval's own path.

    python docs/measure/cells.py model=smollm2 tasks=arc_easy data.mirror=DIR device=cuda

Prints one row a cell. docs/evaluation.md has the numbers.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nmsweep.cell.run import run as run_cell
from nmsweep.cell.session import Session
from nmsweep.config.compose import cells_of

CELLS = (
    ("pattern=dense",),
    ("pattern=8:16", "criterion=act"),
    ("pattern=8:16", "criterion=act", "mitigation=shift+var"),
    ("pattern=dense", "eval.scoring=stock"),
)
"""The first cell also loads the model and builds the requests; the others are what most of a sweep consists of."""


def run(overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run cells, each into a results folder of its own.

    Args:
        overrides: of a run.

    Yields:
        One row a cell: seconds of each task, and of everything (``total``).
    """
    configs = [cells_of([*overrides, *c], multirun=False, config_dir=None)[0] for c in CELLS]
    session = Session()
    with tempfile.TemporaryDirectory() as folder, session.display:
        for at, (cell, cfg) in enumerate(zip(CELLS, configs, strict=True)):
            started = time.perf_counter()
            record = run_cell(
                cfg.model_copy(update={"results_dir": Path(folder) / str(at), "baseline": False}), session
            )
            total = time.perf_counter() - started
            tasks = {task: float(entry["time_s"]) for task, entry in record.provenance["tasks"].items()}
            yield {"cell": " ".join(cell), **tasks, "total": total}


if __name__ == "__main__":
    for row in run(sys.argv[1:]):
        print(row, flush=True)
