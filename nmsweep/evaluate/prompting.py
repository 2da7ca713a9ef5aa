"""How items become prompts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompting:
    """How a task's items become prompts, in the harness's words.

    Attributes:
        limit: items at most, the first ones; None for all.
        num_fewshot: examples before each item.
        apply_chat_template: whether the tokenizer's chat template is put around each prompt.
        fewshot_as_multiturn: whether examples are turns of the chat; else they are part of one message.
        system_instruction: a system prompt; None for none.
    """

    limit: int | None = None
    num_fewshot: int = 0
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None
