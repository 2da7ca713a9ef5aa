"""The compiled CPU backend against the reference, on whatever hypothesis thinks of."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmsweep.sparsity.kernels import prune

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NUMBERS = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, float("inf"), float("-inf"), float("nan"), 1e-42])
)

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
"""A network is compiled for each N and power of two above M: a second or less, once."""


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
    if draw(st.booleans()):
        call["weight"] = torch.rand(*draw(st.sampled_from([(hidden,), (tokens, hidden)])), generator=random)
    call["eta"] = draw(
        st.sampled_from([None, "median", "mean", torch.tensor(0.5), torch.randn(hidden, generator=random)])
    )
    return x.to(draw(st.sampled_from(DTYPES))), call


@settings(max_examples=150, deadline=None)
@given(calls())
def test_masks_and_outputs_are_those_of_the_reference(case: tuple[torch.Tensor, dict[str, Any]]) -> None:
    x, call = case
    u, mask = prune(x, backend="cpu", return_mask=True, **call)
    expected, expected_mask = prune(x, backend="reference", return_mask=True, **call)
    assert torch.equal(mask, expected_mask)
    assert torch.equal(u.isnan(), expected.isnan())
    assert torch.equal(u.nan_to_num(7.0).view(torch.uint8), expected.nan_to_num(7.0).view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(calls())
def test_exactly_n_of_each_m_are_kept(case: tuple[torch.Tensor, dict[str, Any]]) -> None:
    x, call = case
    _, mask = prune(x, return_mask=True, **call)
    n, m = (call["kept"], x.shape[-1]) if "kept" in call else (call["n"], call["m"])
    assert (mask.unflatten(-1, (-1, m)).sum(-1) == n).all()
