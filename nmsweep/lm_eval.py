"""nmsweep as a model of the lm-evaluation-harness: `python -m nmsweep.lm_eval --model nmsweep --model_args …` is its own CLI.

python -m nmsweep.lm_eval --model nmsweep --model_args pretrained=smollm2,pattern=8:16,mitigation=shift --tasks arc_easy
"""

import os
import sys
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from nmsweep.calibrate.store import Calibrated
from nmsweep.catalogue import options
from nmsweep.cell import identify, sparsification_of
from nmsweep.compose import cells_of
from nmsweep.config import RunConfig
from nmsweep.errors import InputError, NmsweepError
from nmsweep.evaluate import lm
from nmsweep.fitting import calibration
from nmsweep.session import Session
from nmsweep.sparsity.install import installed


@register_model("nmsweep")
class NMSweepLM(lm.NMSweepLM):
    """A model that is sparse for as long as this object lives.

    Args:
        pretrained: a model of `nmsweep list`, a local folder or GGUF file, or ``owner/name`` on the hub.
        device: as in nmsweep; None for ``auto``.
        batch_tokens: padded tokens computed at once.
        scoring: ``"packed"`` or ``"stock"``.
        batch_size, max_batch_size: the harness gives them; rows are counted by their tokens here.
        overrides: any other key of a run (``pattern``, ``criterion``, ``mitigation``, ``targets``, ``scope``, ``dtype``,
            ``mitigations.shift.stat``, ``calibration.source``, …), by default as on nmsweep's own command line.

    Raises:
        InputError: as on nmsweep's own command line, all mistakes together.
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
        words = [*model_words(str(pretrained)), f"device={device or 'auto'}"]
        words += [f"{key}={value}" for key, value in overrides.items()]
        (cfg,) = cells_of(words, multirun=False, config_dir=None)
        session = Session()
        loaded = session.model(cfg)
        stack = ExitStack()
        self._dense_again = weakref.finalize(self, stack.close)
        across = False
        if not cfg.pattern.is_dense:
            made = sparsification_of(cfg)
            across = made.criterion.across_tokens or cfg.scope.endswith("%")
            state = _calibrated(cfg, session).state if made.calibrated else {}
            stack.enter_context(installed(loaded.model, made, cfg.targets, state, cfg.scope))
        super().__init__(loaded.model, loaded.tokenizer, batch_tokens, lambda n_tokens: None, scoring, across)


def _calibrated(cfg: RunConfig, session: Session) -> Calibrated:
    """The state that a cell of nmsweep would have, from `results_dir` where it is kept."""
    return calibration(identify(cfg), session.model(cfg), session)


def model_words(pretrained: str) -> list[str]:
    """The overrides that name a model."""
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
    """The harness's own command line, with this model registered."""
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
