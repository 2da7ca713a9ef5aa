"""The Triton kernels on a real GPU: `pytest -m gpu`. Needs a CUDA device."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nmsweep.kernels import prune, prune_with_mask
from nmsweep.kernels.norms import channel_squares
from nmsweep.kernels.reference import make
from nmsweep.models import ModelSpec, load_model
from nmsweep.models.attention import sdpa
from nmsweep.sparsity.api import sparsify

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")]

CALLS: list[dict[str, Any]] = [
    {"n": 2, "m": 4}, {"n": 3, "m": 4}, {"n": 4, "m": 8}, {"n": 8, "m": 16}, {"n": 5, "m": 16}, {"n": 16, "m": 32}, {"n": 3, "m": 6},
    {"n": 32, "m": 64}, {"n": 40, "m": 96}, {"kept": 480}, {"n": 8, "m": 16, "weight": True}, {"n": 8, "m": 16, "eta": "median"},
    {"n": 2, "m": 4, "eta": "mean"}, {"n": 8, "m": 16, "var": True}, {"n": 16, "m": 32, "eta": "median", "var": True},
    {"kept": 480, "eta": "median", "var": True, "weight": True}, {"n": 3, "m": 6, "eta": "vector", "var": True},
    {"kept": 480, "weight": True}, {"kept": 333, "eta": "mean"}, {"kept": 480, "var": True}, {"kept": 479, "eta": "vector", "weight": "odd"},
    {"n": 8, "m": 16, "weight": "odd"}, {"n": 2, "m": 4, "weight": "odd", "var": True},
]  # fmt: skip


def rows(dtype: torch.dtype) -> Tensor:
    x = torch.randn(3, 5, 960, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    x[0, 0, :480] = x[0, 0, 480:]
    x[0, 1] = torch.randint(-2, 3, (960,), device="cuda").to(dtype)
    x[1, 0, ::7], x[1, 1, ::5], x[1, 2, 3] = float("nan"), float("inf"), float("-inf")
    x[2, 0], x[2, 1, ::3] = 0.0, -0.0
    smallest = {torch.bfloat16: 9.2e-41, torch.float16: 6e-8, torch.float32: 1.4e-45}[dtype]
    x[2, 2] = (torch.randint(-30, 30, (960,), device="cuda").double() * smallest).to(dtype)  # denormals
    return x


def weights(call: dict[str, Any]) -> Tensor:
    """[3, 960] fp32; the odd ones hold zeros, denormals, infinities and NaN."""
    made = torch.rand(3, 960, device="cuda")
    if call["weight"] == "odd":
        for at, value in enumerate([0.0, 1e-42, 1e-30, 3e38, float("inf"), float("nan")]):
            made[:, at::41] = value
    return made


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_masks_on_the_gpu_are_those_of_the_reference(call: dict[str, Any], dtype: torch.dtype) -> None:
    x = rows(dtype)
    made = dict(call)
    if "weight" in call:
        made["weight"] = weights(call)
    if call.get("eta") == "vector":
        made["eta"] = torch.randn(960, device="cuda")
    counts = torch.zeros(2, dtype=torch.int64, device="cuda")
    u, mask = prune_with_mask(x, **made)
    expected, expected_mask = prune_with_mask(x, backend="reference", **made)
    assert torch.equal(mask, expected_mask)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype] if call.get("var") else 0.0
    torch.testing.assert_close(u, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(prune(x, counts=counts, **made), u, rtol=0, atol=0, equal_nan=True)
    assert counts.tolist() == [int(mask.sum()), mask.numel()]


def test_a_single_group_is_pruned() -> None:
    for m in (16, 64):
        x = torch.randn(1, m, device="cuda").bfloat16()
        for more in ({}, {"weight": torch.rand(m, device="cuda")}):
            call: dict[str, Any] = {"n": m // 2, "m": m, **more}
            torch.testing.assert_close(prune(x, **call), prune(x, backend="reference", **call), rtol=0, atol=0)


@pytest.mark.parametrize("hidden", [2, 7, 96, 960, 4097, 14336, 28672, 65536])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_without_groups_is_exact_whatever_its_length(hidden: int, dtype: torch.dtype) -> None:
    x = torch.randn(16, hidden, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    x[1], x[2, ::2], x[3] = x[1].round(), 0.0, 1.0
    weight = torch.rand(hidden, device="cuda")
    for kept in {1, hidden // 2, hidden - 1}:
        for more in ({"weight": weight}, {"weight": torch.ones_like(weight)}, {"weight": weight, "eta": "median"}):
            call: dict[str, Any] = {"kept": kept, **more}
            _, mask = prune_with_mask(x.to(dtype), **call)
            assert torch.equal(mask, prune_with_mask(x.to(dtype), backend="reference", **call)[1])


@pytest.mark.parametrize("hidden", [64, 4096, 14336, 28672])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kth_lowest_of_a_token_is_exact_on_the_gpu(hidden: int, dtype: torch.dtype) -> None:
    x = torch.randn(64, hidden, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    x[1, 3], x[2, 5], x[3, ::2], x[4] = float("nan"), float("inf"), -0.0, x[4].exp()
    x[5], x[6, :9], x[7:10] = x[5] ** 9, 1e4, x[7:10].round()
    calls: list[dict[str, Any]] = [{"n": 1, "m": 2, "eta": "median"}, *({"kept": n} for n in (hidden // 2, hidden - 1))]
    for call in calls:
        made = prune(x.to(dtype), **call)
        torch.testing.assert_close(
            made, prune(x.to(dtype), backend="reference", **call), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("call", [*CALLS[:5], *CALLS[7:12], CALLS[13], CALLS[14]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_tensor_in_parts_on_the_gpu_is_the_tensor_that_they_make(call: dict[str, Any], dtype: torch.dtype) -> None:
    x = rows(dtype)
    made = {**call, "weight": torch.rand(3, 960, device="cuda")} if "weight" in call else call
    scale = torch.rand(3, 5, 1, device="cuda")
    for gain in (torch.randn(960, device="cuda").to(dtype), torch.randn(960, device="cuda"), torch.randn_like(x)):
        given = {"gain": gain} if gain.ndim > 1 else {"gain": gain, "scale": scale}
        whole = make(x, given.get("scale"), gain)
        counts = torch.zeros(2, dtype=torch.int64, device="cuda")
        u = prune(x, counts=counts, **given, **made)
        torch.testing.assert_close(u, prune(whole, **made), rtol=0, atol=0, equal_nan=True)
        assert counts[1] == x.numel()


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen2", "tiny-gemma3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("mitigation", ["none", "shift+var"])
def test_joined_to_norms_and_products_a_model_computes_the_same_bits(shape: str, dtype: str, mitigation: str) -> None:
    model = load_model(ModelSpec(name="t", source="tiny", shape=shape), dtype=dtype, device="cuda").model
    ids = torch.randint(0, 250, (4, 96), device="cuda")
    with sparsify(model, pattern="8:16", mitigation=mitigation) as sparse, torch.inference_mode():
        assert len(sparse.joined) == 3 * len(model.get_decoder().layers)
        logits = model(ids).logits
        sparse.view.joins = False
        assert torch.equal(logits, model(ids).logits)


@pytest.fixture
def model() -> Any:
    return load_model(ModelSpec(name="t", source="tiny", shape="tiny-llama"), dtype="bfloat16", device="cuda").model


METHODS: list[dict[str, str]] = [
    {"criterion": "act"}, {"mitigation": "shift+var"}, {"criterion": "wina"}, {"criterion": "clact"}, {"criterion": "random"},
    {"scope": "skip_first:3"}, {"scope": "decode"}, {"pattern": "50%", "criterion": "wina"},
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_sparse_layers_never_wait_for_the_gpu(model: Any, method: dict[str, str]) -> None:
    with sparsify(model, **{"pattern": "8:16", **method}) as sparse, torch.inference_mode():
        inputs = {
            name: torch.randn(2, 32, layer.in_features, device="cuda").bfloat16()
            for name, layer in sparse.layers.items()
        }
        hidden = torch.randn(2, 32, model.config.hidden_size, device="cuda").bfloat16()

        def run() -> None:
            for name, layer in sparse.layers.items():
                layer(inputs[name])
            for module in sparse.joined:  # norms and MLPs
                module(hidden)

        run()
        torch.cuda.set_sync_debug_mode("error")  # the model around them waits by itself, for its attention mask
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("part", ["o_proj", "mlp"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_cuda_graph_replays_the_kernels(method: dict[str, str], part: str, model: Any) -> None:
    with sparsify(model, **{"pattern": "8:16", **method}), torch.inference_mode():
        block = model.model.layers[0]
        module = block.mlp if part == "mlp" else block.self_attn.o_proj
        width = model.config.hidden_size if part == "mlp" else module.in_features
        x = torch.randn(2, 32, width, device="cuda", dtype=torch.bfloat16)
        module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, module(x), rtol=0, atol=0)


def test_peak_memory_stays_near_dense(model: Any) -> None:
    ids = torch.randint(0, 200, (8, 1024), device="cuda")

    def peak() -> int:
        torch.cuda.reset_peak_memory_stats()
        model.get_decoder()(input_ids=ids, use_cache=False)
        return torch.cuda.max_memory_allocated()

    with torch.inference_mode():
        dense = peak()
        with sparsify(model, pattern="8:16", mitigation="shift+var"):
            assert peak() <= 1.1 * dense


def test_squares_on_the_gpu() -> None:
    x = torch.randn(3, 700, 200, device="cuda", dtype=torch.bfloat16)
    padding = torch.rand(3, 700, device="cuda") < 0.3
    expected = x.double().square().masked_fill(padding[..., None], 0.0).sum(1, keepdim=True)
    torch.testing.assert_close(channel_squares(x, padding), expected)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 33), (1, 40), (33, 33), (33, 50), (65, 70), (97, 97), (98, 98), (129, 129)]
)
def test_attention_with_one_key_head_is_right_at_every_length(
    queries: int, keys: int, width: int, dtype: torch.dtype, masked: bool
) -> None:
    if not masked and queries != keys:
        pytest.skip("torch's own causal mask is of a square")
    query = torch.randn(2, queries, 4, width, device="cuda", dtype=dtype).transpose(1, 2)
    key, value = torch.randn(2, 2, 1, keys, width, device="cuda", dtype=dtype)
    mask = torch.full((2, 1, queries, keys), float("-inf"), device="cuda", dtype=dtype).triu(keys - queries + 1)
    mask[1, :, :, 1:3] = float("-inf") if masked else mask[1, :, :, 1:3]
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = 4, True  # type: ignore[assignment]
    ours, _ = sdpa(layer, query, key, value, mask if masked else None, scaling=width**-0.5)
    scores = query.double() @ key.double().transpose(-1, -2) * width**-0.5 + mask
    by_hand = (scores.softmax(-1) @ value.double()).transpose(1, 2)
    torch.testing.assert_close(ours.double(), by_hand, rtol=0, atol=1e-4 if dtype == torch.float32 else 3e-2)
