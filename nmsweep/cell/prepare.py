"""What a cell knows before it is measured: its windows of calibration text, a pattern for each layer, the calibrated state."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from nmsweep.calibrate.fit import fit
from nmsweep.calibrate.search import search
from nmsweep.calibrate.store import Calibrated, calibrate, read_state, state_file
from nmsweep.calibrate.text import windows
from nmsweep.cell.identity import Cell
from nmsweep.cell.session import Session
from nmsweep.config.recipe import Recipe, read_recipe
from nmsweep.data.tasks import read_text
from nmsweep.errors import InputError
from nmsweep.evaluate.perplexity import adds_bos
from nmsweep.methods.sparsification import Sparsification
from nmsweep.models import LoadedModel
from nmsweep.results.claims import claimed
from nmsweep.results.quarantine import put_aside
from nmsweep.results.record import cell_folder
from nmsweep.results.storage import write_text

Kept = TypeVar("Kept")


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
    recipe = _kept(file, read_recipe)
    if recipe is None:
        with claimed(cfg.results_dir, f"allocation-{cell.calibration_id}", "allocation"):
            aside = partial(put_aside, file, cfg.results_dir, say=session.display.say)
            recipe = _kept(file, read_recipe, aside) or _searched(cell, made, loaded, session)
    return replace(cell, sparsification=replace(made, patterns=recipe.layers))


def _kept(file: Path, read: Callable[[Path], Kept], aside: Callable[[str], None] = lambda why: None) -> Kept | None:
    """What a file holds; None where there is none or it is damaged.

    Args:
        file: a recipe or a calibrated state.
        read: raises an InputError where it is damaged.
        aside: told why it is damaged, by who has the claim to make it anew.
    """
    if not file.is_file():
        return None
    try:
        return read(file)
    except InputError as error:
        aside(str(error))
        return None


def _searched(cell: Cell, made: Sparsification, loaded: LoadedModel, session: Session) -> Recipe:
    """A pattern for each layer, found and kept as a recipe."""
    cfg = cell.cfg
    session.display.stage("allocation", cfg.calibration.n_samples or 32)
    recipe = search(
        loaded.model, calibration_windows(cell, loaded, 32), made, cfg.allocation, cfg.targets,
        scope=cfg.scope, settings=cfg.calibration, seed=cfg.seed, step=session.display.step,
    )  # fmt: skip
    _write(recipe_file(cell), cell, recipe)
    session.display.say(f"    recipe: {recipe_file(cell)}")
    return read_recipe(recipe_file(cell))


def recipe_file(cell: Cell) -> Path:
    """Where the recipe of a greedy cell lies: the same for cells that only differ in how they are measured."""
    cfg = cell.cfg
    criterion = cfg.criterion_name
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
    folder, key = cfg.results_dir / ".calibration", cell.calibration_id
    file, read = state_file(folder, key), partial(read_state, key=key)
    if (kept := _kept(file, read)) is not None:
        return kept
    with claimed(cfg.results_dir, f"calibration-{key}", "calibration"):
        kept = _kept(file, read, partial(put_aside, file, cfg.results_dir, say=session.display.say))
        return calibrate(folder, key, make) if kept is None else kept


def _write(file: Path, cell: Cell, recipe: Recipe) -> None:
    cfg = cell.cfg
    what = {"model": cfg.model_name, "criterion": cfg.criterion and cfg.criterion.name, "mitigation": cfg.mitigation}
    full = replace(recipe, made={**what, "targets": "+".join(cfg.targets), **recipe.made})
    write_text(file, full.text())
