"""Models of the Hugging Face hub: from the local cache where they are complete, else downloaded."""

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from nmsweep.errors import ModelError
from nmsweep.models.cache import sha256_file
from nmsweep.models.folder import TOKENIZER_FILES, check_folder, content_fingerprint, folder_fingerprint
from nmsweep.models.spec import ModelSpec

_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
_UNWANTED = ["original/*", "consolidated*"]  # Meta's and Mistral's own formats, the same weights once more
_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


def check_hub(spec: ModelSpec) -> list[str]:
    """What stands in the way of a hub model: one message, or none. One request, none if it is in the cache."""
    try:
        if cached_folder(spec) is None:
            _listing(spec)
    except ModelError as error:
        return list(error.messages)
    return []


def cached_folder(spec: ModelSpec) -> Path | None:
    """The model's snapshot in the hub's cache, if nothing is missing from it."""
    assert spec.repo is not None
    try:
        folder = Path(snapshot_download(spec.repo, revision=spec.revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache
        return None
    return None if check_folder(folder) else folder


def hub_folder(spec: ModelSpec, say: Callable[[str], None] = log.info) -> Path:
    """The model's snapshot; downloaded if it is not in the cache.

    Raises:
        ModelError: gated, missing or unreachable; one message that names the ways out.
    """
    if folder := cached_folder(spec):
        return folder
    _listing(spec)  # fails at once, where a download would be tried six times
    assert spec.repo is not None
    say(f"downloading {spec.repo} from the hub")
    try:
        got = snapshot_download(spec.repo, revision=spec.revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    except Exception as error:  # the client raises its HTTP library's own errors, which differ between its versions
        raise _cannot(spec, error) from error
    if errors := check_folder(Path(got)):
        raise ModelError(*errors)
    return Path(got)


def download_bytes(spec: ModelSpec) -> int:
    """Bytes to download for a hub model; 0 where it is in the cache.

    Raises:
        ModelError: gated, missing or unreachable.
    """
    if cached_folder(spec):
        return 0
    _listing(spec)
    assert spec.repo is not None
    files = (
        HfApi().model_info(spec.repo, revision=spec.revision, files_metadata=True, timeout=_TIMEOUT_S).siblings or ()
    )
    chosen = filter_repo_objects(
        files, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, key=lambda file: file.rfilename
    )
    return sum(file.size or 0 for file in chosen)


def hub_config_file(spec: ModelSpec) -> Path:
    """The model's config.json; one small download where the model is not in the cache."""
    if folder := cached_folder(spec):
        return folder / "config.json"
    return _small_file(spec, "config.json")


def hub_fingerprint(spec: ModelSpec) -> str:
    """As `folder_fingerprint` of the snapshot, without downloading weights: the hub tells their sha256."""
    if folder := cached_folder(spec):
        return folder_fingerprint(folder)
    files = _listing(spec)
    names = [*_weight_names(spec, files), *(name for name in TOKENIZER_FILES if name in files)]
    digests = {name: files.get(name) or sha256_file(_small_file(spec, name)) for name in names}
    return content_fingerprint(json.loads(_small_file(spec, "config.json").read_text()), digests)


def _weight_names(spec: ModelSpec, files: Mapping[str, str | None]) -> list[str]:
    index = "model.safetensors.index.json"
    if index in files:
        return sorted(set(json.loads(_small_file(spec, index).read_text())["weight_map"].values()))
    if "model.safetensors" in files:
        return ["model.safetensors"]
    raise ModelError(
        f"model {spec.name}: {spec.repo} has no safetensors; pickled weights are not loaded; take another repository"
    )


def _small_file(spec: ModelSpec, name: str) -> Path:
    _listing(spec)
    assert spec.repo is not None
    try:
        return Path(hf_hub_download(spec.repo, name, revision=spec.revision))
    except Exception as error:  # as in `hub_folder`
        raise _cannot(spec, error) from error


def _listing(spec: ModelSpec) -> Mapping[str, str | None]:
    """The repository's files, with the sha256 of the large ones.

    Raises:
        ModelError: gated, missing or unreachable.
    """
    assert spec.repo is not None
    found = _ask(spec.repo, spec.revision)
    if isinstance(found, Exception):
        raise _cannot(spec, found) from found
    return found


@cache  # a sweep asks for every cell; a failure is kept too, so that it costs its time-out once
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
    """The one message for everything that keeps a hub model away."""
    return ModelError(
        f"model {spec.name}: {spec.repo} cannot be had from the hub ({_reason(spec, error)}); ways out: "
        f"a token for gated models (HF_TOKEN, or `hf auth login`); `nmsweep prefetch model={spec.name}` where there is "
        "internet; model.path=DIR for a local copy; model=smollm2, which needs no hub"
    )


def _reason(spec: ModelSpec, error: Any) -> str:
    if isinstance(error, GatedRepoError):
        return f"gated: accept its terms at {constants.ENDPOINT}/{spec.repo} first"
    if isinstance(error, RevisionNotFoundError):
        return f"no revision {spec.revision!r}"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or a private one"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set and it is not in the cache"
    return f"{constants.ENDPOINT} cannot be reached: {' '.join(str(error).split())[:120]}"
