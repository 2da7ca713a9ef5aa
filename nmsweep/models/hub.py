"""Models of the Hugging Face hub: taken from the local cache if complete, else downloaded."""

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

from nmsweep.errors import ModelError
from nmsweep.models.cache import sha256_file
from nmsweep.models.folder import INDEX, TOKENIZER_FILES, check_folder, content_fingerprint, folder_fingerprint, shards
from nmsweep.models.spec import ModelSpec

_PATTERNS: dict[str, Any] = {
    "allow_patterns": ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"],
    "ignore_patterns": ["original/*", "consolidated*"],  # the same weights in the formats of Meta and Mistral
}
_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


def check_hub(spec: ModelSpec) -> list[str]:
    """Return what keeps a hub model away: one message, or none. One request, or none if the model is cached."""
    try:
        if cached_folder(spec) is None:
            _files(spec)
    except ModelError as error:
        return list(error.messages)
    return []


def cached_folder(spec: ModelSpec) -> Path | None:
    """Return the model's snapshot in the hub's cache, or None if any of it is missing."""
    try:
        folder = Path(snapshot_download(spec.repo, revision=spec.revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache
        return None
    return None if check_folder(folder) else folder


def hub_folder(spec: ModelSpec, say: Callable[[str], None] = log.info) -> Path:
    """Return the model's snapshot, downloaded if it is not cached.

    Raises:
        ModelError: gated, missing or unreachable.
    """
    if folder := cached_folder(spec):
        return folder
    _files(spec)  # fails at once, where a download would be tried six times
    say(f"downloading {spec.repo} from the hub")
    try:
        folder = Path(snapshot_download(spec.repo, revision=spec.revision, **_PATTERNS))
    except Exception as error:  # the client raises its HTTP library's own errors, which differ between its versions
        raise _cannot(spec, error) from error
    if errors := check_folder(folder):
        raise ModelError(*errors)
    return folder


def download_bytes(spec: ModelSpec) -> int:
    """Return the bytes that `hub_folder` would download; 0 if the model is cached.

    Raises:
        ModelError: gated, missing or unreachable.
    """
    if cached_folder(spec):
        return 0
    _files(spec)
    try:
        files = snapshot_download(spec.repo, revision=spec.revision, dry_run=True, **_PATTERNS)
    except Exception as error:  # as in `hub_folder`
        raise _cannot(spec, error) from error
    return sum(file.file_size or 0 for file in files if file.will_download)


def hub_config_file(spec: ModelSpec) -> Path:
    """Return the model's config.json, downloaded if it is not cached."""
    folder = cached_folder(spec)
    return folder / "config.json" if folder else _small_file(spec, "config.json")


def hub_fingerprint(spec: ModelSpec) -> str:
    """Return the `folder_fingerprint` of the snapshot without downloading weights: the hub lists their sha256.

    Raises:
        ModelError: gated, missing or unreachable, or without safetensors.
    """
    if folder := cached_folder(spec):
        return folder_fingerprint(folder)
    files = _files(spec)
    if INDEX in files:
        weights = shards(_small_file(spec, INDEX))
    elif "model.safetensors" in files:
        weights = ["model.safetensors"]
    else:
        raise ModelError(
            f"model {spec.name}: {spec.repo} has no safetensors; pickled weights are not loaded; take another repository"
        )
    names = [*weights, *(name for name in TOKENIZER_FILES if name in files)]
    digests = {name: files.get(name) or sha256_file(_small_file(spec, name)) for name in names}
    return content_fingerprint(json.loads(_small_file(spec, "config.json").read_text()), digests)


def _small_file(spec: ModelSpec, name: str) -> Path:
    _files(spec)
    try:
        return Path(hf_hub_download(spec.repo, name, revision=spec.revision))
    except Exception as error:  # as in `hub_folder`
        raise _cannot(spec, error) from error


def _files(spec: ModelSpec) -> Mapping[str, str | None]:
    """Return the repository's files, with the sha256 of the large ones.

    Raises:
        ModelError: gated, missing or unreachable.
    """
    answer = _ask(spec.repo, spec.revision)
    if isinstance(answer, Exception):
        raise _cannot(spec, answer) from answer
    return answer


@cache  # a sweep asks for every cell; a failure is kept too, so that its time-out is waited for once
def _ask(repo: str, revision: str | None) -> Mapping[str, str | None] | Exception:
    api = HfApi()
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
        if info.gated:
            api.auth_check(repo)
    except Exception as error:  # as in `hub_folder`
        return error
    return {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or ()}


def _cannot(spec: ModelSpec, error: Exception) -> ModelError:
    """Return the one error for a hub model that is not available, whatever the reason."""
    match error:
        case GatedRepoError():
            reason = f"gated: accept its terms at {constants.ENDPOINT}/{spec.repo} first"
        case RevisionNotFoundError():
            reason = f"no revision {spec.revision!r}"
        case RepositoryNotFoundError():
            reason = "no such repository, or a private one"
        case OfflineModeIsEnabled():
            reason = "HF_HUB_OFFLINE is set and it is not in the cache"
        case _:
            reason = f"{constants.ENDPOINT} cannot be reached: {' '.join(str(error).split())[:120]}"
    return ModelError(
        f"model {spec.name}: {spec.repo} cannot be had from the hub ({reason}); ways out: "
        f"a token for gated models (HF_TOKEN, or `hf auth login`); `nmsweep prefetch model={spec.name}` where there is "
        "internet; model.path=DIR for a local copy; model=smollm2, which needs no hub"
    )
