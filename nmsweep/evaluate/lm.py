"""lm-eval's Hugging Face model with packed scoring, around a model that is already loaded."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from nmsweep.evaluate.packed.attention import why_single_rows
from nmsweep.evaluate.packed.rows import Group, Request
from nmsweep.evaluate.packed.scoring import Budget, cost_of, out_of_memory, plan, score
from nmsweep.evaluate.running import quiet
from nmsweep.methods.base import counting

Scoring = Literal["packed", "stock"]

Pair = tuple[str, str]
"""Context and continuation as text."""

_SEED = 1234
"""Seed of sampled generation, for tasks that ask for it: lm-eval's own."""


@dataclass
class Prepared:
    """The requests of a task, in every form that does not depend on a model's weights; kept for the next cell.

    Attributes:
        instances: as lm-eval builds them.
        token_ids: of the context and of the continuation of each request.
        plans: how the requests are packed, by everything else that this depends on.
    """

    instances: list[Instance] = field(default_factory=list)
    token_ids: dict[Pair, tuple[list[int], list[int]]] = field(default_factory=dict)
    plans: dict[object, list[Group]] = field(default_factory=dict)


class NMSweepLM(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model around a model that is already loaded.

    Args:
        model: a causal language model of transformers, dense or sparse.
        tokenizer: its tokenizer.
        batch_tokens: padded tokens computed at once.
        scoring: ``"packed"``, see `packed.scoring`; ``"stock"`` for lm-eval's own path, whose batch size follows from the
            longest request.
        across_tokens: whether pruning one token depends on other tokens of its sequence (`clact`, a scope in percent). Then
            sequences do not share rows, and lm-eval's own path, which does not tell the model about padding, takes one
            request a batch.
        prepared: keeps the requests for the next object, if it will be asked the same ones; None otherwise.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_tokens: int,
        scoring: Scoring = "packed",
        across_tokens: bool = False,
        prepared: Prepared | None = None,
    ) -> None:
        with quiet():  # HFLM warns that it ignores arguments for a model object; none of them is used
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.budget = Budget(batch_tokens)
        self.scoring = scoring
        self.across_tokens = across_tokens
        self.why_single_rows = why_single_rows(model, across_tokens)
        self.n_tokens = 0
        self._plans = prepared.plans if prepared else None
        self._token_ids = prepared.token_ids if prepared else {}

    def how(self) -> str:
        """Describe how requests were answered, for the record."""
        if self.scoring == "stock":
            return "stock, one request a batch" if self.across_tokens else f"stock, {self.budget}"
        if self.why_single_rows:
            return f"packed, but one continuation a row: {self.why_single_rows}; {self.budget}"
        return f"packed, {self.budget}"

    def count(self, n_tokens: int) -> None:
        """Count tokens that were computed."""
        self.n_tokens += n_tokens

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Answer log-likelihood requests; their texts are encoded all at once."""
        pairs = dict.fromkeys(request.args for request in requests)
        self._token_ids.update(self._encoded([pair for pair in pairs if pair[0] and pair not in self._token_ids]))
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def _encoded(self, pairs: Sequence[Pair]) -> dict[Pair, tuple[list[int], list[int]]]:
        """Encode pairs as lm-eval does.

        Spaces at the end of a context go to the continuation. The whole is encoded, and what follows the context's own
        tokens is the continuation, so tokens may merge across the border.
        """
        contexts = [context.rstrip() for context, _ in pairs]
        wholes = ["".join(pair) for pair in pairs]
        ids = self._ids_of(list(dict.fromkeys(contexts + wholes)))
        return {
            pair: (ids[context], ids[whole][len(ids[context]) :])
            for pair, context, whole in zip(pairs, contexts, wholes, strict=True)
        }

    def _ids_of(self, texts: list[str]) -> dict[str, list[int]]:
        """Encode many texts at once, which a fast tokenizer does in parallel, as `tok_encode` does for one."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        ids: dict[str, list[int]] = {}
        for has_bos in (False, True):
            same = [text for text in texts if text.startswith(bos) == has_bos]
            special = False if has_bos else self.add_bos_token
            options = {} if special is None else {"add_special_tokens": special}
            if same:
                ids.update(zip(same, self.tokenizer(same, verbose=False, **options)["input_ids"], strict=True))
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        known = self._token_ids.get((context, continuation))
        return known or super()._encode_pair(context, continuation)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.scoring == "stock":
            return self._stock(requests)
        answers = score(
            self.model,
            self._packed(requests),
            len(requests),
            budget=self.budget,
            single_rows=self.why_single_rows is not None,
            count=self.count,
        )
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:  # parts of a rolling request have none
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _packed(self, requests: Sequence[Request]) -> list[Group]:
        """Arrange requests in rows, or take the plan that was kept."""
        single = self.why_single_rows is not None
        key = (len(requests), self.max_length, self.budget.tokens, single or cost_of(self.model))
        plans: dict[object, list[Group]] = {}  # parts of rolling requests come in many sets and are not kept
        if self._plans is not None and requests and requests[0][0] is not None:
            plans = self._plans
        if key not in plans:
            plans[key] = plan(self.model, requests, max_length=self.max_length, budget=self.budget, single_rows=single)
        return plans[key]

    def _stock(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Answer on lm-eval's own path."""
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=1)
        n_fitting = max(1, self.budget.tokens // min(longest, self.max_length))
        self.batch_size_per_gpu = 1 if self.across_tokens else n_fitting
        return super()._loglikelihood_tokens(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        with counting(_until_filler(0, inps.cpu())):  # lm-eval pads rows with 0
            logits = super()._model_call(inps, *args, **kwargs)
        self.count(inps.numel())
        return logits

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generate text, for as many requests at once as the budget allows with the longest context and answer."""
        longest = max((len(self.tok_encode(request.args[0])) for request in requests), default=1)
        room = max((int(request.args[1].get("max_gen_toks") or self.max_gen_toks) for request in requests), default=1)
        width = min(longest + room, self.max_length)
        while True:
            self.batch_size_per_gpu = max(1, self.budget.tokens // width)
            try:
                return self._generated(requests)
            except RuntimeError as error:
                if not out_of_memory(error) or self.batch_size_per_gpu == 1:
                    raise
            self.budget.halve(self.batch_size_per_gpu * width, width)

    def _generated(self, requests: list[Instance]) -> list[str]:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_SEED)
            return super().generate_until(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        with _counting_without_padding(self.model, self.tokenizer.pad_token_id):
            ids = super()._model_generate(context, max_length, stop, **kwargs)
        self.count(ids.numel())
        return ids


def _until_filler(filler: int, ids: torch.Tensor) -> torch.Tensor:
    """Return [batch, seq] with 0 for the fillers at the end of each row of `ids`, else 1."""
    return (ids != filler).long().flip(1).cummax(1).values.flip(1)


@contextlib.contextmanager
def _counting_without_padding(model: Any, pad: int) -> Iterator[None]:
    """Count the prompts and the generated tokens, but neither padding before a prompt nor padding after an answer."""
    with contextlib.ExitStack() as counted:

        def before(module: Any, args: Any, kwargs: Any) -> None:
            ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
            counted.close()
            if ids is not None and mask is not None and mask.ndim == 2:
                is_prompt = ids.shape[1] == mask.shape[1]
                counted.enter_context(counting((mask if is_prompt else ids != pad).cpu().long()))

        hook = model.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            hook.remove()
