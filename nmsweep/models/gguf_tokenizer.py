"""The tokenizer of a GGUF file, as transformers rebuilds it, and whether that is the model's own."""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nmsweep.errors import ModelError

_N_PROBES = 1000
_LEAST_SHARE = 0.9
"""Share of probed tokens that must come back as themselves: 1.00 and 0.9995 for SmolLM2 and Gemma3, 0.34 for Gemma3 with
the wrong merges of transformers 5.17, which doubles the length of every text."""

_BOS_BY_DEFAULT = ("llama3", "llama-v3", "llama-bpe")
"""Pre-tokenizers with which llama.cpp adds a BOS although the file does not say so."""


def read_tokenizer(file: Path, reader: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file describes.

    Args:
        file: the GGUF.
        reader: its opened `gguf.GGUFReader`.

    Raises:
        ModelError: this version of transformers reads it wrongly, so that every number would be of another model.
    """
    wants_bos = _wants_bos(reader)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, add_bos_token=wants_bos
    )
    share, adds_bos = share_of_whole_tokens(tokenizer), _adds_bos(tokenizer)
    if share < _LEAST_SHARE or adds_bos != wants_bos:
        raise ModelError(
            f"GGUF {file.name}: transformers {transformers.__version__} reads its tokenizer wrongly ({share:.0%} of its "
            f"tokens come back whole, a BOS is {'' if adds_bos else 'not '}added); at least {_LEAST_SHARE:.0%} and "
            f"{'a' if wants_bos else 'no'} BOS are needed; upgrade transformers (5.23 is known to work)"
        )
    return tokenizer


def share_of_whole_tokens(tokenizer: PreTrainedTokenizerBase) -> float:
    """The share of the vocabulary, probed at equal distances, whose text is read back as that one token."""
    n_tokens = len(tokenizer)
    n_probed = n_whole = 0
    for token_id in range(0, n_tokens, max(1, n_tokens // _N_PROBES)):
        text = str(tokenizer.decode([token_id], skip_special_tokens=True))
        if not text or "\N{REPLACEMENT CHARACTER}" in text:  # special, or a part of a character
            continue
        n_probed += 1
        n_whole += tokenizer(text, add_special_tokens=False).input_ids == [token_id]
    return n_whole / max(n_probed, 1)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids: list[int] = tokenizer("x").input_ids
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _wants_bos(reader: Any) -> bool:
    """Whether llama.cpp would put a BOS before a text. Source: `llama_vocab::impl::load` of llama.cpp."""
    said = reader.get_field("tokenizer.ggml.add_bos_token")
    if said is not None:
        return bool(said.contents())
    model, pre = (reader.get_field(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    sentencepiece = model is not None and model.contents() == "llama"
    return sentencepiece or (pre is not None and pre.contents() in _BOS_BY_DEFAULT)
