"""`nmsweep plan <words of a sweep>`: its cells, which exist, how long the rest takes; nothing is run or written."""

from collections.abc import Sequence

from nmsweep.commands.run import plan_of
from nmsweep.commands.words import parse_cell_words
from nmsweep.config.compose import compose_command
from nmsweep.results.record import cell_index
from nmsweep.sweep.estimate import duration, measured
from nmsweep.sweep.plan import Plan
from nmsweep.sweep.status import missing


def main(words: Sequence[str]) -> int:
    """Show the plan of a command.

    Raises:
        InputError: every mistake of the command, all together.
    """
    cell_words = parse_cell_words(words)
    command = compose_command(cell_words.overrides, multirun=cell_words.multirun, config_dir=cell_words.config_dir)
    _show(plan_of(command, words))
    return 0


def _show(plan: Plan) -> None:
    throughput = measured(cell_index(plan.results_dir).values())
    to_run = set(missing(plan))
    total_s, unknown = 0.0, set()
    for at, cell in enumerate(plan.cells):
        exists, seconds = at not in to_run, throughput.seconds(cell)
        if not exists and seconds is None:
            unknown.add(str(cell.config["model"]["name"]))
        total_s += 0.0 if exists else seconds or 0.0
        state = "exists" if exists else "to run" if seconds is None else f"to run, about {duration(seconds)}"
        print(f"{cell.name}  {state}{' (baseline)' if cell.baseline else ''}")
    n_done = len(plan.cells) - len(to_run)
    print(f"{len(plan.cells)} cells, {n_done} exist in {plan.results_dir}, {len(to_run)} to run")
    if unknown:
        models = ", ".join(sorted(unknown))
        print(f"time: unknown for {models}: no finished cell with these tasks is in {plan.results_dir}")
    elif to_run:
        device = "GPU" if any(str(cell.config["device"]).startswith("cuda") for cell in plan.cells) else "process"
        print(f"time: about {duration(total_s)} of one {device}, from {throughput.n_cells} measured cells")
