"""Packed scoring of trained models against lm-eval's own path, and both against float64."""

import random
from pathlib import Path

import agreement
import pytest
import torch

from nmsweep.bench.scoring import task_requests
from nmsweep.cell.identity import model_spec
from nmsweep.config.compose import cells_of
from nmsweep.data.tasks import find_task
from nmsweep.models import load_model

METHODS = [None, ("act", "none"), ("act", "shift+var"), ("amber", "none"), ("clact_causal", "none"), ("clact", "none")]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_trained_models_agree(name: str, real_mirror: Path) -> None:
    (cfg,) = cells_of([f"model={name}", "pattern=dense"], multirun=False, config_dir=None)
    exact, model = (load_model(model_spec(cfg), dtype=dtype, device="cpu") for dtype in ("float64", "float32"))
    agreement.keep_float64(exact.model)
    source = find_task("arc_easy", real_mirror)
    asked = task_requests(model.model, model.tokenizer, source, limit=6, num_fewshot=0)
    for method in METHODS:
        row64, answers64 = agreement.compare(exact, asked[:12], 4096, method, [])
        row32, _ = agreement.compare(model, asked, 4096, method, answers64)
        assert row64["packed_max"] < 1e-6
        assert row64["packed_flags"] == 0
        if method is None:
            assert row32["budget_max"] < 1e-3, "512, 4,096 and 32,768 tokens a batch"
            assert row32["budget_flags"] == 0
            assert row32["packed_max"] < 1e-3
            assert row32["packed_flags"] == 0
        elif method[0] not in agreement.ACROSS_TOKENS:
            assert row32["replayed_max"] < 1e-3
            assert row32["replayed_flags"] == 0


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_dense_answers_of_trained_models_depend_neither_on_budget_nor_on_order(name: str, real_mirror: Path) -> None:
    (cfg,) = cells_of([f"model={name}", "pattern=dense"], multirun=False, config_dir=None)
    model = load_model(model_spec(cfg), dtype="float32", device="cpu")
    source = find_task("arc_easy", real_mirror)
    asked = task_requests(model.model, model.tokenizer, source, limit=6, num_fewshot=0)
    found = agreement.budget_differences(model, asked, 4096)
    assert (found["budget_max"] < 1e-3, found["budget_flags"]) == (True, 0), "512, 4,096 and 32,768 tokens a batch"
    order = random.Random(0).sample(range(len(asked)), len(asked))
    base = agreement.answers(model, asked, "packed", 4096)
    shuffled = agreement.answers(model, [asked[at] for at in order], "packed", 4096)
    found = agreement.differences("order", [base[at] for at in order], shuffled)
    assert (found["order_max"] < 1e-3, found["order_flags"]) == (True, 0)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-gemma3"])
def test_a_float64_norm_keeps_its_digits(name: str) -> None:
    (cfg,) = cells_of([f"model={name}", "pattern=dense"], multirun=False, config_dir=None)
    model = load_model(model_spec(cfg), dtype="float64", device="cpu").model
    norm = next(module for module in model.modules() if type(module).__name__.endswith("RMSNorm"))
    x = torch.randn(5, norm.weight.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    scale = norm.weight + (1 if name == "tiny-gemma3" else 0)
    by_hand = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * scale
    assert (norm(x) - by_hand).abs().max() > 1e-9  # what transformers does
    agreement.keep_float64(model)
    torch.testing.assert_close(norm(x), by_hand, rtol=1e-13, atol=1e-13)
