"""What a cell knows before it is measured: its windows of calibration text, a pattern for each layer, the calibrated state."""

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nmsweep.calibrate.fit import fit
from nmsweep.calibrate.search import search
from nmsweep.calibrate.store import Calibrated, calibrate
from nmsweep.calibrate.text import windows
from nmsweep.cell import Cell
from nmsweep.data.tasks import read_text
from nmsweep.disk.claims import claimed
from nmsweep.evaluate.perplexity import adds_bos
from nmsweep.models import LoadedModel
from nmsweep.recipe import Recipe, read_recipe
from nmsweep.record import cell_folder
from nmsweep.session import Session


def calibration_windows(cell: Cell, loaded: LoadedModel, n_samples: int) -> Tensor:
    """The cell's windows of its calibration text, ids [n_windows, seqlen]; none without a text.

    Args:
        n_samples: how many, where `calibration.n_samples` leaves it open.
    """
    cfg = cell.cfg
    if cell.calibration_text is None:
        return torch.empty(1, 0, dtype=torch.long)
    return windows(
        read_text(cell.calibration_text), loaded.tokenizer, seqlen=cfg.calibration.seqlen, seed=cfg.seed,
        n_samples=cfg.calibration.n_samples or n_samples,
        exact=cfg.calibration.n_samples is not None,
        bos=cfg.profile == "strict" and adds_bos(loaded.tokenizer),
    )  # fmt: skip


def allocated(cell: Cell, loaded: LoadedModel, session: Session) -> Cell:
    """The cell with a pattern for each layer, where its policy is to search for them: kept as a recipe, or found now."""
    cfg, made = cell.cfg, cell.sparsification
    if cfg.policy != "greedy" or made is None:
        return cell
    file = recipe_file(cell)
    with (
        nullcontext() if file.is_file() else claimed(cfg.results_dir, f"allocation-{cell.calibration_id}", "allocation")
    ):
        if not file.is_file():
            session.display.stage("allocation", cfg.calibration.n_samples or 32)
            recipe = search(
                loaded.model, calibration_windows(cell, loaded, 32), made, cfg.allocation, cfg.targets,
                scope=cfg.scope, settings=cfg.calibration, seed=cfg.seed, step=session.display.step,
            )  # fmt: skip
            _write(file, cell, recipe)
            session.display.say(f"    recipe: {file}")
    return replace(cell, sparsification=replace(made, patterns=read_recipe(file).layers))


def recipe_file(cell: Cell) -> Path:
    """Where the recipe of a greedy cell lies: the same for cells that only differ in how they are measured."""
    cfg = cell.cfg
    criterion = cfg.criterion.name if cfg.criterion else "none"
    folder = cfg.results_dir / "recipes"
    named = cell_folder(
        cfg.results_dir, cfg.model_name, cfg.pattern.slug, criterion, cfg.mitigation, cell.calibration_id[:12]
    )
    return folder / f"{named.name}.yaml"


def calibration(cell: Cell, loaded: LoadedModel, session: Session) -> Calibrated:
    """What the cell's calibrated stages know: kept from an earlier cell, or found out now; nothing without such stages."""
    cfg, made = cell.cfg, cell.sparsification
    if made is None or not made.calibrated:
        return Calibrated()

    def make() -> Calibrated:
        return fit(
            loaded.model, calibration_windows(cell, loaded, 256 if made.learned else 32), made, cfg.targets,
            scope=cfg.scope, settings=cfg.calibration, seed=cfg.seed, step=session.display.step,
        )  # fmt: skip

    session.display.stage("calibration", loaded.model.config.get_text_config().num_hidden_layers)
    folder = cfg.results_dir / ".calibration"
    exists = (folder / f"{cell.calibration_id}.safetensors").is_file()
    with nullcontext() if exists else claimed(cfg.results_dir, f"calibration-{cell.calibration_id}", "calibration"):
        return calibrate(folder, cell.calibration_id, make)


def _write(file: Path, cell: Cell, recipe: Recipe) -> None:
    """Whole or not at all."""
    cfg = cell.cfg
    what = {"model": cfg.model_name, "criterion": cfg.criterion and cfg.criterion.name, "mitigation": cfg.mitigation}
    full = replace(recipe, made={**what, "targets": "+".join(cfg.targets), **recipe.made})
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".tmp-{file.name}-{os.getpid()}")
    temporary.write_text(full.text())
    os.replace(temporary, file)
