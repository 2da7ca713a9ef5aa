"""The prune joined to norms and products: the same bits as without, and left out wherever something else is met."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from nmsweep.models import ModelSpec, load_model
from nmsweep.sparsity import fusion
from nmsweep.sparsity.api import sparsify
from nmsweep.sparsity.install import SparseModel

IDS = torch.arange(90).reshape(3, 30) % 250
METHODS = {
    "act": {},
    "act, 50%": {"pattern": "50%"},
    "wina": {"criterion": "wina"},
    "shift+var": {"mitigation": "shift+var"},
    "var": {"mitigation": "var"},
    "prefill": {"scope": "prefill"},
    "skip_first": {"scope": "skip_first:3"},
    "clact_causal": {"criterion": "clact_causal"},
    "attn": {"targets": "attn"},
    "no v": {"targets": "all+!*.v_proj"},
}


def tiny(shape: str, dtype: str = "bfloat16") -> Any:
    return load_model(ModelSpec(name="t", source="tiny", shape=shape), dtype=dtype, device="cpu").model


def outputs(model: Any, sparse: SparseModel, joins: bool) -> tuple[Tensor, list[tuple[int, int]]]:
    """Logits of a prompt and of a token after it; the channels counted."""
    sparse.view.joins = joins
    sparse.reset_counts()
    first = model(IDS, use_cache=True)
    second = model(IDS[:, :1], past_key_values=first.past_key_values)
    return torch.cat([first.logits, second.logits], 1), [(layer.kept, layer.channels) for layer in sparse.counts()]


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen2", "tiny-gemma3"])
@pytest.mark.parametrize("name", METHODS)
def test_joined_gives_the_same_bits_and_counts(name: str, shape: str) -> None:
    model = tiny(shape)
    with sparsify(model, **{"pattern": "8:16", **METHODS[name]}) as sparse, torch.inference_mode():
        logits, counts = outputs(model, sparse, joins=True)
        expected, expected_counts = outputs(model, sparse, joins=False)
    assert torch.equal(logits, expected)
    assert counts == expected_counts


@pytest.mark.parametrize(
    ("name", "a_block"), [("act", 3), ("shift+var", 3), ("wina", 1), ("clact_causal", 0), ("attn", 1), ("no v", 2)]
)
def test_what_is_joined(name: str, a_block: int) -> None:
    model = tiny("tiny-llama", "float32")
    with sparsify(model, **{"pattern": "8:16", **METHODS[name]}) as sparse:
        assert len(sparse.joined) == a_block * len(model.model.layers)
        assert all("forward" in module.__dict__ for module in sparse.joined)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_gradients_do_not_go_through_what_is_joined() -> None:
    model = tiny("tiny-llama", "float32")
    with sparsify(model, pattern="2:4") as sparse:
        grads = []
        for joins in (True, False):
            sparse.view.joins = joins
            model.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            grads.append(model.model.layers[0].input_layernorm.weight.grad.clone())
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0


class _OtherNorm(torch.nn.Module):
    """A norm that has the attributes of Llama's and computes something else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(width))
        self.variance_epsilon = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(-1, keepdim=True))


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    model = tiny("tiny-llama", "float32")
    for block in model.model.layers:
        block.input_layernorm = _OtherNorm(64)
    with sparsify(model, pattern="8:16") as sparse, torch.inference_mode():
        assert len(sparse.joined) == 2 * len(model.model.layers)
        assert torch.equal(outputs(model, sparse, True)[0], outputs(model, sparse, False)[0])


def test_an_mlp_that_computes_something_else_is_left_alone() -> None:
    model = tiny("tiny-llama", "float32")

    class OtherMLP(type(model.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    for block in model.model.layers:
        block.mlp.__class__ = OtherMLP
    with sparsify(model, pattern="8:16") as sparse, torch.inference_mode():
        assert not any(module in sparse.joined for module in (block.mlp for block in model.model.layers))
        assert torch.equal(outputs(model, sparse, True)[0], outputs(model, sparse, False)[0])


def test_a_forward_that_somebody_else_put_in_stays() -> None:
    model = tiny("tiny-llama", "float32")
    norm = model.model.layers[0].input_layernorm
    dense = norm.forward
    norm.forward = lambda x: 2 * dense(x)
    theirs = norm.forward
    with sparsify(model, pattern="8:16") as sparse, torch.inference_mode():
        assert norm not in sparse.joined
        assert torch.equal(outputs(model, sparse, True)[0], outputs(model, sparse, False)[0])
    assert norm.forward is theirs


def test_models_of_unknown_wiring_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "_KNOWN", frozenset())
    with sparsify(tiny("tiny-llama"), pattern="8:16") as sparse:
        assert not sparse.joined


def test_the_model_is_itself_again_after_an_error() -> None:
    model = tiny("tiny-llama")
    with torch.inference_mode():
        before = model(IDS).logits
    with pytest.raises(RuntimeError, match="stop"), sparsify(model, pattern="8:16"):
        raise RuntimeError("stop")
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, before)


def hooked(model: Any, where: str) -> Any:
    """Register a hook that doubles what it is shown."""
    block = model.model.layers[0]
    if where == "norm":
        return block.input_layernorm.register_forward_hook(lambda module, args, out: 2 * out)
    if where == "attention":
        double = {"hidden_states": 2}
        return block.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                {k: double.get(k, 1) * v if k in double else v for k, v in kwargs.items()},
            ),
            with_kwargs=True,
        )
    layer = block.mlp.down_proj if where == "down" else block.self_attn.k_proj
    return layer.register_forward_pre_hook(lambda module, args: (2 * args[0] + 0.5,))


@pytest.mark.parametrize("before", [True, False], ids=["hooked dense", "hooked sparse"])
@pytest.mark.parametrize("where", ["norm", "attention", "down", "k"])
def test_hooks_are_shown_the_dense_tensor_and_what_they_make_is_pruned(where: str, before: bool) -> None:
    model = tiny("tiny-llama", "float32")
    handle = hooked(model, where) if before else None
    with sparsify(model, pattern="2:4") as sparse, torch.inference_mode():
        handle = handle or hooked(model, where)
        found = outputs(model, sparse, True)
        expected = outputs(model, sparse, False)
        assert torch.equal(found[0], expected[0])
        assert found[1] == expected[1]
        handle.remove()
        assert not torch.equal(outputs(model, sparse, True)[0], expected[0])


def test_a_hook_of_a_target_layer_runs_and_stays() -> None:
    model = tiny("tiny-llama", "float32")
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_hook(lambda module, args, out: 3 * out)
    with torch.inference_mode():
        dense = model(IDS).logits
        with sparsify(model, pattern="4:4"):
            assert torch.equal(model(IDS).logits, dense)
        assert torch.equal(model(IDS).logits, dense)
        handle.remove()
        assert not torch.equal(model(IDS).logits, dense)


def test_norms_in_another_dtype_than_their_input_are_not_joined() -> None:
    model = tiny("tiny-llama")
    for block in model.model.layers:
        block.input_layernorm.float()
        block.post_attention_layernorm.float()
    with sparsify(model, pattern="2:4") as sparse, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs(model, sparse, True)[0], outputs(model, sparse, False)[0])


def test_another_forward_of_the_same_class_is_tried_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("tiny-llama", "float32")
    norms = type(model.model.layers[0].input_layernorm)
    with sparsify(model, pattern="2:4") as sparse:
        assert model.model.layers[0].input_layernorm in sparse.joined
    dense = norms.forward
    monkeypatch.setattr(norms, "forward", lambda self, x: 2 * dense(self, x))
    with sparsify(model, pattern="2:4") as sparse, torch.inference_mode():
        assert model.model.layers[0].input_layernorm not in sparse.joined
        assert torch.equal(outputs(model, sparse, True)[0], outputs(model, sparse, False)[0])


def test_a_copy_of_a_sparse_model_computes_with_its_own_weights() -> None:
    model = tiny("tiny-llama", "float32")
    with sparsify(model, pattern="2:4", scope="skip_first:3"), torch.inference_mode():
        expected = model(IDS).logits
        copy = deepcopy(model)
        assert torch.equal(copy(IDS).logits, expected)
        for block in copy.model.layers:
            block.input_layernorm.weight.zero_()
        assert not torch.equal(copy(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected)


def test_nothing_of_a_pass_that_ended_early_is_kept() -> None:
    model = tiny("tiny-llama", "float32")
    handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(_stop)
    with sparsify(model, pattern="2:4") as sparse, torch.inference_mode():
        with pytest.raises(RuntimeError, match="stop"):
            model(IDS)
        assert all(layer.shared._pruned is None for layer in sparse.layers.values())
    handle.remove()


def _stop(*_: Any) -> None:
    raise RuntimeError("stop")


def test_an_input_that_was_written_to_is_pruned_again() -> None:
    model = tiny("tiny-llama", "float32")
    with sparsify(model, pattern="2:4"), torch.no_grad():
        q_proj = model.model.layers[0].self_attn.q_proj
        x = torch.randn(1, 5, 64)
        first = q_proj(x)
        x.mul_(2)
        torch.testing.assert_close(q_proj(x), 2 * first)
