"""`nmsweep [-m] <key=value …>`: run the cells of a command that are missing."""

import logging
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nmsweep.commands.words import parse_cell_words
from nmsweep.config.compose import Command, compose_command, prepare
from nmsweep.config.defaults import conf_dir
from nmsweep.errors import InputError

if TYPE_CHECKING:  # torch comes with planning
    from nmsweep.sweep.plan import Plan


def main(words: Sequence[str]) -> int:
    """Run the cells of a command; 1 if one failed.

    Raises:
        InputError: every mistake of the command, all together; nothing was written.
        StorageError: the results folder takes no more.
    """
    cell_words = parse_cell_words(words)
    if cell_words.for_hydra:
        return _show_with_hydra(words, cell_words.config_dir)
    if "hydra/launcher=joblib" in cell_words.overrides and "cluster.workers=1" not in cell_words.overrides:
        from nmsweep.sweep.executors.local import start_server

        start_server()  # its imports take as long as ours, so both go on at once
    command = compose_command(cell_words.overrides, multirun=cell_words.multirun, config_dir=cell_words.config_dir)
    from nmsweep.results.interrupt import interruptible
    from nmsweep.results.leftovers import remove_abandoned, restore
    from nmsweep.results.storage import why_unwritable
    from nmsweep.sweep.executors.base import Launch, executor_of
    from nmsweep.sweep.executors.local import SameProcess
    from nmsweep.sweep.plan import store
    from nmsweep.sweep.status import missing

    executor = executor_of(command.launcher) if command.launcher else SameProcess()
    executor.check()
    plan = plan_of(command, words)
    if error := why_unwritable(plan.results_dir):
        raise InputError(error)
    restore(plan.results_dir)
    pending = missing(plan)
    store(plan, latest=bool(pending))
    _announce(plan, len(pending))
    if not pending:
        return 0
    remove_abandoned(plan.results_dir)
    logging.basicConfig(handlers=[logging.NullHandler()])  # the terminal belongs to the display
    with interruptible():
        launch = Launch(plan, tuple(pending), secrets.token_hex(6), command.log_dir, command.cells[0].cluster)
        errors = executor.execute(launch)
        remove_abandoned(plan.results_dir)  # of workers that were killed
    if len(pending) > 1:
        for name, error in errors.items():
            print(f"FAILED {name}: {error}", file=sys.stderr)
    return int(bool(errors))


def plan_of(command: Command, words: Sequence[str]) -> "Plan":
    """Plan a composed command: identify its cells by the models' configs and the data.

    Raises:
        InputError: every mistake of the command, all together.
    """
    from nmsweep.sweep.planning import make_plan

    return make_plan(command.cells, words, lambda text: print(f"nmsweep: {text.strip()}", file=sys.stderr))


def _announce(plan: "Plan", n_missing: int) -> None:
    n_cells = len(plan.cells)
    if not n_missing:
        what, them = (f"all {n_cells} cells exist", "them") if n_cells > 1 else ("this cell exists", "it")
        print(f"nmsweep: {what} in {plan.results_dir}; nothing to do (force=true runs {them} again)", file=sys.stderr)
    elif n_cells > 1:
        print(f"nmsweep: {n_cells} cells, {n_cells - n_missing} exist already, {n_missing} to run", file=sys.stderr)


def _show_with_hydra(words: Sequence[str], config_dir: Path | None) -> int:
    """Let Hydra's application show a config, its help, …"""
    import hydra

    def nmsweep(config: object) -> None:
        """Run nothing; Hydra wants a function."""

    prepare(config_dir)
    sys.argv = [sys.argv[0], *words]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(nmsweep)()
    return 0
