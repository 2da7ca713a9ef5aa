"""Block by block, first to last: what each stage's slot will see goes into its fitter; learned stages are trained."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nmsweep.calibrate.blocks import Blocks, frozen, gradients
from nmsweep.calibrate.learn import Loss, train, train_end_to_end
from nmsweep.calibrate.store import Calibrated
from nmsweep.config.schema import CalibrationConfig
from nmsweep.errors import InputError
from nmsweep.methods.base import SLOT_ORDER, Fitter, Layer, Slots, Stage, Tokens
from nmsweep.methods.sparsification import Sparsification
from nmsweep.models.targets import input_groups
from nmsweep.sparsity.install import Surgery, dense_targets


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
    """Find the state of every calibrated stage.

    Memory, over all windows: the hidden states before and after one block (with ``teacher=dense`` the dense model's too), and
    the input of one group of layers. Everything else is of one window at a time.

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
    surgery = Surgery(model, sparsification, linears, "all" if scope in ("prefill", "decode") else scope)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), frozen(model):
            walk = _Walk(model, windows, sparsification, surgery, settings, seed, step)
            losses = walk.all_stages()
    finally:
        surgery.restore()
        model.train(was_training)
    return Calibrated(walk.state, losses)


def learning_errors(
    sparsification: Sparsification, settings: CalibrationConfig, each_its_own: bool = False
) -> list[str]:
    """Settings of training that contradict each other or the pattern: one message each; none where nothing is learned.

    Args:
        sparsification: what is to be trained.
        settings: how.
        each_its_own: whether layers will have patterns of their own, though they may not be known yet.
    """
    errors: list[str] = []
    if not sparsification.learned:
        return errors
    if settings.schedule == "step" and sparsification.pattern.kind == "threshold":
        errors.append("calibration.schedule: step goes through N:M or p% patterns, not thresholds; take none or decay")
    if settings.schedule == "step" and (each_its_own or sparsification.patterns):
        errors.append("calibration.schedule: step is of one pattern, but each layer has its own; take none or decay")
    if settings.objective == "kl" and settings.teacher == "dense":
        errors.append(
            "calibration.teacher: dense has no effect with objective=kl, whose target is always the dense model's logits; "
            "leave teacher out, or take objective=mse"
        )
    return errors


class _Walk:
    """One calibration: the state so far, and the model with its layers put in as far as they are known."""

    def __init__(
        self, model: Any, windows: Tensor, sparsification: Sparsification, surgery: Surgery,
        settings: CalibrationConfig, seed: int, step: Callable[[], None],
    ) -> None:  # fmt: skip
        self.model, self.windows, self.made, self.surgery = model, windows.to(model.device), sparsification, surgery
        self.settings, self.seed, self.step = settings, seed, step
        self.state: dict[str, dict[str, Tensor]] = {name: {} for name in surgery.linears}
        self.groups = input_groups(model, list(surgery.linears))
        self.blocks = Blocks(model, windows)
        self.fitted = [stage for stage in sparsification.stages if stage.calibration in ("weights", "text")]
        self.learned = [stage for stage in sparsification.stages if stage.calibration == "learned"]

    def all_stages(self) -> list[Loss]:
        """Fit, train, and fit again what comes after a slot that training has moved."""
        if not self.made.uses_text:
            for group in self.groups:
                self._fit_group(group, self.fitted, [])
            return []
        self._set_masters()
        if not self.made.fills("rotation"):
            self._fit_gradients(self.groups)
        losses = self._all_blocks(self.fitted)
        if self.learned and self.settings.objective == "kl":
            for group in self.groups:
                self.surgery.put(group, self.state)
            losses = [train_end_to_end(self.model, self.windows, self._parameters(self.groups), *self._how())]
            self._freeze(self.groups)
            if later := self._later():
                self._all_blocks(later, train_blocks=False)
        return losses

    def _all_blocks(self, stages: Sequence[Stage], train_blocks: bool = True) -> list[Loss]:
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
            trained = bool(self.learned and groups and train_blocks and self.settings.objective == "mse")
            advanced = trained and self.settings.prefix == "sparse" and not self._later()
            if trained:
                losses.append(self._train_block(index, groups, inputs, teacher, advance=advanced))
                for group in groups if (later := self._later()) else ():
                    self._fit_group(group, later, self._inputs(index, group, inputs, later))
                    self._put_prefix(group)
            if not advanced:
                self._advance(index, inputs, dense=self.settings.prefix == "dense")
            self.step()
        return losses

    def _later(self) -> list[Stage]:
        """Fitted stages whose slot comes after one that is trained: their statistics are of what training has changed."""
        first = min((SLOT_ORDER.index(stage.slot) for stage in self.learned), default=len(SLOT_ORDER))
        return [stage for stage in self.fitted if SLOT_ORDER.index(stage.slot) > first]

    def _put_prefix(self, group: Sequence[str]) -> None:
        if self.settings.prefix == "sparse":
            self.surgery.put(group, self.state)

    def _advance(self, index: int, hidden: list[Tensor], dense: bool) -> None:
        """Put what a block makes of each window in the window's place."""
        with self.surgery.view.as_dense(dense):
            for window, before in enumerate(hidden):
                hidden[window] = self.blocks.run(index, before)

    def _inputs(
        self, index: int, group: Sequence[str], inputs: Sequence[Tensor], stages: Sequence[Stage]
    ) -> list[Tensor]:
        """What the layers of a group are given in each window; nothing where no stage looks."""
        if not any(stage.calibration == "text" for stage in stages):
            return []
        layer = self.model.get_submodule(group[0])
        with self.surgery.view.as_dense(self.settings.prefix == "dense"):
            return [self.blocks.input_of(index, layer, hidden) for hidden in inputs]

    def _fit_group(self, group: Sequence[str], stages: Sequence[Stage], inputs: Sequence[Tensor]) -> None:
        for stage in stages:
            for names in [group] if stage.per_input else [[name] for name in group]:
                fitter = self._fitter(stage, names[0])
                if fitter.sees == "gradient":
                    if self.made.fills("rotation"):
                        self._fit_gradients([group])
                    continue
                for x in inputs if fitter.sees == "input" else ():
                    fitter.update(x, self._in_scope(x))
                self._keep(names, fitter)

    def _fitter(self, stage: Stage, name: str) -> Fitter:
        layer = Layer(name, self.surgery.linears[name])
        slots = self.made.slots(layer, self.state[name], before=stage)
        fitter = stage.fitter(Layer(name, layer.linear, slots.folded), slots)
        if fitter is None:
            raise InputError(
                f"{type(stage).__name__}: is calibrated but has no fitter; add one, or calibration = 'none'"
            )
        return fitter

    def _keep(self, names: Sequence[str], fitter: Fitter) -> None:
        found = fitter.result()
        for name in names:
            self.state[name].update(found)

    def _in_scope(self, x: Tensor) -> Tensor | None:
        scope = self.surgery.view.scope.tokens(x, Tokens())
        return scope if isinstance(scope, Tensor) else None

    def _fit_gradients(self, groups: Sequence[Sequence[str]]) -> None:
        """Stages that see gradients: one backward pass of the dense model a window for all groups."""
        stages = [stage for stage in self.fitted if stage.slot == "weight"]
        fitters = [
            (index, group, fitter)
            for index, group in enumerate(groups)
            for stage in stages
            if (fitter := self._gradient_fitter(stage, group[0])) is not None
        ]
        if not fitters:
            return
        with self.surgery.view.as_dense():
            for window in self.windows.split(1):
                found = gradients(self.model, window, groups)
                for index, _, fitter in fitters:
                    fitter.update(found[index], self._in_scope(found[index]))
        for _, group, fitter in fitters:
            self._keep(group, fitter)

    def _gradient_fitter(self, stage: Stage, name: str) -> Fitter | None:
        """A gradient knows no η, so of the stages before it only the rotation counts."""
        layer = Layer(name, self.surgery.linears[name])
        slots = Slots(self.made.pattern)
        for other in self.made.stages:
            slots = other.fill(slots, layer, self.state[name]) if other.slot == "rotation" else slots
        fitter = stage.fitter(layer, slots)
        return fitter if fitter is not None and fitter.sees == "gradient" else None

    def _set_masters(self) -> None:
        """Learned parameters where they start; layers of one input share those of the input."""
        for stage in self.learned:
            for group in self.groups:
                for names in [group] if stage.per_input else [[name] for name in group]:
                    masters = stage.masters(Layer(names[0], self.surgery.linears[names[0]]))
                    for name in names:
                        self.state[name].update(masters)

    def _parameters(self, groups: Sequence[Sequence[str]]) -> list[Tensor]:
        """The learned parameters of some groups as leaves that take gradients, in place in the layers."""
        names = {entry for stage in self.learned for entry in stage.masters(self._any_layer())}
        leaves: dict[int, Tensor] = {}
        for group in groups:
            for layer in group:
                for entry in names & set(self.state[layer]):
                    old = self.state[layer][entry]
                    leaves.setdefault(id(old), old.detach().clone().requires_grad_())
                    self.state[layer][entry] = leaves[id(old)]
            self.surgery.put(group, self.state)
        return list(leaves.values())

    def _any_layer(self) -> Layer:
        return next(Layer(name, linear) for name, linear in self.surgery.linears.items())

    def _freeze(self, groups: Sequence[Sequence[str]]) -> None:
        for group in groups:
            leaves: dict[int, Tensor] = {}
            for layer in group:
                for entry, value in self.state[layer].items():
                    self.state[layer][entry] = leaves.setdefault(id(value), value.detach())
            self.surgery.put(group, self.state)

    def _how(self) -> tuple[Any, ...]:
        return self.settings, self.seed, self.surgery.view, self.made.pattern

    def _train_block(
        self, index: int, groups: Sequence[Sequence[str]], inputs: list[Tensor], targets: list[Tensor] | None, advance: bool
    ) -> Loss:  # fmt: skip
        """Train a block; without `targets` they are what its dense self makes of the same inputs."""
        if targets is None:
            targets = list(inputs)
            self._advance(index, targets, dense=True)
        parameters = self._parameters(groups)
        name = self.blocks.names[index]
        loss = train(
            name,
            lambda hidden: self.blocks.run(index, hidden),
            inputs,
            targets,
            parameters,
            *self._how(),
            advance=advance,
        )
        self._freeze(groups)
        return loss
