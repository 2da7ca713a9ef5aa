"""What building a task's requests gives, kept for other cells: in memory, and on disk for other processes.

On disk each file's name is the hash of everything that its content depends on, so that nothing has to be invalidated;
files appear whole, and any number of processes may write the same one.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lm_eval.utils
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from nmsweep.data.tasks import TaskSource
from nmsweep.models.cache import cache_dir

log = logging.getLogger(__name__)

FORMAT = 1
"""Of the files on disk; raised when what they hold for the same name changes."""

WORTH_KEEPING = 256
"""Requests; fewer are built again sooner than a file is opened."""

FEWSHOT_SEED = 1234
"""With which examples are drawn: the harness's own."""

Pair = tuple[str, str]
"""Context and continuation as text."""

Encode = Callable[[list[str]], list[list[int]]]
"""Token ids of texts."""


def keep_requests(task: ConfigurableTask, source: TaskSource) -> None:
    """Let a task build its requests once for each way of building them.

    lm-eval's evaluator builds them anew whenever it is called, and draws other few-shot examples each time, because the
    task's random state moves on.
    """
    build = task.build_all_requests
    kept: dict[str, list[Instance]] = {}

    def build_once(**how: Any) -> None:
        name = _name(source, task.config.num_fewshot, how)
        if name not in kept:
            found = _read(name, task, how)
            if found is None:
                task.set_fewshot_seed(FEWSHOT_SEED)
                build(**how)
                found = task.instances
                _write(name, found)
            kept[name] = found
        for instance in kept[name]:
            instance.resps = []
            instance.filtered_resps = {}
        task._instances = kept[name]

    task.build_all_requests = build_once


def _name(source: TaskSource, num_fewshot: int | None, how: Mapping[str, Any]) -> str:
    """Hash of everything that the requests depend on: task, items, harness, and how prompts are made."""
    speaker = getattr(how.get("chat_template"), "__self__", None)  # the model whose tokenizer has the template
    depends = [
        FORMAT, version("lm_eval"), source.task, source.definition(), source.content(), num_fewshot, FEWSHOT_SEED,
        sorted((key, repr(value)) for key, value in how.items() if not callable(value)),
        tokenizer_identity(speaker.tokenizer) if speaker is not None else "",
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()


def _file(kind: str, name: str) -> Path:
    return cache_dir() / kind / f"{name[:40]}.parquet"


def _read(name: str, task: ConfigurableTask, how: Mapping[str, Any]) -> list[Instance] | None:
    """The requests on disk, if there are any."""
    table = read_table(_file("requests", name))
    if table is None:
        return None
    docs = dict(task.doc_iterator(limit=how.get("limit")))
    columns = [table[column].to_pylist() for column in ("type", "doc_id", "idx", "repeats", "arguments")]
    return [
        Instance(kind, docs[doc_id], tuple(json.loads(arguments)), idx, (task.config.task, doc_id, repeats))
        for kind, doc_id, idx, repeats, arguments in zip(*columns, strict=True)
    ]


def _write(name: str, instances: Sequence[Instance]) -> None:
    """Keep requests whose arguments are plain values."""
    if len(instances) < WORTH_KEEPING:
        return
    try:
        arguments = [json.dumps(instance.args) for instance in instances]
    except TypeError:  # images and the like
        return
    columns = {
        "type": [instance.request_type for instance in instances],
        "doc_id": [instance.doc_id for instance in instances],
        "idx": [instance.idx for instance in instances],
        "repeats": [instance.repeats for instance in instances],
        "arguments": arguments,
    }
    write_table(_file("requests", name), pa.table(columns))


def read_table(file: Path) -> pa.Table | None:
    """A kept table; None where there is none, or none that can be read."""
    try:
        return pq.read_table(file)
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as error:
        log.warning("cache %s: %s; it is built again", file, error)
        return None


def write_table(file: Path, table: pa.Table) -> None:
    """Keep a table; whole or not at all. A cache that cannot be written costs time at the next start, nothing else."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", dir=file.parent)
        os.close(handle)
        try:
            pq.write_table(table, temporary, compression="zstd")
            os.replace(temporary, file)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        log.info("cache %s: %s", file, error)


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
    """Token ids of (context, continuation) pairs with one tokenizer.

    Args:
        identity: of the tokenizer and its use of BOS.
    """

    def __init__(self, identity: str) -> None:
        self._identity = identity
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
        if len(new) < WORTH_KEEPING:
            self._ids.update(_encoded(new, encode))
            return
        file = _file("tokens", self._name(new))
        found = _read_ids(file, new)
        if found is None:
            found = _encoded(new, encode)
            _write_ids(file, found)
        self._ids.update(found)

    def _name(self, pairs: Sequence[Pair]) -> str:
        digest = hashlib.sha256(json.dumps([FORMAT, version("tokenizers"), self._identity]).encode())
        for text in (text for pair in pairs for text in pair):
            digest.update(b"%d:" % len(data := text.encode()) + data)
        return digest.hexdigest()


Ids = dict[Pair, tuple[list[int], list[int]]]


def _encoded(pairs: Sequence[Pair], encode: Encode) -> Ids:
    contexts = [context.rstrip() for context, _ in pairs]
    wholes = ["".join(pair) for pair in pairs]
    texts = list(dict.fromkeys(contexts + wholes))
    ids = dict(zip(texts, encode(texts), strict=True)) if texts else {}
    return {
        pair: (ids[context], ids[whole][len(ids[context]) :])
        for pair, context, whole in zip(pairs, contexts, wholes, strict=True)
    }


def _read_ids(file: Path, pairs: Sequence[Pair]) -> Ids | None:
    table = read_table(file)
    if table is None or len(table) != len(pairs):
        return None
    contexts, continuations = (table[name].to_pylist() for name in ("context", "continuation"))
    return dict(zip(pairs, zip(contexts, continuations, strict=True), strict=True))


def _write_ids(file: Path, found: Ids) -> None:
    columns = {}
    for at, name in enumerate(("context", "continuation")):
        lists = [ids[at] for ids in found.values()]
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in lists])]).astype(np.int32)
        values = np.fromiter((token for ids in lists for token in ids), dtype=np.int32, count=int(offsets[-1]))
        columns[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    write_table(file, pa.table(columns))


@cache
def encoded_pairs(tokenizer: str, bos: str) -> EncodedPairs:
    """The pairs of this process for a tokenizer (by its identity) and a way to use BOS."""
    return EncodedPairs(f"{tokenizer}/{bos}")
