"""The values that `conf/` gives to a command without overrides."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from nmsweep.errors import InputError


@cache
def conf_dir() -> Path:
    """Return the shipped `conf/`: inside the package in a wheel, beside it in a checkout.

    Raises:
        InputError: this installation has none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise InputError(f"nmsweep: no conf/ folder beside or inside {package}; install nmsweep again")


@cache
def defaults() -> Mapping[str, Any]:
    """Return `conf/config.yaml`, `conf/calibration` and `conf/data`, resolved for ``profile=strict``.

    Keys that depend on the chosen model or belong to Hydra are left out.
    """
    from omegaconf import OmegaConf

    node: Any = OmegaConf.load(conf_dir() / "config.yaml")
    for key in ("defaults", "hydra", "tasks"):
        del node[key]
    for group in ("calibration", "data"):
        node[group] = OmegaConf.load(conf_dir() / group / "default.yaml")
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
