"""Find the mistakes of a cell before its weights are loaded."""

from collections.abc import Callable, Sequence

from nmsweep.calibration import policy
from nmsweep.calibration.fit import learning_errors
from nmsweep.cell.identity import (
    calibration_text,
    model_skeleton,
    model_spec,
    sees_text,
    sparsification_of,
    task_sources,
)
from nmsweep.config.schema import RunConfig
from nmsweep.data.requirements import fewshot_split, missing_extras, needs_split
from nmsweep.data.tasks import TaskSource
from nmsweep.errors import DataError, InputError
from nmsweep.models import check_model, target_linears
from nmsweep.sparsity.install import pattern_errors


def check(cfg: RunConfig) -> list[str]:
    """Return one message for each mistake of a cell; no weights are loaded."""
    messages = [*check_model(model_spec(cfg)), *_prompt_errors(cfg)]
    checks: list[Callable[[], list[str]]] = [lambda: _task_errors(cfg, task_sources(cfg))]
    if not cfg.pattern.is_dense:
        checks += [lambda: _scope_errors(cfg, task_sources(cfg)), lambda: _method_errors(cfg)]
        if not messages:
            checks.append(lambda: _target_errors(cfg))
    for find_errors in checks:
        try:
            errors: Sequence[str] = find_errors()
        except InputError as error:
            errors = error.messages
        messages += [message for message in errors if message not in messages]
    return messages


def _prompt_errors(cfg: RunConfig) -> list[str]:
    if cfg.eval.fewshot_as_multiturn and not cfg.eval.apply_chat_template:
        return [
            "eval.fewshot_as_multiturn: true, but without a chat there are no turns; add eval.apply_chat_template=true"
        ]
    return []


def _task_errors(cfg: RunConfig, sources: Sequence[TaskSource]) -> list[str]:
    """Return the tasks that lack a package, or a split for few-shot examples."""
    errors = [message for source in sources for message in missing_extras(source)]
    for leaf in (leaf for source in sources for leaf in source.leaves):
        n_shots = leaf.shots(cfg.eval.num_fewshot)
        try:
            if needs_split(leaf, n_shots):
                fewshot_split(leaf, n_shots)
        except DataError as error:
            errors.append(str(error))
    return errors


def _scope_errors(cfg: RunConfig, sources: Sequence[TaskSource]) -> list[str]:
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
    """Return the tasks that do not go with the scope or the criterion of a sparse cell.

    Args:
        cfg: config of the cell.
        scored: names of tasks that score given text.
        generated: names of tasks that generate text.
    """
    errors = []
    if cfg.scope == "decode" and scored:
        tasks = ", ".join(scored)
        errors.append(f"scope: decode is of generated text, but {tasks} only scores given text; take scope=all")
    if generated and cfg.scope != "prefill" and sparsification_of(cfg).criterion.looks_ahead:
        errors.append(
            f"criterion: {cfg.criterion_name} looks at later tokens, but {', '.join(generated)} generates text; "
            "take scope=prefill, or criterion=clact_causal"
        )
    return errors


def _method_errors(cfg: RunConfig) -> list[str]:
    check_sparsification(cfg)
    if sees_text(cfg):
        calibration_text(cfg, task_sources(cfg))
    return []


def check_sparsification(cfg: RunConfig) -> None:
    """Check the criterion, the mitigations and the greedy budget of a sparse cell.

    Raises:
        InputError: methods that cannot be built, combined or trained as asked, or a budget that leaves no choice.
    """
    sparsification = sparsification_of(cfg)
    if cfg.policy == "greedy":
        policy.check_budget(cfg.allocation.ladder, cfg.allocation.density or 1 - cfg.pattern.sparsity)
    if errors := learning_errors(sparsification, cfg.calibration, cfg.policy != "none"):
        raise InputError(*errors)


def _target_errors(cfg: RunConfig) -> list[str]:
    """Return the target layers whose width is not a multiple of M, for each pattern that the cell may use."""
    linears = target_linears(model_skeleton(model_spec(cfg)), cfg.targets)
    sparsification = sparsification_of(cfg)
    ladder = cfg.allocation.ladder if cfg.policy == "greedy" else ()
    candidates = [sparsification, *map(sparsification.fitted_only, ladder)]
    return [message for candidate in candidates for message in pattern_errors(linears, candidate)]
