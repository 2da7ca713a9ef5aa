"""Seconds of whole cells, one after the other in one process, and of the dense cell on the harness's own path.

python -m nmsweep.bench.cells model=smollm2 tasks=arc_easy+arc_challenge+hellaswag+winogrande+boolq data.mirror=DIR
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from nmsweep.bench.timing import machine
from nmsweep.cell.identity import device_kind
from nmsweep.cell.run import run
from nmsweep.cell.session import Session
from nmsweep.config.compose import cells_of
from nmsweep.config.schema import RunConfig
from nmsweep.errors import InputError

CELLS = (
    ("pattern=dense",),
    ("pattern=8:16", "criterion=act"),
    ("pattern=8:16", "criterion=act", "mitigation=shift+var"),
    ("pattern=dense", "eval.scoring=stock"),
)
"""The first cell also loads the model and builds the requests; the others are what a sweep is made of."""


def timed(cfg: RunConfig, session: Session, results_dir: Path) -> dict[str, float]:
    """Run a cell into a folder of its own: seconds of its tasks, and of everything (``total``)."""
    started = time.perf_counter()
    record = run(cfg.model_copy(update={"results_dir": results_dir, "baseline": False}), session)
    total = time.perf_counter() - started
    tasks = {task: float(entry["time_s"]) for task, entry in record.provenance["tasks"].items()}
    return {**tasks, "total": total}


def main(words: Sequence[str]) -> int:
    """Words are overrides of a run; `stock=false` leaves the harness's own path out."""
    given = [word for word in words if not word.startswith("stock=")]
    cells = CELLS[:-1] if "stock=false" in words else CELLS
    session = Session()
    try:
        configs = [cells_of([*given, *cell], multirun=False, config_dir=None)[0] for cell in cells]
    except InputError as error:
        print(f"nmsweep: {error}", file=sys.stderr)
        return error.exit_code
    print(machine(device_kind(configs[0].device)), flush=True)
    with tempfile.TemporaryDirectory() as folder, session.display:
        for at, (cell, cfg) in enumerate(zip(cells, configs, strict=True)):
            seconds = timed(cfg, session, Path(folder) / str(at))
            parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
            print(f"{' '.join(cell)}: {parts} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
