"""The Python API: `calibrate`, which computes the state that calibrated methods need."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from nmsweep.calibration.fit import fit
from nmsweep.calibration.text import default_samples, windows
from nmsweep.config.schema import CalibrationConfig
from nmsweep.errors import InputError
from nmsweep.methods.base import Criterion, State
from nmsweep.methods.sparsification import Sparsification
from nmsweep.models import adds_bos
from nmsweep.sparsity.api import MitigationArgument, assemble

_LEARNING = ("prefix", "teacher", "objective", "schedule", "lr", "epochs")


def calibrate(
    model: Any,
    text: str | Sequence[str] | Tensor,
    *,
    pattern: str = "8:16",
    criterion: str | Mapping[str, Any] | Criterion = "act",
    mitigation: MitigationArgument = "none",
    targets: str | Sequence[str] = "all",
    mitigations: Mapping[str, Mapping[str, Any]] | None = None,
    scope: str = "all",
    recipe: str | Path | None = None,
    config_dir: str | Path | None = None,
    tokenizer: Any = None,
    seqlen: int = 512,
    n_samples: int | None = None,
    seed: int = 0,
    **learning: Any,
) -> Mapping[str, State]:
    """Compute the state of calibrated and learned methods on a text, as a sweep does it.

    Example:
        >>> method = {"pattern": "8:16", "criterion": "rms", "mitigation": ["shift_static", MyBias()]}
        >>> state = calibrate(model, texts, tokenizer=tokenizer, **method)
        >>> sparse = sparsify(model, state=state, **method)

    Args:
        model: a dense causal language model of transformers; unchanged afterwards.
        text: texts, joined by blank lines and cut into windows; or windows, an int64 tensor [n_windows, seqlen]. Never the
            text that is evaluated.
        pattern, criterion, mitigation, targets, mitigations, scope, recipe, config_dir: as for `sparsify`.
        tokenizer: of the model; needed for texts.
        seqlen: tokens in a window, for texts.
        n_samples: number of windows, for texts; None for 256 where a method is learned, else 32, or as many as there are.
        seed: of the choice of windows, and of the order of training.
        learning: `prefix`, `teacher`, `objective`, `schedule`, `lr` and `epochs`, as under `calibration` on the command line.

    Returns:
        The state of each target layer, by module path; empty entries where no method is calibrated.

    Raises:
        InputError: as for `sparsify`; a setting that does not exist; windows that are none.
        DataError: the text is too short.
    """
    if unknown := sorted(set(learning) - set(_LEARNING)):
        raise InputError(f"calibrate: {', '.join(unknown)} is no setting; allowed: {', '.join(_LEARNING)}")
    try:
        settings = CalibrationConfig(**learning)
    except ValidationError as error:
        raise InputError(
            *(f"calibrate: {e['loc'][0]}={e['input']!r} is not allowed: {e['msg']}" for e in error.errors())
        ) from error
    sparsification, names = assemble(pattern, criterion, mitigation, targets, mitigations, config_dir, scope, recipe)
    ids = text if isinstance(text, Tensor) else _windows(text, tokenizer, sparsification, seqlen, n_samples, seed)
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise InputError(
            f"calibrate: a {ids.dtype} tensor of shape {list(ids.shape)}; windows are an int64 tensor [n_windows, seqlen]; "
            "pass texts with tokenizer= to have them made"
        )
    return fit(model, ids, sparsification, names, scope=scope, settings=settings, seed=seed).state


def _windows(
    text: str | Sequence[str], tokenizer: Any, sparsification: Sparsification, seqlen: int, n_samples: int | None, seed: int
) -> Tensor:  # fmt: skip
    if tokenizer is None:
        raise InputError(
            "calibrate: texts without a tokenizer; pass tokenizer=, or windows as an int64 tensor [n, seqlen]"
        )
    joined = text if isinstance(text, str) else "\n\n".join(text)
    return windows(
        joined, tokenizer, seqlen=seqlen, seed=seed, n_samples=n_samples or default_samples(sparsification),
        exact=n_samples is not None, bos=adds_bos(tokenizer),
    )  # fmt: skip
