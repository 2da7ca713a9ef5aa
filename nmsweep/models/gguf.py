"""GGUF files: their check, and their conversion to a folder of safetensors, which happens once.

transformers reads the config, the tokenizer and the weights, which are put into a model here: the model that transformers
would return has a quantizer that forbids saving it, and may keep the weights packed, depending on which kernels are
installed.
"""

import io
import logging
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.utils import logging as transformers_logging

from nmsweep.errors import ModelError
from nmsweep.models.cache import built_once, cache_dir, kept_sha256, known_sha256

CONVERSION = 1
"""Version of the conversion, raised if the same GGUF file would give other numbers. Part of the fingerprint."""

MAGIC = b"GGUF"

_ARCHITECTURES = ("gemma2", "gemma3", "llama", "qwen2", "qwen3")
_WAYS_OUT = "get the file again, or take model.path=DIR with a safetensors checkpoint"

_ROPE_FREQS = "rope_freqs.weight"
"""Tensor that becomes a part of the config."""

_BOS_BY_DEFAULT = ("llama3", "llama-v3", "llama-bpe")
"""Pre-tokenizers with which llama.cpp adds a BOS although the file does not say so."""

log = logging.getLogger(__name__)


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file at `path` or in the folder `path`; None for a folder of safetensors.

    Raises:
        ModelError: a folder with several GGUF files and no safetensors.
    """
    if path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if not files or any(path.glob("*.safetensors")):
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelError(f"model.path {path}: holds {len(files)} GGUF files ({names}); name one: model.path={files[0]}")
    return files[0]


def check_gguf(file: Path) -> list[str]:
    """Return what is wrong with a GGUF file by its header and its length: one message, or none."""
    try:
        with file.open("rb") as opened:
            magic = opened.read(4)
        if magic != MAGIC:
            return [f"model.path {file}: begins with {magic!r}; a GGUF file begins with {MAGIC!r}; {_WAYS_OUT}"]
        if known_sha256(file):  # checked before and unchanged; reading a large vocabulary takes seconds
            return []
        architecture = _field(_reader(file), "general.architecture")
    except ModelError as error:
        return list(error.messages)
    except OSError as error:
        return [
            f"model.path {file}: {error.strerror or error}; a readable file is needed; check the path and its permissions"
        ]
    if architecture not in _ARCHITECTURES:
        return [
            f"model.path {file}: GGUF architecture {architecture!r}; allowed: {', '.join(_ARCHITECTURES)}; "
            "take the model's safetensors checkpoint"
        ]
    return []


def converted(gguf_sha256: str, fetch: Callable[[Path], Path], say: Callable[[str], None] = log.info) -> Path:
    """Return the folder with a GGUF's config, tokenizer and safetensors; convert the file if it does not exist.

    Args:
        gguf_sha256: of the file; names the folder together with `CONVERSION`.
        fetch: returns the GGUF file; called only to convert it, with an empty folder for its use.
        say: called before slow steps.
    """
    return built_once(converted_folder(gguf_sha256), partial(_convert_into, fetch=fetch, say=say))


def converted_folder(gguf_sha256: str) -> Path:
    return cache_dir() / "models" / f"gguf-{gguf_sha256[:16]}-{CONVERSION}"


def gguf_config(file: Path) -> PretrainedConfig:
    """Return the config of a local GGUF, from its conversion if it exists, else from its header."""
    known = known_sha256(file)
    if known and (folder := converted_folder(known)).is_dir():
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
        return config
    return _read_config(file, _reader(file))


def gguf_folder(file: Path, say: Callable[[str], None] = log.info) -> Path:
    """Return the folder with the conversion of a local GGUF file."""
    return converted(kept_sha256(file), lambda work: file, say)


def _convert_into(work: Path, fetch: Callable[[Path], Path], say: Callable[[str], None]) -> None:
    scratch = work / "download"
    scratch.mkdir()
    source = fetch(scratch)
    say(f"converting {source.name} to safetensors, once ({work.parent})")
    convert_gguf(source, work)
    shutil.rmtree(scratch)
    for file in work.glob("*.*"):
        file.chmod(0o644)  # safetensors writes 0600, which would keep other users of a shared cache out


def convert_gguf(file: Path, out: Path) -> None:
    """Write the config, tokenizer and safetensors of a GGUF into the folder `out`.

    Weights are stored in bfloat16, or in float32 if the file has float16 or float32 matrices, so that none is rounded.

    Raises:
        ModelError: the file is damaged, of an unsupported architecture, or lacks weights.
    """
    reader = _reader(file)
    config = _read_config(file, reader)
    dtype = _stored_dtype(reader)
    tokenizer = read_tokenizer(file, reader)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    with redirect_stderr(io.StringIO()):  # its progress bar would be drawn into ours
        checkpoint = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model, torch_dtype=dtype)  # type: ignore[no-untyped-call]
    weights = checkpoint["tensors"]
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    n_unknown = sum(tensor.name != _ROPE_FREQS for tensor in reader.tensors) - len(weights)
    if missing or n_unknown:
        raise ModelError(
            f"GGUF {file.name}: {len(missing)} weights of the architecture are missing ({', '.join(missing[:3])}) and "
            f"{n_unknown} are unknown; {_WAYS_OUT}"
        )
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _reader(file: Path) -> Any:
    """Return a `gguf.GGUFReader` of a file.

    Raises:
        ModelError: it is not a whole GGUF file.
    """
    import gguf

    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        size = file.stat().st_size
        raise ModelError(
            f"GGUF {file}: damaged or cut short at {size:,} bytes ({reason}); a whole file is needed; {_WAYS_OUT}"
        ) from error


def _read_config(file: Path, reader: Any) -> PretrainedConfig:
    """Return the config as transformers reads it, with what it loses put back.

    Differs: transformers (seen in 5.23) ignores the tensor `rope_freqs`, with which llama.cpp writes the long-context
    rope of Llama 3.1 and 3.2; drops `rope.scaling` of Gemma3; and keeps 1e-5 as its float32 neighbour.
    """
    config: PretrainedConfig = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    architecture = _field(reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ModelError(
            f"GGUF {file}: architecture {architecture!r}; allowed: {', '.join(_ARCHITECTURES)}; {_WAYS_OUT}"
        )
    import numpy as np

    config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))
    config.name_or_path = config._model_name_or_path = ""  # a title that looks like a path
    scaling = _field(reader, f"{architecture}.rope.scaling.type")
    if scaling == "linear" and architecture == "gemma3":
        factor = float(_field(reader, f"{architecture}.rope.scaling.factor"))
        config.rope_parameters["full_attention"].update(rope_type="linear", factor=factor)
    elif scaling not in (None, "none"):
        raise ModelError(f"GGUF {file}: rope scaling {scaling!r}; allowed: none, and linear for gemma3; {_WAYS_OUT}")
    if factors := [tensor for tensor in reader.tensors if tensor.name == _ROPE_FREQS]:
        config.rope_parameters = {**config.rope_parameters, **_llama3_rope(config, torch.tensor(factors[0].data))}
    return config


def _llama3_rope(config: PretrainedConfig, factors: Tensor) -> dict[str, Any]:
    """Return the Llama-3 rope whose frequencies are the plain ones divided by `factors` [head_dim / 2], float32.

    Raises:
        ModelError: no Llama-3 rope has these factors.
    """
    theta, head_dim = config.rope_parameters["rope_theta"], 2 * len(factors)
    wavelength = 2 * torch.pi * theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
    # Llama 3.1 and 3.2 differ in the factor alone; the other three numbers are those of all published checkpoints
    factor, low, high, n_original = round(float(factors.max()), 3), 1.0, 4.0, 8192
    smooth = ((n_original / wavelength - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(expected, factors.double(), rtol=1e-3):
        raise ModelError(
            f"GGUF: rope_freqs up to {factor:g} are not those of Llama 3.1 or 3.2; allowed: theirs; {_WAYS_OUT}"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": n_original,
    }


def _stored_dtype(reader: Any) -> torch.dtype:
    wide = any(tensor.tensor_type.name in ("F16", "F32", "F64") and len(tensor.shape) > 1 for tensor in reader.tensors)
    return torch.float32 if wide else torch.bfloat16


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def read_tokenizer(file: Path, reader: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a GGUF file.

    Args:
        file: the GGUF.
        reader: its `gguf.GGUFReader`.

    Raises:
        ModelError: this version of transformers adds a BOS where llama.cpp adds none, or the reverse.
    """
    wants_bos = _wants_bos(reader)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, add_bos_token=wants_bos
    )
    if adds_bos(tokenizer) != wants_bos:
        raise ModelError(
            f"GGUF {file.name}: transformers {transformers.__version__} {'leaves out' if wants_bos else 'adds'} the BOS of its "
            f"tokenizer; {'one' if wants_bos else 'none'} is needed; take transformers 5.23, which is known to work"
        )
    return tokenizer


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer puts a BOS before a text (Llama, Gemma)."""
    ids: list[int] = tokenizer("x").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _wants_bos(reader: Any) -> bool:
    """Return whether llama.cpp would put a BOS before a text. Source: `llama_vocab::impl::load` of llama.cpp."""
    stated = _field(reader, "tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    return _field(reader, "tokenizer.ggml.model") == "llama" or _field(reader, "tokenizer.ggml.pre") in _BOS_BY_DEFAULT
