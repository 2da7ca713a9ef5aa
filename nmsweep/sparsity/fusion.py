"""The prune joined to what makes the tensor: a norm's last step, or silu(gate) · up. The same bits; where the prune reads the tensor
once (no median, mean or ν) the dense one is never written.

A norm is replaced where all that reads its output is pruned the same way; an MLP's product where the down projection is pruned. Whether
the parts give the module's own bits is tried on a few tokens, once for each kind of module, dtype and device; where they do not,
or another part of the model's code is not what is known here, nothing is joined and the layers prune what they are given. So they do
in passes that somebody watches: a hook of a norm, of its readers or of the module around them is shown the dense tensor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.modules.module as every_module
from torch import Tensor, nn

from nmsweep.kernels.reference import make
from nmsweep.sparsity.linear import SharedInput, SparseLinear

Forward = Callable[[Tensor], Tensor]

_READERS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""A block's norms and all that reads each, but `post_attention_layernorm` where a block has the one before it: there it is another."""

_KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text"})
"""Model types of transformers whose blocks are wired so."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Norm(NamedTuple):
    """An RMS norm in parts: `x · scale · gain` as `kernels.prune` takes them."""

    module: Any
    plus_one: bool

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """scale [*, 1] fp32, by the operations of transformers' norms in their order, and gain [hidden]."""
        module = self.module
        eps = module.eps if self.plus_one else module.variance_epsilon
        scale = torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)
        return scale, 1.0 + module.weight.float() if self.plus_one else module.weight


def joined(model: nn.Module, layers: Mapping[str, SparseLinear]) -> dict[nn.Module, Forward]:
    """The norms and MLPs of a sparse model that can hand their parts to the prune, with the forward to call instead.

    Args:
        model: a causal language model of transformers whose target layers are sparse.
        layers: these layers by module path.
    """
    if _model_type(model) not in _KNOWN:
        return {}
    found: dict[nn.Module, Forward] = {}
    for path in dict.fromkeys(name.rsplit(".", 2)[0] for name in layers):
        block = model.get_submodule(path)
        for name, readers in _READERS.items():
            if name == "post_attention_layernorm" and hasattr(block, "pre_feedforward_layernorm"):
                continue
            norm = _norm(getattr(block, name, None))
            shared = _shared([layers.get(f"{path}.{reader}") for reader in readers])
            if norm and shared:
                x = _probe(norm.module.weight.shape[0], norm.module.weight)
                shared.prepare_parts(x, *norm.parts(x))
                around = block.get_submodule(readers[0].partition(".")[0])
                watched = [norm.module, around, *(layers[f"{path}.{reader}"] for reader in readers)]
                found[norm.module] = partial(_norm_forward, norm, shared, watched)
        shared = _shared([layers.get(f"{path}.mlp.down_proj")])
        mlp = getattr(block, "mlp", None)
        if mlp is not None and shared and _is_product(mlp):
            x = _probe(mlp.down_proj.in_features, mlp.down_proj.weight)
            shared.prepare_parts(x, None, x)
            found[mlp] = partial(_product_forward, mlp, shared)
    return found


@contextmanager
def replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """The modules run these forwards inside the block; their place in the model stays."""
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


def _norm_forward(norm: Norm, shared: SharedInput, watched: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The norm's pruned output; the dense one where the layers have to see it."""
    if x.dtype == norm.module.weight.dtype and shared.takes_parts(x) and not _hooked(watched):
        return shared.made(x, *norm.parts(x))
    y: Tensor = type(norm.module).forward(norm.module, x)
    return y


def _product_forward(mlp: Any, shared: SharedInput, x: Tensor) -> Tensor:
    """The MLP's output; what the down projection reads is pruned as it is made."""
    gate, up = mlp.act_fn(mlp.gate_proj(x)), mlp.up_proj(x)
    alike = gate.dtype == up.dtype == mlp.down_proj.weight.dtype
    joins = alike and shared.takes_parts(gate) and not _hooked([mlp.down_proj])
    y: Tensor = mlp.down_proj(shared.made(gate, None, up) if joins else gate * up)
    return y


def _hooked(modules: Sequence[nn.Module]) -> bool:
    """Whether something is called with what the modules are given, or with what a norm gives."""
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _shared(readers: Sequence[SparseLinear | None]) -> SharedInput | None:
    """The one pruned input of all readers of a tensor; None where they have none in common."""
    inputs = [reader.shared for reader in readers if reader is not None]
    if len(inputs) < len(readers) or any(shared is not inputs[0] for shared in inputs):
        return None
    return inputs[0] if inputs[0].n_readers == len(readers) and inputs[0].can_take_parts else None


_tried: dict[tuple[Any, torch.dtype, str], Any] = {}
"""What was found out about a kind of module, by the function that it runs."""


def _norm(module: Any) -> Norm | None:
    """The module as a norm in parts, if that gives its bits."""
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
    """Whether an MLP is down(act(gate(x)) · up(x)), bit for bit."""
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
    """A few tokens [1, 4, width]; the global random state stays as it was."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, width, generator=random).to(device=like.device, dtype=like.dtype)


def _model_type(model: Any) -> str:
    return str(getattr(model.config.get_text_config(), "model_type", ""))
