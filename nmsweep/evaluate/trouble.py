"""What to do when a task cannot be measured as asked: a smaller budget, or the name of the layer that spoiled it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nmsweep.errors import NonFiniteError
from nmsweep.evaluate.packed.scoring import out_of_memory
from nmsweep.evaluate.result import TaskResult


def within_memory(evaluate: Callable[[int], TaskResult], batch_tokens: int, least: int) -> TaskResult:
    """Measure with half the budget again and again while memory runs out.

    Args:
        evaluate: measures the task with a budget in tokens.
        batch_tokens: the budget to begin with.
        least: what is computed at once whatever the budget; with a budget of this size or less nothing is left to try.

    Raises:
        torch.OutOfMemoryError: or what PyTorch raises on a CPU: the smallest budget is too large.
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
            fell = f", {budget} tokens a batch after memory ran out at {batch_tokens}"
            return replace(result, scoring=result.scoring + fell)
        return result


def naming_the_layer(model: nn.Module, evaluate: Callable[[], TaskResult]) -> TaskResult:
    """Measure; where a number is not finite, measure once more to find the layer where that begins.

    Raises:
        NonFiniteError: what is not finite, and the first layer whose output is not.
    """
    try:
        return evaluate()
    except NonFiniteError as error:
        found = error
    with _watched(model):
        evaluate()
    raise NonFiniteError(f"{found}; no layer's output was non-finite when it was measured again") from found


@contextmanager
def _watched(model: nn.Module) -> Iterator[None]:
    """Every layer raises as soon as its output is not finite."""
    hooks = [module.register_forward_hook(_checked(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _checked(name: str) -> Callable[[nn.Module, Any, Any], None]:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            kind = "NaN" if torch.isnan(tensor).any() else "infinite"
            raise NonFiniteError(
                f"{name}: the output of this layer ({type(module).__name__}) is {kind}, the first that is not finite"
            )

    return look
