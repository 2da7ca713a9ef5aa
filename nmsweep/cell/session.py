"""State shared by the cells of one process: the loaded model and the display."""

import logging
import secrets
from dataclasses import dataclass, field
from typing import Any

from nmsweep.cell.identity import device_kind, model_spec
from nmsweep.config.schema import RunConfig, short_hash
from nmsweep.errors import InputError
from nmsweep.models import LoadedModel, load_model
from nmsweep.progress import Display

log = logging.getLogger(__name__)


def device_of(cfg: RunConfig) -> str:
    """Return the cell's device; for ``auto`` what this machine has."""
    return device_kind(cfg.device) if cfg.device == "auto" else cfg.device


def place_of(cfg: RunConfig) -> str:
    """Return the device that the cell's model is loaded on: for ``cuda`` the current GPU of this process, by its number."""
    import torch

    device = device_of(cfg)
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" and torch.cuda.is_available() else device


def model_key(cfg: RunConfig) -> list[Any]:
    """Return everything that a loaded model depends on."""
    return [cfg.model, cfg.dtype, device_of(cfg), cfg.seed]


@dataclass
class Session:
    """Keeps one model loaded between the cells of a process; another one replaces it.

    Attributes:
        display: where progress is shown.
        sweep: id of the plan whose cells are run.
        launch: id of the launch that this process belongs to; written to every record.
        n_loads: how often a model was loaded.
    """

    display: Display = field(default_factory=Display)
    sweep: str = ""
    launch: str = field(default_factory=lambda: secrets.token_hex(6))
    n_loads: int = 0
    _key: str = ""
    _loaded: LoadedModel | None = None
    _unusable: dict[str, InputError] = field(default_factory=dict)

    def model(self, cfg: RunConfig) -> LoadedModel:
        """Return the cell's model; load it unless it is loaded.

        Raises:
            InputError: it cannot be loaded; tried only once, for the first of its cells.
        """
        key = short_hash(model_key(cfg))
        if key in self._unusable:
            raise self._unusable[key]
        if self._loaded is None or key != self._key:
            self._loaded = None  # two models may not fit
            self.display.stage("loading the model")
            device = place_of(cfg)
            try:
                self._loaded = load_model(model_spec(cfg), dtype=cfg.dtype, device=device)
            except InputError as error:
                self._unusable[key] = error
                raise
            self._key = key
            if device.startswith("cuda"):
                import torch

                # calls of CUDA without a device, such as that for peak memory, then mean this one
                torch.cuda.set_device(device)
            self.n_loads += 1
            log.info("model load %d: %s, %s on %s", self.n_loads, cfg.model_name, cfg.dtype, device)
            self.display.say(f"    loaded {cfg.model_name} in {cfg.dtype} on {device}")
        return self._loaded
