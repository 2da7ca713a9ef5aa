"""A model as a folder of safetensors, config and tokenizer: its check without reading weights, and its fingerprint."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nmsweep.models.cache import kept_sha256

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")  # fmt: skip
"""Files that decide how text becomes tokens; part of the fingerprint."""

INDEX = "model.safetensors.index.json"
"""File that lists the shards of a model."""

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_NOT_HASHED = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
_BLOB = re.compile(r"[0-9a-f]{64}")


def check_folder(folder: Path) -> list[str]:
    """Return one message for each mistake of a model's folder. Of the weights, only headers are read."""
    where = f"model.path {folder}"
    if not (folder / "config.json").is_file():
        return [f"{where}: has no config.json; a folder written by save_pretrained is needed; name another folder"]
    errors = []
    try:
        if not isinstance(json.loads((folder / "config.json").read_text()), dict):
            raise ValueError("no object")
    except ValueError as error:
        errors.append(f"{where}: config.json is not a JSON object ({error}); get the file again")
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        errors.append(f"{where}: has no tokenizer; one of {', '.join(_VOCABULARIES)} is needed; copy it there")
    try:
        names = weight_files(folder)
    except (ValueError, KeyError, AttributeError):
        return [*errors, f"{where}: {INDEX} is damaged; a weight_map is needed; get the file again"]
    if names:
        return errors + [message for name in names if (message := _check_safetensors(folder / name))]
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        errors.append(
            f"{where}: holds only pickled weights ({', '.join(pickles[:3])}), which can run code when loaded; "
            "safetensors or GGUF is allowed; convert it with save_pretrained"
        )
    else:
        errors.append(
            f"{where}: has no model.safetensors; safetensors or one .gguf file is allowed; name another folder"
        )
    return errors


def weight_files(folder: Path) -> list[str]:
    """Return the names of the safetensors files with the model's weights, sorted."""
    if (folder / INDEX).is_file():
        return shards(folder / INDEX)
    return [name for name in ("model.safetensors",) if (folder / name).is_file()]


def shards(index: Path) -> list[str]:
    """Return the file names in an index, sorted."""
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def folder_fingerprint(folder: Path) -> str:
    """Return a hex sha256 of a folder's weights, config and tokenizer, independent of its path."""
    tokenizer = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    digests = {name: _digest(folder / name) for name in [*weight_files(folder), *tokenizer]}
    return content_fingerprint(json.loads((folder / "config.json").read_text()), digests)


def content_fingerprint(config: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """Return a hex sha256 of a model's config and of its files' sha256 by name; the same for folders and the hub."""
    hashed = {key: value for key, value in config.items() if key not in _NOT_HASHED}
    return hashlib.sha256(json.dumps([hashed, dict(digests)], sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    """Return the sha256 of a file; large files in the hub's cache are named by it and need not be read."""
    target = file.resolve()
    if target.parent.name == "blobs" and _BLOB.fullmatch(target.name):
        return target.name
    return kept_sha256(target)


def _check_safetensors(file: Path) -> str:
    """Return what is wrong with a safetensors file by its header and its length; empty if nothing."""
    try:
        with safe_open(file, framework="pt"):
            return ""
    except FileNotFoundError:
        return f"model.path {file}: No such file or directory; the index names it; get the file"
    except (SafetensorError, OSError) as error:
        return f"model.path {file}: has {file.stat().st_size:,} bytes, which are no whole safetensors file ({error}); get the file again"
