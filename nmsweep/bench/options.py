"""The options of benchmarks: types for the arguments of their `run`, which read what a user types."""

import re
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field

from nmsweep.config.pattern import parse_pattern


def _split(value: Any) -> Any:
    return tuple(name for name in value.split(",") if name) if isinstance(value, str) else value


def _with_exact_budget(names: tuple[str, ...]) -> tuple[str, ...]:
    """Check that patterns keep an exact number of channels."""
    for name in names:
        if parse_pattern(name).kind not in ("n:m", "unstructured"):
            raise ValueError(f"{name}: N:M such as 8:16 or p% is needed")
    return names


def _current(device: str) -> str:
    """Make a device the current one: the events and the memory that are measured are those of it."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError("allowed: auto, cpu, cuda, cuda:N")
    number = device.partition(":")[2]
    n_gpus = torch.cuda.device_count()
    if device.startswith("cuda") and int(number or 0) >= n_gpus:
        raise ValueError(f"this machine has {n_gpus} GPUs; pass device=cpu, or a smaller number")
    if number:
        torch.cuda.set_device(int(number))
    return device


Count = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split), Field(min_length=1)]
Patterns = Annotated[Names, AfterValidator(_with_exact_budget)]
Dtype = Literal["bfloat16", "float16", "float32"]
Device = Annotated[str, AfterValidator(_current)]
