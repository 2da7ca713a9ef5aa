"""WikiText-2 perplexity of a real model against an independent implementation: plain transformers, NumPy masks."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nmsweep.models import ModelSpec, load_model
from nmsweep.results.record import cell_folders, read_cell

N_WINDOWS, SEQLEN = 3, 512


def numpy_keep(x: np.ndarray, n: int, m: int) -> np.ndarray:
    """Set all but the n largest |x| of each m consecutive channels to zero; ties keep the lower channel."""
    groups = np.abs(x).reshape(-1, m)
    order = np.argsort(-groups, axis=1, kind="stable")
    mask = np.zeros_like(groups, dtype=bool)
    np.put_along_axis(mask, order[:, :n], True, axis=1)
    return np.where(mask.reshape(x.shape), x, 0)


def independent_perplexity(
    model: torch.nn.Module, tokenizer: object, text: str, pattern: tuple[int, int] | None
) -> float:
    """Return exp of the mean loss, with a plain hook that prunes the input of each projection of each block."""
    hooks = []
    if pattern:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith("_proj"):
                hooks.append(
                    module.register_forward_pre_hook(
                        lambda _, args: (torch.from_numpy(numpy_keep(args[0].numpy(), *pattern)),)
                    )
                )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    total = 0.0
    with torch.no_grad():
        for start in range(0, N_WINDOWS * SEQLEN, SEQLEN):
            window = torch.tensor([ids[start : start + SEQLEN]])
            total += float(model(input_ids=window, labels=window).loss) * (SEQLEN - 1)
    for hook in hooks:
        hook.remove()
    return math.exp(total / (N_WINDOWS * (SEQLEN - 1)))


def wikitext(mirror: Path) -> str:
    lines = (mirror / "wikitext2" / "test.txt").read_bytes().decode().split("\n")
    assert lines[-1] == ""
    return "\n\n".join("" if not line.strip() else line + "\n" for line in lines[:-1])


@pytest.mark.network
def test_dense_and_8_16_perplexity_equal_an_independent_computation(
    nmsweep: Callable[..., tuple[int, str, str]], results: Path, real_mirror: Path
) -> None:
    words = (
        f"eval.seqlen={SEQLEN}",
        f"eval.limit={N_WINDOWS}",
        "tasks=wikitext2",
        f"data.mirror={real_mirror}",
        f"results_dir={results}",
    )
    code, _, err = nmsweep("dtype=float32", "device=cpu", "pattern=8:16", *words)
    assert code == 0, err
    ours = {
        record.metrics["pattern"].iloc[0]: record.metrics["value"].iloc[0]
        for record in map(read_cell, cell_folders(results))
    }

    from nmsweep.config.compose import cells_of

    (cfg,) = cells_of([], multirun=False, config_dir=None)
    loaded = load_model(ModelSpec.from_node(cfg.model), dtype="float32", device="cpu")
    text = wikitext(real_mirror)
    for name, pattern in (("dense", None), ("8:16", (8, 16))):
        theirs = independent_perplexity(loaded.model, loaded.tokenizer, text, pattern)
        assert ours[name] == pytest.approx(theirs, rel=1e-3)
    assert ours["dense"] < ours["8:16"], "the two are different numbers, so the comparison can fail"
