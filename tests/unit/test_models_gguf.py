"""GGUF files, written here as llama.cpp writes them, and read back."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nmsweep.errors import ModelError
from nmsweep.models import (
    LoadedModel,
    ModelSpec,
    check_model,
    fingerprint,
    load_model,
    local_folder,
    model_config,
    skeleton,
)
from nmsweep.models.tiny import tiny_config


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NMSWEEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def spec(path: Path) -> ModelSpec:
    return ModelSpec.from_node({"name": "smollm2", "source": "wheel", "path": str(path)})


def tiny(shape: str) -> LoadedModel:
    return load_model(ModelSpec(shape, "tiny", shape=shape), dtype="float32", device="cpu")


def permuted(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Permute the rows of Llama's q and k as llama.cpp does."""
    return weight.reshape(n_heads, 2, len(weight) // n_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    file: Path, loaded: LoadedModel, architecture: str, rope_freqs: np.ndarray | None = None, **tokenizer: Any
) -> Path:
    config: Any = loaded.model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    tokens = sorted(loaded.tokenizer.get_vocab(), key=loaded.tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokens, "Ġt"])
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["Ġ t"] * 2)  # transformers 5.17 cannot read a list of one
    for key, value in tokenizer.items():
        getattr(writer, key)(value)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    for name, tensor in loaded.model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        weight = tensor.numpy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            weight = permuted(
                weight, config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            )
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(weight))
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def llama_file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "llama.gguf", tiny("tiny-llama"), "llama")


@pytest.mark.parametrize(("shape", "architecture"), [("tiny-llama", "llama"), ("tiny-qwen2", "qwen2")])
def test_a_gguf_gives_the_logits_of_the_model_it_was_made_of(shape: str, architecture: str, tmp_path: Path) -> None:
    original = tiny(shape)
    file = write_gguf(tmp_path / "model.gguf", original, architecture)
    assert check_model(spec(file)) == []
    loaded = load_model(spec(file), dtype="float32", device="cpu")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, original.model(ids).logits)
    assert loaded.model.config.rms_norm_eps == 1e-6
    assert loaded.tokenizer.decode(loaded.tokenizer("one, two").input_ids) == "one, two"
    assert spec(file).name == "model.gguf"
    assert loaded.fingerprint == fingerprint(spec(file))


def test_a_folder_with_one_gguf_is_that_gguf(llama_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    moved = llama_file.rename(folder / "a.gguf")
    assert fingerprint(spec(folder)) == fingerprint(spec(moved))
    (folder / "b.gguf").write_bytes(b"GGUF")
    assert "2 GGUF files" in check_model(spec(folder))[0]


def test_it_is_converted_once_and_the_config_needs_no_conversion(
    llama_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model_config(spec(llama_file)).num_hidden_layers == 2
    assert sum(1 for _ in skeleton(spec(llama_file)).parameters()) > 0
    said: list[str] = []
    folder = local_folder(spec(llama_file), say=said.append)
    assert len(said) == 1
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert not list(folder.parent.glob(".*"))
    monkeypatch.setattr("nmsweep.models.gguf.convert_gguf", lambda *args: pytest.fail("converted again"))
    assert local_folder(spec(llama_file), say=said.append) == folder
    assert len(said) == 1


def test_long_context_rope_of_llama_31_survives(tmp_path: Path) -> None:
    want = tiny_config("llama-8b")
    want.rope_parameters = {**want.rope_parameters, "rope_theta": 10000.0}
    want.hidden_size, want.num_attention_heads, want.head_dim = 64, 4, 16
    inv_freq, _ = ROPE_INIT_FUNCTIONS["llama3"](want, torch.device("cpu"))
    plain = 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    file = write_gguf(tmp_path / "m.gguf", tiny("tiny-llama"), "llama", (plain / inv_freq.double()).numpy())
    got = model_config(spec(file)).rope_parameters
    assert got == want.rope_parameters
    assert load_model(spec(file), dtype="float32", device="cpu").model.config.rope_parameters == got


@pytest.mark.parametrize(
    ("said", "bos"),
    [({}, []), ({"add_add_bos_token": True}, [2]), ({"add_tokenizer_pre": "llama-bpe"}, [2])],
)
def test_a_bos_is_added_where_llama_cpp_adds_one(said: dict[str, Any], bos: list[int], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", tiny("tiny-llama"), "llama", **said)
    tokenizer = load_model(spec(file), dtype="float32", device="cpu").tokenizer
    plain = tokenizer("some text", add_special_tokens=False).input_ids
    assert tokenizer("some text").input_ids == bos + plain


def test_a_tokenizer_that_transformers_reads_wrongly_is_refused(
    llama_file: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr("nmsweep.models.gguf.adds_bos", lambda tokenizer: True)
    with pytest.raises(ModelError, match="take transformers"):
        load_model(spec(llama_file), dtype="float32", device="cpu")
    assert list((cache / "models").iterdir()) == []


def test_rope_factors_that_are_not_llamas_are_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", tiny("tiny-llama"), "llama", np.linspace(1, 3, 8))
    with pytest.raises(ModelError, match="rope_freqs"):
        model_config(spec(file))


@pytest.mark.parametrize("kept", [0, 3, 4, 20, 1000, -40_000])
def test_a_file_cut_short_is_one_message_before_anything_else(llama_file: Path, kept: int, cache: Path) -> None:
    llama_file.write_bytes(llama_file.read_bytes()[:kept])
    messages = check_model(spec(llama_file))
    assert len(messages) == 1
    assert str(llama_file) in messages[0]
    assert "\n" not in messages[0]
    with pytest.raises(ModelError):
        load_model(spec(llama_file), dtype="float32", device="cpu")
    with pytest.raises(ModelError):
        fingerprint(spec(llama_file))
    assert not cache.exists()


def test_a_file_that_is_no_gguf_says_how_it_begins(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    assert "PK" in check_model(spec(tmp_path / "x.gguf"))[0]


def test_garbage_after_the_magic_is_one_message(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + rng.bytes(500))
    assert len(check_model(spec(tmp_path / "x.gguf"))) == 1


def test_an_architecture_that_is_not_supported_names_those_that_are(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "qwen2" in check_model(spec(tmp_path / "x.gguf"))[0]
