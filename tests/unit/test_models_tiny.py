"""Models with random weights."""

from pathlib import Path

import pytest
import torch

from nmsweep.errors import InputError
from nmsweep.models import ModelSpec, check_model, fingerprint, load_model, model_config, skeleton, target_linears

TINY = ("tiny-llama", "tiny-qwen2", "tiny-gemma3")


def spec(shape: str, seed: int = 0) -> ModelSpec:
    return ModelSpec(name=shape, source="tiny", shape=shape, seed=seed)


@pytest.mark.parametrize("shape", TINY)
def test_the_global_random_state_is_left_alone(shape: str) -> None:
    before = torch.random.get_rng_state()
    load_model(spec(shape, seed=5), dtype="float32", device="cpu")
    fingerprint(spec(shape, seed=6))
    skeleton(spec(shape))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("shape", TINY)
def test_a_seed_gives_the_same_weights_whatever_was_drawn_before(shape: str) -> None:
    first = load_model(spec(shape), dtype="float64", device="cpu")
    torch.randn(3)
    again = load_model(spec(shape), dtype="float64", device="cpu")
    other = load_model(spec(shape, seed=1), dtype="float64", device="cpu")
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    assert first.fingerprint == again.fingerprint == fingerprint(spec(shape))
    assert other.fingerprint != first.fingerprint
    assert first.model.dtype == torch.float64


@pytest.mark.parametrize("shape", TINY)
def test_it_equals_the_same_model_loaded_from_a_folder_in_bfloat16(shape: str, tmp_path: Path) -> None:
    built = load_model(spec(shape), dtype="bfloat16", device="cpu")
    built.model.save_pretrained(tmp_path)
    built.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(ModelSpec(shape, "path", path=str(tmp_path)), dtype="bfloat16", device="cpu")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(built.model(ids).logits, loaded.model(ids).logits)


@pytest.mark.parametrize("shape", TINY)
def test_every_input_width_is_a_multiple_of_32(shape: str) -> None:
    assert all(linear.in_features % 32 == 0 for linear in target_linears(skeleton(spec(shape)), "all").values())


@pytest.mark.parametrize("shape", TINY)
def test_outputs_depend_on_the_input(shape: str) -> None:
    loaded = load_model(spec(shape), dtype="float32", device="cpu")
    assert not loaded.model.training
    with torch.no_grad():
        logits = loaded.model(torch.tensor([loaded.tokenizer("Some text.").input_ids])).logits[0]
    assert logits.std() > 0.3
    assert (logits[-1] - logits[-2]).abs().max() > 0.3


def test_qwen2_has_biases_that_matter_and_gemma3_both_kinds_of_attention() -> None:
    qwen = load_model(spec("tiny-qwen2"), dtype="float32", device="cpu").model
    biases = [linear.bias for linear in target_linears(qwen, "q_proj+k_proj+v_proj").values()]
    assert all(bias is not None and bias.std() > 0.2 for bias in biases)
    kinds = model_config(spec("tiny-gemma3")).layer_types
    assert set(kinds) == {"sliding_attention", "full_attention"}
    gemma = load_model(spec("tiny-gemma3"), dtype="float32", device="cpu").model
    norms = [tensor for name, tensor in gemma.state_dict().items() if name.endswith("norm.weight")]
    assert all(norm.abs().mean() < 0.5 for norm in norms), "Gemma's norms multiply by 1 + weight"


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("text", ["plain", " leading and  double spaces\n\n\tand tabs", "naïve – 数学 🙂"])
def test_the_tokenizer_has_one_token_per_byte_and_loses_nothing(shape: str, text: str) -> None:
    tokenizer = load_model(spec(shape), dtype="float32", device="cpu").tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) <= model_config(spec(shape)).vocab_size
    assert tokenizer(text).input_ids == ([tokenizer.bos_token_id] if "gemma" in shape else []) + ids


def test_an_unknown_shape_is_one_message() -> None:
    messages = check_model(spec("tiny-lama"))
    assert len(messages) == 1
    assert "tiny-llama" in messages[0]


@pytest.mark.parametrize(("dtype", "device"), [("int8", "cpu"), ("float32", "abacus"), ("float32", "hpu")])
def test_a_dtype_or_device_that_does_not_exist_names_what_does(dtype: str, device: str) -> None:
    with pytest.raises(InputError, match="allowed"):
        load_model(spec("tiny-llama"), dtype=dtype, device=device)


def test_the_large_shape_is_llama_8bs() -> None:
    model = skeleton(spec("llama-8b"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248
    assert len(fingerprint(spec("llama-8b"))) == 64
