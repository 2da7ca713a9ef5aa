"""A float64 model that computes in float64 throughout: transformers' norms go through fp32 whatever the model's dtype."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _KeepsFloat64(TorchFunctionMode):
    """A float64 tensor that is asked for in fp32 stays what it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_float32 = func is Tensor.float or (func is Tensor.to and torch.float32 in (*args[1:], kwargs.get("dtype")))
        if to_float32 and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **kwargs)


def keep_float64(model: nn.Module) -> nn.Module:
    """Make the norms of a float64 model compute in float64, in place.

    A rounding to fp32 turns the last bit of a float64 number into 1e-7 where it crosses a border, and a near-tie of the mask
    into another channel: two correct paths would differ by that much.
    """
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            module.forward = _kept(module.forward)
    return model


def _kept(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(forward)
    def in_float64(*args: Any, **kwargs: Any) -> Tensor:
        with _KeepsFloat64():
            return forward(*args, **kwargs)

    return in_float64
