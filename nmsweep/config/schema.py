"""The typed schema of a run, its cross-field rules, and the identity of a cell.

`parse_run` is the only way from a composed Hydra config to a `RunConfig`; it reports every mistake at once.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from nmsweep.config.pattern import Pattern, parse_pattern
from nmsweep.config.recipe import read_recipe
from nmsweep.errors import InputError, nearest

CELL_SCHEMA = 1
"""Version of what goes into a cell's identity; a change gives every cell a new id."""

TARGET_PRESETS = ("all", "mlp", "attn", "paper", "amber")

_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
}
_SCOPE = re.compile(r"all|prefill|decode|skip_first:\d+|skip_first:\d+(\.\d+)?%")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_CLASS = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", re.ASCII)
"""A dotted path; no part begins with an underscore, as that of a module that runs when it is imported may."""


def _reported(parse: Callable[[Any], Any]) -> BeforeValidator:
    """Let an InputError of `parse` be collected by pydantic beside the other mistakes."""

    def collect(value: Any) -> Any:
        try:
            return parse(value)
        except InputError as error:
            raise PydanticCustomError("nmsweep", "{text}", {"text": str(error)}) from error

    return BeforeValidator(collect)


def split_names(value: Any) -> tuple[str, ...]:
    """Read ``a+b`` or ``[a, b]`` as names; ``none``, null and the empty string are no names."""
    parts = value.split("+") if isinstance(value, str) else [] if value is None else list(value)
    return tuple(name for part in parts if (name := str(part).strip()) not in ("", "none"))


def _parse_dtype(value: Any) -> Any:
    return _DTYPES.get(str(value), str(value))


def parse_scope(value: Any) -> str:
    text = str(value)
    if not _SCOPE.fullmatch(text):
        raise InputError(f"scope: {text!r} is no scope; allowed: all, prefill, decode, skip_first:K, skip_first:p%")
    number = text.partition(":")[2]
    if number and not 0 < float(number.rstrip("%")) < (100 if number.endswith("%") else float("inf")):
        raise InputError(
            f"scope: {text} leaves {'every token' if float(number.rstrip('%')) == 0 else 'no token'} sparse; "
            "allowed: skip_first:K with K > 0, skip_first:p% with 0 < p < 100; for every token take scope=all"
        )
    return text


class _Node(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Method(_Node):
    """A criterion or a mitigation as its YAML file gives it.

    Attributes:
        name: the file's name, and the name in every record.
        target: dotted path of its class.
        params: the constructor's arguments.
    """

    name: str
    target: str
    params: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def from_node(cls, name: str, node: Mapping[str, Any]) -> "Method":
        rest = {key: value for key, value in node.items() if key not in ("_target_", "name")}
        return cls(name=name, target=str(node["_target_"]), params=rest)


class EvalConfig(_Node):
    """How a cell is measured. Units: `seqlen`, `batch_tokens` in tokens; `limit` in items or windows of a task.

    `num_fewshot` None is each task's own number (5 for gsm8k, 0 for most). `include_path` has task YAMLs of the user's.
    """

    limit: Annotated[int, Field(ge=1)] | None = None
    seqlen: Annotated[int, Field(ge=2)] = 2048
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    scoring: Literal["packed", "stock"] = "packed"
    batch_tokens: Annotated[int, Field(ge=1)] = 4096
    skip_missing: bool = False
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    include_path: Path | None = None


class DataConfig(_Node):
    """Where the data comes from: the hub, or a folder of local JSONL files (`mirror`)."""

    mirror: Path | None = None


class CalibrationConfig(_Node):
    """Text that calibrated stages see, never the text that is evaluated; and how learned stages are trained.

    `seqlen` in tokens, `n_samples` in windows (None: 256 where a stage is learned, else 32, or what the text has), `epochs`
    in passes over the windows.
    """

    source: str = "auto"
    n_samples: Annotated[int, Field(ge=1)] | None = None
    seqlen: Annotated[int, Field(ge=2)] = 512
    prefix: Literal["sparse", "dense"] = "sparse"
    teacher: Literal["block", "dense"] = "block"
    objective: Literal["mse", "kl"] = "mse"
    schedule: Literal["none", "decay", "step"] = "none"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    epochs: Annotated[int, Field(ge=1)] = 1


class AllocationConfig(_Node):
    """What ``policy=greedy`` chooses from.

    `patterns` are N:M or p%; `density` is the budget, the average density of the target layers weighted by their
    multiply-adds, 0 to 1 (None: that of `pattern`).
    """

    patterns: Annotated[tuple[str, ...], BeforeValidator(split_names)] = (
        "4:16",
        "6:16",
        "8:16",
        "10:16",
        "12:16",
        "16:16",
    )
    density: Annotated[float, Field(gt=0, lt=1)] | None = None

    @property
    def ladder(self) -> tuple[Pattern, ...]:
        return tuple(parse_pattern(word) for word in self.patterns)


class ClusterConfig(_Node):
    """How the cells of a sweep are given to a launcher's jobs; changes no number.

    `cells_per_job` in cells, of one model (None: 8 on Slurm, one batch a worker elsewhere); `workers` in processes of joblib
    and submitit_local (None: one a GPU, or as many as cores and memory allow).
    """

    cells_per_job: Annotated[int, Field(ge=1)] | None = None
    workers: Annotated[int, Field(ge=1)] | None = None


class WandbConfig(_Node):
    """Weights & Biases: which project, and where runs go: `mode` online or offline (None: what WANDB_MODE says, else online)."""

    enabled: bool = False
    project: str = "nmsweep"
    entity: str | None = None
    mode: Literal["online", "offline"] | None = None


class MlflowConfig(_Node):
    """MLflow: where it tracks (None: what MLFLOW_TRACKING_URI says), and which experiment."""

    enabled: bool = False
    tracking_uri: str | None = None
    experiment: str = "nmsweep"


class LoggersConfig(_Node):
    """Who else is told about finished cells; changes no number."""

    wandb: WandbConfig = WandbConfig()
    mlflow: MlflowConfig = MlflowConfig()


class RunConfig(_Node):
    """One cell, fully resolved. Field by field: docs/config.md."""

    model: dict[str, Any]
    pattern: Annotated[Pattern, _reported(parse_pattern)]
    policy: str = "none"
    allocation: AllocationConfig = AllocationConfig()
    criterion: Method | None
    mitigations: tuple[Method, ...]
    targets: Annotated[tuple[str, ...], BeforeValidator(split_names)]
    scope: Annotated[str, _reported(parse_scope)] = "all"
    profile: Literal["strict", "paper", "paper_code"] = "strict"
    tasks: tuple[str, ...]
    eval: EvalConfig
    data: DataConfig
    calibration: CalibrationConfig
    dtype: Annotated[Literal["bfloat16", "float16", "float32", "float64"], BeforeValidator(_parse_dtype)] = "bfloat16"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|xpu|cuda(:\d+)?)$")] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    results_dir: Path = Path("results")
    baseline: bool = True
    force: bool = False
    plugins: tuple[str, ...] = ()
    cluster: ClusterConfig = ClusterConfig()
    loggers: LoggersConfig = LoggersConfig()

    @property
    def model_name(self) -> str:
        """The model as it stands in records and folder names."""
        name = str(self.model["name"])
        if self.model.get("path") and not self.model.get("keep_name"):
            name = Path(str(self.model["path"])).resolve().name
        return name

    @property
    def criterion_name(self) -> str:
        """Name of the criterion; ``none`` for a dense cell."""
        return self.criterion.name if self.criterion else "none"

    @property
    def mitigation(self) -> str:
        """The active mitigations as one word, ``shift+var``; ``none`` without any."""
        return "+".join(method.name for method in self.mitigations) or "none"

    def dense(self) -> "RunConfig":
        """The dense cell that this one is compared with; the cell itself where it is dense."""
        if self.pattern.is_dense:
            return self
        null = {"pattern": Pattern("dense"), "policy": "none", "criterion": None, "mitigations": (), "targets": ()}
        return self.model_copy(update={**null, "scope": "all"})

    def dump(self) -> dict[str, Any]:
        """The effective config as plain values, in the words that the command line takes."""
        return {
            "model": dict(self.model),
            "pattern": self.pattern.rule,
            "policy": self.policy,
            "criterion": self.criterion and {"name": self.criterion.name, **self.criterion.params},
            "mitigation": self.mitigation,
            "mitigations": {method.name: dict(method.params) for method in self.mitigations},
            "targets": "+".join(self.targets) or None,
            "scope": self.scope,
            "profile": self.profile,
            "tasks": list(self.tasks),
            **{
                key: getattr(self, key).model_dump(mode="json") for key in ("eval", "data", "calibration", "allocation")
            },
            **{key: getattr(self, key) for key in ("dtype", "device", "seed", "baseline", "plugins")},
            "results_dir": str(self.results_dir),
        }


def to_plain(cfg: RunConfig) -> dict[str, Any]:
    """A cell's config as JSON has it, for `from_plain`."""
    return {**cfg.model_dump(mode="json"), "pattern": str(cfg.pattern)}


def from_plain(plain: Mapping[str, Any]) -> RunConfig:
    """Read back what `to_plain` gave; a `_target_` outside nmsweep and the cell's plugins, and names that are no names, are
    refused here too.

    Raises:
        InputError: it is no config, or not one of this version.
    """
    try:
        cfg = RunConfig.model_validate(plain)
    except ValidationError as error:
        raise InputError(*map(_describe, error.errors())) from None
    methods = [*cfg.mitigations, *([cfg.criterion] if cfg.criterion else [])]
    errors = [text for m in methods for text in _target_errors(m.name, {"_target_": m.target}, cfg.plugins)]
    if errors := [*errors, *_name_errors(cfg.tasks, cfg.model)]:
        raise InputError(*errors)
    return cfg


def parse_run(raw: Mapping[str, Any]) -> RunConfig:
    """Check a composed config and type it.

    Args:
        raw: the resolved config as plain containers, Hydra's own node left out.

    Raises:
        InputError: one message for each mistake found, all together.
    """
    errors: list[str] = []
    fields = dict(raw)
    presets = fields.pop("task_presets", {})
    fields.pop("profiles", None)  # what the composed values were taken from
    known = fields.pop("mitigations", None) or {}
    plugins = split_names(fields.get("plugins"))
    fields["plugins"] = plugins

    names = split_names(fields.pop("mitigation", None))
    errors += [f"mitigation: {name!r} is not known; {nearest(name, known)}" for name in names if name not in known]
    errors += [
        f"mitigation: {name} is named {names.count(name)} times; name each stage once"
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    active = sorted({name for name in names if name in known})
    nodes = [(f"mitigations.{name}", name, known[name]) for name in active]
    criterion = fields.get("criterion")
    if isinstance(criterion, Mapping):
        nodes.append(("criterion", str(criterion.get("name", "")), criterion))
    else:
        errors.append(f"criterion: {criterion!r} is no criterion; choose one of `nmsweep list`")
    for where, _, node in nodes:
        errors += _target_errors(where, node, plugins)
    if errors and any("_target_" in error for error in errors):
        raise InputError(*errors)
    fields["criterion"] = Method.from_node(nodes[-1][1], criterion) if isinstance(criterion, Mapping) else None
    fields["mitigations"] = tuple(Method.from_node(name, node) for _, name, node in nodes if name in active)
    fields["tasks"] = expand_tasks(fields.get("tasks"), presets)
    if not fields["tasks"]:
        errors.append(
            f"tasks: nothing to measure; name a preset ({', '.join(presets)}) or tasks, such as tasks=arc_easy+boolq"
        )
    errors += _name_errors(fields["tasks"], fields.get("model"))
    try:
        cfg = RunConfig.model_validate(fields)
    except ValidationError as error:
        raise InputError(*errors, *map(_describe, error.errors())) from None
    errors += _cross_field_errors(cfg)
    errors += _policy_errors(cfg)
    if errors:
        raise InputError(*errors)
    return _normalised(cfg)


def _name_errors(tasks: Iterable[str], model: Any) -> list[str]:
    """Tasks and a model whose names cannot become parts of a path."""
    errors = [f"tasks: {task!r} is no task name" for task in tasks if not _SAFE_NAME.fullmatch(task)]
    if not isinstance(model, Mapping) or not _SAFE_NAME.fullmatch(str(model.get("name", ""))):
        errors.append(f"model: {model!r} has no usable name; letters, digits, '.', '_', '+' and '-' are allowed")
    return errors


def expand_tasks(value: Any, presets: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Presets and tasks, ``paper+lambada_openai`` or a list, as sorted task names without doubles."""
    tasks: set[str] = set()
    for name in split_names(value):
        tasks.update(presets.get(name, (name,)))
    return tuple(sorted(tasks))


def _normalised(cfg: RunConfig) -> RunConfig:
    if cfg.pattern.is_dense:
        return cfg.dense().model_copy(update={"criterion": None, "mitigations": (), "targets": (), "scope": "all"})
    policy = "greedy" if cfg.pattern.policy else cfg.policy
    if policy == "greedy":
        return cfg.model_copy(update={"policy": policy, "pattern": replace(cfg.pattern, policy=policy)})
    if policy != "none":
        file = Path(policy).expanduser().resolve()
        label = "recipe-" + re.sub(r"[^A-Za-z0-9._+-]+", "-", file.stem)
        pattern = replace(read_recipe(file).pattern, policy=label)
        return cfg.model_copy(update={"policy": str(file), "pattern": pattern})
    return cfg


def _policy_errors(cfg: RunConfig) -> list[str]:
    """What is wrong with a policy, and with what it chooses from."""
    policy, errors = cfg.policy, []
    if cfg.pattern.policy.startswith("recipe-"):
        return [f"pattern: {cfg.pattern} is the name of a recipe; pass policy=FILE with its YAML file"]
    if policy == "none" and not cfg.pattern.policy:
        return []
    if cfg.pattern.is_dense:
        return [f"policy: {policy} has no effect with pattern=dense; take policy=none, or pattern=8:16 as the budget"]
    if policy not in ("none", "greedy"):
        try:
            read_recipe(Path(policy).expanduser())
        except InputError as error:
            return list(error.messages)
        return []
    if cfg.pattern.kind == "threshold":
        errors.append(f"pattern: {cfg.pattern.rule} with policy=greedy; the budget is N:M or p%, such as 8:16")
    try:
        if bad := [str(pattern) for pattern in cfg.allocation.ladder if pattern.kind not in ("n:m", "unstructured")]:
            errors.append(
                f"allocation.patterns: {', '.join(bad)}; allowed: N:M or p%, M:M for a layer that stays dense"
            )
        if len(set(cfg.allocation.ladder)) < 2:
            errors.append(
                "allocation.patterns: one pattern leaves nothing to choose; name at least two, such as 1:4+2:4+3:4"
            )
    except InputError as error:
        errors += [f"allocation.patterns: {message}" for message in error.messages]
    return errors


def _target_errors(where: str, node: Mapping[str, Any], plugins: tuple[str, ...]) -> list[str]:
    target = node.get("_target_")
    if not isinstance(target, str) or not _CLASS.fullmatch(target):
        return [f"{where}: _target_ is {target!r}; name the class, such as nmsweep.methods.criteria.act.Act"]
    package = target.split(".")[0]
    if package != "nmsweep" and package not in plugins:
        return [
            f"{where}: _target_ {target} is of package {package}; allowed: nmsweep and what `plugins:` lists; add plugins=[{package}]"
        ]
    return []


def _cross_field_errors(cfg: RunConfig) -> list[str]:
    errors = []
    if cfg.pattern.is_dense and cfg.mitigations:
        errors.append(
            f"mitigation: {cfg.mitigation} has no effect with pattern=dense; take mitigation=none or another pattern (a sweep runs the dense cell by itself)"
        )
    if not cfg.pattern.is_dense and not cfg.targets:
        errors.append(f"targets: nothing is named; allowed: {', '.join(TARGET_PRESETS)}, or globs such as '*.mlp.*'")
    if cfg.model.get("path") and not Path(str(cfg.model["path"])).exists():
        errors.append(f"model.path: {cfg.model['path']} does not exist; name a safetensors folder or a .gguf file")
    if cfg.data.mirror and not cfg.data.mirror.is_dir():
        errors.append(
            f"data.mirror: {cfg.data.mirror} is no folder; name one laid out as <task>/<split>.jsonl, or leave it out"
        )
    return errors


def _describe(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "nmsweep":
        return str(error["msg"])
    if error["type"] == "extra_forbidden":
        return f"{where}: is no key of the config; see `nmsweep --cfg job` for all keys"
    return f"{where}: {error['input']!r} is not valid; {error['msg'][0].lower()}{error['msg'][1:]}"


def canonical_json(value: Any) -> str:
    """The one text that equal values have: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)


def short_hash(value: Any, digits: int = 12) -> str:
    """First hex `digits` of the sha256 of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:digits]
