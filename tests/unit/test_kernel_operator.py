"""The primitive as a part of torch: gradients, inference mode, torch.compile, and inside a model."""

import pytest
import torch
from torch import Tensor

from nmsweep.kernels import prune, prune_with_mask
from nmsweep.kernels.norms import channel_squares
from nmsweep.models import ModelSpec, load_model
from nmsweep.sparsity.api import sparsify


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def formula(x: Tensor, mask: Tensor, eta: Tensor, nu: Tensor) -> Tensor:
    """u of METHODS.md §1 in differentiable words, mask and ν constants."""
    return torch.where(mask, x + (nu - 1) * (x - eta), eta)


@pytest.mark.parametrize("var", [False, True])
@pytest.mark.parametrize("shape", [(), (32,)])
def test_gradients_are_those_of_the_formula_with_constant_mask(shape: tuple[int, ...], var: bool) -> None:
    x, eta = draw(3, 5, 32).requires_grad_(), (0.3 * draw(*shape)).requires_grad_()
    pull = draw(3, 5, 32).flip(0)
    u, mask = prune_with_mask(x, n=2, m=4, eta=eta, var=var)
    (u * pull).sum().backward()
    with torch.no_grad():
        z = (x - eta).double()
        kept = torch.where(mask, z, 0.0)
        nu = (z.var(-1, keepdim=True) / kept.var(-1, keepdim=True)).sqrt() if var else torch.ones(())
    x2, eta2 = x.detach().clone().requires_grad_(), eta.detach().clone().requires_grad_()
    (formula(x2, mask, eta2, nu) * pull).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(eta.grad, eta2.grad, rtol=1e-6, atol=1e-6)


def test_inference_mode_and_training_give_the_same() -> None:
    x = draw(2, 7, 64, dtype=torch.bfloat16)
    trained = prune(x.clone().requires_grad_(), n=8, m=16, eta="median", var=True)
    with torch.inference_mode():
        assert torch.equal(prune(x, n=8, m=16, eta="median", var=True), trained)


def test_the_input_is_never_written() -> None:
    x = draw(2, 64, dtype=torch.bfloat16)
    before = x.clone()
    prune(x, n=2, m=4, eta="mean", var=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize("mitigation", ["none", "shift+var"])
def test_a_compiled_model_gives_the_same(mitigation: str) -> None:
    model = load_model(ModelSpec(name="t", source="tiny", shape="tiny-llama"), dtype="float32", device="cpu").model
    ids = torch.arange(24).reshape(2, 12)
    with sparsify(model, pattern="2:4", mitigation=mitigation) as sparse, torch.no_grad():
        expected = model(ids).logits
        counted = [(layer.kept, layer.channels) for layer in sparse.counts()]
        sparse.reset_counts()
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(ids).logits, expected)
        assert [(layer.kept, layer.channels) for layer in sparse.counts()] == counted
    torch.compiler.reset()


def test_squares_of_channels_leave_padding_out() -> None:
    x = draw(2, 300, 24, dtype=torch.bfloat16)
    padding = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)) < 0.3
    expected = x.double().square().masked_fill(padding[..., None], 0.0).sum(1, keepdim=True)
    torch.testing.assert_close(channel_squares(x, padding), expected)
