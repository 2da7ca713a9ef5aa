"""Time a decoder forward pass, sparse against dense, interleaved."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from nmsweep.bench.options import Count, Device, Dtype, Names, Patterns
from nmsweep.bench.timing import Contender, interleave, median_ms, peak_bytes, ratios
from nmsweep.cell.identity import model_spec
from nmsweep.config.compose import cells_of
from nmsweep.evaluate.logits import decoder
from nmsweep.models import load_model
from nmsweep.sparsity.api import sparsify
from nmsweep.sparsity.fusion import Forward, replaced


def run(
    *,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    model: str = "smollm2",
    batch: Count = 2,
    seqlen: Count = 512,
    pattern: Patterns = ("2:4", "8:16", "16:32"),
    criterion: Names = ("act",),
    mitigation: Names = ("none", "shift+var"),
    variants: str = "",
    targets: str = "all",
    rounds: Count = 7,
) -> list[dict[str, Any]]:
    """Time the decoder (no lm_head) of a model, dense and under each variant.

    Args:
        model, dtype: by name.
        device: where it runs.
        batch, seqlen: tokens of one pass.
        pattern, criterion, mitigation: every combination is a variant.
        variants: ``pattern/criterion/mitigation`` of each variant instead, joined by commas; empty for none.
        targets: the layers made sparse.
        rounds: measured rounds; every contender runs once in each.

    Returns:
        One row a variant: `ratio` (median over rounds of sparse/dense), its quartiles, `dense_ms`, and the ratio of
        peak memory (CUDA only).
    """
    (cfg,) = cells_of([f"model={model}", f"dtype={dtype}"], multirun=False, config_dir=None)
    loaded = load_model(model_spec(cfg), dtype=cfg.dtype, device=device).model
    generator = torch.Generator(device=device).manual_seed(0)
    vocabulary = loaded.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (batch, seqlen), device=device, generator=generator)
    body = decoder(loaded)

    @torch.inference_mode()
    def forward() -> None:
        body(input_ids=ids, use_cache=False)

    contenders = {"dense": Contender(forward)}
    methods = _listed(variants) or [(p, c, m) for p in pattern for c in criterion for m in mitigation]
    for share, chosen, corrected in methods:
        with sparsify(
            loaded, pattern=share, criterion=chosen, mitigation=corrected, targets=targets
        ) as sparse:  # computes once what depends on the weights alone
            layers, forwards = dict(sparse.layers), dict(sparse.joined)
        around = partial(_in_place, loaded, layers, forwards)
        contenders[f"{share}/{chosen}/{corrected}"] = Contender(forward, around)
    times = interleave(contenders, device, rounds)
    quartiles = ratios(times, "dense")
    memory = {name: peak_bytes(contender, device) for name, contender in contenders.items()}
    rows = []
    for method in methods:
        name = "/".join(method)
        middle, low, high = quartiles[name]
        rows.append(
            {
                "model": model, "dtype": dtype, "pattern": method[0], "criterion": method[1], "mitigation": method[2],
                "batch": batch, "seqlen": seqlen, "ratio": middle, "ratio_q1": low, "ratio_q3": high,
                "dense_ms": median_ms(times["dense"]),
                "memory_ratio": memory[name] / memory["dense"] if memory["dense"] else None, "rounds": rounds,
            }
        )  # fmt: skip
    return rows


def _listed(variants: str) -> list[tuple[str, str, str]]:
    """Read ``8:16/act/shift,2:4``; the criterion is `act` and the mitigation `none` where they are left out."""
    parts = [word.split("/", 2) for word in variants.split(",") if word]
    padded = [[*part, "", ""] for part in parts]
    return [(pattern, criterion or "act", mitigation or "none") for pattern, criterion, mitigation, *_ in padded]


@contextmanager
def _in_place(model: Any, layers: Mapping[str, nn.Module], forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Put sparse layers and forwards that were built before into the model, inside the block."""
    before = {name: model.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    try:
        with replaced(forwards):
            yield
    finally:
        for name, layer in before.items():
            model.set_submodule(name, layer)
