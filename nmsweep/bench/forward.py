"""A decoder forward pass, sparse against dense, interleaved."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from nmsweep.bench.timing import Contender, interleave, peak_bytes, ratios
from nmsweep.evaluate.logits import decoder
from nmsweep.sparsity.api import sparsify
from nmsweep.sparsity.fusion import Forward, replaced


def run(
    model: Any,
    *,
    device: str,
    batch: int,
    seqlen: int,
    variants: Sequence[tuple[str, str, str]],
    rounds: int = 7,
    targets: str = "all",
) -> list[dict[str, Any]]:
    """Time the decoder (no lm_head) of a model, dense and under each variant.

    Args:
        model: a causal language model of transformers.
        device: what it is on.
        batch, seqlen: tokens of one pass.
        variants: (pattern, criterion, mitigation).
        rounds: measured rounds; every contender runs once in each.

    Returns:
        one row a variant: `ratio` (median over rounds of sparse/dense), its quartiles, `dense_ms`, and the ratio of
        peak memory (CUDA only).
    """
    ids = torch.randint(
        0, model.config.get_text_config().vocab_size, (batch, seqlen), device=device, generator=_generator(device)
    )
    body = decoder(model)

    @torch.inference_mode()
    def forward() -> None:
        body(input_ids=ids, use_cache=False)

    contenders = {"dense": Contender(forward)}
    names = {"|".join(variant): variant for variant in variants}
    for name, (pattern, criterion, mitigation) in names.items():
        with sparsify(
            model, pattern=pattern, criterion=criterion, mitigation=mitigation, targets=targets
        ) as sparse:  # what the weights alone decide is found out once
            layers, forwards = dict(sparse.layers), dict(sparse.joined)
        contenders[name] = Contender(forward, partial(_in_place, model, layers, forwards))
    times = interleave(contenders, device, rounds)
    found = ratios(times, "dense")
    memory = {name: peak_bytes(contender, device) for name, contender in contenders.items()}
    rows = []
    for name, (pattern, criterion, mitigation) in names.items():
        middle, low, high = found[name]
        rows.append(
            {
                "pattern": pattern,
                "criterion": criterion,
                "mitigation": mitigation,
                "batch": batch,
                "seqlen": seqlen,
                "ratio": middle,
                "ratio_q1": low,
                "ratio_q3": high,
                "dense_ms": 1e3 * times["dense"].median_s,
                "memory_ratio": memory[name] / memory["dense"] if memory["dense"] else None,
                "rounds": rounds,
            }
        )
    return rows


@contextmanager
def _in_place(model: Any, layers: Mapping[str, nn.Module], forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Layers and forwards that were made before stand in the model inside the block."""
    before = {name: model.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    try:
        with replaced(forwards):
            yield
    finally:
        for name, layer in before.items():
            model.set_submodule(name, layer)


def _generator(device: str) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(0)
