"""Every backend against the reference: the same mask to the bit, the same output."""

import importlib.util
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nmsweep.errors import InputError
from nmsweep.kernels import prune, prune_with_mask
from nmsweep.kernels.reference import make

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
BACKENDS = [
    "cpu",
    pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")),
]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, except that a NaN is a NaN."""
    bits = a.dtype if a.dtype == torch.bool else BITS[a.dtype]
    equal = a.view(bits) == b.view(bits)
    return a.shape == b.shape and a.dtype == b.dtype and bool((equal | (a != a) & (b != b)).all())


def agree(backend: str, x: Tensor, **call: Any) -> None:
    expected, mask = prune_with_mask(x, backend="reference", **call)
    counts = torch.zeros(2, dtype=torch.int64)
    u, found = prune_with_mask(x, backend=backend, counts=counts, **call)
    alone = prune(x, backend=backend, **call)
    assert torch.equal(found, mask)
    assert counts.tolist() == [int(mask.sum()), mask.numel()]
    assert same(u, alone)
    if call.get("var"):
        # sums in another order, of bfloat16s in fp32: ν may differ in its last bits, and a rounding with it
        assert torch.equal(u != u, expected != expected)
        tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[x.dtype]
        finite = expected.isfinite() & u.isfinite()
        torch.testing.assert_close(u[finite], expected[finite], rtol=tolerance, atol=tolerance)
    else:
        assert same(u, expected)


CALLS: dict[str, dict[str, Any]] = {
    "2:4": {"n": 2, "m": 4},
    "1:8": {"n": 1, "m": 8},
    "8:16": {"n": 8, "m": 16},
    "12:16": {"n": 12, "m": 16},
    "16:32": {"n": 16, "m": 32},
    "3:6": {"n": 3, "m": 6},
    "5:12": {"n": 5, "m": 12},
    "1:1": {"n": 1, "m": 1},
    "32:64": {"n": 32, "m": 64},
    "50%": {"kept": 96},
    "1 of all": {"kept": 1},
    "weight": {"n": 2, "m": 4, "weight": "hidden"},
    "weight a sequence": {"n": 8, "m": 16, "weight": "batch"},
    "weight a token": {"n": 3, "m": 6, "weight": "token"},
    "median": {"n": 8, "m": 16, "eta": "median"},
    "mean": {"n": 2, "m": 4, "eta": "mean"},
    "scalar": {"n": 2, "m": 4, "eta": "scalar"},
    "vector": {"n": 8, "m": 16, "eta": "vector"},
    "var": {"n": 2, "m": 4, "var": True},
    "median+var": {"n": 8, "m": 16, "eta": "median", "var": True},
    "vector+var+weight": {"n": 3, "m": 6, "eta": "vector", "var": True, "weight": "hidden"},
    "50%+weight": {"kept": 96, "weight": "batch"},
    "50%+median": {"kept": 95, "eta": "median"},
    "50%+mean+var": {"kept": 100, "eta": "mean", "var": True},
    "50%+vector+var+weight": {"kept": 96, "eta": "vector", "var": True, "weight": "token"},
}


def arguments(call: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """A call of CALLS with its tensors in place of their names."""
    random = torch.Generator().manual_seed(7)
    shapes = {"hidden": x.shape[-1:], "batch": (x.shape[0], x.shape[-1]), "token": x.shape}
    made = dict(call)
    if "weight" in call:
        made["weight"] = torch.rand(shapes[call["weight"]], generator=random)
    if call.get("eta") == "scalar":
        made["eta"] = torch.tensor(0.25)
    if call.get("eta") == "vector":
        made["eta"] = torch.randn(x.shape[-1], generator=random)
    return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_a_backend_agrees_with_the_reference(name: str, dtype: torch.dtype, backend: str) -> None:
    x = draw(2, 3, 192, dtype=dtype)
    x[0, 0, :8] = x[0, 0, 8:16]  # ties across groups, and within
    x[0, 1] = torch.randint(-2, 3, (192,)).to(dtype)
    agree(backend, x, **arguments(CALLS[name], x))


PARTS = ["gain of each value", "scale and gain", "scale and fp32 gain"]
"""What the tensor to prune can be made of beside x; `parts` draws it."""


def parts(name: str, x: Tensor) -> dict[str, Tensor]:
    if "each value" in name:
        return {"gain": draw(*x.shape, dtype=x.dtype, seed=9)}
    scale = draw(*x.shape[:-1], 1, dtype=torch.float32, seed=8).abs()
    return {"scale": scale, "gain": draw(x.shape[-1], dtype=torch.float32 if "fp32" in name else x.dtype, seed=9)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", PARTS)
def test_a_tensor_in_parts_is_pruned_as_the_tensor_that_they_make(name: str, dtype: torch.dtype, backend: str) -> None:
    x = draw(2, 2, 96, dtype=dtype)
    made = make(x, **{"scale": None, "gain": None, **parts(name, x)})
    for call in ("8:16", "3:6", "50%", "weight a sequence", "median+var"):
        given = arguments({**CALLS[call], "kept": 48} if "kept" in CALLS[call] else CALLS[call], x)
        u = prune(x, backend=backend, **parts(name, x), **given)
        assert same(u, prune(made, backend=backend, **given))
        expected, mask = prune_with_mask(x, backend="reference", **parts(name, x), **given)
        assert same(u, expected) or "var" in given
        assert torch.equal(u == expected, (u == expected) | ~mask)  # whatever ν is, what is pruned is η


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter is numpy
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PARTS)
def test_special_values_in_parts_agree(name: str, backend: str) -> None:
    random = torch.Generator().manual_seed(1)
    values = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (4, 192), generator=random)]
    for dtype in (torch.bfloat16, torch.float32):
        x = values.to(dtype)[None]
        given = parts(name, x)
        if "scale" in given:
            given["scale"][0, :4, 0] = torch.tensor([math.inf, math.nan, 0.0, 1e-30])
        for call in ("2:4", "16:32", "50%", "weight", "median"):
            agree(backend, x, **given, **arguments(CALLS[call], x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_any_strides_agree(backend: str) -> None:
    wide, other = draw(4, 6, 200), draw(6, 4, 400, seed=3)
    for gain in (other.transpose(0, 1)[..., 1:193], other.transpose(0, 1)[..., :384:2]):
        agree(backend, wide[..., 4:196], n=8, m=16, gain=gain)
    scale = draw(6, 4, 1, dtype=torch.float32).transpose(0, 1)
    agree(backend, wide[..., 4:196], n=8, m=16, gain=draw(193, seed=4)[1:], scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parts_are_what_the_modules_of_transformers_compute(dtype: torch.dtype) -> None:
    x, weight = draw(3, 5, 64, dtype=dtype), draw(64, dtype=dtype, seed=2)
    llama, gemma = LlamaRMSNorm(64, eps=1e-5).to(dtype), Gemma3RMSNorm(64, eps=1e-5).to(dtype)
    with torch.no_grad():
        llama.weight.copy_(weight)
        gemma.weight.copy_(weight)
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
        assert same(make(x, scale, weight), llama(x))
        assert same(make(x, scale, 1.0 + weight.float()), gemma(x))


def test_parts_that_do_not_fit_are_refused() -> None:
    x = draw(2, 3, 64)
    for wrong in (
        {"scale": torch.ones(2, 3, 1)},
        {"scale": torch.ones(2, 3), "gain": torch.ones(64)},
        {"scale": torch.ones(2, 3, 1).bfloat16(), "gain": torch.ones(64)},
        {"scale": torch.ones(2, 3, 1), "gain": torch.ones(32)},
        {"scale": torch.ones(2, 3, 1), "gain": torch.ones(64, dtype=torch.float64)},
        {"gain": torch.ones(2, 3, 64)},
        {"gain": torch.ones(64).bfloat16()},
    ):
        with pytest.raises(ValueError, match=r"prune: scale .* and gain .* for x"):
            prune(x, n=2, m=4, **wrong)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", ["8:16", "16:32", "50%", "median+var"])
def test_a_gpu_without_words_of_two_numbers_agrees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nmsweep.kernels.triton import backend as triton

    def refused(*args: Any) -> None:
        raise AssertionError("a kernel of words")

    monkeypatch.setattr(triton, "_knows_words", lambda device: False)
    monkeypatch.setattr(triton, "_launch_packed", refused)
    monkeypatch.setattr(triton, "packed_median_kernel", None)
    x = draw(2, 3, 192)
    agree("triton", x, **arguments(CALLS[name], x))
    agree("triton", x, **arguments(CALLS[name], x), **parts("scale and gain", x))


SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, -1e-40, 1e-45, 65504.0, 3e38, -3e38]


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter is numpy
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["2:4", "8:16", "3:6", "50%", "weight", "median", "mean", "median+var", "var"])
def test_special_values_agree(name: str, backend: str) -> None:
    random = torch.Generator().manual_seed(1)
    rows = [torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (192,), generator=random)] for _ in range(3)]
    rows += [torch.full((192,), math.nan), torch.zeros(192), torch.full((192,), -0.0), torch.full((192,), 3.0)]
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.stack(rows)[None].to(dtype)
        agree(backend, x, **arguments(CALLS[name], x))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_negative_zero_passes_where_nu_is_below_1(dtype: torch.dtype, backend: str) -> None:
    x = torch.tensor([3.0, 3.125] * 30 + [0.0, -0.0] * 2, dtype=dtype)[None]
    u = prune(x, n=2, m=4, var=True, backend=backend)
    assert 0 < u[0, 1] < 3.125
    assert u[0, 60:].signbit().tolist() == [False, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.1, 3.0, 60000.0])
def test_a_constant_token_keeps_its_values(value: float, backend: str) -> None:
    for dtype, eta in ((torch.bfloat16, None), (torch.float16, None), (torch.float32, None), (torch.bfloat16, "mean")):
        x = torch.full((2, 6 * 43), value, dtype=dtype)
        u, mask = prune_with_mask(x, n=3, m=6, eta=eta, var=True, backend=backend)
        assert same(u[mask], x[mask])


@pytest.mark.parametrize("share", [0.02, 1.0])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (5, 6), (3, 8), (8, 16), (16, 32), (63, 64)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_that_differ_in_their_last_bits_alone_are_told_apart(backend: str, n: int, m: int, share: float) -> None:
    x = draw(6, 960, dtype=torch.float32)
    near = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < share
    last = torch.randint(0, 9, x.shape, generator=torch.Generator().manual_seed(2)) * 2.0**-22
    x = torch.where(near, 0.7 + last, x)
    agree(backend, x, n=n, m=m, eta=torch.tensor(0.0))
    agree(backend, x, n=n, m=m, weight=1 + torch.arange(960) % 3 * 2.0**-20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1e-4), (0.0, 1e3), (1e3, 30.0), (2.6, 7e-4), (0.0, 1e-18), (0.0, 1e17)])  # fmt: skip
@pytest.mark.parametrize("eta", [None, "median", "mean"])
def test_nu_is_right_where_sums_in_fp32_would_not_be(
    eta: str | None, offset: float, scale: float, dtype: torch.dtype
) -> None:
    x = (draw(4, 8192, dtype=torch.float32) * scale + offset).to(dtype)
    if x.isfinite().all() and x.any():
        found, expected = (prune(x, n=1, m=4, eta=eta, var=True, backend=backend) for backend in ("cpu", "reference"))
        size = expected.double().abs().max().clamp(min=1e-300)
        torch.testing.assert_close(found / size, expected / size, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_odd_places_agree(backend: str) -> None:
    wide = draw(4, 6, 200)
    for x in (
        wide[::2, 1:5, 4:196],
        wide.transpose(0, 1)[..., :192],
        wide.flatten()[1:193],
        wide.flatten()[3:1155].view(3, 2, 192),
    ):
        agree(backend, x, n=8, m=16)
        agree(backend, x, n=2, m=4, eta="median")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_no_tokens(backend: str) -> None:
    u, mask = prune_with_mask(torch.empty(0, 5, 64), n=2, m=4, backend=backend)
    assert u.shape == mask.shape == (0, 5, 64)


def test_what_no_fast_backend_knows_goes_to_the_reference() -> None:
    for x, call in ((draw(2, 192, dtype=torch.float64), {"n": 2, "m": 4}), (draw(2, 192), {"n": 40, "m": 96})):
        assert same(prune(x, **call), prune(x, backend="reference", **call))


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"'cup' does not exist; did you mean cpu\?"):
        prune(draw(2, 64), n=2, m=4, backend="cup")
    monkeypatch.setenv("NMSWEEP_KERNEL", "cuda")
    with pytest.raises(InputError, match="'cuda' does not exist; "):
        prune(draw(2, 64), n=2, m=4)
    monkeypatch.setenv("NMSWEEP_KERNEL", "cpu")
    with pytest.raises(InputError, match=r"cpu cannot prune torch\.float64"):
        prune(draw(2, 64, dtype=torch.float64), n=2, m=4)


def test_all_kept_passes_bit_for_bit() -> None:
    x = draw(3, 64)
    x[0, 3] = -0.0
    for backend in ("reference", "cpu"):
        assert same(prune(x, n=4, m=4, eta="median", var=True, backend=backend), x)


def test_a_nan_never_becomes_a_number() -> None:
    x = draw(1, 64)
    x[0, 5] = math.nan
    for backend in ("reference", "cpu"):
        assert prune(x, n=2, m=4, backend=backend).isnan().sum() == 1
        assert prune(x, n=2, m=4, eta="median", backend=backend).isnan().sum() == 33, "each pruned channel, and itself"
