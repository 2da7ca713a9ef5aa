"""Prepare a cell before it is measured: its calibration windows, a pattern for each layer, and the calibrated state."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from nmsweep.calibration.fit import fit
from nmsweep.calibration.policy import search
from nmsweep.calibration.store import Calibrated, read_state, state_file, write_state
from nmsweep.calibration.text import default_samples, windows
from nmsweep.cell.identity import Cell
from nmsweep.cell.session import Session
from nmsweep.config.recipe import Recipe, read_recipe
from nmsweep.data.tasks import read_text
from nmsweep.errors import InputError
from nmsweep.models import LoadedModel, adds_bos
from nmsweep.results.claims import claimed
from nmsweep.results.layout import CALIBRATION, RECIPES
from nmsweep.results.quarantine import put_aside
from nmsweep.results.record import cell_folder
from nmsweep.results.storage import write_text

T = TypeVar("T")


def calibration_windows(cell: Cell, loaded: LoadedModel, n_samples: int) -> Tensor:
    """Return the windows of the cell's calibration text, ids [n_windows, seqlen]; none without a text.

    Args:
        n_samples: how many, where `calibration.n_samples` is null.
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
    """Return the cell with a pattern for each layer where `policy=greedy` asks for it: from its recipe, or searched now."""
    cfg, sparsification = cell.cfg, cell.sparsification
    if cfg.policy != "greedy" or sparsification is None:
        return cell

    def search_patterns() -> Recipe:
        session.display.stage("allocation", cfg.calibration.n_samples or 32)
        recipe = search(
            loaded.model, calibration_windows(cell, loaded, 32), sparsification, cfg.allocation, cfg.targets,
            scope=cfg.scope, settings=cfg.calibration, seed=cfg.seed, step=session.display.step,
        )  # fmt: skip
        names = {
            "model": cfg.model_name,
            "criterion": cfg.criterion and cfg.criterion.name,
            "mitigation": cfg.mitigation,
        }
        made = {**names, "targets": "+".join(cfg.targets), **recipe.made}
        write_text(recipe_file(cell), replace(recipe, made=made).text())
        session.display.say(f"    recipe: {recipe_file(cell)}")
        return read_recipe(recipe_file(cell))

    claim = f"allocation-{cell.calibration_id}"
    recipe = _stored_or_computed(recipe_file(cell), read_recipe, search_patterns, claim, cell, session)
    return replace(cell, sparsification=replace(sparsification, patterns=recipe.layers))


def _stored_or_computed(
    file: Path, read: Callable[[Path], T], compute: Callable[[], T], claim: str, cell: Cell, session: Session
) -> T:
    """Return the content of a file; without a sound file, compute it while holding a claim.

    Args:
        file: a recipe or a calibrated state.
        read: raises an InputError where the file is damaged; the process that holds the claim puts such a file aside.
        compute: writes the file too.
        claim: held by one process at a time.
    """
    results_dir = cell.cfg.results_dir

    def stored(damaged: Callable[[str], None] = lambda why: None) -> T | None:
        try:
            return read(file) if file.is_file() else None
        except InputError as error:
            damaged(str(error))
            return None

    content = stored()
    if content is None:
        with claimed(results_dir, claim, claim.partition("-")[0]):
            content = stored(partial(put_aside, file, results_dir, say=session.display.say))
            return compute() if content is None else content
    return content


def recipe_file(cell: Cell) -> Path:
    """Return the file of a greedy cell's recipe; cells that differ only in how they are measured share it."""
    cfg = cell.cfg
    criterion = cfg.criterion_name
    folder = cfg.results_dir / RECIPES
    named = cell_folder(
        cfg.results_dir, cfg.model_name, cfg.pattern.slug, criterion, cfg.mitigation, cell.calibration_id[:12]
    )
    return folder / f"{named.name}.yaml"


def calibration(cell: Cell, loaded: LoadedModel, session: Session) -> Calibrated:
    """Return the state of the cell's calibrated methods: stored by an earlier cell, or computed now; empty without any."""
    cfg, sparsification = cell.cfg, cell.sparsification
    if sparsification is None or not sparsification.calibrated:
        return Calibrated()
    key = cell.calibration_id
    file = state_file(cfg.results_dir / CALIBRATION, key)

    def calibrate() -> Calibrated:
        calibrated = fit(
            loaded.model, calibration_windows(cell, loaded, default_samples(sparsification)), sparsification, cfg.targets,
            scope=cfg.scope, settings=cfg.calibration, seed=cfg.seed, step=session.display.step,
        )  # fmt: skip
        write_state(file, calibrated)
        return replace(calibrated, key=key)

    session.display.stage("calibration", loaded.model.config.get_text_config().num_hidden_layers)
    return _stored_or_computed(file, partial(read_state, key=key), calibrate, f"calibration-{key}", cell, session)
