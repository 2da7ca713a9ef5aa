"""Training of learned stages: a block against its dense output, or the whole model against its dense logits."""

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
from nmsweep.sparsity.linear import TokenView

BETAS = (0.9, 0.95)
CLIP = 1.0
WARMUP = 0.03
"""AdamW without weight decay, gradient norm clipped, learning rate up over 3 % of the steps and then linearly to 0."""


@dataclass(frozen=True)
class Loss:
    """The mean loss over all windows before and after training: squared error of a block's output, or KL in nats a token."""

    block: str
    before: float
    after: float


def train(
    name: str,
    run: Callable[[Tensor], Tensor],
    inputs: MutableSequence[Tensor],
    targets: Sequence[Tensor],
    parameters: Sequence[Tensor],
    settings: CalibrationConfig,
    seed: int,
    view: TokenView,
    pattern: Pattern,
    *,
    advance: bool = False,
) -> Loss:
    """Train the learned parameters of one block; batch 1, mean squared error, masks constant in the backward pass.

    Args:
        name: of the block.
        run: the sparse block, [1, seqlen, hidden] to the same.
        inputs, targets: hidden states of each window, and what the block should make of them.
        parameters: fp32 masters, changed in place.
        settings: learning rate, epochs and schedule.
        seed: of the order of the windows.
        view: of the sparse layers; carries the schedule.
        pattern: the layers' own.
        advance: put what the trained block makes of each window in its place in `inputs`: the loss after training needs it
            anyway, so that no pass of its own is spent on it.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """

    def loss_of(index: int, last: bool) -> Tensor:
        out = run(inputs[index])
        if last and advance:
            inputs[index] = out
        return F.mse_loss(_wide(out), _wide(targets[index]))

    return _descend(name, loss_of, len(inputs), parameters, settings, seed, view, pattern)


def train_end_to_end(
    model: Any, windows: Tensor, parameters: Sequence[Tensor], settings: CalibrationConfig, seed: int, view: TokenView,
    pattern: Pattern,
) -> Loss:  # fmt: skip
    """Train all learned parameters at once with the divergence of the logits from the dense model's, KL(dense ‖ sparse).

    Args:
        model: the sparse model.
        windows: ids [n_windows, seqlen].
        parameters, settings, seed, view, pattern: as for `train`.
    """

    def loss_of(index: int, last: bool) -> Tensor:
        ids = windows[index : index + 1]
        with torch.no_grad(), view.as_dense():
            dense = _wide(model(input_ids=ids, use_cache=False).logits[0]).log_softmax(-1)
        sparse = _wide(model(input_ids=ids, use_cache=False).logits[0]).log_softmax(-1)
        return F.kl_div(sparse, dense, log_target=True, reduction="batchmean")

    return _descend("model", loss_of, len(windows), parameters, settings, seed, view, pattern)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _descend(
    name: str, loss_of: Callable[[int, bool], Tensor], n_windows: int, parameters: Sequence[Tensor],
    settings: CalibrationConfig, seed: int, view: TokenView, pattern: Pattern,
) -> Loss:  # fmt: skip
    """Train on `loss_of` a window by its index; its second argument says that training is over and nothing else will run."""

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
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(n_windows, generator=generator) for _ in range(settings.epochs)]).tolist()
    try:
        for done, index in enumerate(order):
            _schedule(view, settings.schedule, pattern, done / n_steps)
            with torch.enable_grad():
                loss_of(index, False).backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
    finally:
        view.fade, view.pattern = 0.0, None
    return Loss(name, before, mean_loss(last=True))


def _schedule(view: TokenView, schedule: str, pattern: Pattern, progress: float) -> None:
    """How sparse the layers are at a point of training, 0 to 1; from its middle on they are what they will be."""
    dense = max(0.0, 1 - 2 * progress)
    if schedule == "decay":
        view.fade = dense
    elif schedule == "step" and pattern.kind == "n:m":
        view.pattern = Pattern("n:m", pattern.n + math.ceil((pattern.m - pattern.n) * dense), pattern.m)
    elif schedule == "step":
        view.pattern = Pattern(pattern.kind, percent=max(1e-6, pattern.percent * (1 - dense)))
