"""The subcommands of a sweep: `plan`, `status`, `retry`, `gc`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nmsweep.commands.run import planned, run_plan
from nmsweep.commands.words import key_values
from nmsweep.config.compose import prepare
from nmsweep.errors import InputError
from nmsweep.results.leftovers import leftovers, remove
from nmsweep.results.record import cell_index
from nmsweep.sweep.estimate import duration, measured
from nmsweep.sweep.plan import Plan, PlannedCell, load, plan_ids, store
from nmsweep.sweep.status import missing, read_status, show_status


def plan(words: Sequence[str]) -> int:
    """Show the cells of a command, what exists and how long the rest takes; run and write nothing."""
    options, overrides = _options("plan", words)
    made = planned(words, overrides, options.multirun, options.config_dir)
    _show_plan(made)
    return 0


def _options(subcommand: str, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command that runs cells, and its other words.

    Raises:
        InputError: an option without its value, or a config folder that is none.
    """
    parser = argparse.ArgumentParser(f"nmsweep {subcommand}", add_help=False, exit_on_error=False)
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=Path)
    try:
        options, rest = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise InputError(f"{subcommand}: {error}; it takes the words of the command that runs the cells") from error
    if options.config_dir and not options.config_dir.is_dir():
        raise InputError(
            f"--config-dir: {options.config_dir} is no folder; name one with criterion/, model/, hydra/, …"
        )
    return options, rest


def _show_plan(made: Plan) -> None:
    known = cell_index(made.results_dir)
    throughput = measured(known.values())
    to_run = set(missing(made))
    total, unknown = 0.0, set()
    for at, cell in enumerate(made.cells):
        exists, seconds = at not in to_run, throughput.seconds(cell)
        if not exists and seconds is None:
            unknown.add(str(cell.config["model"]["name"]))
        total += 0.0 if exists else seconds or 0.0
        state = "exists" if exists else "to run" if seconds is None else f"to run, about {duration(seconds)}"
        print(f"{cell.name}  {state}{' (baseline)' if cell.baseline else ''}")
    n_done = len(made.cells) - len(to_run)
    print(f"{len(made.cells)} cells, {n_done} exist in {made.results_dir}, {len(to_run)} to run")
    if unknown:
        print(
            f"time: unknown for {', '.join(sorted(unknown))}: no finished cell with these tasks is in {made.results_dir}"
        )
    elif n_done < len(made.cells):
        device = "GPU" if any(str(cell.config["device"]).startswith("cuda") for cell in made.cells) else "process"
        print(f"time: about {duration(total)} of one {device}, from {throughput.n_cells} measured cells")


def _stored(given: dict[str, str]) -> Plan:
    """The plan that the words of a subcommand mean: the latest, if they name none."""
    results_dir = Path(given.get("results_dir", "results"))
    ids = plan_ids(results_dir)
    if not ids and "plan" not in given:
        raise InputError(f"results_dir: {results_dir} has no plan of a sweep; run one first, or pass results_dir=DIR")
    return load(results_dir, given.get("plan", ids[0] if ids else ""))


def status(words: Sequence[str]) -> int:
    """Show how far a sweep is; exit code 1 if a cell failed."""
    given = key_values(words, ["results_dir", "plan", "limit"])
    limit = given.get("limit", "20")
    if not limit.isdecimal():
        raise InputError(f"limit: {limit!r} is no number of lines; pass limit=N")
    found = _stored(given)
    shown = show_status(found, int(limit))
    others = [plan_id for plan_id in plan_ids(found.results_dir) if plan_id != found.plan_id]
    if others and "plan" not in given:
        print(f"{len(others)} other plans: plan=ID shows one of {', '.join(others[:3])}{', …' if others[3:] else ''}")
    return int(bool(shown.failed))


def retry(words: Sequence[str]) -> int:
    """Run a sweep's failed cells again, here or through the launcher that is named.

    Only the cells come from the stored plan, not the command: whoever can write to a results folder can write a plan.
    """
    options, rest = _options("retry", words)
    own = [word for word in rest if word.startswith(("hydra/", "hydra.", "cluster.", "+hydra."))]
    given = key_values([word for word in rest if word not in own], ["results_dir", "plan", "trust"])
    found = _stored(given)
    pending = [found.cells.index(cell) for cell, _ in read_status(found).failed]
    if not pending:
        print(f"nmsweep: no cell of plan {found.plan_id} has failed; nothing to do", file=sys.stderr)
        return 0
    if given.get("trust") != "true" and (why := _foreign_code(found)):
        raise InputError(f"plan {found.plan_id}: {why}; if it is yours, add trust=true")
    print(f"nmsweep: {len(pending)} failed cells to run again", file=sys.stderr)
    store(found)
    prepare(options.config_dir)
    folder = ["--config-dir", str(options.config_dir)] if options.config_dir else []
    return run_plan(["--multirun", *folder, f"results_dir={found.results_dir}", *own], found, pending)


def _foreign_code(found: Plan) -> str:
    """Why a stored plan runs code that is not nmsweep's, or sends results away; empty if it does not."""
    for cell in found.cells:
        if packages := cell.config.get("plugins"):
            return f"it runs code of {', '.join(map(str, packages))}"
        if cell.config["model"].get("trust_remote_code"):
            return f"it runs code that model {cell.config['model']['name']} brings along"
        if folder := cell.config["eval"].get("include_path"):
            return f"it runs code that the tasks in {folder} may name (eval.include_path)"
        if (place := _logged_to(cell)) is not None:
            return f"it sends results to {place}"
    return ""


def _logged_to(cell: PlannedCell) -> str | None:
    """Where a cell of a stored plan is reported to, as the plan says; None if nowhere, or where this user's environment says."""
    loggers = cell.config.get("loggers") or {}
    mlflow, wandb = loggers.get("mlflow") or {}, loggers.get("wandb") or {}
    if mlflow.get("enabled") and mlflow.get("tracking_uri"):
        return str(mlflow["tracking_uri"])
    if wandb.get("enabled") and wandb.get("entity"):
        return f"{wandb['entity']} of Weights & Biases"
    return None


def gc(words: Sequence[str]) -> int:
    """List what interrupted runs left; remove it with the word ``remove``."""
    given = key_values([word for word in words if word != "remove"], ["results_dir"])
    found = leftovers(Path(given.get("results_dir", "results")))
    for leftover in found:
        print(f"{leftover.n_bytes / 1e6:10.2f} MB  {leftover.path}  ({leftover.what})")
    if "remove" in words:
        remove(found)
        print(f"{len(found)} removed")
    else:
        print(f"{len(found)} leftovers" + ("; `nmsweep gc remove` removes them" if found else ""))
    return 0
