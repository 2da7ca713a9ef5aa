"""Packed scoring gives the log-likelihoods of lm-eval's own path."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from replay import Masks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from nmsweep.calibration.fit import fit
from nmsweep.calibration.text import cut
from nmsweep.config.catalogue import find_method, options
from nmsweep.config.schema import CalibrationConfig
from nmsweep.data.tasks import MINI_FOLDER, find_task
from nmsweep.errors import ModelError
from nmsweep.evaluate import logits, perplexity
from nmsweep.evaluate.lm import NMSweepLM
from nmsweep.evaluate.packed import packing, rows, scoring
from nmsweep.evaluate.packed.rows import Request
from nmsweep.evaluate.packed.segments import Segments
from nmsweep.methods.sparsification import build
from nmsweep.models import attention
from nmsweep.models.tiny import tiny_model, tiny_tokenizer
from nmsweep.sparsity.api import assemble, sparsify
from nmsweep.sparsity.install import SparseModel, install

SHAPES = ["tiny-llama", "tiny-qwen2", "tiny-gemma3"]  # Gemma3's sliding window is 16 tokens, shorter than most contexts
Answers = list[tuple[float, bool]]
SHOTS = 150


@pytest.fixture(autouse=True)
def _small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the few shared examples of these tests worth caching."""
    monkeypatch.setitem(scoring.PASS_TOKENS, "cpu", 16)


def requests(seed: int = 0, n_items: int = 6) -> list[Request]:
    """Draw choices of one context, a continuation of two contexts, single tokens, duplicates, passages, few-shot examples."""
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
    lm = NMSweepLM(model, tiny_tokenizer("tiny-llama"), batch_tokens, scoring=how, **options)  # type: ignore[arg-type]
    lm._max_length = max_length
    return lm._loglikelihood_tokens(asked)


def furthest(a: Answers, b: Answers) -> float:
    """Return the largest difference of two sets of log-likelihoods, whose flags must be equal."""
    assert [flag for _, flag in a] == [flag for _, flag in b]
    return max(abs(x - y) for (x, _), (y, _) in zip(a, b, strict=True))


@pytest.mark.parametrize(("shape", "by_runs"), [("tiny-llama", True), ("tiny-qwen2", True), ("tiny-gemma3", False)])
def test_fp32_attends_run_by_run_where_no_window_is_shorter(
    shape: str, by_runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention.register()
    batches = []
    attend = Segments.attend
    monkeypatch.setattr(Segments, "attend", lambda *args: batches.append(1) or attend(*args))
    asked = requests(n_items=3)
    for dtype, expected in ((torch.float32, by_runs), (torch.bfloat16, False)):
        model = tiny(shape, dtype)
        batches.clear()
        packed = scored(model, asked)
        assert bool(batches) == expected
        if dtype == torch.float32:
            assert furthest(packed, scored(model, asked, "stock")) < 1e-4


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


OTHER_HEADS = {
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "hyperclovax": {"logits_scaling": 0.3},
    "gemma2": {"final_logit_softcapping": 3.0},
}


def other_model(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    """Return a small random model of a family that transforms the output of its output embedding."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    ids = {"vocab_size": 260, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **sizes, **heads, **ids, **OTHER_HEADS[kind], initializer_range=0.3)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()


@pytest.mark.parametrize("kind", OTHER_HEADS)
def test_the_logits_are_transformed_as_the_model_does(kind: str) -> None:
    model = other_model(kind)
    assert furthest(scored(model, requests(n_items=2)), scored(model, requests(n_items=2), "stock")) < 1e-5


@pytest.mark.parametrize("kind", OTHER_HEADS)
def test_perplexity_is_of_the_models_own_logits(kind: str) -> None:
    model, source = other_model(kind), find_task("mini_prose", None)
    found = perplexity.perplexity(
        model, tiny_tokenizer("tiny-llama"), source, seqlen=64, limit=2, batch_tokens=128, bos=False,
    ).samples["nll"]  # fmt: skip
    ids = cut(source.files["test"].read_text(), tiny_tokenizer("tiny-llama"), 64, bos=False)[:2]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    assert found.tolist() == pytest.approx(by_hand.view(2, -1).sum(1).tolist(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_cannot_be_reproduced_are_refused(dtype: torch.dtype) -> None:
    model = tiny("tiny-llama", dtype)
    forward = model.forward

    def other(*args: Any, **inputs: Any) -> Any:
        found = forward(*args, **inputs)
        found.logits = 1.5 * found.logits
        return found

    model.forward = other
    with pytest.raises(ModelError, match=r"model llama: its logits are not those .*; take eval\.scoring=stock"):
        scored(model, requests(n_items=1))
    assert scored(model, requests(n_items=1), "stock")


def test_finding_the_head_counts_no_channel() -> None:
    model = tiny("tiny-llama")
    with sparsify(model, pattern="2:4") as layers:
        logits.token_logits(model, torch.zeros(3, 64))
        assert {layer.channels for layer in layers.counts()} == {0}
    assert "forward" not in vars(logits.decoder(model))


def test_these_requests_have_rows_of_every_kind() -> None:
    groups = packing.pack(rows.queries(requests(), 4096), packing.Cost(3000.0, 16), 2048)
    assert sorted(len(group.prefix) for group in groups) == [0, SHOTS]
    assert {row.branches for row in groups[0].rows} == {True, False}


def criteria() -> dict[str, Any]:
    """Return the class of every shipped criterion, by name."""
    return {
        option.name: type(build(find_method("criterion", option.name, {}))) for option in options("criterion").values()
    }


@contextmanager
def sparse(model: Any, method: str) -> Iterator[bool]:
    """Make a model sparse by a criterion, or by `act` with mitigations; yield whether it looks across tokens."""
    if method == "dense":
        yield False
        return
    criterion, mitigation = ("act", method) if method in ("shift+var", "larosa") else (method, "none")
    made, targets = assemble("8:16", criterion, mitigation, "all", {})
    ids = torch.randint(3, 259, (4, 32), generator=torch.Generator().manual_seed(0))
    state = fit(model, ids, made, targets, settings=CalibrationConfig(seqlen=32)).state if made.calibrated else {}
    with install(model, made, targets, state):
        yield made.criterion.across_tokens


METHODS = ["dense", "shift+var", *sorted(criteria())]


@pytest.mark.parametrize("method", ["act", "shift+var", "amber", "clact_causal", "clact"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_equals_stock_in_float64(shape: str, method: str) -> None:
    model = tiny(shape, torch.float64)
    with sparse(model, method) as across:
        ours = scored(model, requests(), across_tokens=across)
        assert furthest(ours, scored(model, requests(), "stock", across_tokens=across)) < 1e-6


def test_stock_batches_would_change_what_clact_prunes() -> None:
    model = tiny("tiny-llama", torch.float64)
    with sparse(model, "clact") as across:
        alone = scored(model, requests(), "stock", across_tokens=across)
        padded = scored(model, requests(), "stock", across_tokens=False)
    assert max(abs(x - y) for (x, _), (y, _) in zip(alone, padded, strict=True)) > 1e-3


@pytest.mark.parametrize(
    ("shape", "method"),
    [*(("tiny-llama", method) for method in METHODS), *(("tiny-gemma3", method) for method in ("dense", "shift+var"))],
)
def test_budget_and_order_change_nothing_in_float64(shape: str, method: str) -> None:
    model, asked = tiny(shape, torch.float64), requests(n_items=2)
    order = random.Random(1).sample(range(len(asked)), len(asked))
    with sparse(model, method) as across:
        base = scored(model, asked, batch_tokens=4096, across_tokens=across)
        for budget in (512, 32768):
            assert furthest(scored(model, asked, batch_tokens=budget, across_tokens=across), base) < 1e-6
        shuffled = scored(model, [asked[i] for i in order], across_tokens=across)
    assert furthest(shuffled, [base[i] for i in order]) < 1e-6


Counts = list[tuple[int, int]]


def counts_of(layers: SparseModel) -> Counts:
    """Return all and kept channels of each layer since the last call."""
    found = [(layer.channels, layer.kept) for layer in layers.counts()]
    layers.reset_counts()
    return found


def one_by_one(model: Any, asked: Sequence[Request], layers: SparseModel) -> Counts:
    """Return the counts when each distinct sequence is computed by itself."""
    counts_of(layers)
    with torch.no_grad():
        for query in rows.queries(asked, 4096):
            model(input_ids=torch.from_numpy(query.ids)[None])
    return counts_of(layers)


@pytest.mark.parametrize(
    ("shape", "pattern", "method", "scope"),
    [
        ("tiny-llama", "2:4", "act", "all"),
        ("tiny-llama", "2:4", "act", "skip_first:4"),
        ("tiny-gemma3", "2:4", "act", "skip_first:30"),
        ("tiny-qwen2", "25%", "act", "skip_first:50%"),
        ("tiny-llama", "threshold:50%", "act", "all"),
        ("tiny-qwen2", "2:4", "rsparse", "skip_first:4"),
        ("tiny-llama", "2:4", "clact", "all"),
    ],
)
def test_channels_are_those_of_each_sequence_by_itself(shape: str, pattern: str, method: str, scope: str) -> None:
    model, asked = tiny(shape, torch.float64), requests(n_items=2)
    criterion, mitigation = ("act", method) if method == "rsparse" else (method, "none")
    made, targets = assemble(pattern, criterion, mitigation, "all", {"rsparse": {"rank": 4}})
    ids = torch.randint(3, 259, (4, 32), generator=torch.Generator().manual_seed(0))
    state = fit(model, ids, made, targets, settings=CalibrationConfig(seqlen=32)).state if made.calibrated else {}
    across = made.criterion.across_tokens or scope.endswith("%")
    with install(model, made, targets, state, scope) as layers:
        wanted = one_by_one(model, asked, layers)
        for budget in (512, 4096, 32768):
            scored(model, asked, batch_tokens=budget, across_tokens=across)
            assert counts_of(layers) == wanted
        scored(model, asked[::-1], batch_tokens=700, across_tokens=across)
        assert counts_of(layers) == wanted
        scored(model, asked, "stock", across_tokens=across)
        assert [kept / channels for channels, kept in counts_of(layers)] == pytest.approx(
            [kept / channels for channels, kept in wanted], abs=0.01
        )


@pytest.mark.parametrize("scope", ["all", "prefill", "decode"])
def test_channels_of_generated_text_hold_no_padding(scope: str) -> None:
    model = tiny("tiny-llama", torch.float64)
    texts = ["Short.", "A longer text that goes on for a while."]
    asked = [Instance("generate_until", {}, (text, {"until": ["e", "q"], "max_gen_toks": 12}), 0) for text in texts]
    found = []
    with sparsify(model, pattern="1:4", scope=scope) as layers:
        for batch_tokens in (1, 4096):
            layers.reset_counts()
            NMSweepLM(model, tiny_tokenizer("tiny-llama"), batch_tokens).generate_until(asked)
            found.append([layer.channels // layer.in_features for layer in layers.counts()])
    for alone, together in zip(*found, strict=True):
        assert alone >= sum(map(len, texts))
        assert 0 <= together - alone <= len(texts), "but for the token that ends a text"


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_equals_the_harness_itself(shape: str) -> None:
    model = tiny(shape)
    harness = HFLM(pretrained=model, tokenizer=tiny_tokenizer("tiny-llama"), batch_size=8)
    theirs = harness._loglikelihood_tokens(requests(), disable_tqdm=True)
    assert furthest(scored(model, requests()), theirs) < 1e-4


@pytest.mark.parametrize("method", ["act", "shift+var", "amber"])
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-gemma3"])
def test_with_the_masks_of_stock_sparse_equals_stock(shape: str, method: str) -> None:
    model = tiny(shape)
    mitigation = "none" if method in criteria() else method
    with sparsify(model, criterion=method if method in criteria() else "act", mitigation=mitigation) as layers:
        asked, masks = requests(n_items=3), Masks(layers)
        with masks.recording():
            free = scored(model, asked, "stock")
        with masks.replaying():
            packed, stock = scored(model, asked), scored(model, asked, "stock")
        assert furthest(packed, stock) < 1e-4
        assert furthest(stock, free) < 1e-4, "the replayed masks are stock's own"
        with inverted(masks), masks.replaying():
            other = scored(model, asked)
    assert max(abs(a - b) for (a, _), (b, _) in zip(other, packed, strict=True)) > 1e-3


@contextmanager
def inverted(masks: Masks) -> Iterator[None]:
    """Invert every mask: a replay that ignores the masks would not notice."""
    recorded = masks._masks
    masks._masks = [{key: ~bits for key, bits in layer.items()} for layer in recorded]
    yield
    masks._masks = recorded


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-pair tokenizer with merges, small enough for the tiny models."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"])
    backend.train([str(MINI_FOLDER / "prose.txt")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=4096
    )


def test_tokens_that_merge_across_the_border_are_scored_as_stock_scores_them() -> None:
    tokenizer, model = merging_tokenizer(), tiny("tiny-llama")
    pairs = [
        (f"{start} {word[:cut]}", word[cut:] + end)
        for start, word, end in (("It was", "the", " rest"), ("She saw", "and", " then"), ("  Once", "there", " was"))
        for cut in range(1, len(word))
    ]
    pairs += [("A context that ends in spaces  ", "then"), ("", "no context at all"), ("It was", " the rest")]
    merged = [
        pair for pair in pairs
        if tokenizer("".join(pair))["input_ids"][: len(ids := tokenizer(pair[0])["input_ids"])] != ids
    ]  # fmt: skip
    assert len(merged) >= 3
    instances = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    ours = NMSweepLM(model, tokenizer, 512)
    assert furthest(ours.loglikelihood(instances), harness.loglikelihood(instances, disable_tqdm=True)) < 1e-4


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
    lm = NMSweepLM(tiny("tiny-llama"), tiny_tokenizer("tiny-llama"), 4096)
    lm._loglikelihood_tokens(asked)
    assert lm.n_tokens == len(shots) + 60 * 41


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], bool]], list[int]]:
    """Return a function that makes forward passes of the packed path run out of memory, by their padded tokens."""
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
def test_running_out_of_memory_at_random_loses_no_item(seed: int, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scoring.PASS_TOKENS, "cpu", 256)  # so that batches have many rows
    model, draw = tiny("tiny-gemma3", torch.float64), random.Random(seed)
    base = scored(model, requests())
    left = 6

    def fails(size: int) -> bool:
        nonlocal left
        left -= (hit := left > 0 and size > 200 and draw.random() < 0.7)
        return hit

    memory(fails)
    assert furthest(scored(model, requests()), base) < 1e-6
    assert left < 6


def test_the_budget_falls_to_what_fits_and_no_further(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scoring.PASS_TOKENS, "cpu", 2048)  # so that batches are as large as the budget allows
    model = tiny("tiny-llama", torch.float64)
    base = scored(model, requests())
    sizes = memory(lambda size: size > 400)
    lm = NMSweepLM(model, tiny_tokenizer("tiny-llama"), 4096)
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


def test_another_error_is_not_mistaken_for_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(scoring, "target_logprobs", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        scored(tiny("tiny-llama"), requests())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-gemma3"])
def test_non_finite_scores_become_nan(shape: str, bad: float) -> None:
    model = tiny(shape)
    asked = [request for request in requests() if 99 in request[1]]
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = bad
        answers = scored(model, asked)
    assert all(math.isnan(value) for value, _ in answers)


def test_the_record_says_how_it_was_scored() -> None:
    model, tokenizer = tiny("tiny-llama"), tiny_tokenizer("tiny-llama")

    def how(**options: Any) -> str:
        return NMSweepLM(model, tokenizer, 64, **options).how()

    assert how() == "packed, 64 tokens a batch"
    assert how(scoring="stock") == "stock, 64 tokens a batch"
    assert how(across_tokens=True).startswith(
        "packed, but one continuation a row: pruning a token depends on other tokens"
    )
    model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2 attention takes no custom mask" in how()


@pytest.mark.parametrize("criterion", criteria())
def test_no_criterion_writes_to_its_input(criterion: str) -> None:
    ids = torch.randint(3, 259, (1, 24), generator=torch.Generator().manual_seed(0))
    found = []
    for dtype in (torch.float32, torch.float64):  # a cast to float64 is no copy of a float64 tensor
        model = tiny("tiny-llama", dtype)
        with torch.no_grad(), sparse(model, criterion):
            found.append(model(input_ids=ids).logits.double())
    moved = (found[0] - found[1]).abs().amax(dim=-1)
    assert (moved < 1e-3).double().mean() > 0.8, "but for near-ties, fp32 prunes what float64 prunes"
