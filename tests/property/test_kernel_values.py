"""The compiled backends against the reference, on whatever hypothesis thinks of: the CPU's, and Triton's through its interpreter."""

import importlib.util
import os
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nmsweep.kernels import prune_with_mask
from nmsweep.kernels.reference import make

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ODD = [0.0, -0.0, 1.0, -1.0, 0.5, float("inf"), float("-inf"), float("nan"), 1e-42]
NUMBERS = st.one_of(st.floats(width=32), st.sampled_from(ODD))
WEIGHTS = [0.0, 1e-42, 0.5, 1.0, 3e38, float("inf"), float("nan")]

PAIRS = [
    (1, 1),
    (1, 2),
    (2, 3),
    (2, 4),
    (3, 4),
    (1, 5),
    (4, 8),
    (7, 9),
    (8, 16),
    (1, 31),
    (16, 32),
    (20, 40),
    (64, 64),
    (33, 66),
]
"""N and M, with M a power of two and not, up to and above the largest group that a network ranks."""


@st.composite
def calls(draw: st.DrawFn) -> tuple[torch.Tensor, dict[str, Any]]:
    """An input [tokens, hidden] of any values, and what is asked of the primitive."""
    n, m = draw(st.sampled_from(PAIRS))
    tokens, hidden = draw(st.integers(1, 4)), m * draw(st.integers(1, 5))
    few = draw(st.lists(NUMBERS, min_size=1, max_size=12))
    seed = draw(st.integers(0, 2**31))
    random = torch.Generator().manual_seed(seed)
    x = torch.tensor(few, dtype=torch.float32)[torch.randint(0, len(few), (tokens, hidden), generator=random)]
    if draw(st.booleans()):
        x = x + torch.randn(tokens, hidden, generator=random)
    call: dict[str, Any] = {"n": n, "m": m} if draw(st.booleans()) else {"kept": draw(st.integers(1, hidden))}
    x = x.to(draw(st.sampled_from(DTYPES)))
    weight_shape = draw(st.sampled_from([None, (hidden,), (tokens, hidden), (1, hidden)]))
    if weight_shape is not None:
        call["weight"] = torch.rand(*weight_shape, generator=random)
        odd = torch.tensor(WEIGHTS)[torch.randint(0, len(WEIGHTS), weight_shape, generator=random)]
        call["weight"] = torch.where(torch.rand(*weight_shape, generator=random) < 0.1, odd, call["weight"])
    call["eta"] = draw(
        st.sampled_from([None, "median", "mean", torch.tensor(0.5), torch.randn(hidden, generator=random)])
    )
    call["var"] = draw(st.booleans())
    if draw(st.booleans()):
        call["scale"] = torch.rand(tokens, 1, generator=random)
        call["gain"] = torch.randn(hidden, generator=random).to(draw(st.sampled_from([x.dtype, torch.float32])))
    if weight_shape == (1, hidden):  # of the one sequence
        x, call["weight"] = x[None], call["weight"]
        call = {key: value[None] if key == "scale" else value for key, value in call.items()}
    return x, call


def agree(backend: str, x: torch.Tensor, call: dict[str, Any]) -> None:
    u, mask = prune_with_mask(x, backend=backend, **call)
    expected, expected_mask = prune_with_mask(x, backend="reference", **call)
    assert torch.equal(mask, expected_mask)
    assert torch.equal(u.isnan(), expected.isnan())
    if call["var"]:  # ν is the root of float64 sums, which have an order, and what is pruned is the fill to the bit
        fills = ~mask
        assert torch.equal(_bits(u)[fills], _bits(expected)[fills])
        kept = mask & u.isfinite() & expected.isfinite()
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[x.dtype]
        z = (make(x, call.get("scale"), call.get("gain")).float() - expected.float())[kept].abs()
        near = (u.float() - expected.float())[kept].abs() <= tolerance * (expected.float()[kept].abs() + z) + 1e-6
        assert near.all()
    else:
        assert torch.equal(_bits(u), _bits(expected))


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num(7.0, float("inf"), float("-inf")).view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@settings(max_examples=150, deadline=None)
@given(calls())
def test_masks_and_outputs_are_those_of_the_reference(case: tuple[torch.Tensor, dict[str, Any]]) -> None:
    agree("cpu", *case)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs Triton's interpreter",
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which computes there, names each infinity and NaN
@settings(max_examples=40, deadline=None)
@given(calls())
def test_the_gpu_kernels_agree_too(case: tuple[torch.Tensor, dict[str, Any]]) -> None:
    assume(case[1].get("m", 1) <= 64)  # the reference takes the others
    agree("triton", *case)


@settings(max_examples=60, deadline=None)
@given(calls())
def test_exactly_n_of_each_m_are_kept(case: tuple[torch.Tensor, dict[str, Any]]) -> None:
    x, call = case
    _, mask = prune_with_mask(x, **call)
    n, m = (call["kept"], x.shape[-1]) if "kept" in call else (call["n"], call["m"])
    assert (mask.unflatten(-1, (-1, m)).sum(-1) == n).all()
