"""From typed configs to a plan: identify every cell, add the dense baselines, collect every mistake."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nmsweep.cell.check import check
from nmsweep.cell.identity import identify
from nmsweep.cell.session import device_of, model_key
from nmsweep.config.schema import RunConfig, short_hash, to_plain
from nmsweep.errors import InputError
from nmsweep.results.record import cell_index
from nmsweep.sweep.plan import Plan, PlannedCell, ordered


@dataclass
class Draft:
    """A plan in the making, with the mistakes so far."""

    say: Callable[[str], None]
    cells: dict[str, PlannedCell] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    def say_once(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            self.say(text)

    def add_errors(self, messages: Sequence[str]) -> None:
        self.errors += [message for message in messages if message not in self.errors]


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
    draft = Draft(say)
    baselines: dict[str, RunConfig] = {}
    for cfg in configs:
        cell = _add(draft, cfg, known)
        if cell is not None and cfg.baseline and cell.dense_cell_id != cell.cell_id:
            baselines.setdefault(cell.dense_cell_id, cfg.dense())
    for cell_id, cfg in baselines.items():
        if cell_id not in draft.cells:
            _add(draft, cfg, known, baseline=True)
    if draft.errors:
        raise InputError(*draft.errors)
    return Plan(tuple(words), tuple(ordered(draft.cells.values())), results_dir)


def _add(draft: Draft, cfg: RunConfig, known: Mapping[str, Path], baseline: bool = False) -> PlannedCell | None:
    try:
        cell = identify(cfg, draft.say_once)
    except InputError:  # the first mistake; `check` collects all
        draft.add_errors(check(cfg))
        return None
    if cfg.force or cell.cell_id not in known:
        draft.add_errors(check(cfg))
    # `auto` is resolved here, as other nodes may have other devices
    config = {**to_plain(cfg), "device": device_of(cfg)}
    del config["results_dir"]
    if cfg.data.mirror:
        config["data"] = {**config["data"], "mirror": str(cfg.data.mirror.absolute())}
    ids = (cell.cell_id, cell.part_id, cell.dense_cell_id, cell.calibration_id)
    planned = PlannedCell(cell.folder.name, *ids, short_hash(model_key(cfg)), baseline, config)
    return draft.cells.setdefault(cell.cell_id, planned)
