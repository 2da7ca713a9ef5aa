"""Fuse the prune with the operation that makes its input: the last step of a norm, or silu(gate) · up.

The result has the same bits. Where the prune reads the tensor once (no median, mean or ν), the dense tensor is never written.

A norm is fused where every reader of its output is pruned in the same way; the product of an MLP where its down projection is
pruned. For each kind of module, dtype and device, a few tokens are used to test that the fused parts give the module's own
bits. If they do not, or if the model is not one of the known kinds, nothing is fused and each layer prunes its input. The same
holds in passes with hooks on a norm, on its readers or on the module around them: a hook sees the dense tensor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.modules.module as every_module
from torch import Tensor, nn

from nmsweep.kernels.reference import make
from nmsweep.sparsity.linear import SparseLinear
from nmsweep.sparsity.shared_input import SharedInput

Forward = Callable[[Tensor], Tensor]

_READERS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""The norms of a block and all their readers. Blocks with `pre_feedforward_layernorm` use `post_attention_layernorm` otherwise."""

_KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text"})
"""Model types of transformers with this wiring."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Norm(NamedTuple):
    """An RMS norm in parts: `x · scale · gain` as `kernels.prune` takes them."""

    module: Any
    plus_one: bool

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale [*, 1] fp32, computed in the same order as in transformers, and gain [hidden]."""
        module = self.module
        eps = module.eps if self.plus_one else module.variance_epsilon
        scale = torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)
        return scale, 1.0 + module.weight.float() if self.plus_one else module.weight


def joined(model: nn.Module, layers: Mapping[str, SparseLinear]) -> dict[nn.Module, Forward]:
    """Return the norms and MLPs of a sparse model that can be fused with the prune, and the forward to run instead.

    Args:
        model: a causal language model of transformers with sparse layers.
        layers: the sparse layers by module path.
    """
    if _model_type(model) not in _KNOWN:
        return {}
    forwards: dict[nn.Module, Forward] = {}
    for path in dict.fromkeys(name.rsplit(".", 2)[0] for name in layers):
        block = model.get_submodule(path)
        for name, readers in _READERS.items():
            if name == "post_attention_layernorm" and hasattr(block, "pre_feedforward_layernorm"):
                continue
            norm = _norm(getattr(block, name, None))
            shared = _shared([layers.get(f"{path}.{reader}") for reader in readers])
            if norm and shared:
                x = _probe(norm.module.weight.shape[0], norm.module.weight)
                shared.compile_parts(x, *norm.parts(x))
                around = block.get_submodule(readers[0].partition(".")[0])
                watched = [norm.module, around, *(layers[f"{path}.{reader}"] for reader in readers)]
                forwards[norm.module] = partial(_norm_forward, norm, shared, watched)
        shared = _shared([layers.get(f"{path}.mlp.down_proj")])
        mlp = getattr(block, "mlp", None)
        if mlp is not None and shared and _is_product(mlp):
            x = _probe(mlp.down_proj.in_features, mlp.down_proj.weight)
            shared.compile_parts(x, None, x)
            forwards[mlp] = partial(_product_forward, mlp, shared)
    return forwards


@contextmanager
def replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Make the modules run these forwards inside the block."""
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


def _norm_forward(norm: Norm, shared: SharedInput, watched: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Return the norm's pruned output, or the dense one where the layers need it."""
    if x.dtype == norm.module.weight.dtype and shared.fuses(x) and not _hooked(watched):
        return shared.prune_parts(x, *norm.parts(x))
    y: Tensor = type(norm.module).forward(norm.module, x)
    return y


def _product_forward(mlp: Any, shared: SharedInput, x: Tensor) -> Tensor:
    """Return the MLP's output; the product that the down projection reads is pruned as it is computed."""
    gate, up = mlp.act_fn(mlp.gate_proj(x)), mlp.up_proj(x)
    alike = gate.dtype == up.dtype == mlp.down_proj.weight.dtype
    fuses = alike and shared.fuses(gate) and not _hooked([mlp.down_proj])
    y: Tensor = mlp.down_proj(shared.prune_parts(gate, None, up) if fuses else gate * up)
    return y


def _hooked(modules: Sequence[nn.Module]) -> bool:
    """Whether any forward hook would see an input or output of these modules."""
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _shared(readers: Sequence[SparseLinear | None]) -> SharedInput | None:
    """Return the pruned input that all readers of a tensor share; None where they do not, or where it cannot be fused."""
    inputs = [reader.shared for reader in readers if reader is not None]
    if len(inputs) < len(readers) or any(shared is not inputs[0] for shared in inputs):
        return None
    return inputs[0] if inputs[0].n_readers == len(readers) and inputs[0].can_fuse else None


_tried: dict[tuple[Any, torch.dtype, str], Any] = {}
"""Results of the tests by forward function, dtype and device type: for norms `plus_one`, or None if not fusable."""


def _norm(module: Any) -> Norm | None:
    """Return the module as a norm in parts; None if these do not give its bits."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in _DTYPES or "forward" in module.__dict__:
        return None
    runs = type(module).forward
    key = (runs, weight.dtype, weight.device.type)
    if key not in _tried:
        x = _probe(weight.shape[0], weight)
        candidates = [Norm(module, name == "eps") for name in ("variance_epsilon", "eps") if hasattr(module, name)]
        with torch.no_grad():
            same = [each.plus_one for each in candidates if torch.equal(make(x, *each.parts(x)), runs(module, x))]
        _tried[key] = same[0] if same else None
    return None if _tried[key] is None else Norm(module, _tried[key])


def _is_product(mlp: Any) -> bool:
    """Whether an MLP computes down(act(gate(x)) · up(x)), bit for bit."""
    parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if not all(isinstance(part, nn.Module) for part in parts) or "forward" in mlp.__dict__:
        return False
    weight = mlp.down_proj.weight
    if weight.dtype not in _DTYPES:
        return False
    runs = type(mlp).forward
    key = (runs, weight.dtype, weight.device.type)
    if key not in _tried:
        shared: SharedInput = mlp.down_proj.shared
        x = _probe(mlp.gate_proj.in_features, weight)
        with torch.no_grad(), shared.view.as_dense():
            product = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            _tried[key] = torch.equal(mlp.down_proj(product), runs(mlp, x))
    return bool(_tried[key])


def _probe(width: int, like: Tensor) -> Tensor:
    """Return a few random tokens [1, 4, width] without using the global random state."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, width, generator=random).to(device=like.device, dtype=like.dtype)


def _model_type(model: Any) -> str:
    return str(getattr(model.config.get_text_config(), "model_type", ""))
