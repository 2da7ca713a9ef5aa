"""Which tokens are pruned: in whole sequences, with padding, and while text is generated; on the three families."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nmsweep.calibration import fit
from nmsweep.models import ModelSpec, load_model
from nmsweep.sparsity.api import assemble, sparsify
from nmsweep.sparsity.install import install

FAMILIES = ("tiny-llama", "tiny-qwen2", "tiny-gemma3")


def model_of(family: str) -> Any:
    return load_model(ModelSpec(name=family, source="tiny", shape=family), dtype="float64", device="cpu").model


def text(n: int, seqlen: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 259, (n, seqlen), generator=torch.Generator().manual_seed(seed))


def stepwise(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Logits of every token, the prompt in one pass and the rest one by one from the cache."""
    out = model(ids[:, :prompt], use_cache=True)
    found, cache = [out.logits], out.past_key_values
    for place in range(prompt, ids.shape[1]):
        out = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_first_tokens_stay_dense(family: str) -> None:
    model, ids = model_of(family), text(2, 12)
    dense = model(ids).logits
    for scope, first in (("skip_first:4", 4), ("skip_first:50%", 6), ("skip_first:30%", 3)):
        with sparsify(model, pattern="1:4", scope=scope) as sparse:
            found, counts = model(ids).logits, sparse.counts()
        torch.testing.assert_close(found[:, :first], dense[:, :first], rtol=0, atol=1e-12)
        assert ((found[:, first:] - dense[:, first:]).abs().amax(-1) > 1e-6).all()
        for layer in counts:
            assert layer.kept * 24 == layer.channels * (2 * first + (24 - 2 * first) / 4)


@pytest.mark.parametrize("scope", ["skip_first:3", "skip_first:50%"])
@torch.no_grad()
def test_padding_takes_no_place(scope: str) -> None:
    model, ids = model_of("tiny-llama"), text(1, 8)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = torch.arange(13)[None] >= 5
    place = (mask.long().cumsum(1) - 1).clamp(min=0)
    with sparsify(model, pattern="1:4", scope=scope):
        alone = model(ids).logits
        for position in (place, None):
            found = model(padded, attention_mask=mask.long(), position_ids=position).logits[:, 5:]
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-9 if position is not None else 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mitigation", ["shift+var", "rsparse+bias_static"])
@torch.no_grad()
def test_prefill_and_decode_are_the_two_halves(family: str, mitigation: str) -> None:
    model, ids = model_of(family), text(1, 12)
    made, targets = assemble("1:4", "act", mitigation, "all", {"rsparse": {"rank": 4}})
    state = fit(model, text(2, 12, 1), made).state if made.calibrated else {}
    dense = stepwise(model, ids, 7)
    with install(model, made, targets, state, "all"):
        both = stepwise(model, ids, 7)
    with install(model, made, targets, state, "decode"):
        decode = stepwise(model, ids, 7)
    with install(model, made, targets, state, "prefill") as sparse:
        prompt = model(ids[:, :7], use_cache=True)
        with sparse.view.as_dense():
            after = model(ids[:, 7:8], past_key_values=prompt.past_key_values, use_cache=True).logits
        prefill = stepwise(model, ids, 7)
    torch.testing.assert_close(prefill[:, :7], both[:, :7], rtol=0, atol=1e-12)
    torch.testing.assert_close(prefill[:, 7:8], after, rtol=0, atol=1e-9)
    torch.testing.assert_close(decode[:, :7], dense[:, :7], rtol=0, atol=1e-12)
    assert not torch.allclose(decode[:, 7:], dense[:, 7:], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_causal_criterion_is_the_same_step_by_step(family: str) -> None:
    model, ids = model_of(family), text(2, 12)
    with sparsify(model, pattern="1:4", criterion="clact_causal"):
        torch.testing.assert_close(stepwise(model, ids, 5), model(ids).logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(stepwise(model, ids, 3), model(ids).logits, rtol=0, atol=1e-9)


@torch.no_grad()
def test_clact_prunes_a_prompt_that_is_then_gone_on_with_densely() -> None:
    model, ids = model_of("tiny-llama"), text(1, 9)
    with sparsify(model, pattern="1:4", criterion="clact", scope="prefill"):
        found = stepwise(model, ids, 5)
        torch.testing.assert_close(found[:, :5], model(ids[:, :5]).logits, rtol=0, atol=1e-12)
        model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)


@torch.no_grad()
def test_statistics_are_of_the_tokens_in_scope() -> None:
    model, ids = model_of("tiny-qwen2"), text(2, 12)
    made, _ = assemble("2:4", "rms", "none", "all", {})
    inputs: list[Tensor] = []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(ids)
    hook.remove()
    state = fit(model, ids, made, scope="skip_first:5").state["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(state["rms"], inputs[0][:, 5:].square().mean(dim=(0, 1)).sqrt())
