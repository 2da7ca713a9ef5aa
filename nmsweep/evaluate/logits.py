"""Log-probabilities of given tokens without ever holding `[tokens, vocab]` for more than a slice."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    """The part of a causal language model that gives hidden states."""
    return model.get_decoder()  # type: ignore[operator, no-any-return]


def token_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits [tokens, vocab] of hidden states [tokens, hidden], fp32 (float64 for a float64 model)."""
    return _widened(model, model.get_output_embeddings()(hidden))


def _widened(model: Any, logits: Tensor) -> Tensor:
    """What an output embedding gives, as logits in fp32 or float64."""
    return _head(model)(logits if logits.dtype == torch.float64 else logits.float())


Head = Callable[[Tensor], Tensor]
"""What a model does to the output of its output embedding; does not change its argument."""

_heads: WeakKeyDictionary[Any, Head] = WeakKeyDictionary()


def _head(model: Any) -> Head:
    """The one of `_known_heads` that gives the model's own logits, found out once.

    Raises:
        ModelError: none does.
    """
    if model not in _heads:
        _heads[model] = _found_head(model)
    return _heads[model]


def _known_heads(config: Any) -> Iterator[Head]:
    """What a config may mean, the plain one last: ``logits_scaling`` divides in Granite and multiplies in HyperCLOVA X."""
    for name, heads in _HEADS.items():
        if (value := getattr(config, name, None)) is not None:
            yield from (partial(head, value) for head in heads)
    yield lambda logits: logits


def _capped(cap: float, logits: Tensor) -> Tensor:
    return cap * torch.tanh(logits / cap)


def _divided(by: float, logits: Tensor) -> Tensor:
    return logits / by


def _multiplied(by: float, logits: Tensor) -> Tensor:
    return logits * by


_HEADS: Mapping[str, Sequence[Callable[[float, Tensor], Tensor]]] = {
    "final_logit_softcapping": [_capped],  # Gemma
    "logits_soft_cap": [_capped],  # RecurrentGemma
    "logits_scaling": [_divided, _multiplied],
    "logit_scale": [_multiplied],  # Cohere
    "lm_head_multiplier": [_multiplied],  # Falcon-H1
}
"""Keys of a config that say what happens to logits."""


@torch.inference_mode()
def _found_head(model: Any) -> Head:
    """Hold the known heads against the model's own, on a few hidden states; no layer is computed, nothing is counted."""
    embedding, heads = model.get_output_embeddings(), list(_known_heads(model.config.get_text_config()))
    dtype, device = embedding.weight.dtype, embedding.weight.device
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, embedding.weight.shape[1], generator=generator).to(device, dtype)
    finite = embedding(hidden).isfinite()
    if not finite.any():  # there is nothing to compare, and no number of this model will count
        return heads[-1]
    hidden = hidden * (_PROBED / embedding(hidden)[finite].float().std()).to(dtype)  # so large that a cap shows
    raw = embedding(hidden)
    raw = raw if raw.dtype == torch.float64 else raw.float()
    with _giving(decoder(model), hidden):
        ids = torch.zeros(1, 4, dtype=torch.long, device=device)
        own = model.forward(input_ids=ids, use_cache=False).logits
    own = own[finite].to(raw.dtype)
    furthest = []
    for head in heads:
        furthest.append(float((head(raw)[finite] - own).abs().max() / own.abs().max()))
        if furthest[-1] < _TOLERANCE.get(dtype, 0.02):
            return head
    raise ModelError(
        f"model {model.config.model_type}: its logits are not those of its output embedding (they differ by "
        f"{min(furthest):.0%} or more), so packed scoring and perplexity would be of another model; "
        "take eval.scoring=stock, and tasks without a text"
    )


_PROBED = 20.0
"""Standard deviation of the logits that heads are compared on."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the largest logit; the others round it to three digits."""


@contextmanager
def _giving(module: nn.Module, hidden: Tensor) -> Iterator[None]:
    """A decoder that computes nothing and gives these hidden states; its hooks do not see it."""
    before = {name: vars(module).get(name) for name in ("forward", "_forward_pre_hooks", "_forward_hooks")}
    vars(module).update(forward=lambda *args, **kwargs: _Given(hidden), _forward_pre_hooks={}, _forward_hooks={})
    try:
        yield
    finally:
        vars(module).update(before)
        if before["forward"] is None:
            del module.forward


class _Given:
    """What a decoder gives, all of it absent but the hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: Any) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


def slice_tokens(model: Any) -> int:
    """How many tokens' logits are held at once."""
    vocab = int(model.get_output_embeddings().weight.shape[0])
    return max(1, SLICE_ELEMENTS // vocab)


def _part_tokens(model: Any) -> int:
    """How many tokens' logits are read at once."""
    vocab = int(model.get_output_embeddings().weight.shape[0])
    return max(1, CACHE_ELEMENTS // vocab) if model.device.type == "cpu" else slice_tokens(model)


def _parts(model: Any, hidden: Tensor) -> Iterator[Tensor]:
    """Logits of [tokens, hidden], a few tokens at a time; they may be overwritten."""
    part = _part_tokens(model)
    for states in hidden.split(max(1, slice_tokens(model) // part) * part):
        yield from (_widened(model, logits) for logits in model.get_output_embeddings()(states).split(part))


def divergence(model: Any, dense: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    """How far the next-token distributions of two hidden states are apart.

    Args:
        model: a causal language model of transformers; its output embedding is used for both.
        dense, sparse: [tokens, hidden], last hidden states.

    Returns:
        KL(dense ‖ sparse) [tokens] in nats, float64; whether the most likely tokens are the same, [tokens] bool.
    """
    step = max(1, slice_tokens(model) // 4)  # four tensors of this size are alive
    found, same = [], []
    for one, other in zip(dense.split(step), sparse.split(step), strict=True):
        p, q = (token_logits(model, hidden).log_softmax(-1) for hidden in (one, other))
        same.append(p.argmax(-1) == q.argmax(-1))
        found.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
    return torch.cat(found), torch.cat(same)


def token_logprobs(model: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and whether it is the most likely token.

    Args:
        model: a causal language model of transformers.
        hidden: [tokens, hidden], last hidden states.
        targets: [tokens], the token that each position should predict.

    Returns:
        log-probabilities [tokens], fp32 (float64 for a float64 model), natural logarithm; greedy [tokens] bool.
    """
    parts = zip(_parts(model, hidden), targets.split(_part_tokens(model)), strict=True)
    found = [_read(logits, torch.arange(len(wanted), device=hidden.device), wanted) for logits, wanted in parts]
    logprobs, greedy = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(greedy)


def target_logprobs(
    model: Any, hidden: Tensor, cells: NDArray[np.int64], targets: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` where several targets may share a cell, as the first tokens of an item's choices do.

    Args:
        model: a causal language model of transformers.
        hidden: [tokens, hidden], last hidden states.
        cells: [k], places in `hidden`; the logits of each are computed once.
        targets: [k], tokens.

    Returns:
        log-probabilities [k]; greedy [k].
    """
    places, back = np.unique(cells, return_inverse=True)
    order = np.argsort(back, kind="stable")
    part, device = _part_tokens(model), hidden.device
    which, target, position = torch.from_numpy(np.stack([back[order], targets[order], np.argsort(order)])).to(device)
    starts = np.searchsorted(back[order], np.arange(0, len(places) + part, part)).tolist()
    found = []
    for at, logits in enumerate(_parts(model, hidden[torch.from_numpy(places).to(device)])):
        of = slice(starts[at], starts[at + 1])
        found.append(_read(logits, which[of] - at * part, target[of]))
    logprobs, greedy = zip(*found, strict=True)
    return torch.cat(logprobs)[position], torch.cat(greedy)[position]


def _read(logits: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of tokens [k] by rows [k] of logits [n, vocab], and whether each is the most likely; overwrites logits."""
    top, likeliest = logits.max(-1)
    chosen = logits[rows, tokens]
    total = logits.sub_(top[:, None]).exp_().sum(-1).log_() + top
    return chosen - total[rows], likeliest[rows] == tokens
