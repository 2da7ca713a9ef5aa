"""Recover from a measurement that failed: retry with less memory, or name the layer that is not finite."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nmsweep.errors import NonFiniteError
from nmsweep.evaluate.base import TaskResult
from nmsweep.evaluate.packed.scoring import out_of_memory


def within_memory(evaluate: Callable[[int], TaskResult], batch_tokens: int, least: int) -> TaskResult:
    """Measure a task, halving the token budget for as long as memory runs out.

    Args:
        evaluate: measures the task with a budget in tokens.
        batch_tokens: the budget to start with.
        least: tokens that are computed at once under any budget; a budget this small is not halved again.

    Raises:
        RuntimeError: the smallest budget is still too large (`torch.OutOfMemoryError` on a GPU).
    """
    budget = batch_tokens
    while True:
        try:
            result = evaluate(budget)
        except RuntimeError as error:
            if not out_of_memory(error) or budget <= least:
                raise
            budget //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        if budget < batch_tokens:
            lowered = f", {budget} tokens a batch after memory ran out at {batch_tokens}"
            return replace(result, scoring=result.scoring + lowered)
        return result


def naming_the_layer(model: nn.Module, evaluate: Callable[[], TaskResult]) -> TaskResult:
    """Measure a task; if a number is not finite, measure it again to find the layer where that starts.

    Raises:
        NonFiniteError: names the first layer whose output is not finite.
    """
    try:
        return evaluate()
    except NonFiniteError as error:
        first = error
    with _raising_at_the_layer(model):
        evaluate()
    raise NonFiniteError(f"{first}; no layer's output was non-finite when it was measured again") from first


@contextmanager
def _raising_at_the_layer(model: nn.Module) -> Iterator[None]:
    """Let every layer raise as soon as its output is not finite."""
    hooks = [module.register_forward_hook(_check_of(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
    def check(module: nn.Module, inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            kind = "NaN" if torch.isnan(tensor).any() else "infinite"
            raise NonFiniteError(
                f"{name}: the output of this layer ({type(module).__name__}) is {kind}, the first that is not finite"
            )

    return check
