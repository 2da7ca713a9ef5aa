"""The contract of methods, and `check_method`, which runs it on an author's class.

It stands above `calibration` because it needs models, calibration and `sparsify`; methods themselves know none of them.
"""

import inspect
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nmsweep.calibration.fit import SlotWindows, fit
from nmsweep.calibration.store import Calibrated, read_state, write_state
from nmsweep.config.pattern import parse_pattern
from nmsweep.errors import NmsweepError
from nmsweep.methods.base import SLOT_ORDER, Criterion, Layer, Mitigation, Slots, State, Tokens, as_tensor
from nmsweep.methods.criteria.act import Act
from nmsweep.methods.mitigations.larosa import Larosa
from nmsweep.methods.sparsification import Sparsification, build_sparsification
from nmsweep.models.tiny import tiny_model
from nmsweep.sparsity.formula import pruned, rotated
from nmsweep.sparsity.install import SparseModel, install
from nmsweep.sparsity.scope import Scope

_INEXACT = {"rotation", "residual", "gamma", "beta"}
"""Slots with which M:M equals the dense layer only up to rounding (up to training, where learned)."""

_TOLERANCE = 1e-9
"""For float64 logits that are summed in another order."""


class ContractError(NmsweepError):
    """A method breaks a rule of the contract."""


def check_method(method: Any, *others: Any, shape: str = "tiny-qwen2") -> None:
    """Check that a method keeps the contract, on a tiny random model on the CPU. Takes seconds.

    Args:
        method: a criterion or a mitigation: an instance, or a class that needs no arguments.
        others: further methods to combine with it.
        shape: ``"tiny-llama"``, ``"tiny-qwen2"`` (with biases) or ``"tiny-gemma3"``.

    Raises:
        ContractError: the first rule that is broken, what was seen, and what to do.
    """
    methods = [_instance(each) for each in (method, *others)]
    with _kept_random_state():
        contract = _Contract(methods, shape)
        for rule in contract.rules():
            if seen := rule():
                statement, _, advice = inspect.cleandoc(rule.__doc__ or rule.__name__).partition("\n\n")
                raise ContractError(
                    f"check_method {contract.name}: {statement} Seen: {seen}. {' '.join(advice.split())}"
                )


def _instance(method: Any) -> Criterion | Mitigation:
    instance = method() if isinstance(method, type) else method
    if not isinstance(instance, Criterion | Mitigation):
        raise ContractError(f"check_method: {instance!r} is no method; derive it from nmsweep.Criterion or .Mitigation")
    return instance


class _Contract:
    """The rules. Each returns what was seen if it is broken; its docstring says what holds and what to do.

    Args:
        methods: at most one criterion, and mitigations.
        shape: of the tiny models, one in float64 (`wide`) and one in bfloat16 (`narrow`).
    """

    def __init__(self, methods: list[Criterion | Mitigation], shape: str) -> None:
        self.name = "+".join(type(method).__name__ for method in methods)
        self.methods = methods
        cpu = torch.device("cpu")
        self.wide, self.narrow = (tiny_model(shape, 0, dtype, cpu) for dtype in (torch.float64, torch.bfloat16))
        self.criterion = next((method for method in methods if isinstance(method, Criterion)), Act())
        self.mitigations = [method for method in methods if isinstance(method, Mitigation)]

    def rules(self) -> list[Callable[[], str]]:
        return [
            self.declarations, self.slots, self.restored, self.global_randomness, self.determinism, self.dense_at_m_of_m,
            self.exactly_n_of_m, self.tokens, self.batch_mates, self.rotation, self.stored_state,
        ]  # fmt: skip

    def declarations(self) -> str:
        """A method fills one slot, and there is at most one criterion.

        A criterion keeps slot = "weight"; a mitigation names one of rotation, eta, nu, residual, gamma, beta.
        """
        if len(criteria := [type(method).__name__ for method in self.methods if isinstance(method, Criterion)]) > 1:
            return f"{' and '.join(criteria)} are criteria"
        for method in self.methods:
            free = set(SLOT_ORDER) - {"weight", "threshold"}
            if getattr(method, "slot", None) not in ({"weight"} if isinstance(method, Criterion) else free):
                return f"slot is {getattr(method, 'slot', None)!r}"
        return ""

    def global_randomness(self) -> str:
        """The global random state is not used.

        Draw from a torch.Generator with a fixed seed.
        """
        before = _random_state()
        with self.sparse(self.wide, "2:4"):
            _logits(self.wide, _ids(2, 9))
        moved = [name for name, state in _random_state().items() if repr(state) != repr(before[name])]
        return f"the random state of {' and '.join(moved)} has changed" if moved else ""

    def slots(self) -> str:
        """Slots have the right shapes, fp32 (or float64 for a float64 model) and finite numbers; w is not negative.

        Convert with nmsweep.methods.base.as_tensor(value, layer.weight), and guard against a division by 0.
        """
        width, out = 32, 24
        shapes = {
            "eta": [[], [width]], "weight": [[width]], "priority": [[width]], "gamma": [[out]], "beta": [[out]],
            "rotation": [[width, width]],
        }  # fmt: skip
        for dtype, allowed in ((torch.bfloat16, {torch.float32}), (torch.float64, {torch.float32, torch.float64})):
            linear, x = _linear(_normal(out, width).to(dtype)), _normal(1, 40, width, seed=1).to(dtype)
            slots = _filled(self.method("2:4"), linear, x)
            values = [(slot, getattr(slots, slot), shapes[slot]) for slot in shapes]
            if slots.dynamic is not None:
                w = slots.dynamic.token_weight(as_tensor(x, x), Tokens(), {})
                values.append(("weight", w, [[1, 1, width], [1, 40, width]]))
            for slot, value, sizes in values:
                if not isinstance(value, Tensor):
                    continue
                if list(value.shape) not in sizes:
                    return f"{slot} has shape {list(value.shape)}; allowed: {' or '.join(map(str, sizes))}"
                if value.dtype not in allowed:
                    return f"{slot} is {value.dtype} in a {dtype} model"
                if not torch.isfinite(value).all() or (slot == "weight" and (value < 0).any()):
                    return f"{slot} has {'negative entries' if torch.isfinite(value).all() else 'NaN or infinity'}"
        with self.sparse(self.narrow, "2:4"):
            logits = _logits(self.narrow, _ids(2, 9))
        finite = bool(torch.isfinite(logits).all())
        return "" if finite and logits.dtype == torch.bfloat16 else f"logits are {logits.dtype}, finite: {finite}"

    def determinism(self) -> str:
        """The same input gives the same result.

        Return a new fitter for each layer, keep nothing between passes but `memory`, and use no randomness.
        """
        first, second = (self.state(self.wide, self.method("2:4")) for _ in range(2))
        for layer, state in first.items():
            if different := [name for name, value in state.items() if not torch.equal(value, second[layer][name])]:
                return f"two calibrations on one text give another {different[0]} of {layer}"
        with self.sparse(self.wide, "2:4"):
            change = _difference(*(_logits(self.wide, _ids(2, 9)) for _ in range(2)))
        return f"the logits of two passes over one input differ by {change:.2g}" if change else ""

    def dense_at_m_of_m(self) -> str:
        """M:M prunes nothing, so it is the dense model: bit for bit, bias included; with a rotation, UV, γ or β to rounding.

        Change nothing but the value of pruned channels.
        """
        exact = not any(method.slot in _INEXACT for method in self.methods)
        learned = any(method.calibration == "learned" for method in self.methods)
        model = self.narrow if exact else self.wide
        with self.sparse(model, "4:4"):
            logits = _logits(model, _ids(2, 9))
        change = _difference(logits, _logits(model, _ids(2, 9)))
        return f"with 4:4 logits differ by {change:.2g}" if change > (0 if exact else 2e-2 if learned else 1e-6) else ""

    def exactly_n_of_m(self) -> str:
        """Exactly N of each M channels are kept, ties included, whatever the criterion.

        Leave the choice to the pattern: return scores, not a mask.
        """
        with self.sparse(self.wide, "1:4") as sparse:
            _logits(self.wide, _ids(2, 9))
            for count in sparse.counts():
                if 4 * count.kept != count.channels:
                    return f"{count.layer} keeps {count.kept} of {count.channels} with 1:4"
            for name in sparse.kept_weights:
                if ((sparse.linears[name].weight != 0).unflatten(1, (-1, 4)).sum(-1) > 1).any():
                    return "a row of a pruned weight keeps more than 1 of 4 entries"
        for name, width, mask in self.masks("1:4"):
            x = (_normal(2, 5, width) * 2).round()
            x[0, 0], x[0, 1] = 0, 1
            if (mask(x).unflatten(-1, (-1, 4)).sum(-1) != 1).any():
                return f"{name} does not keep 1 of each 4 channels with equal values"
        return ""

    def tokens(self) -> str:
        """The mask of a token depends on this token alone, on earlier ones (`across_tokens`) or on all (`looks_ahead`).

        Set across_tokens = True and, for later tokens, looks_ahead = True; or use less of the sequence.
        """
        for name, width, mask in self.masks("2:4"):
            x = _normal(2, 6, width)
            if not self.criterion.across_tokens and not torch.equal(
                mask(x), torch.cat([mask(token) for token in x.split(1, dim=1)], dim=1)
            ):
                return f"a mask in {name} changes with the other tokens, but across_tokens is False"
            if not self.criterion.looks_ahead and not torch.equal(mask(x)[:, :3], mask(x[:, :3])):
                return f"a mask in {name} changes with later tokens, but looks_ahead is False"
        return ""

    def batch_mates(self) -> str:
        """A sequence's result depends neither on the other sequences of its batch nor on padding.

        z is [batch, seq, in]: reduce over dim 1, never over dim 0, and leave out what tokens.padding marks.
        """
        ids = _ids(1, 9)
        padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
        padding = torch.arange(13)[None] < torch.tensor([[4], [0], [0]])
        with self.sparse(self.wide, "1:4"):
            alone = _logits(self.wide, ids)[0]
            batched = _logits(self.wide, torch.cat([padded, _ids(2, 13, seed=2)]), padding)[0, 4:]
        change = _difference(alone, batched)
        return f"in a padded batch its float64 logits change by {change:.2g}" if change > _TOLERANCE else ""

    def rotation(self) -> str:
        """A layer whose input is rotated is pruned as the layer W Q on the input Qᵀx.

        Read layer.weight, which is W Q, never layer.linear.weight.
        """
        if self.criterion.operand == "weights" or any(method.slot == "rotation" for method in self.methods):
            return ""
        weight, x = _normal(12, 16), _normal(1, 40, 16, seed=1)
        rotated_slots = _filled(self.method("2:4", Larosa()), _linear(weight), x)
        Q = rotated_slots.rotation
        assert Q is not None
        plain_slots = _filled(self.method("2:4"), _linear(weight @ Q), x @ Q)
        for slot in ("eta", "weight", "priority", "gamma", "beta", "residual"):
            a, b = getattr(rotated_slots, slot), getattr(plain_slots, slot)
            parts = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)] if isinstance(a, Tensor) else []
            if any(_difference(*part) > 1e-6 for part in parts):
                return f"they differ in {slot}"
        return ""

    def restored(self) -> str:
        """The model is what it was before, also after an error.

        Write to no tensor of layer.linear.
        """

        def stop() -> None:
            raise ContractError("an error inside a block")

        modules, weights = dict(self.wide.named_modules()), {k: v.clone() for k, v in self.wide.state_dict().items()}
        with suppress(ContractError), self.sparse(self.wide, "2:4"):
            stop()
        with suppress(ContractError):
            fit(self.wide, _ids(2, 12), self.method("2:4"), step=stop)
        same = all(torch.equal(value, weights[name]) for name, value in self.wide.state_dict().items())
        return "" if same and dict(self.wide.named_modules()) == modules else "modules or weights have changed"

    def stored_state(self) -> str:
        """A state that is written to disk and read again gives the same result.

        Return tensors from `result`, and keep nothing else.
        """
        method = self.method("2:4")
        state = self.state(self.wide, method)
        with tempfile.TemporaryDirectory() as folder:
            write_state(Path(folder) / "state", Calibrated(state))
            stored = read_state(Path(folder) / "state", "").state
        logits = []
        for each in (state, stored):
            with install(self.wide, method, ["all"], each):
                logits.append(_logits(self.wide, _ids(2, 9)))
        return "" if torch.equal(*logits) else f"logits differ by {_difference(*logits):.2g}"

    def method(self, pattern: str, *more: Mitigation) -> Sparsification:
        return build_sparsification(parse_pattern(pattern), self.criterion, [*self.mitigations, *more])

    def state(self, model: nn.Module, method: Sparsification) -> Mapping[str, State]:
        return fit(model, _ids(2, 12, seed=1), method).state if method.calibrated else {}

    def sparse(self, model: nn.Module, pattern: str) -> SparseModel:
        method = self.method(pattern)
        return install(model, method, ["all"], self.state(model, method))

    def masks(self, pattern: str) -> Iterator[tuple[str, int, Callable[[Tensor], Tensor]]]:
        """Yield name, width and mask function of the first block's layers in float64; none where weights are pruned."""
        with self.sparse(self.wide, pattern) as sparse:
            layers = list(sparse.layers.items())[:7]
        for name, layer in layers:

            def mask(x: Tensor, slots: Slots = layer.slots) -> Tensor:
                return pruned(rotated(x, slots), slots, slots.pattern, Tokens(), {})[1]

            yield name, layer.in_features, mask


def _filled(method: Sparsification, linear: nn.Linear, x: Tensor) -> Slots:
    """Calibrate one layer on x [batch, seq, in] and return its slots; learned parameters as they start."""
    state: dict[str, Tensor] = {}
    layer = Layer("layer", linear)
    for stage in method.stages:
        slots = method.slots(layer, state, before=stage)
        fitter = stage.fitter(replace(layer, folded=slots.folded), slots)
        if fitter is not None:
            state.update(fitter.fit(SlotWindows(stage.slot, slots, [] if fitter.sees == "nothing" else [x], Scope())))
        state.update(stage.initial_parameters(layer))
    return method.slots(layer, state)


def _linear(weight: Tensor) -> nn.Linear:
    """Return a layer with a weight [out, in] and a bias of zeros, without drawing random numbers."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=False)
    return linear


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _ids(n: int, seqlen: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 259, (n, seqlen), generator=torch.Generator().manual_seed(seed))


def _logits(model: nn.Module, ids: Tensor, padding: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if padding is None else (~padding).long()
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits
    return logits


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; infinite where one is not finite."""
    difference = float((a.double() - b.double()).abs().max())
    return difference if np.isfinite(difference) else float("inf")


def _random_state() -> dict[str, Any]:
    """Return the global random states of torch, numpy and Python."""
    return {"torch": torch.get_rng_state().tolist(), "numpy": np.random.get_state(), "random": random.getstate()}


@contextmanager
def _kept_random_state() -> Iterator[None]:
    before = _random_state()
    try:
        yield
    finally:
        torch.set_rng_state(torch.tensor(before["torch"], dtype=torch.uint8))
        np.random.set_state(before["numpy"])
        random.setstate(before["random"])
