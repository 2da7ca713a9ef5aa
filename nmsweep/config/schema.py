"""The typed schema of a run and the rules that span several of its fields.

`parse_run` is the only way from a composed Hydra config to a `RunConfig`; it reports every mistake at once. Default
values are not repeated here: they stand in `conf/`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from nmsweep.config.defaults import defaults
from nmsweep.config.pattern import Pattern, parse_pattern
from nmsweep.config.recipe import read_recipe
from nmsweep.errors import InputError, nearest

CELL_SCHEMA = 1
"""Version of a cell's identity; a change gives every cell a new id."""

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
"""A dotted path without parts that begin with an underscore: such modules may run code when they are imported."""

Seqlen = Annotated[int, Field(ge=2)]
Count = Annotated[int, Field(ge=1)]


def _reported(parse: Callable[[Any], Any]) -> BeforeValidator:
    """Let pydantic collect an InputError of `parse` with the other mistakes."""

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
    """Check a scope and return it as text.

    Raises:
        InputError: it is no scope, or one that leaves no token or every token sparse.
    """
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
    """A node of the config. Keys that are left out take the values of `conf/`."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    section: ClassVar[str] = ""
    """Dotted path of the node in `conf/`; empty for a node without default values."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not cls.section or not isinstance(values, Mapping):
            return values
        node: Mapping[str, Any] = defaults()
        for key in cls.section.split("."):
            node = node[key]
        return {**node, **values}


class Method(_Node):
    """A criterion or a mitigation as its YAML file defines it.

    Attributes:
        name: the file's name without suffix, and the name in every record.
        target: dotted path of its class.
        params: arguments of the constructor.
    """

    name: str
    target: str
    params: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def from_node(cls, name: str, node: Mapping[str, Any]) -> "Method":
        rest = {key: value for key, value in node.items() if key not in ("_target_", "name")}
        return cls(name=name, target=str(node["_target_"]), params=rest)


class EvalConfig(_Node):
    """How a cell is measured.

    Units: `seqlen` and `batch_tokens` in tokens, `limit` in items or windows per task. `num_fewshot` None is each task's
    own number (5 for gsm8k, 0 for most). `include_path` is a folder of the user's task YAMLs.
    """

    section = "eval"

    limit: Count | None
    seqlen: Seqlen
    num_fewshot: Annotated[int, Field(ge=0)] | None
    scoring: Literal["packed", "stock"]
    batch_tokens: Count
    skip_missing: bool
    apply_chat_template: bool
    fewshot_as_multiturn: bool | None
    system_instruction: str | None
    include_path: Path | None

    @property
    def multiturn(self) -> bool:
        """Whether few-shot examples are turns of a chat: where it is not set, they follow the chat template, as in lm-eval."""
        return self.apply_chat_template if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn


class DataConfig(_Node):
    """Where task data comes from: a folder of local JSONL files (`mirror`), or the hub if it is None."""

    section = "data"

    mirror: Path | None


class CalibrationConfig(_Node):
    """The calibration text, and how learned stages are trained on it.

    Units: `seqlen` in tokens, `n_samples` in windows, `epochs` in passes over the windows. `n_samples` None is 256 for a
    learned stage and 32 for any other, or as many as the text has.
    """

    section = "calibration"

    source: str
    n_samples: Count | None
    seqlen: Seqlen
    prefix: Literal["sparse", "dense"]
    teacher: Literal["block", "dense"]
    objective: Literal["mse", "kl"]
    schedule: Literal["none", "decay", "step"]
    lr: Annotated[float, Field(gt=0)]
    epochs: Count


class AllocationConfig(_Node):
    """The choices and the budget of ``policy=greedy``.

    `patterns` are N:M or p%. `density` is the average density of the target layers, weighted by their multiply-adds,
    between 0 and 1; None is the density of `pattern`.
    """

    section = "allocation"

    patterns: Annotated[tuple[str, ...], BeforeValidator(split_names)]
    density: Annotated[float, Field(gt=0, lt=1)] | None

    @property
    def ladder(self) -> tuple[Pattern, ...]:
        return tuple(parse_pattern(word) for word in self.patterns)


class ClusterConfig(_Node):
    """How the cells of a sweep are distributed over jobs; changes no number.

    `cells_per_job` is the number of cells of one model in a job (None: 8 on Slurm, one batch per worker elsewhere);
    `workers` is the number of local processes (None: one per GPU, or as many as cores and memory allow).
    """

    section = "cluster"

    cells_per_job: Count | None
    workers: Count | None


class WandbConfig(_Node):
    """Weights & Biases. `mode` None follows WANDB_MODE, which defaults to online."""

    section = "loggers.wandb"

    enabled: bool
    project: str
    entity: str | None
    mode: Literal["online", "offline"] | None


class MlflowConfig(_Node):
    """MLflow. `tracking_uri` None follows MLFLOW_TRACKING_URI."""

    section = "loggers.mlflow"

    enabled: bool
    tracking_uri: str | None
    experiment: str


class LoggersConfig(_Node):
    """External loggers of finished cells; they change no number."""

    section = "loggers"

    wandb: WandbConfig
    mlflow: MlflowConfig


class RunConfig(_Node):
    """The resolved config of one cell. `conf/config.yaml` explains each key."""

    model: dict[str, Any]
    pattern: Annotated[Pattern, _reported(parse_pattern)]
    policy: str
    allocation: AllocationConfig
    criterion: Method | None
    mitigations: tuple[Method, ...]
    targets: Annotated[tuple[str, ...], BeforeValidator(split_names)]
    scope: Annotated[str, _reported(parse_scope)]
    profile: Literal["strict", "paper", "paper_code"]
    tasks: tuple[str, ...]
    eval: EvalConfig
    data: DataConfig
    calibration: CalibrationConfig
    dtype: Annotated[Literal["bfloat16", "float16", "float32", "float64"], BeforeValidator(_parse_dtype)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|xpu|cuda(:\d+)?)$")]
    seed: Annotated[int, Field(ge=0)]
    results_dir: Path
    baseline: bool
    force: bool
    plugins: tuple[str, ...]
    cluster: ClusterConfig
    loggers: LoggersConfig

    @property
    def model_name(self) -> str:
        """Name of the model in records and folder names."""
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
        """Names of the active mitigations, ``shift+var``; ``none`` without any."""
        return "+".join(method.name for method in self.mitigations) or "none"

    def dense(self) -> "RunConfig":
        """Return the dense baseline of this cell; the cell itself if it is dense."""
        if self.pattern.is_dense:
            return self
        null = {"pattern": Pattern("dense"), "policy": "none", "criterion": None, "mitigations": (), "targets": ()}
        return self.model_copy(update={**null, "scope": "all"})

    def dump(self) -> dict[str, Any]:
        """Return the effective config as plain values, in the words of the command line."""
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
    """Return a cell's config as JSON values, for `from_plain`."""
    return {**cfg.model_dump(mode="json"), "pattern": str(cfg.pattern)}


def from_plain(plain: Mapping[str, Any]) -> RunConfig:
    """Read the values of `to_plain`, with the same checks of names and of `_target_` as `parse_run`.

    Raises:
        InputError: it is no config of this version.
    """
    try:
        cfg = RunConfig.model_validate(plain)
    except ValidationError as error:
        raise InputError(*map(describe, error.errors())) from None
    methods = [*cfg.mitigations, *([cfg.criterion] if cfg.criterion else [])]
    errors = [text for m in methods for text in _target_errors(m.name, {"_target_": m.target}, cfg.plugins)]
    if errors := [*errors, *_name_errors(cfg.tasks, cfg.model)]:
        raise InputError(*errors)
    return cfg


def parse_run(raw: Mapping[str, Any]) -> RunConfig:
    """Check and type a composed config.

    Args:
        raw: the resolved config as plain containers, without Hydra's own node.

    Raises:
        InputError: one message for each mistake.
    """
    errors: list[str] = []
    fields = dict(raw)
    presets = fields.pop("task_presets", {})
    fields.pop("profiles", None)  # the composed values were taken from here
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
        raise InputError(*errors, *map(describe, error.errors())) from None
    errors += _cross_field_errors(cfg)
    errors += _policy_errors(cfg)
    if errors:
        raise InputError(*errors)
    return _normalised(cfg)


def _name_errors(tasks: Iterable[str], model: Any) -> list[str]:
    """Return the names of tasks and of the model that cannot be part of a path."""
    errors = [f"tasks: {task!r} is no task name" for task in tasks if not _SAFE_NAME.fullmatch(task)]
    if not isinstance(model, Mapping) or not _SAFE_NAME.fullmatch(str(model.get("name", ""))):
        errors.append(f"model: {model!r} has no usable name; letters, digits, '.', '_', '+' and '-' are allowed")
    return errors


def expand_tasks(value: Any, presets: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Expand presets and tasks, ``paper+lambada_openai`` or a list, to sorted task names without duplicates."""
    tasks: set[str] = set()
    for name in split_names(value):
        tasks.update(presets.get(name, (name,)))
    return tuple(sorted(tasks))


def _normalised(cfg: RunConfig) -> RunConfig:
    """Drop the methods of a dense cell; write a policy's name into the pattern."""
    if cfg.pattern.is_dense:
        return cfg.dense().model_copy(update={"criterion": None, "mitigations": (), "targets": (), "scope": "all"})
    policy = "greedy" if cfg.pattern.policy else cfg.policy
    if policy == "none":
        return cfg
    if policy == "greedy":
        return cfg.model_copy(update={"policy": policy, "pattern": replace(cfg.pattern, policy=policy)})
    file = Path(policy).expanduser().resolve()
    label = "recipe-" + re.sub(r"[^A-Za-z0-9._+-]+", "-", file.stem)
    pattern = replace(read_recipe(file).pattern, policy=label)
    return cfg.model_copy(update={"policy": str(file), "pattern": pattern})


def _policy_errors(cfg: RunConfig) -> list[str]:
    """Return what is wrong with a policy and its choices."""
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


def describe(error: Any, *parents: str) -> str:
    """Return one of pydantic's errors as *key: what came; what is allowed*; `parents` are put before its key."""
    where = ".".join(str(part) for part in [*parents, *error["loc"]])
    if error["type"] == "nmsweep":
        return str(error["msg"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: is no key of the config; see `nmsweep --cfg job` for all keys"
    if error["type"] == "missing":
        return f"{where}: is missing; add it"
    return f"{where}: {error['input']!r} is not valid; {error['msg'][0].lower()}{error['msg'][1:]}"


def canonical_json(value: Any) -> str:
    """Return the JSON of a value with sorted keys, no spaces and no NaN, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)


def short_hash(value: Any, digits: int = 12) -> str:
    """Return the first hex `digits` of the sha256 of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:digits]
