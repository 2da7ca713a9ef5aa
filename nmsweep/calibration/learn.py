"""Train learned stages: one block against its dense output, or the whole model against its dense logits."""

import math
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nmsweep.config.pattern import Pattern
from nmsweep.config.schema import CalibrationConfig
from nmsweep.errors import NonFiniteError
from nmsweep.methods.base import as_tensor
from nmsweep.sparsity.shared_input import TokenView

BETAS = (0.9, 0.95)
CLIP = 1.0
WARMUP = 0.03
"""AdamW without weight decay, gradients clipped by norm, learning rate up over 3 % of the steps, then linearly down to 0."""


@dataclass(frozen=True)
class Loss:
    """The mean loss over all windows before and after training: a block's squared error, or KL in nats per token."""

    block: str
    before: float
    after: float


@dataclass(frozen=True)
class Training:
    """How learned stages are trained.

    Attributes:
        settings: learning rate, epochs and schedule.
        seed: of the order of the windows.
        view: of the sparse layers; carries the schedule.
        pattern: the layers' own.
    """

    settings: CalibrationConfig
    seed: int
    view: TokenView
    pattern: Pattern


def train(
    name: str,
    run: Callable[[Tensor], Tensor],
    inputs: MutableSequence[Tensor],
    targets: Sequence[Tensor],
    parameters: Sequence[Tensor],
    training: Training,
    *,
    advance: bool = False,
) -> Loss:
    """Train the parameters of one block with batch 1 and mean squared error; masks are constant in the backward pass.

    Args:
        name: of the block.
        run: the sparse block, from [1, seqlen, hidden] to the same.
        inputs, targets: hidden states of each window, and the outputs to learn.
        parameters: fp32 leaves, changed in place.
        training: settings.
        advance: replace `inputs` by the outputs of the trained block; the loss after training needs them anyway.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """

    def loss_of(index: int, last: bool) -> Tensor:
        out = run(inputs[index])
        if last and advance:
            inputs[index] = out
        return F.mse_loss(as_tensor(out, out), as_tensor(targets[index], out))

    return _descend(name, loss_of, len(inputs), parameters, training)


def train_end_to_end(model: Any, windows: Tensor, parameters: Sequence[Tensor], training: Training) -> Loss:
    """Train all parameters together with the divergence from the dense model's logits, KL(dense ‖ sparse).

    Args:
        model: the sparse model.
        windows: ids [n_windows, seqlen].
        parameters, training: as for `train`.
    """

    def logits_of(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[0]
        return as_tensor(logits, logits)

    def loss_of(index: int, last: bool) -> Tensor:
        ids = windows[index : index + 1]
        with torch.no_grad(), training.view.as_dense():
            dense = logits_of(ids).log_softmax(-1)
        sparse = logits_of(ids).log_softmax(-1)
        return F.kl_div(sparse, dense, log_target=True, reduction="batchmean")

    return _descend("model", loss_of, len(windows), parameters, training)


def _descend(
    name: str, loss_of: Callable[[int, bool], Tensor], n_windows: int, parameters: Sequence[Tensor], training: Training
) -> Loss:
    """Minimise `loss_of`, a function of a window's index and of whether training is over."""
    settings = training.settings

    def mean_loss(last: bool) -> float:
        value = sum(float(loss_of(index, last)) for index in range(n_windows)) / n_windows
        if not math.isfinite(value):
            raise NonFiniteError(
                f"calibration: the loss of {name} is {value}; lower calibration.lr, or take dtype=float32"
            )
        return value

    before = mean_loss(last=False)
    n_steps = settings.epochs * n_windows
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=BETAS, weight_decay=0.0)
    warmup = max(1, round(WARMUP * n_steps))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / warmup, (n_steps - done) / max(1, n_steps - warmup))
    )
    generator = torch.Generator().manual_seed(training.seed)
    order = torch.cat([torch.randperm(n_windows, generator=generator) for _ in range(settings.epochs)]).tolist()
    try:
        for done, index in enumerate(order):
            _schedule(training, done / n_steps)
            with torch.enable_grad():
                loss_of(index, False).backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
    finally:
        training.view.fade, training.view.pattern = 0.0, None
    return Loss(name, before, mean_loss(last=True))


def _schedule(training: Training, progress: float) -> None:
    """Set the sparsity for a point of training, 0 to 1; in its second half it is the final one."""
    view, pattern, schedule = training.view, training.pattern, training.settings.schedule
    dense = max(0.0, 1 - 2 * progress)
    if schedule == "decay":
        view.fade = dense
    elif schedule == "step" and pattern.kind == "n:m":
        view.pattern = Pattern("n:m", pattern.n + math.ceil((pattern.m - pattern.n) * dense), pattern.m)
    elif schedule == "step":
        view.pattern = Pattern(pattern.kind, percent=max(1e-6, pattern.percent * (1 - dense)))
