"""Run the decoder blocks of a model one at a time, and catch the inputs and gradients of layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmsweep.methods.base import as_tensor
from nmsweep.models.targets import decoder_linears


class _Reached(Exception):  # noqa: N818 it is no error
    """Ends a pass once the tensor is caught."""


class Blocks:
    """The decoder blocks of a model.

    All windows have the same length and no padding, so the other inputs of a block (masks, positions) are the same for every
    window. They differ between blocks where attention does (Gemma3).

    Args:
        model: a causal language model of transformers.
        windows: ids [n_windows, seqlen].
    """

    def __init__(self, model: Any, windows: Tensor) -> None:
        first = next(iter(decoder_linears(model)))
        prefix = first[: first.index("layers.") + len("layers")]
        self.names = [f"{prefix}.{name}" for name, _ in model.get_submodule(prefix).named_children()]
        self._modules = [model.get_submodule(name) for name in self.names]
        self._decoder = model.get_decoder()
        self._ids = windows.to(model.device)
        self._kwargs: list[dict[str, Any]] = []

    def first_inputs(self) -> list[Tensor]:
        """Return the hidden states [1, seqlen, hidden] of every window before the first block."""
        self._kwargs = self._side_inputs()
        first = self._modules[0]
        return [
            _caught_input(first, partial(self._decoder, input_ids=window, use_cache=False))
            for window in self._ids.split(1)
        ]

    def _side_inputs(self) -> list[dict[str, Any]]:
        """Return the keyword arguments of every block, from one pass of one window."""
        of_block: list[dict[str, Any]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            of_block.append({key: value for key, value in kwargs.items() if key != "hidden_states"})

        with ExitStack() as hooks:
            for module in self._modules:
                hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
            self._decoder(input_ids=self._ids[:1], use_cache=False)
        return of_block

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Run one block: hidden states [1, seqlen, hidden] to hidden states."""
        out: Any = self._modules[index](hidden, **self._kwargs[index])
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def input_of(self, index: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Return the input of a layer inside a block, [1, seqlen, in]; the block runs no further than that."""
        return _caught_input(layer, partial(self.run, index, hidden))


def _caught_input(module: nn.Module, forward: Callable[[], Any]) -> Tensor:
    """Return the first input of a module during a forward pass, which ends there."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    with suppress(_Reached), module.register_forward_pre_hook(catch, with_kwargs=True):
        forward()
    if not caught:
        raise RuntimeError("a decoder block never called the layer whose input was requested")
    return caught[0]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn off the gradients of all parameters inside the block."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@torch.enable_grad()
def gradients(model: Any, window: Tensor, groups: Sequence[Sequence[str]]) -> Mapping[int, Tensor]:
    """Compute the gradient of a window's summed next-token loss with respect to the input of each group's layers.

    Args:
        model: a causal language model whose parameters are frozen.
        window: ids [1, seqlen].
        groups: module paths of layers that read one tensor.

    Returns:
        By index of the group, the gradient through all its layers, [1, seqlen, in].
    """
    inputs: dict[int, Tensor] = {}

    def mark(group: int) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if group not in inputs:
                x = args[0]
                inputs[group] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
                inputs[group].retain_grad()
            return (inputs[group], *args[1:])

        return before

    with ExitStack() as hooks:
        for index, group in enumerate(groups):
            for name in group:
                hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(mark(index)))
        logits = model(input_ids=window, use_cache=False).logits[0, :-1]
        F.cross_entropy(as_tensor(logits, logits), window[0, 1:], reduction="sum").backward()
    return {group: x.grad for group, x in inputs.items() if x.grad is not None}
