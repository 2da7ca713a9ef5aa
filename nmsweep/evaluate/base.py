"""Types of evaluation: how items become prompts, and the result of measuring a task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from nmsweep.results.record import Metric

Advance = Callable[[int], None]
"""Called with the number of tokens just computed, for the progress display."""


@dataclass(frozen=True)
class Prompting:
    """How the items of a task become prompts, in lm-eval's terms.

    Attributes:
        limit: number of items, from the first; None for all.
        num_fewshot: examples before each item; None for the task's own number.
        apply_chat_template: whether each prompt is wrapped in the tokenizer's chat template.
        fewshot_as_multiturn: whether examples are turns of the chat or part of one message; None for turns.
        system_instruction: a system prompt; None for none.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None

    @property
    def multiturn(self) -> bool:
        """Whether examples are turns of a chat; never without a chat template."""
        return as_multiturn(self.fewshot_as_multiturn, self.apply_chat_template)


def as_multiturn(fewshot_as_multiturn: bool | None, apply_chat_template: bool) -> bool:
    """Resolve `fewshot_as_multiturn` as lm-eval's command line does: None follows the chat template."""
    return apply_chat_template if fewshot_as_multiturn is None else fewshot_as_multiturn


@dataclass(frozen=True)
class TaskResult:
    """The result of measuring one task.

    Attributes:
        metrics: its numbers.
        samples: one row an item or window, from which the numbers can be recomputed.
        n_tokens: tokens computed, without padding.
        scoring: how requests were answered, in words.
    """

    metrics: Sequence[Metric]
    samples: pd.DataFrame
    n_tokens: int
    scoring: str
