"""Eleven defects of the code of arXiv:2509.22166; each has a test here that fails if it comes back.

That a vision tower is left alone (10) is tested in tests/unit/test_models_targets.py.
"""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmsweep.calibration import fit
from nmsweep.calibration.text import check_disjoint, find_source
from nmsweep.config.catalogue import options
from nmsweep.data.tasks import TaskSource
from nmsweep.errors import DataError, InputError
from nmsweep.evaluate.perplexity import perplexity
from nmsweep.methods.base import Layer, Tokens
from nmsweep.methods.sparsification import Sparsification
from nmsweep.models import ModelSpec, load_model
from nmsweep.sparsity.api import assemble, sparsify
from nmsweep.sparsity.formula import pruned
from nmsweep.sparsity.install import install

CRITERIA, MITIGATIONS = tuple(options("criterion")), tuple(options("mitigations"))
WEIGHTS = ("wt", "wanda", "sparsegpt")


def qwen(dtype: str = "float32") -> Any:
    return load_model(ModelSpec(name="tiny-qwen2", source="tiny", shape="tiny-qwen2"), dtype=dtype, device="cpu").model


def text(n: int = 2, seqlen: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, 259, (n, seqlen), generator=torch.Generator().manual_seed(seed))


def logits(pattern: str, criterion: str = "act", mitigation: str = "none") -> tuple[Tensor, list[Any]]:
    model = qwen()
    made, targets = assemble(pattern, criterion, mitigation, "all", {})
    state = fit(model, text(4, seed=1), made).state if made.calibrated else {}
    with torch.no_grad(), install(model, made, targets, state) as sparse:
        return model(text()).logits, sparse.counts()


def mask_of(made: Sparsification, x: Tensor, linear: nn.Linear) -> Tensor:
    slots = made.slots(Layer("a.b", linear), {})
    return pruned(x, slots, made.pattern, Tokens(), {})[1]


def test_1_a_replaced_layer_keeps_its_bias() -> None:
    model, ids = qwen(), text()
    with torch.no_grad():
        dense = model(ids).logits
        with sparsify(model, pattern="4:4", targets="*.q_proj+*.k_proj+*.v_proj"):
            assert torch.equal(model(ids).logits, dense)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
        assert not torch.allclose(model(ids).logits, dense, atol=1e-2), "control: these biases matter"


def test_2_a_name_runs_the_method_of_that_name_and_no_other() -> None:
    for group in ("criterion", "mitigations"):
        for name, option in options(group).items():
            assert option.node["_target_"].split(".")[-2] == name
            assert option.node.get("name", name) == name
    found = {name: logits("1:4", name)[0] for name in CRITERIA}
    assert not [(a, b) for a, b in combinations(found, 2) if torch.equal(found[a], found[b])]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_3_n_is_the_number_kept_by_every_criterion(criterion: str) -> None:
    for pattern, share in (("1:4", 0.25), ("3:4", 0.75)):
        for layer in logits(pattern, criterion)[1]:
            assert layer.kept == share * layer.channels


@pytest.mark.parametrize("criterion", ["clact", "clact_causal", "rms", "scale"])
def test_4_a_sentences_mask_is_its_own(criterion: str) -> None:
    model = qwen("float64")
    made, targets = assemble("2:4", criterion, "none", "all", {})
    state = fit(model, text(4, seed=1), made).state if made.calibrated else {}
    with torch.no_grad(), install(model, made, targets, state):
        first, second = (model(torch.cat([text(1), 1 + text(1, seed=seed)])).logits[0] for seed in (2, 3))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-10)


@pytest.mark.parametrize("criterion", ["act", "clact", "amber"])
def test_5_an_unstructured_budget_is_each_tokens(criterion: str) -> None:
    made, _ = assemble("50%", criterion, "none", "all", {})
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 7)[:, None]
    assert (mask_of(made, x, nn.Linear(64, 8)).sum(-1) == 32).all()


def test_6_amber_is_the_same_at_every_pass() -> None:
    made, _ = assemble("2:4", "amber", "none", "all", {})
    x, linear, random = torch.randn(2, 7, 64), nn.Linear(64, 8), torch.get_rng_state()
    assert torch.equal(mask_of(made, x, linear), mask_of(made, x, linear))
    assert torch.equal(torch.get_rng_state(), random)


def test_7_the_evaluated_text_is_never_calibrated_on(tmp_path: Path) -> None:
    prose = find_source("mini", ["mini_prose"], None)
    with pytest.raises(DataError, match="in common"):
        check_disjoint(prose, [TaskSource("mini_prose", "text", {}, None, dict(prose.files), "train")])


@pytest.mark.parametrize("mitigation", ["shift_static", "larosa"])
def test_7_evaluation_changes_no_state(mitigation: str) -> None:
    model = qwen()
    made, targets = assemble("2:4", "act", mitigation, "all", {})
    state = fit(model, text(4, seed=1), made).state
    before = {(layer, name): value.clone() for layer, own in state.items() for name, value in own.items()}
    with torch.no_grad(), install(model, made, targets, state):
        first = model(text()).logits
        model(100 + text(seed=5) % 50)
        assert torch.equal(model(text()).logits, first)
    assert all(torch.equal(state[layer][name], value) for (layer, name), value in before.items())


def test_8_a_small_factor_is_not_rounded_away() -> None:
    model = qwen("bfloat16")
    made, targets = assemble("2:4", "act", "scale_learned", "mlp", {})
    state = {
        name: {"gamma": torch.full((layer.out_features,), 0.0035)}
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    assert (1 + torch.tensor(0.0035)).bfloat16() == 1, "control: 1+γ is 1 in bfloat16"
    with torch.no_grad(), install(model, made, targets, state) as sparse:
        layer = sparse.layers["model.layers.0.mlp.down_proj"]
        x = torch.randn(1, 50, layer.in_features).bfloat16()
        y, plain = layer(x), nn.functional.linear(layer.shared(x).u, layer.weight)
    assert ((y.float() / plain.float()).mean() - 1).abs() > 0.003


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_8_variance_of_small_rows_and_dead_channels_stays_finite(dtype: torch.dtype) -> None:
    x = (torch.randn(1, 6, 64) * 1e-5).to(dtype)
    x[0, 0], x[0, 1], x[..., 3] = 0, 1, 0
    for criterion, state in (("act", {}), ("scale", {"peak": torch.zeros(64)})):
        made, _ = assemble("2:4", criterion, "shift+var", "all", {})
        u, _ = pruned(x, made.slots(Layer("a.b", nn.Linear(64, 8)), state), made.pattern, Tokens(), {})
        assert torch.isfinite(u).all()
    found = fit(qwen(), torch.full((2, 12), 7), assemble("2:4", "scale", "none", "all", {})[0]).state
    assert all(torch.isfinite(value).all() for own in found.values() for value in own.values())


def test_9_the_batch_size_that_is_asked_for_is_used(tmp_path: Path) -> None:
    loaded = load_model(ModelSpec(name="t", source="tiny", shape="tiny-llama"), dtype="float32", device="cpu")
    source, seen = TaskSource("mini_prose", "text", {}, None, {"test": tmp_path / "text"}, "test"), []
    source.files["test"].write_text("abcdefgh" * 16)
    loaded.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for batch_tokens in (16, 64):
        perplexity(
            loaded.model, loaded.tokenizer, source, seqlen=16, limit=None, batch_tokens=batch_tokens, bos=False
        )  # fmt: skip
    assert seen == [1] * 8 + [4] * 2


def test_9_no_two_mitigations_give_the_same_numbers() -> None:
    found = {name: logits("2:4", "act", name)[0] for name in ("none", *MITIGATIONS)}
    assert not [pair for pair in combinations(found, 2) if torch.equal(found[pair[0]], found[pair[1]])]


def test_10_groups_never_straddle_tokens() -> None:
    refused = pytest.raises(InputError, match=r"64 inputs and .* has 128 inputs, not a multiple of 48")
    with refused, sparsify(qwen(), pattern="24:48"):
        pass


@pytest.mark.parametrize("mitigation", ["none", "shift+var", "shift_static", "bias_static", "larosa"])
def test_11_layers_of_one_input_prune_it_once(mitigation: str) -> None:
    model = qwen()
    made, targets = assemble("2:4", "act", mitigation, "all", {})
    state = fit(model, text(4, seed=1), made).state if made.calibrated else {}
    with install(model, made, targets, state) as sparse:
        inputs = {id(layer.shared) for layer in sparse.layers.values()}
    assert len(inputs) == 4 * model.config.num_hidden_layers
