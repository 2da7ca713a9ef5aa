"""nmsweep as a model of the lm-evaluation-harness, with the harness's own command line.

python -m nmsweep.lm_eval --model nmsweep --model_args pretrained=smollm2,pattern=8:16,mitigation=shift --tasks arc_easy
"""

import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model

from nmsweep.calibration.text import check_items
from nmsweep.cell.check import check_sparsification, scope_errors
from nmsweep.cell.identity import Cell, identify, sees_text
from nmsweep.cell.prepare import allocated, calibration
from nmsweep.cell.session import Session
from nmsweep.config.catalogue import options
from nmsweep.config.compose import cells_of
from nmsweep.config.schema import RunConfig
from nmsweep.errors import InputError, NmsweepError
from nmsweep.evaluate import lm
from nmsweep.sparsity.install import install

_OF_LM_EVAL = ("eval", "baseline", "force", "cluster", "loggers", "hydra")
"""First words of the keys that have no effect on a model of lm-eval; `eval.include_path` has one."""


@register_model("nmsweep")
class NMSweepLM(lm.NMSweepLM):
    """A model of lm-eval that stays sparse as long as this object exists.

    Args:
        pretrained: a model of `nmsweep list`, a local folder or GGUF file, or ``owner/name`` on the hub.
        device: as in nmsweep; None for ``auto``.
        batch_tokens: padded tokens per batch.
        scoring: ``"packed"`` or ``"stock"``.
        batch_size, max_batch_size: passed by the harness and ignored; `batch_tokens` decides.
        overrides: any other key of the command line (``pattern``, ``policy``, ``criterion``, ``mitigation``, ``targets``, ``scope``,
            ``dtype``, ``mitigations.shift.stat``, ``calibration.source``, …), with the same defaults. `tasks`, with
            `eval.include_path` and `data.mirror`, names the tasks that the calibration text must not overlap with.

    Raises:
        InputError: as on the command line, all mistakes together; a method that needs a calibration text, without `tasks` or
            `calibration.source`; and, while requests are answered, tasks that do not fit the scope, criterion or text.
    """

    def __init__(
        self,
        pretrained: str = "smollm2",
        device: str | None = None,
        batch_tokens: int = 4096,
        scoring: lm.Scoring = "packed",
        batch_size: Any = None,
        max_batch_size: Any = None,
        **overrides: Any,
    ) -> None:
        cfg = _config(str(pretrained), device, batch_tokens, scoring, overrides)
        cell = None if cfg.pattern.is_dense else _cell(cfg, "tasks" in overrides)
        session = Session()
        loaded = session.model(cfg)
        if cell is not None:
            cell = allocated(cell, loaded, session)
            sparsification, state = cell.sparsification, calibration(cell, loaded, session).state
            assert sparsification is not None
            sparse = install(loaded.model, sparsification, cfg.targets, state, cfg.scope)
            self._dense_again = weakref.finalize(self, sparse.restore)
        self._cell = cell
        across = cell is not None and cell.across_tokens
        super().__init__(loaded.model, loaded.tokenizer, cfg.eval.batch_tokens, cfg.eval.scoring, across)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._check(requests)
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        self._check(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm)  # type: ignore[no-any-return]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        self._check(requests, generates=True)
        return super().generate_until(requests, disable_tqdm)

    def _check(self, requests: Sequence[Instance], generates: bool = False) -> None:
        """Check tasks against scope and calibration text; unlike in a cell, they are known only from the requests."""
        if self._cell is None:
            return
        docs: dict[str, dict[int, Any]] = {}
        for request in requests:
            docs.setdefault(str(request.task_name), {})[id(request.doc)] = request.doc
        if errors := scope_errors(self._cell.cfg, **{"generated" if generates else "scored": list(docs)}):
            raise InputError(*errors)
        if self._cell.calibration_text is not None:
            for task, items in docs.items():
                check_items(self._cell.calibration_text, task, items.values())


def _config(
    pretrained: str, device: str | None, batch_tokens: int, scoring: str, overrides: Mapping[str, Any]
) -> RunConfig:
    """Return the checked config that the arguments describe."""
    if without := [key for key in overrides if key.split(".")[0] in _OF_LM_EVAL and key != "eval.include_path"]:
        raise InputError(
            *(
                f"{key}: has no effect here; use the option of lm-eval, or batch_tokens= and scoring= without a prefix"
                for key in without
            )
        )
    words = [*model_words(pretrained), f"device={device or 'auto'}"]
    words += [f"eval.batch_tokens={batch_tokens}", f"eval.scoring={scoring}"]
    words += [f"{key}={'null' if value is None else value}" for key, value in overrides.items()]
    (cfg,) = cells_of(words, multirun=False, config_dir=None)
    if not cfg.pattern.is_dense:
        check_sparsification(cfg)
    return cfg


def _cell(cfg: RunConfig, names_tasks: bool) -> Cell:
    """Return the cell whose calibrated state is used and stored in `results_dir`; it does not depend on tasks.

    Raises:
        InputError: it needs a calibration text, and neither the text nor the tasks are named.
    """
    if sees_text(cfg) and cfg.calibration.source == "auto" and not names_tasks:
        raise InputError(
            "calibration.source: auto goes by the tasks, which lm-eval does not tell a model; name them with tasks=…, "
            "or the text with calibration.source=mini, wikitext2 or a text file"
        )
    return identify(cfg, sources=None if names_tasks else ())


def model_words(pretrained: str) -> list[str]:
    """Return the overrides that select a model."""
    if pretrained in options("model"):
        return [f"model={pretrained}"]
    if Path(pretrained).exists():
        return [f"model.path={pretrained}"]
    if pretrained.count("/") == 1:
        name = pretrained.rpartition("/")[2]
        return ["model=llama", f"model.repo={pretrained}", f"model.name={name}"]
    raise InputError(
        f"pretrained: {pretrained!r} is no model; allowed: {', '.join(options('model'))}, a folder or .gguf file, owner/name"
    )


def main() -> int:
    """Run the harness's command line with this model registered."""
    try:
        cli_evaluate()
    except NmsweepError as error:
        for message in str(error).splitlines():
            print(f"nmsweep: {message}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
