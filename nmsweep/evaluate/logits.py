"""Read log-probabilities of given tokens without holding `[tokens, vocab]` for more than a slice of the tokens."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nmsweep.errors import ModelError

SLICE_ELEMENTS = 2**26
"""Logits held at once, tokens × vocabulary: 256 MiB in fp32."""

CACHE_ELEMENTS = 2**21
"""Logits read at once on a CPU: few enough to stay in its cache from one operation to the next."""


def decoder(model: nn.Module) -> nn.Module:
    """Return the part of a causal language model that computes hidden states."""
    return model.get_decoder()  # type: ignore[operator, no-any-return]


def target_logprobs(
    model: Any, hidden: Tensor, cells: NDArray[np.int64], targets: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each target, and whether it is the most likely token.

    Args:
        model: a causal language model of transformers.
        hidden: [tokens, hidden], last hidden states.
        cells: [k], the place in `hidden` that should predict each target. Several targets may share a cell, as the first
            tokens of an item's choices do; its logits are computed once.
        targets: [k], tokens.

    Returns:
        log-probabilities [k], fp32 (float64 for a float64 model), natural logarithm; greedy [k] bool.
    """
    places, back = np.unique(cells, return_inverse=True)
    order = np.argsort(back, kind="stable")
    part, device = _part_tokens(model), hidden.device
    which, target, position = torch.from_numpy(np.stack([back[order], targets[order], np.argsort(order)])).to(device)
    starts = np.searchsorted(back[order], np.arange(0, len(places) + part, part)).tolist()
    read = []
    for at, logits in enumerate(_parts(model, hidden[torch.from_numpy(places).to(device)])):
        of = slice(starts[at], starts[at + 1])
        read.append(_read(logits, which[of] - at * part, target[of]))
    logprobs, greedy = zip(*read, strict=True)
    return torch.cat(logprobs)[position], torch.cat(greedy)[position]


def divergence(model: Any, dense: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    """Compare the next-token distributions of two hidden states.

    Args:
        model: a causal language model of transformers; its output embedding is used for both.
        dense, sparse: [tokens, hidden], last hidden states.

    Returns:
        KL(dense ‖ sparse) [tokens] in nats, float64; whether the most likely tokens are the same, [tokens] bool.
    """
    step = max(1, slice_tokens(model) // 4)  # four tensors of this size are alive
    kl, same = [], []
    for dense_part, sparse_part in zip(dense.split(step), sparse.split(step), strict=True):
        p, q = (token_logits(model, hidden).log_softmax(-1) for hidden in (dense_part, sparse_part))
        same.append(p.argmax(-1) == q.argmax(-1))
        kl.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
    return torch.cat(kl), torch.cat(same)


def token_logits(model: Any, hidden: Tensor) -> Tensor:
    """Compute logits [tokens, vocab] of hidden states [tokens, hidden], fp32 (float64 for a float64 model)."""
    return _head(model)(_widened(model.get_output_embeddings()(hidden)))


def slice_tokens(model: Any) -> int:
    """Return how many tokens' logits are held at once."""
    return max(1, SLICE_ELEMENTS // _vocabulary(model))


def _part_tokens(model: Any) -> int:
    """Return how many tokens' logits are read at once."""
    return max(1, CACHE_ELEMENTS // _vocabulary(model)) if model.device.type == "cpu" else slice_tokens(model)


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _parts(model: Any, hidden: Tensor) -> Iterator[Tensor]:
    """Yield the logits of [tokens, hidden], a few tokens at a time; the caller may overwrite them."""
    part = _part_tokens(model)
    for states in hidden.split(max(1, slice_tokens(model) // part) * part):
        for logits in model.get_output_embeddings()(states).split(part):
            yield _head(model)(_widened(logits))


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _read(logits: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability of tokens [k] by rows [k] of logits [n, vocab], and whether each is the most likely.

    Overwrites the logits.
    """
    top, likeliest = logits.max(-1)
    chosen = logits[rows, tokens]
    total = logits.sub_(top[:, None]).exp_().sum(-1).log_() + top
    return chosen - total[rows], likeliest[rows] == tokens


Head = Callable[[Tensor], Tensor]
"""A function that turns the output of the output embedding into logits, without changing its argument."""


def _capped(cap: float, logits: Tensor) -> Tensor:
    return cap * torch.tanh(logits / cap)


_HEADS: Mapping[str, Sequence[Callable[[float, Tensor], Tensor]]] = {
    "final_logit_softcapping": [_capped],  # Gemma
    "logits_soft_cap": [_capped],  # RecurrentGemma
    "logits_scaling": [lambda by, logits: logits / by, operator.mul],  # Granite divides, HyperCLOVA X multiplies
    "logit_scale": [operator.mul],  # Cohere
    "lm_head_multiplier": [operator.mul],  # Falcon-H1
}
"""How a key of a config may act on the logits."""

_PROBE_STD = 20.0
"""Standard deviation of the logits on which heads are compared."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Difference allowed between heads, relative to the largest logit; other dtypes round it to three digits."""

_heads: WeakKeyDictionary[Any, Head] = WeakKeyDictionary()


def _head(model: Any) -> Head:
    """Return the head that gives the model's own logits, found once for each model.

    Raises:
        ModelError: no known head does.
    """
    if model not in _heads:
        _heads[model] = _find_head(model)
    return _heads[model]


@torch.inference_mode()
def _find_head(model: Any) -> Head:
    """Compare the known heads with the model's own on a few hidden states; no layer is computed, nothing is counted."""
    config, embedding = model.config.get_text_config(), model.get_output_embeddings()
    values = {name: value for name in _HEADS if (value := getattr(config, name, None)) is not None}
    heads: list[Head] = [partial(head, value) for name, value in values.items() for head in _HEADS[name]]
    heads.append(lambda logits: logits)
    dtype, device = embedding.weight.dtype, embedding.weight.device
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, embedding.weight.shape[1], generator=generator).to(device, dtype)
    finite = embedding(hidden).isfinite()
    if not finite.any():  # there is nothing to compare, and this model's numbers will be refused
        return heads[-1]
    hidden = hidden * (_PROBE_STD / embedding(hidden)[finite].float().std()).to(dtype)  # so large that a cap shows
    raw = _widened(embedding(hidden))
    ids = torch.zeros(1, 4, dtype=torch.long, device=device)
    body = vars(decoder(model))
    before = dict(body)
    body.update(forward=lambda *args, **kwargs: _Output(hidden), _forward_pre_hooks={}, _forward_hooks={})
    try:
        expected = model.forward(input_ids=ids, use_cache=False).logits[finite].to(raw.dtype)
    finally:
        body.clear()
        body.update(before)
    differences = []
    for head in heads:
        differences.append(float((head(raw)[finite] - expected).abs().max() / expected.abs().max()))
        if differences[-1] < _TOLERANCE.get(dtype, 0.02):
            return head
    raise ModelError(
        f"model {model.config.model_type}: its logits are not those of its output embedding (they differ by "
        f"{min(differences):.0%} or more), so packed scoring and perplexity would be of another model; "
        "take eval.scoring=stock, and tasks without a text"
    )


class _Output:
    """Output of a decoder that computed nothing; every field but the hidden states is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None
