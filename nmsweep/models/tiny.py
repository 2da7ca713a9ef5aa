"""Models with random weights, for tests and for benchmarks at the shape of a real model."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from nmsweep.errors import InputError, nearest

_VERSION = 1
"""Version of the weights, raised if the same seed would give others."""

_SPECIAL = ("<pad>", "<eos>", "<bos>")
_N_TOKENS = len(_SPECIAL) + 256
_IDS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "vocab_size": 260, **_IDS,
}  # fmt: skip


def _tiny_gemma3() -> PretrainedConfig:
    kinds = ["sliding_attention", "full_attention"] * 2
    return Gemma3TextConfig(
        num_hidden_layers=4, layer_types=kinds, sliding_window=16, head_dim=32, query_pre_attn_scalar=32, **_SMALL
    )


def _llama_8b() -> PretrainedConfig:
    """The dimensions of Llama-3.1-8B."""
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False, **_IDS,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip


SHAPES: Mapping[str, Callable[[], PretrainedConfig]] = {
    "tiny-llama": partial(LlamaConfig, num_hidden_layers=2, tie_word_embeddings=False, **_SMALL),
    "tiny-qwen2": partial(Qwen2Config, num_hidden_layers=2, tie_word_embeddings=False, **_SMALL),
    "tiny-gemma3": _tiny_gemma3,
    "llama-8b": _llama_8b,
}


def tiny_config(shape: str) -> PretrainedConfig:
    """Return the config of a random model.

    Raises:
        InputError: an unknown shape.
    """
    if errors := shape_errors(shape):
        raise InputError(*errors)
    return SHAPES[shape]()


def shape_errors(shape: str) -> list[str]:
    """Return what is wrong with the name of a shape: one message, or none."""
    return [] if shape in SHAPES else [f"model.shape: {shape!r} is not known; {nearest(shape, SHAPES)}"]


def tiny_model(shape: str, seed: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Build a random model without changing the global random state.

    The small models are drawn on the CPU in float32, so that every device and dtype gets the same weights. Of the large
    one only the shape matters; it is drawn on its device in its dtype.
    """
    with _forked(device):
        _seed(device, seed)
        model = _from_config(shape, dtype, device)
    if shape.startswith("tiny-"):
        # copied, not cast: `.to(dtype)` would round buffers that a loaded model keeps in float32, rope's among them
        model.load_state_dict(_drawn(shape, seed))
    return cast(PreTrainedModel, model.eval())  # type: ignore[no-untyped-call]


def _from_config(shape: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            tiny_config(shape), dtype=dtype, attn_implementation="sdpa"
        )
    return model


def _drawn(shape: str, seed: int) -> dict[str, torch.Tensor]:
    """Return the weights of a small model, float32 on the CPU."""
    cpu = torch.device("cpu")
    with _forked(cpu):
        _seed(cpu, seed)
        model = _from_config(shape, torch.float32, cpu)
        _draw(model)
    return model.state_dict()


def _forked(device: torch.device) -> Any:
    """Restore the global random state of the CPU and of the device at the end of the block."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device.index or 0], device_type=device.type)


def _seed(device: torch.device, seed: int) -> None:
    """Seed the CPU and one device; `torch.manual_seed` would seed all devices."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        with torch.accelerator.device_index(device.index or 0):
            torch.get_device_module(device).manual_seed(seed)


def _draw(model: nn.Module) -> None:
    """Draw weights that act like trained ones, with peaked outputs and with biases and norm gains that matter."""
    offset = 0.0 if "Gemma" in type(model).__name__ else 1.0  # Gemma's norms multiply by 1 + weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(offset, 0.1)
            elif name.endswith(".bias"):
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, 0.1)


def tiny_tokenizer(shape: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte; Gemma's adds a BOS, like the real one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    adds_bos = shape == "tiny-gemma3"
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocab["<bos>"])]
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        add_bos_token=adds_bos,
        clean_up_tokenization_spaces=False,
        model_max_length=tiny_config(shape).max_position_embeddings,
    )


@cache
def tiny_fingerprint(shape: str, seed: int) -> str:
    """Return a hex sha256 of config and weights; of the large model, of config and seed."""
    config = tiny_config(shape).to_dict()
    config.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps([_VERSION, config, shape, seed], sort_keys=True, default=str).encode())
    if shape.startswith("tiny-"):
        for name, tensor in _drawn(shape, seed).items():
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
