"""`nmsweep retry [results_dir=DIR] [plan=ID] [<more words>]`: give the command of the latest sweep again."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from nmsweep.commands import run
from nmsweep.commands.words import key_values, parse_cell_words, stored_plan
from nmsweep.config.catalogue import conf_dir
from nmsweep.config.compose import cells_of
from nmsweep.config.schema import RunConfig
from nmsweep.errors import InputError


def main(words: Sequence[str]) -> int:
    """Run what a stored sweep lacks, as its own command would; 1 if a cell failed.

    Whoever can write to a results folder can write a plan. So a plan whose words may run other code than nmsweep's, or send
    results away, is refused: its command is shown instead.

    Raises:
        InputError: there is no plan, or it is refused.
    """
    ours = ("results_dir=", "plan=")
    values = key_values([word for word in words if word.startswith(ours)], ["results_dir", "plan"])
    plan = stored_plan(values)
    command = [*_in_folder(plan.words, plan.results_dir), *(word for word in words if not word.startswith(ours))]
    if risk := _risk(plan.words):
        raise InputError(f"plan {plan.plan_id}: {risk}; if it is yours, run `nmsweep {shlex.join(command)}`")
    print(f"nmsweep {shlex.join(command)}", file=sys.stderr)
    return run.main(command)


def _in_folder(words: Sequence[str], results_dir: Path) -> list[str]:
    """Return the words of a plan for the folder that it lies in, which may have been moved since."""
    stored = [word for word in words if word.startswith("results_dir=")]
    if Path(stored[-1].partition("=")[2] if stored else "results") == results_dir:
        return list(words)
    return [*(word for word in words if word not in stored), f"results_dir={results_dir}"]


def _risk(words: Sequence[str]) -> str:
    """Return why the words of a stored plan may run other code than nmsweep's; empty if they do not."""
    cell_words = parse_cell_words(words)
    if cell_words.config_dir or cell_words.for_hydra:
        return "it names a folder of config files"
    shipped = {f"hydra/launcher={file.stem}" for file in (conf_dir() / "hydra" / "launcher").glob("*.yaml")}
    for word in cell_words.overrides:
        if word.lstrip("+~").startswith("hydra") and word not in shipped:
            return f"it sets {word}"
    for cfg in cells_of(cell_words.overrides, multirun=cell_words.multirun, config_dir=None):
        if risk := _risk_of_cell(cfg):
            return risk
    return ""


def _risk_of_cell(cfg: RunConfig) -> str:
    wandb, mlflow = cfg.loggers.wandb, cfg.loggers.mlflow
    if cfg.plugins:
        return f"it runs code of {', '.join(cfg.plugins)}"
    if cfg.model.get("trust_remote_code"):
        return f"it runs code that comes with model {cfg.model_name}"
    if cfg.eval.include_path:
        return f"it runs code that the tasks in {cfg.eval.include_path} may name (eval.include_path)"
    if mlflow.enabled and mlflow.tracking_uri:
        return f"it sends results to {mlflow.tracking_uri}"
    if wandb.enabled and wandb.entity:
        return f"it sends results to {wandb.entity} of Weights & Biases"
    return ""
