"""Target layers by preset and glob."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nmsweep.errors import InputError
from nmsweep.models import ModelSpec, input_groups, linear_flops, load_model, skeleton, target_linears

TINY = ("tiny-llama", "tiny-qwen2", "tiny-gemma3")
BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def spec(shape: str) -> ModelSpec:
    return ModelSpec(name=shape, source="tiny", shape=shape)


def leaves(model: nn.Module, targets: Any) -> set[str]:
    return {name.rpartition(".")[2] for name in target_linears(model, targets)}


def small_multimodal() -> nn.Module:
    """A multimodal Gemma 3 like the hub's 4B: a text model and a vision tower of two blocks each."""
    text = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300}
    vision = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("shape", TINY)
def test_all_is_every_blocks_seven_layers_in_execution_order(shape: str) -> None:
    model = skeleton(spec(shape))
    names = list(target_linears(model, "all"))
    n_blocks = model.config.num_hidden_layers
    assert [name.rpartition(".")[2] for name in names] == list(BLOCK) * n_blocks
    assert [int(name.split(".")[2]) for name in names] == [block for block in range(n_blocks) for _ in BLOCK]


@pytest.mark.parametrize("shape", TINY)
def test_layers_are_listed_in_execution_order(shape: str) -> None:
    model = load_model(spec(shape), dtype="float32", device="cpu").model
    seen: list[str] = []
    for name, linear in target_linears(model, "all").items():
        linear.register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    with torch.no_grad():
        model(torch.arange(5)[None])
    assert seen == list(target_linears(model, "all"))


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("targets", ["all", "mlp", "attn", "paper", "amber", "*.mlp.*"])
def test_a_skeleton_has_the_targets_of_the_real_model(shape: str, targets: str) -> None:
    real = load_model(spec(shape), dtype="float32", device="cpu").model
    wanted = {name: (linear.in_features, linear.out_features) for name, linear in target_linears(real, targets).items()}
    bare = target_linears(skeleton(spec(shape)), targets)
    assert {name: (linear.in_features, linear.out_features) for name, linear in bare.items()} == wanted
    assert all(linear.weight.is_meta for linear in bare.values())


@pytest.mark.parametrize("shape", TINY)
def test_presets_name_the_layers_that_they_say(shape: str) -> None:
    model = skeleton(spec(shape))
    assert leaves(model, "mlp") == {"gate_proj", "up_proj", "down_proj"}
    assert leaves(model, "attn") == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert leaves(model, "amber") == {"q_proj", "gate_proj", "down_proj"}
    paper = {"o_proj", "gate_proj", "up_proj", "down_proj"} if "qwen2" in shape else set(BLOCK)
    assert leaves(model, "paper") == paper


def test_globs_match_the_path_its_end_and_the_last_component_and_can_exclude() -> None:
    model = skeleton(spec("tiny-llama"))
    assert leaves(model, "down_proj") == {"down_proj"}
    assert leaves(model, ["*.mlp.*", "q_proj"]) == {"gate_proj", "up_proj", "down_proj", "q_proj"}
    assert leaves(model, "attn+down_proj") == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    first = target_linears(model, "model.layers.[0-0].*")
    assert list(first) == list(target_linears(model, "layers.0.*"))
    assert len(first) == 7
    sensitive = list(target_linears(model, "amber+!layers.1.self_attn.q_proj"))
    assert "model.layers.1.self_attn.q_proj" not in sensitive
    assert "model.layers.0.self_attn.q_proj" in sensitive


@pytest.mark.parametrize("target", ["downproj", "*.experts.*", "lm_head", "all+!nothing"])
def test_unmatched_target_names_what_exists(target: str) -> None:
    with pytest.raises(InputError) as caught:
        target_linears(skeleton(spec("tiny-llama")), target)
    assert "model.layers.N.mlp.down_proj" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_unmatched_target_has_its_message() -> None:
    with pytest.raises(InputError) as caught:
        target_linears(skeleton(spec("tiny-llama")), ["nope", "mlp", "neither"])
    assert len(caught.value.messages) == 2


def test_excluding_everything_is_an_error() -> None:
    with pytest.raises(InputError, match="leaves no layer"):
        target_linears(skeleton(spec("tiny-llama")), "mlp+!*.mlp.*")


def test_the_vision_tower_of_a_multimodal_model_is_never_a_target() -> None:
    model = small_multimodal()
    vision = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "vision" in name]
    assert vision, "the control: this model has linear layers in its vision tower"
    names = list(target_linears(model, "all"))
    assert len(names) == 14
    assert all("language_model.layers" in name for name in names)
    assert not set(vision) & set(linear_flops(model))
    with pytest.raises(InputError):
        target_linears(model, "*vision*")


def test_a_preset_that_would_miss_fused_layers_is_refused() -> None:
    config = AutoConfig.for_model(
        "phi3",
        num_hidden_layers=1,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        vocab_size=300,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="qkv_proj"):
        target_linears(model, "all")
    assert leaves(model, "*.qkv_proj") == {"qkv_proj"}


def test_a_model_without_a_text_decoder_is_refused() -> None:
    with pytest.raises(InputError, match="no text decoder"):
        target_linears(nn.Sequential(nn.Linear(2, 2)), "all")


def test_a_replaced_layer_is_selected_in_its_place() -> None:
    class StandIn(nn.Module):
        def __init__(self, dense: nn.Linear) -> None:
            super().__init__()
            self.dense, self.in_features, self.out_features = dense, dense.in_features, dense.out_features

    model: Any = load_model(spec("tiny-llama"), dtype="float32", device="cpu").model
    before = list(target_linears(model, "all"))
    mlp = model.model.layers[0].mlp
    mlp.down_proj = StandIn(mlp.down_proj)
    assert list(target_linears(model, "all")) == before


@pytest.mark.parametrize("shape", TINY)
def test_linear_flops_are_all_linear_layers_and_lm_head_once(shape: str) -> None:
    model = skeleton(spec(shape))
    expected = {
        name: module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert linear_flops(model) == expected
    assert "lm_head" in expected


def test_layers_that_read_one_tensor_form_a_group() -> None:
    model: Any = load_model(spec("tiny-qwen2"), dtype="float32", device="cpu").model
    linears = target_linears(model, "all")
    seen: dict[str, int] = {}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, id(args[0])))
    with torch.no_grad():
        model(torch.arange(5)[None])
    groups = input_groups(model, list(linears))
    assert [len(group) for group in groups] == [3, 1, 2, 1] * 2
    assert all(len({seen[name] for name in group}) == 1 for group in groups)
    assert [name for group in groups for name in group] == list(linears)
