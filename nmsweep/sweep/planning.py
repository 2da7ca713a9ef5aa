"""From typed configs to a plan: identify every cell, add the dense baselines, collect every mistake."""

from collections.abc import Callable, Sequence
from functools import cache

from nmsweep.cell.check import check
from nmsweep.cell.identity import Cell, identify
from nmsweep.cell.session import device_of, model_key
from nmsweep.config.schema import RunConfig, short_hash, to_plain
from nmsweep.errors import InputError
from nmsweep.results.record import cell_index
from nmsweep.sweep.plan import Plan, PlannedCell, ordered


def make_plan(
    configs: Sequence[RunConfig], words: Sequence[str], say: Callable[[str], None] = lambda text: None
) -> Plan:
    """Plan the cells of a command.

    Args:
        configs: its cells, composed.
        words: the command as typed.
        say: called once for each task that is left out (`eval.skip_missing`).

    Raises:
        InputError: every mistake that can be found without loading weights, all together.
    """
    if len({cfg.results_dir for cfg in configs}) > 1:
        raise InputError("results_dir: a sweep has one results folder; give one, and sweep over something else")
    results_dir = configs[0].results_dir
    known = cell_index(results_dir)
    say_once = cache(say)
    cells: dict[str, PlannedCell] = {}
    errors: list[str] = []

    def add(cfg: RunConfig, baseline: bool = False) -> PlannedCell | None:
        try:
            cell = identify(cfg, say_once)
        except InputError:  # the first mistake; `check` collects all
            errors.extend(check(cfg))
            return None
        if cfg.force or cell.cell_id not in known:
            errors.extend(check(cfg))
        return cells.setdefault(cell.cell_id, _planned(cell, baseline))

    baselines: dict[str, RunConfig] = {}
    for cfg in configs:
        planned = add(cfg)
        if planned is not None and cfg.baseline and planned.dense_cell_id != planned.cell_id:
            baselines.setdefault(planned.dense_cell_id, cfg.dense())
    for cell_id, cfg in baselines.items():
        if cell_id not in cells:
            add(cfg, baseline=True)
    if errors:
        raise InputError(*dict.fromkeys(errors))
    return Plan(tuple(words), tuple(ordered(cells.values())), results_dir)


def _planned(cell: Cell, baseline: bool) -> PlannedCell:
    cfg = cell.cfg
    # `auto` is resolved here, as other nodes may have other devices
    config = {**to_plain(cfg), "device": device_of(cfg)}
    del config["results_dir"]
    if cfg.data.mirror:
        config["data"] = {**config["data"], "mirror": str(cfg.data.mirror.absolute())}
    ids = (cell.cell_id, cell.part_id, cell.dense_cell_id, cell.calibration_id)
    return PlannedCell(cell.folder.name, *ids, short_hash(model_key(cfg)), baseline, config)
