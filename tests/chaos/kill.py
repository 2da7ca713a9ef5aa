"""A sweep that is killed again and again: `python tests/chaos/kill.py --kills 50`.

A sweep of 24 cells of the tiny model and their dense one is run undisturbed, then again into another folder, killed by SIGKILL
at random moments and started anew each time until it has been killed often enough, and in the end let finish; where it
finishes before, another one is begun. It is an error if the tidy tables differ by a byte, if a temporary file is left, or if a
finished cell is written twice. Prints the counts.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from processes import Run, run

WORDS = [
    "-m", "model=tiny-llama", "dtype=float32", "calibration.n_samples=2", "calibration.seqlen=32", "eval.limit=8", "eval.seqlen=32", "tasks=mini_science+mini_prose",
    "criterion=act,rms", "pattern=2:4,4:8,8:16", "mitigation=none,shift,var,shift+var",
]  # fmt: skip
"""24 sparse cells and the dense one that they are compared with."""


def tidy(results: Path) -> bytes:
    """The bytes of the tidy table."""
    from nmsweep.results.read import read_results

    return read_results(results).tidy.to_csv(index=False).encode()


def finished(results: Path) -> dict[str, tuple[int, int]]:
    """What identifies each finished cell's folder as the one that was there before: inode and time of its provenance."""
    found = {}
    for file in (results / "cells").glob("[!.]*/provenance.json"):
        stat = file.stat()
        found[file.parent.name] = (stat.st_ino, stat.st_mtime_ns)
    return found


def temporary(results: Path) -> list[Path]:
    return sorted(results.rglob(".tmp*"))


def kill_once(results: Path, log: Path, draw: random.Random) -> bool:
    """Start the sweep and kill it at a random moment of its start or of its first or second cell; False if it ended before.

    A cell takes about a tenth of a second, a start twice that: the moments hit loading, measuring, writing, renaming.
    """
    process = Run([*WORDS, f"results_dir={results}"], log)
    delay_s = draw.uniform(0, 0.3)
    if draw.random() < 0.8 and process.until(f"\n[{draw.choice((1, 1, 2))}/"):
        delay_s = draw.uniform(0, 0.15)
    time.sleep(delay_s)
    process.send(signal.SIGKILL)
    return process.end() == -signal.SIGKILL


def chaos(folder: Path, n_kills: int, seed: int) -> None:
    """Run, kill, compare.

    Raises:
        SystemExit: something was lost, left or done twice.
    """
    draw, started = random.Random(seed), time.monotonic()
    calm, log = folder / "calm", folder / "log"
    run([*WORDS, f"results_dir={calm}"], log)
    kills = n_starts = n_left = n_with_cells = n_sweeps = 0
    while kills < n_kills:
        n_sweeps += 1
        wild, seen, ended = folder / f"wild{n_sweeps}", dict[str, tuple[int, int]](), False
        while not ended and kills < n_kills:
            ended = not kill_once(wild, log, draw)
            n_starts, kills = n_starts + 1, kills + (not ended)
            n_left += len(temporary(wild))
            n_with_cells += len(finished(wild)) > len(seen)
            seen = unchanged(seen, finished(wild))
        run([*WORDS, f"results_dir={wild}"], log)
        unchanged(seen, finished(wild))
        compare(calm, wild)
    print(
        f"{len(finished(calm))} cells; {kills} kills in {n_starts} starts of {n_sweeps} sweeps, {n_with_cells} after new cells; "
        f"temporary files that kills left: {n_left}, in the end: 0; finished cells computed again: 0; "
        f"tidy tables equal byte for byte; {time.monotonic() - started:.0f} s"
    )


def unchanged(before: dict[str, tuple[int, int]], now: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The cells that are finished now; stop if one that was has been written again."""
    if again := [name for name, was in before.items() if now.get(name) != was]:
        raise SystemExit(f"computed again or lost: {', '.join(again)}")
    return now


def compare(calm: Path, wild: Path) -> None:
    """Stop if the two results folders are not the same."""
    if left := temporary(wild):
        raise SystemExit(f"temporary files are left: {', '.join(map(str, left))}")
    if tidy(calm) != tidy(wild):
        raise SystemExit(f"the tidy tables of {calm} and {wild} differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chaos(Path(folder), options.kills, options.seed)


if __name__ == "__main__":
    main()
