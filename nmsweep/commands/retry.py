"""`nmsweep retry [results_dir=DIR] [plan=ID] [<more words>]`: give the command of the latest sweep again."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from nmsweep.commands import run
from nmsweep.commands.words import key_values, stored_plan
from nmsweep.errors import InputError

_HARMLESS = re.compile(
    r"-m|--multirun|hydra\.mode=MULTIRUN|hydra/launcher=(basic|joblib|submitit_local|submitit_slurm|ray)"
    r"|hydra\.launcher\.(partition|account|qos|constraint|exclude|name|timeout_min|mem_gb|cpus_per_task|gpus_per_node"
    r"|max_num_timeout|signal_delay_s|array_parallelism|ray\.(init|remote)\.num_[cg]pus)=[\w.,:-]*"
)
"""Words that only say where the jobs run and what they ask for; no value here can end a line of a job's script."""

_RISKY = re.compile(r"[-+~]|hydra|plugins|loggers|eval\.include_path|model\.trust_remote_code|.*[{}]|.*\$")


def main(words: Sequence[str]) -> int:
    """Run what a stored sweep lacks, as its own command would; 1 if a cell failed.

    Whoever can write to a results folder can write a plan. A plan is therefore refused, and its command shown, if one of its
    words may name code from outside nmsweep or a place to send results to.

    Raises:
        InputError: there is no plan, or it is refused.
    """
    ours = ("results_dir=", "plan=")
    plan = stored_plan(key_values([word for word in words if word.startswith(ours)], ["results_dir", "plan"]))
    command = [*_in_folder(plan.words, plan.results_dir), *(word for word in words if not word.startswith(ours))]
    for word in plan.words:
        if _RISKY.match(word) and not _HARMLESS.fullmatch(word):
            raise InputError(
                f"plan {plan.plan_id}: {word} may run code from outside nmsweep or send results away; "
                f"if the sweep is yours, give its command: nmsweep {shlex.join(command)}"
            )
    print(f"nmsweep {shlex.join(command)}", file=sys.stderr)
    return run.main(command)


def _in_folder(words: Sequence[str], results_dir: Path) -> list[str]:
    """Return the words of a plan for the folder that it lies in, which may have been moved since."""
    stored = [word for word in words if word.startswith("results_dir=")]
    if Path(stored[-1].partition("=")[2] if stored else "results") == results_dir:
        return list(words)
    return [*(word for word in words if word not in stored), f"results_dir={results_dir}"]
