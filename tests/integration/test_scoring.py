"""Packed scoring gives the log-likelihoods of lm-eval's own path."""

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from nmsweep.evaluate import packing, scoring
from nmsweep.evaluate.lm import NMSweepLM
from nmsweep.evaluate.packing import Request
from nmsweep.models.tiny import tiny_model, tiny_tokenizer
from nmsweep.sparsity.install import sparsify

SHAPES = ["tiny-llama", "tiny-qwen2", "tiny-gemma3"]  # Gemma3's sliding window is 16 tokens, shorter than most contexts
Answers = list[tuple[float, bool]]
SHOTS = 150


@pytest.fixture(autouse=True)
def _small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the few shared examples of these tests be worth the key-value cache."""
    monkeypatch.setattr(packing, "ROW_TOKENS", 64)
    monkeypatch.setattr(packing, "PREFIX_TOKENS", 64)


def requests(seed: int = 0, n_items: int = 6) -> list[Request]:
    """Choices of one context, one continuation of two contexts, one token, equal ones, passages, few-shot examples."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(3, 259) for _ in range(draw.randint(low, high))]

    found: list[Request] = [(None, [2], tokens(1, 6)), (None, tokens(30, 30), tokens(25, 25))]
    for _ in range(n_items):
        context = tokens(1, 50)
        found += [(None, context, tokens(1, 9)) for _ in range(4)]
        found += [(None, context, [token]) for token in tokens(2, 2)]
        passage, ending = tokens(20, 30), tokens(3, 8)
        found += [(None, [*passage, *option], ending) for option in (tokens(1, 3), tokens(1, 3))]
    found += found[5:8]
    shots = tokens(SHOTS, SHOTS)
    found += [(None, [*shots, *tokens(20, 30)], tokens(1, 4)) for _ in range(3 * n_items)]
    draw.shuffle(found)
    return found


def scored(
    model: Any,
    asked: Sequence[Request],
    how: str = "packed",
    batch_tokens: int = 2048,
    max_length: int | None = None,
    **options: Any,
) -> Answers:
    lm = NMSweepLM(model, tiny_tokenizer("tiny-llama"), batch_tokens, lambda n: None, scoring=how, **options)  # type: ignore[arg-type]
    lm._max_length = max_length
    return lm._loglikelihood_tokens(asked)


def furthest(a: Answers, b: Answers) -> float:
    """The largest difference of two sets of log-likelihoods; the flags have to be equal."""
    assert [flag for _, flag in a] == [flag for _, flag in b]
    return max(abs(x - y) for (x, _), (y, _) in zip(a, b, strict=True))


def tiny(shape: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    model = tiny_model(shape, 0, dtype, torch.device("cpu"))
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_equals_stock(shape: str, attention: str) -> None:
    model = tiny(shape, attention=attention)
    assert furthest(scored(model, requests()), scored(model, requests(), "stock")) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_equals_stock_in_float64(shape: str) -> None:
    model = tiny(shape, torch.float64)
    assert furthest(scored(model, requests()), scored(model, requests(), "stock")) < 1e-9


def test_these_requests_have_rows_of_every_kind() -> None:
    groups = packing.pack(packing.queries(requests(), 4096), 3000.0, 2048)
    assert sorted(len(group.prefix) for group in groups) == [0, SHOTS]
    assert {row.branches for row in groups[0].rows} == {True, False}


SPARSE: dict[str, Callable[[Any], AbstractContextManager[object]]] = {
    "dense": lambda model: nullcontext(),
    "act": lambda model: sparsify(model),
    "shift+var": lambda model: sparsify(model, mitigation="shift+var"),
}


@pytest.mark.parametrize("method", ["act", "shift+var"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_equals_stock_in_float64(shape: str, method: str) -> None:
    model = tiny(shape, torch.float64)
    with SPARSE[method](model):
        assert furthest(scored(model, requests()), scored(model, requests(), "stock")) < 1e-6


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("shape", SHAPES)
def test_budget_and_order_change_nothing_in_float64(shape: str, method: str) -> None:
    model, asked = tiny(shape, torch.float64), requests()
    order = random.Random(1).sample(range(len(asked)), len(asked))
    with SPARSE[method](model):
        base = scored(model, asked, batch_tokens=4096)
        for budget in (512, 32768):
            assert furthest(scored(model, asked, batch_tokens=budget), base) < 1e-6
        shuffled = scored(model, [asked[i] for i in order])
    assert furthest(shuffled, [base[i] for i in order]) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_length", [9, 32, 160])
def test_long_contexts_are_cut_as_stock_cuts_them(shape: str, max_length: int) -> None:
    model = tiny(shape, torch.float64)
    asked = [request for request in requests() if len(request[2]) <= max_length]
    packed = scored(model, asked, max_length=max_length)
    assert furthest(packed, scored(model, asked, "stock", max_length=max_length)) < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_one_row_each_equals_stock(shape: str) -> None:
    model = tiny(shape, torch.float64)
    alone = scored(model, requests(), across_tokens=True)
    assert furthest(alone, scored(model, requests(), "stock")) < 1e-9


def test_shared_examples_are_computed_once() -> None:
    shots = list(range(3, 203)) * 2
    asked: list[Request] = [(None, [*shots, *range(3 + i, 43 + i)], [7, 8]) for i in range(60)]
    lm = NMSweepLM(tiny("tiny-llama"), tiny_tokenizer("tiny-llama"), 4096, lambda n: None)
    lm._loglikelihood_tokens(asked)
    assert lm.n_tokens == len(shots) + 60 * 41


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], bool]], list[int]]:
    """Let forward passes of the packed path fail for want of memory as a rule on their padded tokens says."""
    forward = scoring.decoder

    def rule(fails: Callable[[int], bool]) -> list[int]:
        sizes: list[int] = []

        def decoder(model: Any) -> Any:
            inner = forward(model)

            def call(**inputs: Any) -> Any:
                size = inputs["input_ids"].numel()
                sizes.append(size)
                if fails(size):
                    if len(sizes) % 2:
                        raise torch.OutOfMemoryError("CUDA out of memory")
                    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
                return inner(**inputs)

            call.parameters = inner.parameters  # type: ignore[attr-defined]
            call.rotary_emb = inner.rotary_emb  # type: ignore[attr-defined]
            return call

        monkeypatch.setattr(scoring, "decoder", decoder)
        return sizes

    return rule


@pytest.mark.parametrize("seed", range(4))
def test_running_out_of_memory_at_random_loses_no_item(seed: int, memory: Any) -> None:
    model, draw = tiny("tiny-gemma3", torch.float64), random.Random(seed)
    base = scored(model, requests())
    left = 6

    def fails(size: int) -> bool:
        nonlocal left
        left -= (hit := left > 0 and size > 300 and draw.random() < 0.4)
        return hit

    memory(fails)
    assert furthest(scored(model, requests()), base) < 1e-6


def test_the_budget_falls_to_what_fits_and_no_further(memory: Any) -> None:
    model = tiny("tiny-llama", torch.float64)
    base = scored(model, requests())
    sizes = memory(lambda size: size > 400)
    lm = NMSweepLM(model, tiny_tokenizer("tiny-llama"), 4096, lambda n: None)
    assert furthest(lm._loglikelihood_tokens(requests()), base) < 1e-6
    assert 200 <= lm.budget.tokens <= 512
    assert sum(size > 400 for size in sizes) <= 4
    assert "after memory ran out" in lm.how()
    assert str(lm.budget.tokens) in lm.how()


def test_memory_too_small_for_the_prefix_recomputes_it(memory: Any) -> None:
    model = tiny("tiny-llama", torch.float64)
    base, calls = scored(model, requests()), 0

    def fails(size: int) -> bool:
        nonlocal calls
        calls += size == SHOTS
        return size == SHOTS and calls == 1

    memory(fails)
    assert furthest(scored(model, requests()), base) < 1e-6
    assert calls


def test_memory_too_small_for_one_sequence_is_an_error(memory: Any) -> None:
    memory(lambda size: True)
    with pytest.raises(RuntimeError, match="memory"):
        scored(tiny("tiny-llama"), requests())


def test_another_error_is_not_taken_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(scoring, "_target_logprobs", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        scored(tiny("tiny-llama"), requests())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-gemma3"])
def test_what_is_not_finite_comes_out_as_nan(shape: str, bad: float) -> None:
    model = tiny(shape)
    asked = [request for request in requests() if 99 in request[1]]
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = bad
        answers = scored(model, asked)
    assert all(math.isnan(value) for value, _ in answers)


def test_the_record_says_how_it_was_scored() -> None:
    model, tokenizer = tiny("tiny-llama"), tiny_tokenizer("tiny-llama")

    def how(**options: Any) -> str:
        return NMSweepLM(model, tokenizer, 64, lambda n: None, **options).how()

    assert how() == "packed, 64 tokens a batch"
    assert how(scoring="stock") == "stock, 64 tokens a batch"
    assert how(across_tokens=True).startswith(
        "packed, but one continuation a row: what is pruned depends on other tokens"
    )
    model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2 attention takes no mask of its own" in how()
