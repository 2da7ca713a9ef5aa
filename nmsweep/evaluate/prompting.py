"""How items become prompts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompting:
    """How a task's items become prompts, in the harness's words.

    Attributes:
        limit: items at most, the first ones; None for all.
        num_fewshot: examples before each item; None for each task's own number.
        apply_chat_template: whether the tokenizer's chat template is put around each prompt.
        fewshot_as_multiturn: whether examples are turns of the chat, else part of one message; None for turns.
        system_instruction: a system prompt; None for none.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None

    @property
    def multiturn(self) -> bool:
        """Whether examples are turns of a chat; without a chat template there is none."""
        return as_multiturn(self.fewshot_as_multiturn, self.apply_chat_template)


def as_multiturn(asked: bool | None, apply_chat_template: bool) -> bool:
    """`fewshot_as_multiturn` as the harness's command line reads it: None follows the chat template."""
    return apply_chat_template if asked is None else asked
