"""The prune joined to norms and products: the same bits as without, and left out wherever something else is met."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nmsweep.models import ModelSpec, load_model
from nmsweep.sparsity import fusion
from nmsweep.sparsity.api import sparsify
from nmsweep.sparsity.install import Installed

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


def outputs(model: Any, sparse: Installed, joins: bool) -> tuple[Tensor, list[tuple[int, int]]]:
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
