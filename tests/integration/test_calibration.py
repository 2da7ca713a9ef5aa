"""Calibration and learning: order, prefix, memory, what is kept and shared; on the three families."""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nmsweep.calibration import Calibrated, fit
from nmsweep.calibration.api import calibrate
from nmsweep.calibration.store import read_state, state_file, write_state
from nmsweep.config.schema import CalibrationConfig
from nmsweep.methods.base import Fitter, Layer, Mitigation, Pruning, Slots, State
from nmsweep.methods.fitters import order_statistic
from nmsweep.models import ModelSpec, load_model
from nmsweep.sparsity.api import assemble
from nmsweep.sparsity.install import install

FAMILIES = ("tiny-llama", "tiny-qwen2", "tiny-gemma3")
CLI = Callable[..., tuple[int, str, str]]


def model_of(family: str, dtype: str = "float32") -> Any:
    return load_model(ModelSpec(name=family, source="tiny", shape=family), dtype=dtype, device="cpu").model


def text(n: int = 6, seqlen: int = 24) -> Tensor:
    return torch.randint(3, 259, (n, seqlen), generator=torch.Generator().manual_seed(0))


def fitted(
    model: Any, criterion: str, mitigation: str, ids: Tensor | None = None, pattern: str = "2:4", **settings: Any
) -> Calibrated:
    made, targets = assemble(pattern, criterion, mitigation, "all", {})
    return fit(model, text() if ids is None else ids, made, targets, settings=CalibrationConfig(**settings))


def inputs_of(model: Any, name: str, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_of_the_dense_or_of_the_sparse_prefix(family: str) -> None:
    """A layer's statistic is of what it is given in the whole model, dense, or sparse with all layers before it in place."""
    model = model_of(family, "float64")
    made, targets = assemble("2:4", "rms", "none", "all", {})
    for prefix in ("dense", "sparse"):
        state = fit(model, text(), made, settings=CalibrationConfig(prefix=prefix)).state
        for name in (
            "model.layers.0.self_attn.o_proj",
            "model.layers.1.self_attn.k_proj",
            "model.layers.1.mlp.down_proj",
        ):
            if prefix == "dense":
                x = inputs_of(model, name, text())
            else:
                with install(model, made, targets, state):
                    x = inputs_of(model, name, text())
            torch.testing.assert_close(state[name]["rms"], x.square().mean(dim=(0, 1)).sqrt(), rtol=1e-9, atol=0)


def test_slots_are_filled_in_order_each_of_the_tensor_it_will_see() -> None:
    """η first, then w of x − η, then the threshold of |x − η|·w, then β of the whole rest."""
    model, layer = model_of("tiny-qwen2", "float64"), "model.layers.0.self_attn.q_proj"
    state = fitted(model, "rms", "bias_static+shift_static", pattern="threshold:50%", prefix="dense").state[layer]
    x = inputs_of(model, layer, text())
    eta = x.flatten().sort().values[(x.numel() - 1) // 2]
    torch.testing.assert_close(state["eta"], eta)
    z = x - eta
    rms = z.square().mean(dim=(0, 1)).sqrt()
    torch.testing.assert_close(state["rms"], rms)
    score = (z * rms).abs()
    torch.testing.assert_close(state["threshold"], score.flatten().sort().values[score.numel() // 2])
    u = torch.where(score >= state["threshold"], x, eta)
    weight = model.get_submodule(layer).weight.detach()
    torch.testing.assert_close(state["beta"], weight @ (x - u).mean(dim=(0, 1)), rtol=1e-6, atol=1e-9)


class _Mean(Fitter):
    """An author's statistic, which knows nothing of rotations and shifts."""

    def __init__(self, name: str) -> None:
        self.name, self.rows = name, []

    def update(self, x: Any) -> None:
        self.rows.append(x)

    def result(self) -> dict[str, Tensor]:
        if isinstance(self.rows[0], Pruning):
            return {
                f"{self.name}.{part}": torch.cat([getattr(row, part) for row in self.rows])
                for part in ("x", "u", "removed")
            }
        return {self.name: torch.cat(self.rows).mean(dim=0)}


class _Eta(Mitigation):
    slot = "eta"
    calibration = "text"

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return replace(slots, eta=self.state_entry(layer, state, "eta"))

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return _Mean("eta")


class _Beta(Mitigation):
    slot = "beta"
    calibration = "text"

    def fill(self, slots: Slots, layer: Layer, state: State) -> Slots:
        return slots

    def fitter(self, layer: Layer, slots: Slots) -> Fitter:
        return _Mean("beta")


def test_an_authors_fitters_see_the_tensor_of_their_slot() -> None:
    """Under a rotation η is of Qᵀx, w of Qᵀx − η, and β of the pruning of both; tokens out of scope are left out."""
    model, layer = model_of("tiny-qwen2", "float64"), "model.layers.0.self_attn.q_proj"
    state = calibrate(
        model, text(), pattern="2:4", criterion="rms", mitigation=["larosa", _Eta(), "rsparse", _Beta()], mitigations={"rsparse": {"rank": 4}},
        scope="skip_first:4", prefix="dense",
    )[layer]  # fmt: skip
    x = (inputs_of(model, layer, text()) @ state["Q"])[:, 4:].flatten(0, 1)
    torch.testing.assert_close(state["eta"], x.mean(dim=0))
    z = x - state["eta"]
    torch.testing.assert_close(state["rms"], z.square().mean(dim=0).sqrt())
    torch.testing.assert_close(state["beta.x"], x)
    kept = (z * state["rms"]).abs().unflatten(-1, (-1, 4)).argsort(dim=-1).argsort(dim=-1).flatten(-2) >= 2
    torch.testing.assert_close(state["beta.u"], torch.where(kept, x, state["eta"]))
    torch.testing.assert_close(state["beta.removed"], torch.where(kept, 0.0, z))


@pytest.mark.parametrize(
    ("family", "settings"),
    [(family, settings) for family in FAMILIES for settings in ({}, {"teacher": "dense"}, {"objective": "kl"})]
    + [("tiny-llama", settings) for settings in ({"schedule": "decay"}, {"schedule": "step"}, {"prefix": "dense"})]
    + [
        pytest.param(family, settings, marks=pytest.mark.slow)
        for family in FAMILIES[1:]
        for settings in ({"schedule": "decay"}, {"schedule": "step"}, {"prefix": "dense"})
    ],
)
def test_training_lowers_the_loss(family: str, settings: dict[str, Any]) -> None:
    """The same windows again and again: what is learned must fit them better; blocks whose inputs do not move, every one."""
    model = model_of(family)
    found = fitted(
        model, "act", "shift_learned+scale_learned+bias_learned", text(2, 16), epochs=12, lr=4e-3, **settings
    )
    assert len(found.losses) == (1 if settings.get("objective") == "kl" else model.config.num_hidden_layers)
    for loss in found.losses:
        assert loss.after < loss.before, loss
    for own in found.state.values():
        assert own["eta"].dtype == own["gamma"].dtype == own["beta"].dtype == torch.float32
        assert all(value.any() and not value.requires_grad for value in own.values())


def test_training_repeats_and_needs_no_global_seed() -> None:
    first, second = (fitted(model_of("tiny-llama"), "act", "scale_learned").state for _ in range(2))
    assert all(torch.equal(first[layer]["gamma"], second[layer]["gamma"]) for layer in first)


def test_learned_parameters_are_fp32_whatever_the_model_is() -> None:
    state = fitted(model_of("tiny-llama", "bfloat16"), "act", "scale_learned+shift_learned").state
    assert {value.dtype for own in state.values() for value in own.values()} == {torch.float32}


def test_what_comes_after_a_trained_slot_is_fitted_on_it() -> None:
    """β closes the mean gap that is left after γ was trained."""
    model = model_of("tiny-llama", "float64")
    made, targets = assemble("2:4", "act", "scale_learned+bias_static", "all", {})
    state = fit(model, text(), made, settings=CalibrationConfig(lr=0.02, prefix="dense")).state
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj"):
        x = inputs_of(model, layer, text())
        with install(model, made, targets, state) as sparse, torch.no_grad():
            gap = sparse.layers[layer](x) - sparse.layers[layer].dense(x)
        assert gap.mean(dim=(0, 1)).abs().max() < 1e-9


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in self._known:
                size, place = storage.nbytes(), storage.data_ptr()
                self._known.add(place)
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._gone, place, size)
        return out

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.bytes -= size


@pytest.mark.parametrize(
    ("criterion", "mitigation", "pattern", "settings", "n_hidden"),
    [
        ("rms", "bias_static", "2:4", {}, 1), ("act", "shift_static", "threshold:50%", {}, 1), ("act", "scale_learned", "2:4", {}, 2),
        ("act", "shift_learned", "2:4", {"teacher": "dense"}, 2), ("sparsegpt", "none", "2:4", {}, 1), ("act", "larosa", "2:4", {}, 1),
    ],
)  # fmt: skip
def test_memory_grows_by_one_blocks_activations(
    criterion: str, mitigation: str, pattern: str, settings: dict[str, Any], n_hidden: int
) -> None:
    """What one more window costs: the hidden states before and after a block, and the input of one group of layers."""
    model, seqlen, peaks = model_of("tiny-llama"), 64, []
    fitted(model, criterion, mitigation, text(2, seqlen), pattern, **settings)
    for n in (4, 12):
        with _Live() as live:
            fitted(model, criterion, mitigation, text(n, seqlen), pattern, **settings)
        peaks.append(live.peak)
    bound = 4 * seqlen * (n_hidden * model.config.hidden_size + model.config.intermediate_size)
    assert 0.5 * bound < (peaks[1] - peaks[0]) / 8 <= 1.02 * bound, "the lower bound shows that the meter measures"


def test_state_is_kept_whole_and_layers_of_one_input_share_it(tmp_path: Path) -> None:
    kept = fitted(model_of("tiny-qwen2"), "rms", "scale_learned+larosa")
    write_state(state_file(tmp_path, "key"), kept)
    again = read_state(state_file(tmp_path, "key"), "key")
    assert again.losses == kept.losses
    assert {layer: set(own) for layer, own in again.state.items()} == {
        layer: {"rms", "gamma", "Q"} for layer in kept.state
    }
    assert all(
        torch.equal(again.state[layer][name], value) for layer, own in kept.state.items() for name, value in own.items()
    )
    attention = "model.layers.0.self_attn."
    assert again.state[f"{attention}q_proj"]["Q"] is again.state[f"{attention}v_proj"]["Q"]
    assert [file.name for file in tmp_path.iterdir()] == ["key.safetensors"]


def test_cells_share_a_state_and_records_have_the_losses(nmsweep: CLI, results: Path) -> None:
    words = ["model=tiny-qwen2", f"results_dir={results}", "tasks=mini_prose", "eval.limit=2", "eval.seqlen=64", "dtype=float32",
             "mitigation=scale_learned", "calibration.n_samples=3", "calibration.seqlen=32", "baseline=false"]  # fmt: skip
    assert nmsweep(*words)[0] == 0
    [state] = (results / ".calibration").iterdir()
    stamp = state.stat().st_mtime_ns
    assert nmsweep(*words, "eval.limit=3")[0] == 0
    assert [file.stat().st_mtime_ns for file in (results / ".calibration").iterdir()] == [stamp]
    assert nmsweep(*words, "calibration.lr=0.01")[0] == 0
    assert len(list((results / ".calibration").iterdir())) == 2
    for record in (results / "cells").iterdir():
        found = json.loads((record / "provenance.json").read_text())["calibration"]
        assert [loss["block"] for loss in found["losses"]] == ["model.layers.0", "model.layers.1"]
        assert all(loss["before"] > 0 for loss in found["losses"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_an_order_statistic_is_exact(dtype: torch.dtype) -> None:
    values = torch.randn(4001, generator=torch.Generator().manual_seed(0)).mul(8).round().div(3).to(dtype)
    values[:7] = torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e4, float("inf"), float("-inf")]).to(dtype)
    ordered = values.sort().values
    for rank in (0, 1, 1999, 2000, 2003, 4000):
        assert order_statistic(values.split(321), rank) == ordered[rank]
