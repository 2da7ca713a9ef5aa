"""What building a task's requests gives, kept for the other cells of the process: the requests and their token ids."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import lm_eval.utils
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

Pair = tuple[str, str]
"""Context and continuation as text."""

Encode = Callable[[list[str]], list[list[int]]]
"""Token ids of texts."""


def keep_requests(task: ConfigurableTask, fewshot_seed: int = 0) -> ConfigurableTask:
    """Let a task build its requests once for each way of building them.

    lm-eval's evaluator builds them anew whenever it is called, and draws other few-shot examples each time, because the
    task's random state moves on.
    """
    build = task.build_all_requests
    kept: dict[object, list[Instance]] = {}

    def build_once(**how: Any) -> None:
        speaker = getattr(how.get("chat_template"), "__self__", None)  # the model whose tokenizer has the template
        key = (
            tuple((name, repr(value)) for name, value in sorted(how.items()) if not callable(value)),
            tokenizer_identity(speaker.tokenizer) if speaker is not None else "",
        )
        if key not in kept:
            task.set_fewshot_seed(fewshot_seed)
            build(**how)
            kept[key] = task.instances
        for instance in kept[key]:
            instance.resps = []
            instance.filtered_resps = {}
        task._instances = kept[key]

    task.build_all_requests = build_once
    return task


@contextlib.contextmanager
def templates_compiled_once() -> Iterator[None]:
    """lm-eval compiles a task's Jinja templates again for every item, which is most of the time it takes; not here."""
    environment = lm_eval.utils.env
    environment.from_string = cache(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string


_identities: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def tokenizer_identity(tokenizer: Any) -> str:
    """sha256 of everything that says how a tokenizer turns text or a chat into token ids."""
    if tokenizer not in _identities:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        options = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "chat_template")]
        digest = hashlib.sha256(content.encode())
        digest.update(repr([options, sorted(tokenizer.special_tokens_map.items(), key=str)]).encode())
        _identities[tokenizer] = digest.hexdigest()
    return _identities[tokenizer]


class EncodedPairs:
    """Token ids of the (context, continuation) pairs seen so far with one tokenizer."""

    def __init__(self) -> None:
        self._ids: dict[Pair, tuple[list[int], list[int]]] = {}

    def __getitem__(self, pair: Pair) -> tuple[list[int], list[int]]:
        return self._ids[pair]

    def __contains__(self, pair: Pair) -> bool:
        return pair in self._ids

    def add(self, pairs: Sequence[Pair], encode: Encode) -> None:
        """Encode what is new, all texts at once.

        As lm-eval does it: spaces at a context's end go to the continuation; the whole is encoded, and what lies behind
        the context's own length is the continuation, so that tokens may merge across the border.
        """
        new = [pair for pair in dict.fromkeys(pairs) if pair[0] and pair not in self._ids]
        contexts = [context.rstrip() for context, _ in new]
        wholes = ["".join(pair) for pair in new]
        texts = list(dict.fromkeys(contexts + wholes))
        ids = dict(zip(texts, encode(texts), strict=True)) if texts else {}
        for pair, context, whole in zip(new, contexts, wholes, strict=True):
            self._ids[pair] = (ids[context], ids[whole][len(ids[context]) :])


@cache
def encoded_pairs(tokenizer: str, bos: str) -> EncodedPairs:
    """The pairs of this process for a tokenizer (by its identity) and a way to use BOS."""
    return EncodedPairs()
