"""`nmsweep sensitivity [skip=K] <key=value …>`: each layer's output error when it alone is pruned, and the layers to skip."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from nmsweep.calibration.sensitivity import output_errors
from nmsweep.cell.check import check
from nmsweep.cell.identity import calibration_text, identify, sparsification_of
from nmsweep.cell.prepare import calibration_windows
from nmsweep.cell.session import Session
from nmsweep.commands.words import key_values, whole_number
from nmsweep.config.compose import cells_of
from nmsweep.config.pattern import Pattern
from nmsweep.config.schema import RunConfig, short_hash
from nmsweep.errors import InputError
from nmsweep.models import linear_flops, target_linears
from nmsweep.results.layout import SENSITIVITY
from nmsweep.results.record import cell_folder
from nmsweep.results.storage import why_unwritable

COLUMNS = (
    "layer",
    "block",
    "projection",
    "pattern",
    "criterion",
    "mitigation",
    "relative_error",
    "flops_share",
    "skip",
)

NEVER_SKIPPED = {"amber": ("down_proj",)}
"""Projections that a preset prunes in every block: arXiv:2508.02128 skips q and gate only."""


def main(words: Sequence[str]) -> int:
    """Measure the layers of one cell, print the most sensitive ones, and write a table.

    Raises:
        InputError: the words are not those of one sparse cell, or the results folder cannot be written.
    """
    ours = [word for word in words if word.startswith("skip=")]
    skip = whole_number(key_values(ours, ["skip"]), "skip", 0)
    [cfg] = cells_of([word for word in words if word not in ours], multirun=False, config_dir=None)
    if error := why_unwritable(cfg.results_dir):
        raise InputError(error)
    session = Session()
    with session.display:
        file, table = sensitivity(cfg, skip, session)
    print(summary(cfg.targets, table))
    print(file)
    return 0


def sensitivity(cfg: RunConfig, skip: int, session: Session) -> tuple[Path, pd.DataFrame]:
    """Measure a cell's layers one by one on its calibration text, and write the table.

    Args:
        cfg: a sparse cell; its tasks only say which text is not to be used.
        skip: how many of the most sensitive layers to leave dense.
        session: keeps the model.

    Returns:
        the CSV in ``results_dir/sensitivity``, and its table, layers in the order they run.

    Raises:
        InputError: a dense cell, a policy, or more layers to skip than there are.
    """
    if cfg.pattern.is_dense or cfg.policy != "none":
        raise InputError("sensitivity: it is of one pattern, criterion and mitigation; take pattern=8:16 policy=none")
    if errors := check(cfg):
        raise InputError(*errors)
    cell = identify(cfg, session.display.say)
    if cell.calibration_text is None:
        cell = replace(cell, calibration_text=calibration_text(cfg, cell.sources))
    loaded = session.model(cfg)
    _check_skip(cfg, skip, list(target_linears(loaded.model, cfg.targets)))
    windows = calibration_windows(cell, loaded, 32)
    session.display.stage("sensitivity", len(windows))
    pattern: Pattern = sparsification_of(cfg).pattern
    errors_of = output_errors(
        loaded.model, windows, sparsification_of(cfg), [pattern], cfg.targets,
        scope=cfg.scope, settings=cfg.calibration, seed=cfg.seed, step=session.display.step,
    )  # fmt: skip
    table = _table(cfg, {name: errors[pattern] for name, errors in errors_of.items()}, linear_flops(loaded.model), skip)
    return _write(cfg, cell.cell_id, table), table


def _table(cfg: RunConfig, errors: Mapping[str, float], flops: Mapping[str, int], skip: int) -> pd.DataFrame:
    table = pd.DataFrame({"layer": list(errors), "relative_error": list(errors.values())})
    table["block"] = table["layer"].str.extract(r"layers\.(\d+)\.", expand=False).astype(int)
    table["projection"] = table["layer"].str.rpartition(".")[2]
    table["pattern"], table["mitigation"] = str(cfg.pattern), cfg.mitigation
    table["criterion"] = cfg.criterion_name
    table["flops_share"] = [flops[name] / sum(flops.values()) for name in errors]
    free = table[table["layer"].isin(_may_be_skipped(cfg, list(errors)))]
    table["skip"] = table.index.isin(free.nlargest(skip, "relative_error").index).astype(int)
    return table[list(COLUMNS)]


def _check_skip(cfg: RunConfig, skip: int, layers: Sequence[str]) -> None:
    """Check that `skip` layers leave something to prune."""
    most = len(_may_be_skipped(cfg, layers)) - 1
    if not 0 <= skip <= most:
        raise InputError(f"skip: {skip} of {most + 1} layers that may be left dense; allowed: 0 to {most}")


def _may_be_skipped(cfg: RunConfig, layers: Sequence[str]) -> list[str]:
    fixed = {leaf for target in cfg.targets for leaf in NEVER_SKIPPED.get(target, ())}
    return [layer for layer in layers if layer.rpartition(".")[2] not in fixed]


def _write(cfg: RunConfig, cell_id: str, table: pd.DataFrame) -> Path:
    criterion = cfg.criterion_name
    key = short_hash([cell_id, cfg.calibration.model_dump()])
    name = cell_folder(cfg.results_dir, cfg.model_name, cfg.pattern.slug, criterion, cfg.mitigation, key).name
    file = cfg.results_dir / SENSITIVITY / f"{name}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(file, index=False, float_format="%.6g")
    return file


def summary(targets: Sequence[str], table: pd.DataFrame, n_shown: int = 10) -> str:
    """Describe the most sensitive layers, all skipped ones included, and the word that leaves these dense."""
    worst = table.sort_values("relative_error", ascending=False, kind="stable")
    shown = worst[(worst["skip"] == 1) | (worst["relative_error"].rank(ascending=False, method="first") <= n_shown)]
    lines = [f"{len(shown)} of {len(table)} layers, largest ‖ŷ−y‖/‖y‖ first"]
    lines += [f"{row.relative_error:8.4f}  {row.layer}{'  skipped' if row.skip else ''}" for row in shown.itertuples()]
    if table["skip"].any():
        dense = table.loc[table["skip"] == 1, "flops_share"].sum() / table["flops_share"].sum()
        lines += [
            f"{dense:.1%} of the targets' multiply-adds stay dense with",
            f"'targets=\"{targets_word(targets, table)}\"'",
        ]
    return "\n".join(lines)


def targets_word(targets: Sequence[str], table: pd.DataFrame) -> str:
    """Return the value of `targets` that leaves the skipped layers dense."""
    skipped = table.loc[table["skip"] == 1, "layer"]
    return "+".join([*targets, *(f"!{name[name.find('layers.') :]}" for name in skipped)])
