"""The harness's Hugging Face model with packed scoring, around a model that is loaded already."""

import contextlib
import io
import logging
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, Literal

import datasets
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from nmsweep.evaluate.packed.attention import why_single_rows
from nmsweep.evaluate.packed.rows import Group, Request
from nmsweep.evaluate.packed.scoring import Budget, out_of_memory, plan, score
from nmsweep.evaluate.requests import encoded_pairs, tokenizer_identity
from nmsweep.evaluate.result import Advance
from nmsweep.methods.base import counting

Scoring = Literal["packed", "stock"]

Plans = MutableMapping[object, list[Group]]
"""How the requests of a task were packed, by everything but the requests themselves that this depends on."""

_SEED = 1234
"""Of sampled generation, where a task asks for it: the harness's own."""


class NMSweepLM(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model around a model that is loaded already.

    Args:
        model: a causal language model of transformers, dense or sparse.
        tokenizer: its tokenizer.
        batch_tokens: padded tokens computed at once.
        advance: progress.
        scoring: ``"packed"``, see `scoring`; ``"stock"`` for the harness's own path, whose batch size follows from the
            longest request.
        across_tokens: whether what is pruned of one token depends on other tokens of its sequence (`clact`, a scope in
            percent); then nothing shares a row, and the harness's own path, which does not tell the model about padding,
            takes one request a batch.
        plans: where to keep how requests were packed; None to keep nothing. Only for requests that are the same each time.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_tokens: int,
        advance: Advance,
        scoring: Scoring = "packed",
        across_tokens: bool = False,
        plans: Plans | None = None,
    ) -> None:
        with quiet():  # it warns that arguments are ignored for a model object; none is relied on
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.budget = Budget(batch_tokens)
        self.scoring = scoring
        self.across_tokens = across_tokens
        self.why_single_rows = why_single_rows(model, across_tokens)
        self.n_tokens = 0
        self._show = advance
        self._plans = plans
        self._pairs = encoded_pairs(tokenizer_identity(tokenizer), repr(self.add_bos_token))

    def how(self) -> str:
        """How requests were answered, for the record."""
        if self.scoring == "stock":
            return "stock, one request a batch" if self.across_tokens else f"stock, {self.budget}"
        if self.why_single_rows:
            return f"packed, but one continuation a row: {self.why_single_rows}; {self.budget}"
        return f"packed, {self.budget}"

    def advance(self, n_tokens: int) -> None:
        self.n_tokens += n_tokens
        self._show(n_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._pairs.add([request.args for request in requests], self._encode)
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continuations; as many at once as the budget allows for the longest context and what may follow it."""
        longest = max((len(self.tok_encode(request.args[0])) for request in requests), default=1)
        room = max((int(request.args[1].get("max_gen_toks") or self.max_gen_toks) for request in requests), default=1)
        each = min(longest + room, self.max_length)
        while True:
            self.batch_size_per_gpu = max(1, self.budget.tokens // each)
            try:
                return self._generated(requests)
            except RuntimeError as error:
                if not out_of_memory(error) or self.batch_size_per_gpu == 1:
                    raise
            self.budget.halve(self.batch_size_per_gpu * each, each)

    def _generated(self, requests: list[Instance]) -> list[str]:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_SEED)
            return super().generate_until(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        pair = (context, continuation)
        return self._pairs[pair] if pair in self._pairs else super()._encode_pair(context, continuation)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """`tok_encode` of many texts at once, which the tokenizer does in parallel."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        found: dict[str, list[int]] = {}
        for has_bos in (False, True):
            same = [text for text in texts if text.startswith(bos) == has_bos]
            special = False if has_bos else self.add_bos_token
            options = {} if special is None else {"add_special_tokens": special}
            if same:
                found.update(zip(same, self.tokenizer(same, verbose=False, **options)["input_ids"], strict=True))
        return [found[text] for text in texts]

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
            advance=self.advance,
        )
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:  # parts of a rolling request have none
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _stock(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """The harness's own path."""
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=1)
        n_fitting = max(1, self.budget.tokens // min(longest, self.max_length))
        self.batch_size_per_gpu = 1 if self.across_tokens else n_fitting
        return super()._loglikelihood_tokens(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def _packed(self, requests: Sequence[Request]) -> list[Group]:
        single = self.why_single_rows is not None
        key = (len(requests), self.max_length, self.budget.tokens, single, self.model.dtype)
        plans: Plans = {}  # parts of a rolling request have no texts, and there are many sets of them
        if self._plans is not None and requests and requests[0][0] is not None:
            plans = self._plans
        if key not in plans:
            plans[key] = plan(self.model, requests, max_length=self.max_length, budget=self.budget, single_rows=single)
        return plans[key]

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        with counting(_before_trailing(0, inps.cpu())):  # which the harness fills rows up with
            logits = super()._model_call(inps, *args, **kwargs)
        self.advance(inps.numel())
        return logits

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        with _counting_what_is_written(self.model, self.tokenizer.pad_token_id):
            found = super()._model_generate(context, max_length, stop, **kwargs)
        self.advance(found.numel())
        return found


def _before_trailing(filler: int, ids: torch.Tensor) -> torch.Tensor:
    """1 for each token of ids [batch, seq] that something else than `filler` stands at or behind, else 0."""
    return (ids != filler).long().flip(1).cummax(1).values.flip(1)


@contextlib.contextmanager
def _counting_what_is_written(model: Any, pad: int) -> Iterator[None]:
    """Of a generation count the prompts and what is written, not the padding of either: other texts may take longer."""
    with contextlib.ExitStack() as counted:

        def before(module: Any, args: Any, kwargs: Any) -> None:
            ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
            counted.close()
            if ids is not None and mask is not None and mask.ndim == 2:
                begins = ids.shape[1] == mask.shape[1]
                counted.enter_context(counting((mask if begins else ids != pad).cpu().long()))

        hook = model.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            hook.remove()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The harness and the data library log and draw bars; a cell has one display of its own."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            yield
    except BaseException:
        logging.getLogger(__name__).info("%s", said.getvalue())
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
