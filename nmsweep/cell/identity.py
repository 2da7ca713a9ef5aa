"""What a cell is: everything that can change one of its numbers, hashed; and where it lies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from nmsweep.calibration import policy
from nmsweep.calibration import store as calibrate
from nmsweep.calibration.fit import learning_errors
from nmsweep.calibration.text import check_disjoint, find_source
from nmsweep.config.recipe import read_recipe
from nmsweep.config.schema import CELL_SCHEMA, Method, RunConfig, short_hash
from nmsweep.data.examples import check_examples
from nmsweep.data.extras import missing_extras
from nmsweep.data.tasks import TaskSource, find_task, task_names
from nmsweep.errors import DataError, InputError
from nmsweep.evaluate.base import as_multiturn
from nmsweep.methods.sparsification import Sparsification, build_sparsification
from nmsweep.models import ModelSpec, check_model, fingerprint, skeleton, target_linears
from nmsweep.results.record import cell_folder
from nmsweep.sparsity.install import pattern_errors

_EVAL_WITHOUT_EFFECT = {"scoring", "batch_tokens", "skip_missing", "include_path"}
"""Keys of `eval` that change no number, or none that the tasks' fingerprints do not tell apart."""


@dataclass(frozen=True)
class Cell:
    """One cell's identity.

    Attributes:
        cell_id: 12 hex digits; equal for equal numbers.
        dense_cell_id: the id of the dense cell it is compared with; its own id where it is dense.
        part_id: the same without the task list.
        folder: where its record lies when it is finished.
        sources: its tasks and their data.
        sparsification: what makes it sparse; None where it is dense.
        calibration_text: what its calibrated stages see; None where no stage sees a text.
        calibration_id: hash of everything that their state and a greedy allocation depend on; empty without either.
    """

    cfg: RunConfig
    cell_id: str
    dense_cell_id: str
    part_id: str
    folder: Path
    sources: Sequence[TaskSource]
    sparsification: Sparsification | None
    calibration_text: TaskSource | None = None
    calibration_id: str = ""

    @property
    def is_dense(self) -> bool:
        return self.sparsification is None

    @property
    def across_tokens(self) -> bool:
        """Whether what is pruned of one token depends on others of its sequence, or on how many there are."""
        made = self.sparsification
        return made is not None and (made.criterion.across_tokens or self.cfg.scope.endswith("%"))


def device_kind(device: str) -> str:
    """``cpu``, ``cuda``, …, for ``auto`` what this machine has."""
    if device == "auto":
        import torch

        return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]
    return device.split(":")[0]


def model_spec(cfg: RunConfig) -> ModelSpec:
    return ModelSpec.from_node(cfg.model)


def identify(
    cfg: RunConfig, say: Callable[[str], None] = lambda text: None, sources: Sequence[TaskSource] | None = None
) -> Cell:
    """Work out a cell's identity; no weights are loaded.

    Args:
        cfg: the cell's config.
        say: told about tasks that are left out because their data is missing (`eval.skip_missing`).
        sources: its tasks, where they are not those of the config.

    Raises:
        InputError: a model, task or method that cannot be had.
    """
    sources = task_sources(cfg, say) if sources is None else sources
    sparsification = None if cfg.pattern.is_dense else sparsification_of(cfg)
    model = fingerprint(model_spec(cfg))
    text = calibration_text(cfg, sources) if sparsification is not None and sees_text(cfg) else None
    part = _identity(cfg, model, sparsification, text)
    dense_part = _identity(cfg.dense(), model, None)
    tasks = {source.task: list(task_identity(source, cfg).values()) for source in sources}
    cell_id = short_hash({**part, "tasks": tasks})
    criterion = cfg.criterion.name if cfg.criterion else "none"
    folder = cell_folder(cfg.results_dir, cfg.model_name, cfg.pattern.slug, criterion, cfg.mitigation, cell_id)
    dense_id = short_hash({**dense_part, "tasks": tasks})
    state_id = ""
    if sparsification and (sparsification.calibrated or cfg.policy == "greedy"):
        state_id = short_hash({**part, "eval": None, "calibration_version": calibrate.VERSION}, 20)
    return Cell(cfg, cell_id, dense_id, short_hash(part), folder, sources, sparsification, text, state_id)


def task_sources(cfg: RunConfig, say: Callable[[str], None] = lambda text: None) -> list[TaskSource]:
    """The cell's tasks with their data, sorted by name, each once: a tag may name it again.

    Raises:
        InputError: a task that does not exist, or whose data is missing from the mirror; all of them together.
    """
    sources: dict[str, TaskSource] = {}
    errors = []
    for task in sorted({one for name in cfg.tasks for one in task_names(name, cfg.eval.include_path)}):
        try:
            sources[task] = find_task(task, cfg.data.mirror, cfg.eval.include_path)
        except DataError as error:
            if cfg.eval.skip_missing and "data.mirror" in str(error):
                say(f"    {task} is left out: {cfg.data.mirror} has no data for it (eval.skip_missing=true)")
            else:
                errors.append(str(error))
    if not sources and not errors:
        errors.append(f"tasks: none of {', '.join(cfg.tasks)} has data in {cfg.data.mirror}; nothing would be measured")
    if errors:
        raise InputError(*errors)
    return list(sources.values())


def task_identity(source: TaskSource, cfg: RunConfig) -> dict[str, str]:
    """What a task's numbers depend on beside the rest of the cell: its version and its data.

    Tasks of a group that do not have the same number of examples are part of its version.
    """
    shots = [leaf.shots(cfg.eval.num_fewshot) for leaf in source.leaves]
    differ = f"/{short_hash(shots)}" if len(set(shots)) > 1 else ""
    return {"version": source.version + differ, "data": source.fingerprint(max(shots) > 0)}


def sparsification_of(cfg: RunConfig) -> Sparsification:
    assert cfg.criterion is not None
    recipe = cfg.policy not in ("none", "greedy")
    return build_sparsification(
        replace(cfg.pattern, policy=""), cfg.criterion, cfg.mitigations, cfg.scope,
        patterns=read_recipe(Path(cfg.policy)).layers if recipe else None,
        drops_bias=cfg.profile == "paper_code",
    )  # fmt: skip


def calibration_text(cfg: RunConfig, evaluated: Sequence[TaskSource]) -> TaskSource:
    """The text that calibrated stages see.

    Raises:
        DataError: it cannot be had, or has text in common with what is evaluated.
    """
    found = find_source(cfg.calibration.source, cfg.tasks, cfg.data.mirror)
    check_disjoint(found, [leaf for source in evaluated for leaf in source.leaves])
    return found


def _identity(
    cfg: RunConfig, model: str, sparsification: Sparsification | None, text: TaskSource | None = None
) -> dict[str, Any]:
    """Everything that can change a number, less the tasks."""
    identity: dict[str, Any] = {
        "schema": CELL_SCHEMA,
        "model": model,
        "pattern": cfg.pattern.rule,
        "profile": cfg.profile,
        "dtype": cfg.dtype,
        "device": device_kind(cfg.device),
        "seed": cfg.seed,
        "eval": {
            **cfg.eval.model_dump(exclude=_EVAL_WITHOUT_EFFECT),
            "fewshot_as_multiturn": as_multiturn(cfg.eval.fewshot_as_multiturn, cfg.eval.apply_chat_template),
        },
    }
    if sparsification is None:
        return identity
    assert cfg.criterion is not None
    if text is not None:
        unused = (
            {"source"} if sparsification.learned else {"source", "teacher", "objective", "schedule", "lr", "epochs"}
        )
        used = cfg.calibration.model_dump(exclude=unused)
        identity["calibration"] = {**used, "text": text.fingerprint()}
    return identity | {
        "criterion": _method_identity(cfg.criterion, sparsification.criterion.version),
        "mitigation": [
            _method_identity(method, made.version)
            for method, made in zip(cfg.mitigations, sparsification.mitigations, strict=True)
        ],
        "targets": sorted(cfg.targets),
        "scope": cfg.scope,
        **_policy_identity(cfg, sparsification),
    }


def _policy_identity(cfg: RunConfig, sparsification: Sparsification) -> dict[str, Any]:
    """What the layers' own patterns depend on: a recipe is what it says, whatever its file is called."""
    if cfg.policy == "none":
        return {}
    if cfg.policy == "greedy":
        return {"policy": {"name": "greedy", "version": policy.VERSION, **cfg.allocation.model_dump()}}
    return {"policy": {name: str(pattern) for name, pattern in sorted(sparsification.patterns.items())}}


def _method_identity(method: Method, version: int) -> Mapping[str, Any]:
    return {"name": method.name, "version": version, "params": dict(method.params)}


def check(cfg: RunConfig) -> list[str]:
    """Everything that can be found wrong with a cell before its weights are loaded: one message each."""
    messages: list[str] = [*check_model(model_spec(cfg)), *_prompt_errors(cfg)]
    steps: list[Callable[[], object]] = [lambda: messages.extend(_task_errors(cfg, task_sources(cfg)))]
    if not cfg.pattern.is_dense:
        steps.append(lambda: messages.extend(_scope_errors(cfg, task_sources(cfg))))
        steps.append(lambda: _check_calibration(cfg))
        if not messages:
            steps.append(lambda: messages.extend(_check_targets(cfg)))
    for step in steps:
        try:
            step()
        except InputError as error:
            messages.extend(message for message in error.messages if message not in messages)
    return messages


def _prompt_errors(cfg: RunConfig) -> list[str]:
    if cfg.eval.fewshot_as_multiturn and not cfg.eval.apply_chat_template:
        return [
            "eval.fewshot_as_multiturn: true, but without a chat there are no turns; add eval.apply_chat_template=true"
        ]
    return []


def _task_errors(cfg: RunConfig, sources: Sequence[TaskSource]) -> list[str]:
    """Tasks that lack a package, or a split to take examples from."""
    errors = [message for source in sources for message in missing_extras(source)]
    for leaf in (leaf for source in sources for leaf in source.leaves):
        try:
            check_examples(leaf, leaf.shots(cfg.eval.num_fewshot))
        except DataError as error:
            errors.append(str(error))
    return errors


def _scope_errors(cfg: RunConfig, sources: Sequence[TaskSource]) -> list[str]:
    """A choice of tokens that leaves nothing sparse, or that the criterion is undefined for."""
    errors = scope_errors(
        cfg,
        scored=[source.task for source in sources if not source.generates],
        generated=[source.task for source in sources if source.generates],
    )
    word, _, number = cfg.scope.partition(":")
    if (
        word == "skip_first"
        and not number.endswith("%")
        and int(number) >= cfg.eval.seqlen
        and any(source.kind == "text" for source in sources)
    ):
        errors.append(
            f"scope: {cfg.scope} leaves nothing sparse in windows of {cfg.eval.seqlen} tokens; lower it, or raise eval.seqlen"
        )
    return errors


def scope_errors(cfg: RunConfig, scored: Sequence[str] = (), generated: Sequence[str] = ()) -> list[str]:
    """What is wrong with a sparse cell's choice of tokens, by the names of tasks that score given text or generate their own."""
    errors = []
    if cfg.scope == "decode" and scored:
        tasks = ", ".join(scored)
        errors.append(f"scope: decode is of generated text, but {tasks} only scores given text; take scope=all")
    if generated and cfg.scope != "prefill" and sparsification_of(cfg).criterion.looks_ahead:
        errors.append(
            f"criterion: {cfg.criterion and cfg.criterion.name} looks at later tokens, but {', '.join(generated)} generates text; "
            "take scope=prefill, or criterion=clact_causal"
        )
    return errors


def _check_calibration(cfg: RunConfig) -> None:
    """Methods that cannot be made or cannot act together, and a calibration text that cannot be used."""
    check_method(cfg)
    if sees_text(cfg):
        calibration_text(cfg, task_sources(cfg))


def check_method(cfg: RunConfig) -> None:
    """Look for methods that cannot be made, act together or learn as asked, and for a budget without a choice.

    Raises:
        InputError: what is wrong.
    """
    made = sparsification_of(cfg)
    if cfg.policy == "greedy":
        policy.check_budget(cfg.allocation.ladder, cfg.allocation.density or 1 - cfg.pattern.sparsity)
    if errors := learning_errors(made, cfg.calibration, cfg.policy != "none"):
        raise InputError(*errors)


def sees_text(cfg: RunConfig) -> bool:
    """Whether anything of a sparse cell is found out on a calibration text."""
    return sparsification_of(cfg).uses_text or cfg.policy == "greedy"


def _check_targets(cfg: RunConfig) -> list[str]:
    linears = target_linears(_kept_skeleton(model_spec(cfg)), cfg.targets)
    made = sparsification_of(cfg)
    ladder = cfg.allocation.ladder if cfg.policy == "greedy" else ()
    return [text for one in (made, *map(made.fitted_only, ladder)) for text in pattern_errors(linears, one)]


def model_bytes(cfg: RunConfig) -> int:
    """Bytes of the model's weights in the cell's dtype; none is loaded."""
    size = {"float32": 4, "float64": 8}.get(cfg.dtype, 2)
    return size * int(sum(p.numel() for p in _kept_skeleton(model_spec(cfg)).parameters()))


@cache
def _kept_skeleton(spec: ModelSpec) -> Any:
    return skeleton(spec)
