"""Profiles, and the effect of the paper's lost bias on a Qwen2 model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from nmsweep.config.compose import cells_of
from nmsweep.methods.sparsification import build_sparsification
from nmsweep.models import ModelSpec, load_model
from nmsweep.sparsity.install import install

CLI = Callable[..., tuple[int, str, str]]


def one(*words: str) -> Any:
    [cfg] = cells_of(["model=tiny-qwen2", *words], multirun=False, config_dir=None)
    return cfg


@pytest.mark.parametrize(
    ("profile", "targets", "seqlen", "lr"),
    [("strict", ("all",), 2048, 1e-3), ("paper", ("paper",), 512, 1e-4), ("paper_code", ("paper",), 512, 1e-4)],
)
def test_a_profile_sets_values_and_words_on_the_command_line_win(
    profile: str, targets: tuple[str, ...], seqlen: int, lr: float
) -> None:
    cfg = one(f"profile={profile}")
    assert (cfg.targets, cfg.eval.seqlen, cfg.calibration.lr) == (targets, seqlen, lr)
    cfg = one(f"profile={profile}", "targets=mlp", "eval.seqlen=128", "calibration.lr=0.5")
    assert (cfg.targets, cfg.eval.seqlen, cfg.calibration.lr) == (("mlp",), 128, 0.5)


def test_every_profile_has_the_papers_shifts() -> None:
    for profile in ("strict", "paper", "paper_code"):
        shift, static = (
            one(f"profile={profile}", "mitigation=shift").mitigations[0],
            one(f"profile={profile}", "mitigation=shift_static").mitigations[0],
        )
        assert shift.params["stat"] == static.params["stat"] == "median"
        assert static.params["granularity"] == "layer"


def qwen_with_trained_like_biases() -> Any:
    """Give the keys a few biases far larger than the rest, as in a trained Qwen2."""
    model: Any = load_model(ModelSpec(name="q", source="tiny", shape="tiny-qwen2"), dtype="float32", device="cpu").model
    generator = torch.Generator().manual_seed(0)
    for block in model.model.layers:
        for projection in (block.self_attn.q_proj, block.self_attn.k_proj):
            few = torch.randperm(projection.bias.numel(), generator=generator)[:4]
            projection.bias.data[few] += 8.0 * torch.randn(4, generator=generator).sign()
    return model


def divergence(model: Any, pattern: str, targets: str, profile: str, ids: Tensor) -> float:
    """Return the mean KL(dense ‖ sparse) of the next token, in nats."""
    cfg = one(f"pattern={pattern}", f"targets={targets}", f"profile={profile}")
    made = build_sparsification(cfg.pattern, cfg.criterion, cfg.mitigations, drops_bias=profile == "paper_code")
    with torch.no_grad():
        dense = model(ids).logits.log_softmax(-1)
        with install(model, made, cfg.targets):
            sparse = model(ids).logits.log_softmax(-1)
    return float((dense.exp() * (dense - sparse)).sum(-1).mean())


def test_leaving_out_q_k_v_repairs_a_lost_bias_not_the_model() -> None:
    """Losing the bias without pruning does more harm than 16:32 with it; with the biases kept, q/k/v can be pruned."""
    model = qwen_with_trained_like_biases()
    ids = torch.randint(3, 259, (4, 48), generator=torch.Generator().manual_seed(1))
    kl = {
        (pattern, targets, profile): divergence(model, pattern, targets, profile, ids)
        for pattern in ("32:32", "16:32")
        for targets in ("all", "paper")
        for profile in ("strict", "paper_code")
    }
    assert kl["32:32", "all", "strict"] == kl["32:32", "paper", "paper_code"] == 0
    assert kl["32:32", "all", "paper_code"] > 2 * kl["16:32", "all", "strict"]
    assert kl["16:32", "paper", "paper_code"] == kl["16:32", "paper", "strict"]
    assert kl["16:32", "all", "strict"] < 0.5 * kl["16:32", "all", "paper_code"]


def test_the_study_is_one_command(nmsweep: CLI, results: Path) -> None:
    code, _, said = nmsweep(
        "experiment=lost_bias", "model=tiny-qwen2", "tasks=mini_prose", "eval.limit=1", "eval.seqlen=64", "dtype=float32",
        "pattern=32:32", f"results_dir={results}",
    )  # fmt: skip
    assert code == 0, said
    rows = pd.concat([pd.read_csv(file, keep_default_na=False) for file in results.glob("cells/*/metrics.csv")])
    rows = rows[rows["metric"] == "perplexity"]
    value = rows.set_index(["pattern", "targets", "profile"])["value"]
    dense = value["dense", "none", "strict"]
    assert value["32:32", "all", "strict"] == value["32:32", "paper", "paper_code"] == dense
    assert value["32:32", "all", "paper_code"] != dense
