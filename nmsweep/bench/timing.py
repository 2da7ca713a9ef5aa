"""Interleaved timing: every contender runs once a round, so that drift of the machine affects all of them alike."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from nmsweep.cell.provenance import device_name


@dataclass(frozen=True)
class Contender:
    """Something to be timed.

    Attributes:
        run: the timed part.
        around: a context in which it runs; entering and leaving it is not timed.
        repeats: runs of which the mean is taken, for runs shorter than the resolution of the clock or than their launch.
    """

    run: Callable[[], object]
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    repeats: int = 1


Times = dict[str, list[float]]


def interleave(contenders: Mapping[str, Contender], device: str, rounds: int, warm_up: int = 2) -> Times:
    """Run all contenders once a round, in turn.

    Args:
        contenders: by name.
        device: where they run; waited for before and after each run.
        rounds: measured rounds.
        warm_up: rounds before them that are not measured.

    Returns:
        Seconds of each contender, one for each round.
    """
    times: Times = {name: [] for name in contenders}
    for number in range(warm_up + rounds):
        for name, contender in contenders.items():
            with contender.around():
                synchronize(device)
                elapsed = _time(contender, device)
            if number >= warm_up:
                times[name].append(elapsed)
    return times


def synchronize(device: str) -> None:
    """Wait until the device has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _time(contender: Contender, device: str) -> float:
    """Return the seconds of one run; on a GPU, between two events of its own clock."""
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(contender.repeats):
            contender.run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / contender.repeats
    began = time.perf_counter()
    for _ in range(contender.repeats):
        contender.run()
    return (time.perf_counter() - began) / contender.repeats


def median_ms(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return 1e3 * statistics.median(seconds)


def ratios(times: Times, base: str) -> dict[str, tuple[float, float, float]]:
    """Return median, lower and upper quartile of each contender's time over the base's of the same round."""
    quartiles = {}
    for name, seconds in times.items():
        each = [second / base_second for second, base_second in zip(seconds, times[base], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else (each[0],) * 3
        quartiles[name] = (middle, low, high)
    return quartiles


def peak_bytes(contender: Contender, device: str) -> int:
    """Return the most GPU memory in use during one run, in bytes; 0 without a GPU."""
    if not device.startswith("cuda"):
        return 0
    with contender.around():
        synchronize(device)
        with peak_memory(device) as peak:
            contender.run()
            synchronize(device)
        return peak()


@contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], int]]:
    """Measure the most memory in use inside the block, in bytes: of the GPU, else of the whole process (0 but on Linux)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        yield lambda: int(torch.cuda.max_memory_allocated())
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is in use now
    yield _process_peak


def _process_peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def machine(device: str) -> str:
    """Describe the hardware and versions that a benchmark's numbers belong to."""
    kind = device.partition(":")[0]
    threads = "" if kind == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{device_name(kind)}{threads}; torch {torch.__version__}; Python {platform.python_version()}"
