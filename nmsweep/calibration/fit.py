"""Calibrate block by block, first to last: fit each stage on the tensor that its slot will see, and train learned stages."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmsweep.calibration.blocks import Blocks, frozen, gradients
from nmsweep.calibration.learn import Loss, Training, train, train_end_to_end
from nmsweep.calibration.store import Calibrated
from nmsweep.config.schema import CalibrationConfig
from nmsweep.errors import InputError
from nmsweep.methods.base import SLOT_ORDER, Fitter, Layer, Pruning, Slot, Slots, Stage, Tokens, as_tensor
from nmsweep.methods.sparsification import Sparsification
from nmsweep.models.targets import input_groups
from nmsweep.sparsity.formula import centred, pruned, rotated, score
from nmsweep.sparsity.install import SparseModel, dense_targets
from nmsweep.sparsity.scope import Scope


def fit(
    model: Any,
    windows: Tensor,
    sparsification: Sparsification,
    targets: Sequence[str] = ("all",),
    *,
    scope: str = "all",
    settings: CalibrationConfig | None = None,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> Calibrated:
    """Compute the state of every calibrated stage.

    Memory, over all windows: the hidden states before and after one block (with ``teacher=dense`` the dense model's too), and
    the input of one group of layers. Everything else is held for one window at a time.

    Args:
        model: a dense causal language model of transformers; dense again afterwards.
        windows: ids [n_windows, seqlen].
        sparsification: pattern, criterion and mitigations.
        targets: presets or globs that say which layers.
        scope: which tokens are pruned; statistics are of those. A window is one prompt, so ``prefill`` and ``decode`` take all.
        settings: prefix, and how learned stages are trained.
        seed: of the order of training.
        step: called after each block.

    Raises:
        InputError: targets or widths that do not fit; a schedule that the pattern does not have.
    """
    settings = settings or CalibrationConfig.model_validate({})
    if errors := learning_errors(sparsification, settings):
        raise InputError(*errors)
    linears = dense_targets(model, sparsification, targets)
    sparse = SparseModel(model, sparsification, linears, "all" if scope in ("prefill", "decode") else scope)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), frozen(model):
            walk = _Walk(model, windows, sparsification, sparse, settings, seed, step)
            losses = walk.all_stages()
    finally:
        sparse.restore()
        model.train(was_training)
    return Calibrated(walk.state, losses)


def learning_errors(sparsification: Sparsification, settings: CalibrationConfig, per_layer: bool = False) -> list[str]:
    """Return one message for each training setting that contradicts another or the pattern; none where nothing is learned.

    Args:
        sparsification: what is to be trained.
        settings: of training.
        per_layer: whether each layer will have a pattern of its own, even if it is not known yet.
    """
    errors: list[str] = []
    if not sparsification.learned:
        return errors
    if settings.schedule == "step" and sparsification.pattern.kind == "threshold":
        errors.append("calibration.schedule: step goes through N:M or p% patterns, not thresholds; take none or decay")
    if settings.schedule == "step" and (per_layer or sparsification.patterns):
        errors.append("calibration.schedule: step is of one pattern, but each layer has its own; take none or decay")
    if settings.objective == "kl" and settings.teacher == "dense":
        errors.append(
            "calibration.teacher: dense has no effect with objective=kl, whose target is always the dense model's logits; "
            "leave teacher out, or take objective=mse"
        )
    return errors


@dataclass(frozen=True)
class SlotWindows:
    """The windows of a layer's input as one slot will see them, for `Fitter.fit`; computed again at each iteration.

    Attributes:
        slot: of the stage that is fitted.
        slots: the slots before it.
        inputs: [batch, seq, in] each, what the dense layer is given.
        scope: which tokens are pruned.
    """

    slot: Slot
    slots: Slots
    inputs: Sequence[Tensor]
    scope: Scope

    def __iter__(self) -> Iterator[Tensor | Pruning]:
        return map(self._view, self.inputs)

    def _view(self, x: Tensor) -> Tensor | Pruning:
        if self.slot == "rotation":
            return in_scope(x, self.scope)
        x = rotated(x, self.slots)
        if self.slot == "eta":
            return in_scope(x, self.scope)
        if self.slot in ("weight", "residual"):
            return in_scope(centred(x, self.slots), self.scope)
        if self.slot == "threshold":
            return in_scope(score(x, self.slots, Tokens(), {}), self.scope)
        u, mask = pruned(x, self.slots, self.slots.pattern, Tokens(), {})
        removed = None if self.slots.residual is None else torch.where(mask, 0.0, centred(x, self.slots))
        parts = (None if part is None else in_scope(part, self.scope) for part in (x, u, removed))
        return Pruning(*parts)  # type: ignore[arg-type]


def in_scope(x: Tensor, scope: Scope) -> Tensor:
    """Return the tokens in scope of x [batch, seq, in]: [tokens, in]."""
    chosen = scope.tokens(x, Tokens())
    return x[chosen] if isinstance(chosen, Tensor) else x.flatten(0, -2)


class _Walk:
    """One calibration: the state so far, and the model with the layers that are known so far."""

    def __init__(
        self, model: Any, windows: Tensor, sparsification: Sparsification, sparse: SparseModel,
        settings: CalibrationConfig, seed: int, step: Callable[[], None],
    ) -> None:  # fmt: skip
        self.model, self.windows, self.sparse = model, windows.to(model.device), sparse
        self.sparsification, self.settings, self.step = sparsification, settings, step
        self.training = Training(settings, seed, sparse.view, sparsification.pattern)
        self.state: dict[str, dict[str, Tensor]] = {name: {} for name in sparse.linears}
        self.groups = input_groups(model, list(sparse.linears))
        self.blocks = Blocks(model, windows)
        self.fitted = [stage for stage in sparsification.stages if stage.calibration in ("weights", "text")]
        self.learned = [stage for stage in sparsification.stages if stage.calibration == "learned"]

    def all_stages(self) -> list[Loss]:
        """Fit, train, and fit again what comes after a slot that was trained."""
        if not self.sparsification.uses_text:
            for group in self.groups:
                self._fit_group(group, self.fitted, [])
            return []
        parameter_names = self._set_initial_parameters()
        if not self.sparsification.fills("rotation"):
            self._fit_gradients(self.groups)
        losses = self._all_blocks(self.fitted, parameter_names)
        if self.learned and self.settings.objective == "kl":
            for group in self.groups:
                self.sparse.put(group, self.state)
            parameters = self._parameters(self.groups, parameter_names)
            losses = [train_end_to_end(self.model, self.windows, parameters, self.training)]
            self._freeze(self.groups)
            if later := self._after_training():
                self._all_blocks(later, parameter_names, train_blocks=False)
        return losses

    def _all_blocks(self, stages: Sequence[Stage], parameter_names: set[str], train_blocks: bool = True) -> list[Loss]:
        losses: list[Loss] = []
        inputs = self.blocks.first_inputs()
        teacher = list(inputs) if self.learned and self.settings.teacher == "dense" else None
        for index, name in enumerate(self.blocks.names):
            groups = [group for group in self.groups if group[0].startswith(f"{name}.")]
            for group in groups:
                self._fit_group(group, stages, self._inputs(index, group, inputs, stages))
                self._put_prefix(group)
            if teacher is not None:
                self._advance(index, teacher, dense=True)
            trains = bool(self.learned and groups and train_blocks and self.settings.objective == "mse")
            advances = trains and self.settings.prefix == "sparse" and not self._after_training()
            if trains:
                losses.append(self._train_block(index, groups, parameter_names, inputs, teacher, advance=advances))
                for group in groups if (later := self._after_training()) else ():
                    self._fit_group(group, later, self._inputs(index, group, inputs, later))
                    self._put_prefix(group)
            if not advances:
                self._advance(index, inputs, dense=self.settings.prefix == "dense")
            self.step()
        return losses

    def _after_training(self) -> list[Stage]:
        """Return the fitted stages whose slot comes after one that is trained: training changes the tensor they see."""
        first = min((SLOT_ORDER.index(stage.slot) for stage in self.learned), default=len(SLOT_ORDER))
        return [stage for stage in self.fitted if SLOT_ORDER.index(stage.slot) > first]

    def _put_prefix(self, group: Sequence[str]) -> None:
        if self.settings.prefix == "sparse":
            self.sparse.put(group, self.state)

    def _advance(self, index: int, hidden: list[Tensor], dense: bool) -> None:
        """Replace the hidden states of each window by the output of a block."""
        with self.sparse.view.as_dense(dense):
            for window, before in enumerate(hidden):
                hidden[window] = self.blocks.run(index, before)

    def _inputs(
        self, index: int, group: Sequence[str], inputs: Sequence[Tensor], stages: Sequence[Stage]
    ) -> list[Tensor]:
        """Return the input of a group's layers in each window; nothing where no stage needs it."""
        if not any(stage.calibration == "text" for stage in stages):
            return []
        layer = self.model.get_submodule(group[0])
        with self.sparse.view.as_dense(self.settings.prefix == "dense"):
            return [self.blocks.input_of(index, layer, hidden) for hidden in inputs]

    def _fit_group(self, group: Sequence[str], stages: Sequence[Stage], inputs: Sequence[Tensor]) -> None:
        for stage in stages:
            for names in _sharing(stage, group):
                slots = self.sparsification.slots(self._layer(names[0]), self.state[names[0]], before=stage)
                fitter = self._fitter(stage, names[0], slots)
                if fitter.sees != "gradient":
                    seen = inputs if fitter.sees == "slot" else ()
                    self._keep(names, fitter.fit(SlotWindows(stage.slot, slots, seen, self.sparse.view.scope)))
                elif self.sparsification.fills("rotation"):
                    self._fit_gradients([group])

    def _layer(self, name: str, slots: Slots | None = None) -> Layer:
        return Layer(name, self.sparse.linears[name], slots.folded if slots else None)

    def _fitter(self, stage: Stage, name: str, slots: Slots) -> Fitter:
        fitter = stage.fitter(self._layer(name, slots), slots)
        if fitter is None:
            raise InputError(
                f"{type(stage).__name__}: is calibrated but has no fitter; add one, or calibration = 'none'"
            )
        return fitter

    def _keep(self, names: Sequence[str], state: dict[str, Tensor]) -> None:
        for name in names:
            self.state[name].update(state)

    def _fit_gradients(self, groups: Sequence[Sequence[str]]) -> None:
        """Fit criteria that see gradients, for all groups at once: one backward pass of the dense model for each window.

        A gradient does not depend on η, so only the rotation comes before it.
        """
        fitters: list[tuple[int, Slots, Fitter]] = []
        for index, group in enumerate(groups):
            layer, state = self._layer(group[0]), self.state[group[0]]
            slots = Slots(self.sparsification.pattern)
            for stage in self.sparsification.stages:
                slots = stage.fill(slots, layer, state) if stage.slot == "rotation" else slots
            for stage in self.fitted:
                if stage.slot == "weight" and (fitter := self._fitter(stage, group[0], slots)).sees == "gradient":
                    fitters.append((index, slots, fitter))
        if not fitters:
            return
        scope = self.sparse.view.scope
        with self.sparse.view.as_dense():
            for window in self.windows.split(1):
                of_group = gradients(self.model, window, groups)
                for index, slots, fitter in fitters:
                    gradient = rotated(of_group[index], slots)
                    fitter.update(in_scope(as_tensor(gradient, gradient), scope))
        for index, _, fitter in fitters:
            self._keep(groups[index], fitter.result())

    def _set_initial_parameters(self) -> set[str]:
        """Put learned parameters into the state, shared where the stage is per input; return their names."""
        parameter_names: set[str] = set()
        for stage in self.learned:
            for group in self.groups:
                for names in _sharing(stage, group):
                    parameters = stage.initial_parameters(self._layer(names[0]))
                    parameter_names |= set(parameters)
                    self._keep(names, parameters)
        return parameter_names

    def _parameters(self, groups: Sequence[Sequence[str]], names: set[str]) -> list[Tensor]:
        """Replace the learned parameters of some groups by leaves that take gradients, and return these."""
        leaves: dict[int, Tensor] = {}
        for group in groups:
            for layer in group:
                for entry in names & set(self.state[layer]):
                    old = self.state[layer][entry]
                    leaves.setdefault(id(old), old.detach().clone().requires_grad_())
                    self.state[layer][entry] = leaves[id(old)]
            self.sparse.put(group, self.state)
        return list(leaves.values())

    def _freeze(self, groups: Sequence[Sequence[str]]) -> None:
        for group in groups:
            frozen_of: dict[int, Tensor] = {}
            for layer in group:
                for entry, value in self.state[layer].items():
                    self.state[layer][entry] = frozen_of.setdefault(id(value), value.detach())
            self.sparse.put(group, self.state)

    def _train_block(
        self, index: int, groups: Sequence[Sequence[str]], names: set[str], inputs: list[Tensor],
        targets: list[Tensor] | None, advance: bool,
    ) -> Loss:  # fmt: skip
        """Train a block; without `targets` they are the dense block's outputs on the same inputs."""
        if targets is None:
            targets = list(inputs)
            self._advance(index, targets, dense=True)
        parameters = self._parameters(groups, names)
        loss = train(
            self.blocks.names[index],
            lambda hidden: self.blocks.run(index, hidden),
            inputs,
            targets,
            parameters,
            self.training,
            advance=advance,
        )
        self._freeze(groups)
        return loss


def _sharing(stage: Stage, group: Sequence[str]) -> list[Sequence[str]]:
    """Split the layers of one input into lists that share the state of a stage."""
    return [group] if stage.per_input else [[name] for name in group]
