"""Every criterion, mitigation and pattern against `numpy_reading`: masks equal, outputs to the rounding of the type."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy_reading import Array, Reading, amber, kernel_density_peak, sparsegpt, svd_product
from torch import Tensor, nn

from nmsweep.calibration.fit import SlotWindows
from nmsweep.config.catalogue import find_method
from nmsweep.config.pattern import parse_pattern
from nmsweep.methods.base import Layer, State, Tokens
from nmsweep.methods.mitigations.shift_static import mode
from nmsweep.methods.sparsification import Sparsification, build_sparsification
from nmsweep.methods.weights.sparsegpt import prune_columns
from nmsweep.sparsity.formula import pruned, rotated
from nmsweep.sparsity.linear import SparseLinear
from nmsweep.sparsity.scope import Scope
from nmsweep.sparsity.shared_input import SharedInput, TokenView

WIDTH, OUT, BATCH, SEQ = 48, 20, 2, 7
PATTERNS = ("1:4", "2:4", "3:4", "2:8", "50%", "4:4")
DTYPES = ("float32", "bfloat16", "float16", "float64")
LEARNED_AS = {"eta": "shift", "gamma": "scale", "beta": "bias"}


def make(pattern: str, criterion: str, mitigation: Sequence[str] = (), **params: Any) -> Sparsification:
    known = {name: {key: value for key, value in params.items() if key in find_method(group, name, {}).params} for group, name in
             [("criterion", criterion), *(("mitigations", word) for word in mitigation)]}  # fmt: skip
    return build_sparsification(
        parse_pattern(pattern),
        find_method("criterion", criterion, known[criterion]),
        [find_method("mitigations", name, known[name]) for name in mitigation],
    )


def inputs(dtype: str, seed: int = 0) -> Tensor:
    """Coarse values, so that ties are common; a group of zeros, a row of zeros, a constant row, a dead channel."""
    x = torch.randn(BATCH, SEQ, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[0, :3] = (x[0, :3] * 4).round() / 4
    x[0, 1, :16] = 0
    x[1, 0] = 0
    x[1, 1] = 1.5
    x[..., 5] = 0
    return x.to(getattr(torch, dtype))


def linear(dtype: str) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(WIDTH, OUT).to(getattr(torch, dtype)).requires_grad_(False)


def state_of(made: Sparsification, layer: Layer, text: Sequence[Tensor]) -> dict[str, Tensor]:
    """Calibrate one layer as the walk over a model does."""
    state: dict[str, Tensor] = {}
    for stage in made.stages:
        slots = made.slots(layer, state, before=stage)
        fitter = stage.fitter(Layer(layer.name, layer.linear, slots.folded), slots)
        if fitter:
            state.update(fitter.fit(SlotWindows(stage.slot, slots, () if fitter.sees == "nothing" else text, Scope())))
        for name, initial in stage.initial_parameters(layer).items():
            state[name] = torch.linspace(-0.02, 0.03, initial.numel(), dtype=initial.dtype)
    return state


def as64(x: Tensor) -> Array:
    return x.double().numpy()


def flat(x: Tensor) -> Array:
    return as64(x).reshape(-1, x.shape[-1])


def compare(made: Sparsification, dense: nn.Linear, state: State, reading: Reading, x: Tensor) -> None:
    slots = made.slots(Layer("a.b", dense), state)
    sparse = SparseLinear(dense, SharedInput(slots, 1, TokenView(), x.device), slots)
    seen = rotated(x, slots)
    u, mask = pruned(seen, slots, made.pattern, Tokens(), {})
    if reading.Q is None:
        expected_u, expected_mask = reading.u(flat(x))
        np.testing.assert_array_equal(mask.reshape(-1, WIDTH).numpy(), expected_mask)
        np.testing.assert_allclose(
            flat(u), expected_u, rtol=0 if not reading.var else 2e-2 if x.dtype == torch.bfloat16 else 2e-3
        )
    tolerance = {"float32": 2e-5, "bfloat16": 5e-2, "float16": 6e-3, "float64": 2e-6}[reading.dtype]
    np.testing.assert_allclose(flat(sparse(x)), reading.y(flat(x)), rtol=0, atol=tolerance)
    assert sparse(x).dtype == x.dtype


def channel_weight(name: str, W: Array, z: Array) -> Array | None:
    """w by its formula, of the weights or of the calibration tokens z."""
    with np.errstate(all="ignore"):
        return {
            "act": lambda: None,
            "amber": lambda: amber(W, drop=False),
            "wina": lambda: np.sqrt((W**2).sum(axis=0)),
            "wvar": lambda: W.var(axis=0),
            "rms": lambda: np.sqrt((z**2).mean(axis=0)),
            "grad": lambda: np.sqrt((z**2).mean(axis=0)),
            "scale": lambda: np.sqrt(np.maximum(np.abs(W).max(axis=0), 1e-5) / np.maximum(np.abs(z).max(axis=0), 1e-5)),
        }[name]()  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("criterion", ["act", "amber", "wina", "wvar", "rms", "grad", "scale"])
def test_channel_weights_and_masks_follow_their_formula(criterion: str, pattern: str, dtype: str) -> None:
    dense, text = linear(dtype), [inputs(dtype, 7), inputs(dtype, 8)]
    made = make(pattern, criterion)
    state = state_of(made, Layer("a.b", dense), text)
    expected = channel_weight(criterion, as64(dense.weight), np.concatenate([flat(x) for x in text]))
    w = made.slots(Layer("a.b", dense), state).weight
    if expected is None:
        assert w is None
    else:
        assert w is not None
        np.testing.assert_allclose(as64(w), expected, rtol=3e-6)
        assert w.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    reading = Reading(as64(dense.weight), as64(dense.bias), pattern, dtype, w=None if w is None else as64(w))
    if dtype == "float64":
        return compare64(made, dense, state, w, inputs(dtype))
    return compare(made, dense, state, reading, inputs(dtype))


def compare64(made: Sparsification, dense: nn.Linear, state: State, w: Tensor | None, x: Tensor) -> None:
    """A float64 model is scored in float64."""
    slots = made.slots(Layer("a.b", dense), state)
    _, mask = pruned(x, slots, made.pattern, Tokens(), {})
    s = (x if w is None else x * w).abs()
    n, m = (made.pattern.n, made.pattern.m) if made.pattern.kind == "n:m" else (made.pattern.kept(WIDTH), WIDTH)
    for row, kept in zip(s.view(-1, m).tolist(), mask.view(-1, m).tolist(), strict=True):
        best = sorted(range(m), key=lambda j: (-row[j], j))[:n]
        assert {j for j in range(m) if kept[j]} == set(best)


def ranked(s: Array) -> Array:
    """The two highest scores of each four, ties to the lower channel."""
    order = np.argsort(-s.reshape(-1, 4), axis=1, kind="stable")[:, :2]
    mask = np.zeros((s.size // 4, 4), bool)
    np.put_along_axis(mask, order, True, axis=1)
    return mask.reshape(s.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("criterion", ["clact", "clact_causal"])
def test_a_sequences_norm_is_its_own(criterion: str, padded: bool, dtype: str) -> None:
    x, dense = inputs(dtype), linear(dtype)
    padding = torch.zeros(BATCH, SEQ, dtype=torch.bool)
    padding[0, 4:] = padded
    made = make("2:4", criterion)
    slots = made.slots(Layer("a.b", dense), {})
    _, mask = pruned(x, slots, made.pattern, Tokens(padding if padded else None), {})
    assert torch.equal(x, inputs(dtype)), "the input is only read"
    for sequence in range(BATCH):
        z = as64(x[sequence, : 4 if padded and sequence == 0 else SEQ])
        total = np.cumsum(z**2, axis=0) if criterion == "clact_causal" else (z**2).sum(axis=0, keepdims=True)
        w = np.sqrt(total) if dtype == "float64" else np.sqrt(total).astype(np.float32).astype(np.float64)
        if dtype == "float64":
            expected = ranked(np.abs(z * w))
            np.testing.assert_array_equal(mask[sequence, : len(z)].numpy(), expected)
            continue
        reading = Reading(as64(dense.weight), None, "2:4", w=w)
        np.testing.assert_array_equal(mask[sequence, : len(z)].numpy(), reading.mask(z))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("pattern", ["1:4", "2:8", "50%", "4:4"])
@pytest.mark.parametrize(
    ("mitigation", "params"),
    [
        (["shift"], {}), (["var"], {}), (["shift", "var"], {}), (["shift"], {"stat": "mean"}),
        (["shift_static"], {}), (["shift_static"], {"stat": "mean", "granularity": "channel"}), (["shift_static", "var"], {"granularity": "channel"}),
        (["shift_learned"], {}), (["shift_learned", "var", "scale_learned", "bias_learned"], {}), (["scale_learned"], {}), (["bias_learned"], {}),
        (["bias_static"], {}), (["rsparse"], {"rank": 5}), (["shift", "rsparse", "var", "bias_static"], {"rank": 5}),
    ],
)  # fmt: skip
def test_mitigations_follow_their_formula(
    mitigation: list[str], params: dict[str, Any], pattern: str, dtype: str
) -> None:
    dense, text = linear(dtype), [inputs(dtype, 7), inputs(dtype, 8)]
    made = make(pattern, "wina", mitigation, **params)
    state = state_of(made, Layer("a.b", dense), text)
    W, tokens = as64(dense.weight), np.concatenate([flat(x) for x in text])
    w = made.slots(Layer("a.b", dense), state).weight
    assert w is not None
    reading = Reading(W, as64(dense.bias), pattern, dtype, w=as64(w), var="var" in mitigation)
    if "shift" in mitigation:
        reading.eta = params.get("stat", "median")
    if "shift_static" in mitigation:
        axis = 0 if params.get("granularity") == "channel" else None
        order = np.sort(tokens, axis=axis)
        middle = order[(len(order) - 1) // 2]
        reading.eta = np.asarray(tokens.mean(axis=axis) if params.get("stat") == "mean" else middle)
        np.testing.assert_allclose(as64(state["eta"]), reading.eta, rtol=1e-6)
    for name in ("eta", "gamma", "beta"):
        if f"{LEARNED_AS[name]}_learned" in mitigation:
            setattr(reading, name, as64(state[name]))
    if "rsparse" in mitigation:
        reading.UV = svd_product(W, 5)
        np.testing.assert_allclose(as64(state["U"]) @ as64(state["V"]), reading.UV, atol=1e-6)
    if "bias_static" in mitigation:
        reading.beta = (tokens @ W.T + as64(dense.bias) - reading.y(tokens)).mean(axis=0)
        np.testing.assert_allclose(as64(state["beta"]), reading.beta, atol=2e-6 if dtype == "float32" else 2e-3)
    compare(made, dense, state, reading, inputs(dtype))


@pytest.mark.parametrize("pattern", ["2:8", "4:4"])
def test_rotation_is_to_the_principal_axes(pattern: str) -> None:
    dense, text = linear("float32"), [inputs("float32", seed) for seed in range(9)]
    made = make(pattern, "wina", ["larosa", "shift"])
    state = state_of(made, Layer("a.b", dense), text)
    tokens, Q = np.concatenate([flat(x) for x in text]), as64(state["Q"])
    np.testing.assert_allclose(Q.T @ Q, np.eye(WIDTH), atol=1e-5)
    moment = Q.T @ (tokens.T @ tokens / len(tokens)) @ Q
    np.testing.assert_allclose(moment, np.diag(np.diag(moment)), atol=1e-5)
    m = int(pattern.partition(":")[2])
    for j in range(m - 1):  # the j-th axes of all groups are stronger than the next ones of any group
        assert np.diag(moment)[j::m].min() >= np.diag(moment)[j + 1 :: m].max() - 1e-6
    folded = as64(dense.weight) @ Q
    reading = Reading(
        as64(dense.weight), as64(dense.bias), pattern, w=np.sqrt((folded**2).sum(axis=0)), eta="median", Q=Q
    )
    compare(made, dense, state, reading, inputs("float32", 3)[:1, 3:])


@pytest.mark.parametrize("criterion", ["act", "wina"])
@pytest.mark.parametrize("percent", [30, 50])
def test_a_threshold_prunes_its_share_of_the_calibration_text(criterion: str, percent: int) -> None:
    dense, text = linear("float32"), [torch.randn(1, 9, WIDTH), torch.randn(1, 5, WIDTH)]
    made = make(f"threshold:{percent}%", criterion, ["shift"])
    state = state_of(made, Layer("a.b", dense), text)
    w = made.slots(Layer("a.b", dense), state).weight
    reading = Reading(as64(dense.weight), as64(dense.bias), w=None if w is None else as64(w), eta="median")
    scores = np.sort(np.concatenate([reading.score(flat(x)) for x in text]), axis=None)
    reading.threshold = float(scores[round(percent / 100 * scores.size)])
    assert float(state["threshold"]) == reading.threshold
    compare(made, dense, state, reading, inputs("float32"))
    pruned_share = np.mean(np.concatenate([~reading.mask(flat(x)) for x in text]))
    assert abs(pruned_share - percent / 100) < 1 / scores.size


@pytest.mark.parametrize("pattern", ["2:8", "50%"])
def test_random_is_one_choice_for_every_token(pattern: str) -> None:
    dense, made = linear("float32"), make(pattern, "random", ["shift", "var"])
    slots = made.slots(Layer("a.b", dense), {})
    assert slots.priority is not None
    assert sorted(slots.priority.tolist()) == list(range(1, WIDTH + 1))
    reading = Reading(
        as64(dense.weight), as64(dense.bias), pattern, priority=as64(slots.priority), eta="median", var=True
    )
    compare(made, dense, {}, reading, inputs("float32"))
    other = made.slots(Layer("a.c", dense), {}).priority
    assert other is not None
    assert not torch.equal(slots.priority, other)


def test_outliers_can_be_left_out_of_ambers_norm() -> None:
    dense = linear("float32")
    w = make("2:4", "amber", drop_outliers=True).slots(Layer("a.b", dense), {}).weight
    assert w is not None
    np.testing.assert_allclose(as64(w), amber(as64(dense.weight), drop=True), rtol=3e-6)


def test_the_mode_is_the_peak_of_the_kernel_density() -> None:
    generator = torch.Generator().manual_seed(0)
    for x in (
        torch.randn(4000, generator=generator).exp(),
        torch.cat([torch.randn(900, generator=generator), 6 + 0.3 * torch.randn(700, generator=generator)]),
    ):
        peak, bandwidth = kernel_density_peak(as64(x))
        assert abs(float(mode(x.split(700))) - peak) < bandwidth / 2
    assert float(mode([torch.tensor([2.0, 2.0, 2.0, 9.0])])) == 2.0


@pytest.mark.parametrize("criterion", ["wt", "wanda"])
@pytest.mark.parametrize("pattern", ["1:4", "3:4", "2:8", "50%"])
def test_weights_are_pruned_by_row(criterion: str, pattern: str) -> None:
    dense, text = linear("float32"), [inputs("float32", 7)]
    made: Any = make(pattern, criterion)
    state = state_of(made, Layer("a.b", dense), text)
    weight, kept = made.criterion.pruned(Layer("a.b", dense), made.pattern, state)
    W, tokens = as64(dense.weight), flat(text[0])
    reading = Reading(W, pattern=pattern, w=None if criterion == "wt" else as64(state["rms"]))
    mask = reading.mask(W)
    np.testing.assert_array_equal(as64(weight), np.where(mask, W, 0))
    assert kept == mask.sum()
    if criterion == "wanda":
        np.testing.assert_allclose(as64(state["rms"]), np.sqrt((tokens**2).mean(axis=0)), rtol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (2, 8), (7, 12)])
def test_sparsegpt_is_optimal_brain_surgeon(n: int, m: int) -> None:
    width = 264  # more than two blocks, the last one shorter
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, width, generator=generator, dtype=torch.float64)
    x = torch.randn(400, width, generator=generator, dtype=torch.float64) @ torch.randn(
        width, width, generator=generator, dtype=torch.float64
    )
    x[:, 9] = 0
    H = x.T @ x / len(x)
    pruned_weight, mask = prune_columns(W, H, parse_pattern(f"{n}:{m}"))
    np.testing.assert_allclose(as64(pruned_weight), sparsegpt(as64(W), as64(H), n, m), atol=1e-8)
    assert (mask.view(6, -1, m).sum(-1) == n).all()
    assert (pruned_weight[~mask] == 0).all()


def test_sparsegpt_spends_a_rows_budget_exactly() -> None:
    W, x = torch.randn(5, 300), torch.randn(600, 300)
    _, mask = prune_columns(W, x.T @ x, parse_pattern("37%"))
    assert mask.sum(dim=1).tolist() == [parse_pattern("37%").kept(300)] * 5
