"""The calibrated state on disk: one safetensors file under a key of everything it depends on, shared by cells."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nmsweep.calibration.learn import Loss
from nmsweep.errors import InputError
from nmsweep.methods.base import State
from nmsweep.results.storage import whole_file

VERSION = 1
"""Part of every key; increased when calibration gives other numbers."""


@dataclass(frozen=True)
class Calibrated:
    """The result of a calibration.

    Attributes:
        state: of each target layer, by module path.
        losses: of the trained blocks, before and after.
        key: of its file; empty where nothing was calibrated or stored.
    """

    state: Mapping[str, State] = field(default_factory=dict)
    losses: Sequence[Loss] = ()
    key: str = ""

    def provenance(self) -> dict[str, Any]:
        """Return what a record says about it."""
        return {"key": self.key, "losses": [asdict(loss) for loss in self.losses]} if self.key else {}


def state_file(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def write_state(file: Path, calibrated: Calibrated) -> None:
    """Write a state atomically; a tensor that layers share is stored once."""
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    places: dict[str, str] = {}
    for layer, state in calibrated.state.items():
        for name, value in state.items():
            place = first.setdefault(id(value), f"{layer}/{name}")
            places[f"{layer}/{name}"] = place
            if place not in tensors:
                tensors[place] = value.detach().cpu().contiguous().clone()
    metadata = {"places": json.dumps(places), "losses": json.dumps([asdict(loss) for loss in calibrated.losses])}
    with whole_file(file) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_state(file: Path, key: str) -> Calibrated:
    """Read a state.

    Raises:
        InputError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        state: dict[str, dict[str, Tensor]] = {}
        for place, name in json.loads(metadata["places"]).items():
            layer, _, entry = place.rpartition("/")
            state.setdefault(layer, {})[entry] = tensors[name]
        return Calibrated(state, [Loss(**loss) for loss in json.loads(metadata["losses"])], key)
    except (
        Exception
    ) as error:  # besides OSError the library raises types of its own; each means that the file is damaged
        raise InputError(f"calibrated state {file.name}: {type(error).__name__}: {error}") from error
