"""The Python API: names and instances, at once and in a block, and the same state as a sweep's."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nmsweep
from nmsweep.calibration.store import read_state
from nmsweep.calibration.text import find_source
from nmsweep.data.tasks import read_text
from nmsweep.errors import InputError
from nmsweep.methods.criteria.wina import Wina
from nmsweep.methods.mitigations.rsparse import RSparse
from nmsweep.methods.mitigations.shift import Shift
from nmsweep.methods.mitigations.var import Var
from nmsweep.models import LoadedModel, ModelSpec, load_model

IDS = torch.arange(3, 35)[None]
CLI = Callable[..., tuple[int, str, str]]


def loaded(shape: str = "tiny-qwen2", dtype: str = "float32") -> LoadedModel:
    return load_model(ModelSpec(name=shape, source="tiny", shape=shape), dtype=dtype, device="cpu")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def under(model: Any, **method: Any) -> Tensor:
    with nmsweep.sparsify(model, pattern="2:4", **method):
        return logits(model)


@pytest.mark.parametrize(
    ("instances", "names"),
    [
        ({"criterion": Wina()}, {"criterion": "wina"}),
        ({"mitigation": Shift("mean")}, {"mitigation": "shift", "mitigations": {"shift": {"stat": "mean"}}}),
        (
            {"criterion": Wina(), "mitigation": [Shift(), Var()]},
            {"criterion": {"name": "wina"}, "mitigation": "shift+var"},
        ),
        ({"mitigation": ["shift", Var()]}, {"mitigation": ["shift", "var"]}),
        ({"mitigation": (Var(), "shift")}, {"mitigation": "var+shift"}),
    ],
)
def test_an_instance_is_the_method_of_its_name(instances: dict[str, Any], names: dict[str, Any]) -> None:
    model = loaded().model
    assert torch.equal(under(model, **instances), under(model, **names))


def test_a_model_is_sparse_at_once_until_it_is_restored() -> None:
    model = loaded().model
    dense = logits(model)
    sparse = nmsweep.sparsify(model, criterion=Wina(), mitigation=["shift", Var()])
    assert repr(sparse) == "<sparse Qwen2ForCausalLM: 8:16 Wina shift+Var, 14 layers>"
    assert not torch.equal(logits(model), dense)
    with pytest.raises(InputError, match=r"sparse already; .* or call restore\(\)"):
        nmsweep.sparsify(model)
    sparse.restore()
    assert torch.equal(logits(model), dense)
    sparse.restore()
    assert repr(sparse).startswith("<restored ")
    with pytest.raises(InputError, match="call sparsify once more"), sparse:
        pass
    with nmsweep.sparsify(model) as other:
        sparse.restore()
        assert not torch.equal(logits(model), dense), "what was restored before leaves this one alone"
        other.restore()
        assert torch.equal(logits(model), dense)


def test_a_model_is_restored_after_an_error_of_the_block_or_of_a_method() -> None:
    model = loaded().model
    dense, modules = logits(model), dict(model.named_modules())

    class Broken(Wina):
        def weight(self, layer: Any, state: Any) -> Tensor:
            if "layers.1" in layer.name:
                raise RuntimeError("stop")
            return super().weight(layer, state)

    with pytest.raises(RuntimeError, match="stop"):
        nmsweep.sparsify(model, criterion=Broken())
    with pytest.raises(RuntimeError, match="stop"), nmsweep.sparsify(model):
        raise RuntimeError("stop")
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), dense)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ({"criterion": "akt", "mitigation": ["shfit", Var()], "pattern": "5:4"}, ["'akt'", "'shfit'", "keeps 5 of 4"]),
        ({"criterion": Wina}, ["criterion: Wina is a class; pass an instance, such as Wina()"]),
        ({"mitigation": [Var]}, ["mitigation: Var is a class; pass an instance"]),
        ({"criterion": Var(), "mitigation": [Wina()]}, ["Var is a mitigation; pass it as mitigation=", "Wina is a criterion; pass it as criterion="]),
        ({"mitigation": ["shift", Shift()]}, ["shift and Shift both set eta"]),
        ({"mitigation": "shift+shift"}, ["shift is named twice"]),
        ({"criterion": "wt", "mitigation": [Var()]}, ["mitigation: Var corrects activations"]),
        ({"criterion": "clact_static"}, ["criterion: 'clact_static' is not known; did you mean clact", "rms"]),
        ({"criterion": "rms"}, ["no calibrated state 'rms'", "pass state=nmsweep.calibrate("]),
    ],
)  # fmt: skip
def test_mistakes_are_reported_together(arguments: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(InputError) as error:
        nmsweep.sparsify(loaded().model, **arguments)
    assert all(message in str(error.value) for message in messages), str(error.value)


@pytest.mark.parametrize("family", ["tiny-qwen2", "tiny-gemma3"])
def test_calibrate_gives_the_state_of_the_sweep(nmsweep: CLI, results: Path, family: str) -> None:
    """The same bits, for windows that are drawn from the text in the same way, by name and by instance."""
    from nmsweep import calibrate

    assert nmsweep(
        f"model={family}", f"results_dir={results}", "tasks=mini_prose", "eval.limit=2", "eval.seqlen=64", "seed=7", "baseline=false",
        "pattern=2:4", "criterion=rms", "mitigation=shift_static+rsparse+scale_learned", "mitigations.rsparse.rank=4", "scope=skip_first:2",
        "calibration.n_samples=3", "calibration.seqlen=32", "calibration.lr=0.01", "dtype=float32", "device=cpu",
    )[0] == 0  # fmt: skip
    [file] = (results / ".calibration").iterdir()
    stored = read_state(file, file.stem).state
    model = loaded(family)
    text = read_text(find_source("mini", ["mini_prose"], None))
    for mitigation in (["shift_static", "rsparse", "scale_learned"], ["shift_static", RSparse(4), "scale_learned"]):
        state = calibrate(
            model.model, [text], pattern="2:4", criterion="rms", mitigation=mitigation, mitigations={"rsparse": {"rank": 4}},
            scope="skip_first:2", tokenizer=model.tokenizer, seqlen=32, n_samples=3, seed=7, lr=0.01,
        )  # fmt: skip
        assert state.keys() == stored.keys()
        for layer, entries in stored.items():
            assert {name: value.tolist() for name, value in entries.items()} == {
                name: value.tolist() for name, value in state[layer].items()
            }


def test_calibrate_takes_windows_and_an_instance() -> None:
    @dataclass(frozen=True)
    class Mine(nmsweep.Mitigation):
        slot = "eta"
        calibration = "text"

        def fill(self, slots: nmsweep.Slots, layer: nmsweep.Layer, state: nmsweep.State) -> nmsweep.Slots:
            return replace(slots, eta=self.state_entry(layer, state, "eta"))

        def fitter(self, layer: nmsweep.Layer, slots: nmsweep.Slots) -> nmsweep.Fitter:
            return Middle()

    class Middle(nmsweep.Fitter):
        def fit(self, windows: Any) -> dict[str, Tensor]:
            return {"eta": torch.cat(list(windows)).mean(dim=0)}

    model = loaded().model
    state = nmsweep.calibrate(model, IDS.view(2, 16), mitigation=Mine())
    with nmsweep.sparsify(model, mitigation=Mine(), state=state) as sparse:
        assert torch.isfinite(logits(model)).all()
        assert {layer.slots.eta.shape for layer in sparse.layers.values()} == {(64,), (128,)}  # type: ignore[union-attr]
    assert not any(nmsweep.calibrate(model, IDS, criterion="act").values()), "nothing is calibrated"


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (["a text"], {}, "texts without a tokenizer"),
        (IDS.float(), {}, "a torch.float32 tensor of shape [1, 32]; windows are an int64 tensor"),
        (IDS[0], {}, "of shape [32]"),
        (IDS, {"rate": 0.1}, "rate is no setting; allowed: prefix, teacher"),
        (IDS, {"lr": -1}, "lr=-1 is not allowed"),
        (IDS, {"mitigation": "scale_learned", "objective": "kl", "teacher": "dense"}, "calibration.teacher: dense has no effect"),
        (IDS, {"criterion": "akt"}, "'akt' is not known"),
    ],
)  # fmt: skip
def test_what_calibrate_cannot_use_is_refused(text: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        nmsweep.calibrate(loaded().model, text, **arguments)
    assert message in str(error.value)


def test_names_are_imported_when_they_are_used() -> None:
    code = "import sys, nmsweep; assert 'torch' not in sys.modules; print([getattr(nmsweep, name) for name in nmsweep.__all__])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'sparsity_of'"):
        nmsweep.sparsity_of  # noqa: B018
