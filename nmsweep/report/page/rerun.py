"""The command that runs a cell again, from its effective config."""

import re
import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

from nmsweep.config.defaults import defaults
from nmsweep.config.schema import AllocationConfig, CalibrationConfig, DataConfig, EvalConfig

_KEYS = (
    "scope", "profile", "dtype", "device", "seed", "plugins", "eval", "data", "policy", "allocation", "calibration",
)  # fmt: skip
_NODES: Mapping[str, type[BaseModel]] = {
    "eval": EvalConfig, "data": DataConfig, "allocation": AllocationConfig, "calibration": CalibrationConfig,
}  # fmt: skip
_MODEL_KEYS = ("path", "revision", "seed", "trust_remote_code")
_PLAIN = re.compile(r"[A-Za-z0-9_./:%+*@?-]+")


def rerun_command(config: Mapping[str, Any]) -> str:
    """Return one shell line, ``nmsweep model=… force=true``, with the settings that differ from the defaults.

    Args:
        config: as `RunConfig.dump` gives it; an empty one gives an empty line.
    """
    return shlex.join(["nmsweep", *_words(config), "force=true"]) if config else ""


def _words(config: Mapping[str, Any]) -> Iterator[str]:
    model = config.get("model") or {}
    yield _word("model", model.get("name", ""))
    yield from (_word(f"model.{key}", model[key]) for key in _MODEL_KEYS if model.get(key))
    yield _word("pattern", config.get("pattern", "dense"))
    if config.get("pattern") != "dense":
        yield from _methods(config)
    yield _word("tasks", "+".join(config.get("tasks") or ()))
    for key, default in _defaults().items():
        yield from _differing(key, config.get(key, default), default)


@cache
def _defaults() -> dict[str, Any]:
    """Return the values of `conf/` as `RunConfig.dump` writes them."""
    nodes = {key: node.model_validate({}).model_dump(mode="json") for key, node in _NODES.items()}
    return {key: nodes[key] if key in nodes else defaults()[key] for key in _KEYS}


def _methods(config: Mapping[str, Any]) -> Iterator[str]:
    criterion = dict(config.get("criterion") or {"name": "act"})
    yield _word("criterion", criterion.pop("name", "act"))
    yield from (_word(f"criterion.{key}", value) for key, value in criterion.items())
    yield _word("mitigation", config.get("mitigation", "none"))
    for stage, parameters in (config.get("mitigations") or {}).items():
        yield from (_word(f"mitigations.{stage}.{key}", value) for key, value in parameters.items())
    if config.get("targets"):
        yield _word("targets", config["targets"])


def _differing(key: str, value: Any, default: Any) -> Iterator[str]:
    if value == default:
        return
    if isinstance(default, Mapping) and isinstance(value, Mapping):
        for name, inner in value.items():
            if inner != default.get(name):
                yield _word(f"{key}.{name}", inner)
    elif list(value if isinstance(value, list | tuple) else [value]) != default:
        yield _word(key, value)


def _word(key: str, value: Any) -> str:
    return f"{key}={_literal(value)}"


def _literal(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_literal, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_literal(key)}:{_literal(inner)}" for key, inner in value.items()) + "}"
    text = str(value)
    if isinstance(value, int | float) or (_PLAIN.fullmatch(text)):
        return text
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'")
    return f"'{escaped}'"
