"""The identity of a cell: a hash over everything that can change one of its numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from nmsweep.calibration import policy
from nmsweep.calibration import store as calibrate
from nmsweep.calibration.text import check_disjoint, find_source
from nmsweep.config.recipe import read_recipe
from nmsweep.config.schema import CELL_SCHEMA, Method, RunConfig, short_hash
from nmsweep.data.tasks import TaskSource, find_task, task_names
from nmsweep.errors import DataError, InputError
from nmsweep.methods.sparsification import Sparsification, build_sparsification
from nmsweep.models import ModelSpec, fingerprint, resolve_device, skeleton
from nmsweep.results.record import cell_folder

_EVAL_NOT_HASHED = {"scoring", "batch_tokens", "skip_missing", "include_path"}
"""Keys of `eval` that change no number, or only through the tasks' fingerprints."""

_LEARNING_KEYS = {"teacher", "objective", "schedule", "lr", "epochs"}
"""Keys of `calibration` that only learned stages read."""


@dataclass(frozen=True)
class Cell:
    """A config with its identity.

    Attributes:
        cfg: the config.
        cell_id: 12 hex digits; cells with equal ids have equal numbers.
        dense_cell_id: id of the dense baseline; its own id for a dense cell.
        part_id: hash of the identity without the tasks.
        folder: folder of the finished record.
        sources: the tasks with their data.
        sparsification: how the model is made sparse; None for a dense cell.
        calibration_text: text for the calibrated stages; None if no stage reads one.
        calibration_id: hash of everything that the calibrated state and a greedy allocation depend on; empty if the
            cell has neither.
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
    def across_tokens(self) -> bool:
        """Whether the mask of a token depends on the other tokens of its sequence, or on their number."""
        if self.sparsification is None:
            return False
        return self.sparsification.criterion.across_tokens or self.cfg.scope.endswith("%")


def identify(
    cfg: RunConfig, say: Callable[[str], None] = lambda text: None, sources: Sequence[TaskSource] | None = None
) -> Cell:
    """Compute the identity of a cell without loading weights.

    Args:
        cfg: config of the cell.
        say: called with each task that is left out because its data is missing (`eval.skip_missing`).
        sources: tasks to use instead of those of the config.

    Raises:
        InputError: the model, a task or a method does not exist or is not available.
    """
    sources = task_sources(cfg, say) if sources is None else sources
    sparsification = None if cfg.pattern.is_dense else sparsification_of(cfg)
    model = fingerprint(model_spec(cfg))
    text = calibration_text(cfg, sources) if sparsification is not None and sees_text(cfg) else None
    part = _identity_without_tasks(cfg, model, sparsification, text)
    dense_part = _identity_without_tasks(cfg.dense(), model)
    tasks = {source.task: list(task_identity(source, cfg).values()) for source in sources}
    cell_id = short_hash({**part, "tasks": tasks})
    folder = cell_folder(cfg.results_dir, cfg.model_name, cfg.pattern.slug, cfg.criterion_name, cfg.mitigation, cell_id)
    calibration_id = ""
    if sparsification and (sparsification.calibrated or cfg.policy == "greedy"):
        calibration_id = short_hash({**part, "eval": None, "calibration_version": calibrate.VERSION}, 20)
    return Cell(
        cfg,
        cell_id=cell_id,
        dense_cell_id=short_hash({**dense_part, "tasks": tasks}),
        part_id=short_hash(part),
        folder=folder,
        sources=sources,
        sparsification=sparsification,
        calibration_text=text,
        calibration_id=calibration_id,
    )


def _identity_without_tasks(
    cfg: RunConfig, model: str, sparsification: Sparsification | None = None, text: TaskSource | None = None
) -> dict[str, Any]:
    """Return the hashed part of a cell's config.

    Args:
        cfg: config of the cell.
        model: fingerprint of the model.
        sparsification: None for a dense cell.
        text: calibration text; None if no stage reads one.
    """
    identity: dict[str, Any] = {
        "schema": CELL_SCHEMA,
        "model": model,
        "pattern": cfg.pattern.rule,
        "profile": cfg.profile,
        "dtype": cfg.dtype,
        "device": device_kind(cfg.device),
        "seed": cfg.seed,
        "eval": {
            **cfg.eval.model_dump(exclude=_EVAL_NOT_HASHED),
            "fewshot_as_multiturn": cfg.eval.multiturn,
        },
    }
    if sparsification is None:
        return identity
    assert cfg.criterion is not None
    if text is not None:
        unused = {"source"} | (set() if sparsification.learned else _LEARNING_KEYS)
        identity["calibration"] = {**cfg.calibration.model_dump(exclude=unused), "text": text.fingerprint()}
    versions = [mitigation.version for mitigation in sparsification.mitigations]
    return identity | {
        "criterion": _method_identity(cfg.criterion, sparsification.criterion.version),
        "mitigation": [_method_identity(*pair) for pair in zip(cfg.mitigations, versions, strict=True)],
        "targets": sorted(cfg.targets),
        "scope": cfg.scope,
        **_policy_identity(cfg, sparsification),
    }


def _method_identity(method: Method, version: int) -> dict[str, Any]:
    return {"name": method.name, "version": version, "params": dict(method.params)}


def _policy_identity(cfg: RunConfig, sparsification: Sparsification) -> dict[str, Any]:
    """Return what the layers' own patterns depend on: for a recipe its content, not its file name."""
    if cfg.policy == "none":
        return {}
    if cfg.policy == "greedy":
        return {"policy": {"name": "greedy", "version": policy.VERSION, **cfg.allocation.model_dump()}}
    return {"policy": {name: str(pattern) for name, pattern in sorted(sparsification.patterns.items())}}


def task_identity(source: TaskSource, cfg: RunConfig) -> dict[str, str]:
    """Return the version and the data fingerprint of a task.

    The version of a group includes its tasks' numbers of few-shot examples where they differ.
    """
    shots = [leaf.shots(cfg.eval.num_fewshot) for leaf in source.leaves]
    suffix = f"/{short_hash(shots)}" if len(set(shots)) > 1 else ""
    return {"version": source.version + suffix, "data": source.fingerprint(max(shots) > 0)}


def task_sources(cfg: RunConfig, say: Callable[[str], None] = lambda text: None) -> list[TaskSource]:
    """Return the tasks of a cell with their data, sorted by name and without duplicates.

    Raises:
        InputError: tasks that do not exist or whose data is missing from the mirror; all of them in one error.
    """
    sources: dict[str, TaskSource] = {}
    errors = []
    for task in sorted({task for name in cfg.tasks for task in task_names(name, cfg.eval.include_path)}):
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


def sparsification_of(cfg: RunConfig) -> Sparsification:
    """Build the criterion and the mitigations of a sparse cell.

    Raises:
        InputError: a method that cannot be built, or a recipe that cannot be read.
    """
    assert cfg.criterion is not None
    has_recipe = cfg.policy not in ("none", "greedy")
    return build_sparsification(
        replace(cfg.pattern, policy=""), cfg.criterion, cfg.mitigations, cfg.scope,
        patterns=read_recipe(Path(cfg.policy)).layers if has_recipe else None,
        drops_bias=cfg.profile == "paper_code",
    )  # fmt: skip


def sees_text(cfg: RunConfig) -> bool:
    """Return whether a sparse cell reads a calibration text."""
    return sparsification_of(cfg).uses_text or cfg.policy == "greedy"


def calibration_text(cfg: RunConfig, evaluated: Sequence[TaskSource]) -> TaskSource:
    """Return the text for the calibrated stages.

    Args:
        cfg: config of the cell.
        evaluated: tasks that must share no text with it.

    Raises:
        DataError: the text is not available, or shares text with an evaluated task.
    """
    text = find_source(cfg.calibration.source, cfg.tasks, cfg.data.mirror)
    check_disjoint(text, [leaf for source in evaluated for leaf in source.leaves])
    return text


def device_kind(device: str) -> str:
    """Return the device without its index, ``cpu`` or ``cuda``; for ``auto`` the accelerator of this machine, if any."""
    return resolve_device("auto").type if device == "auto" else device.split(":")[0]


def model_spec(cfg: RunConfig) -> ModelSpec:
    return ModelSpec.from_node(cfg.model)


@cache
def model_skeleton(spec: ModelSpec) -> Any:
    """Return the model on the `meta` device, without weights."""
    return skeleton(spec)


def model_bytes(cfg: RunConfig) -> int:
    """Return the size in bytes of the model's weights in the cell's dtype, without loading them."""
    item_bytes = {"float32": 4, "float64": 8}.get(cfg.dtype, 2)
    return item_bytes * int(sum(p.numel() for p in model_skeleton(model_spec(cfg)).parameters()))
