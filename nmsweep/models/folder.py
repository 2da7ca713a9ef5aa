"""A model as a folder of safetensors, config and tokenizer: checked by its headers, named by its content."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmsweep.models.cache import kept_sha256

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")  # fmt: skip
"""Files that decide how text becomes tokens; part of the fingerprint."""

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_NO_NUMBER = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
_BLOB = re.compile(r"[0-9a-f]{64}")


def check_folder(folder: Path) -> list[str]:
    """What is wrong with a model's folder, without reading its weights: one message for each mistake."""
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
        return [
            *errors,
            f"{where}: model.safetensors.index.json is damaged; a weight_map is needed; get the file again",
        ]
    if not names:
        return [*errors, _no_safetensors(folder)]
    return errors + [message for name in names if (message := _check_safetensors(folder / name))]


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that hold the model's weights, sorted."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [name for name in ("model.safetensors",) if (folder / name).is_file()]


def folder_fingerprint(folder: Path) -> str:
    """Hex sha256 of what the folder holds: weights, config, tokenizer. Not of its path."""
    digests = {name: _digest(folder / name) for name in weight_files(folder)}
    digests |= {name: _digest(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    return content_fingerprint(json.loads((folder / "config.json").read_text()), digests)


def content_fingerprint(config: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """Hex sha256 of a model's config and its files' sha256 by name; the one rule for folders and the hub."""
    kept = {key: value for key, value in config.items() if key not in _NO_NUMBER}
    return hashlib.sha256(json.dumps([kept, dict(digests)], sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    """sha256 of a file; the hub's cache names a large file by it, which saves reading gigabytes."""
    target = file.resolve()
    if target.parent.name == "blobs" and _BLOB.fullmatch(target.name):
        return target.name
    return kept_sha256(target)


def _check_safetensors(file: Path) -> str:
    """What is wrong with a safetensors file, from its header and its length; empty if nothing."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            n_header = int.from_bytes(opened.read(8), "little")
            if n_header > size:
                raise ValueError("no safetensors header")
            header = json.loads(opened.read(n_header))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except OSError as error:
        return f"model.path {file}: {error.strerror or error}; the index names it; get the file"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"model.path {file}: is no safetensors file ({error}); get the file again"
    if size != 8 + n_header + end:
        return f"model.path {file}: has {size:,} bytes; {8 + n_header + end:,} are needed; get the file again"
    return ""


def _no_safetensors(folder: Path) -> str:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        return (
            f"model.path {folder}: holds only pickled weights ({', '.join(pickles[:3])}), which can run code when loaded; "
            "safetensors or GGUF is allowed; convert it with save_pretrained"
        )
    return (
        f"model.path {folder}: has no model.safetensors; safetensors or one .gguf file is allowed; name another folder"
    )
