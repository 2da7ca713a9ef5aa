"""`nmsweep gc [remove] [results_dir=DIR]`: what interrupted runs left in a results folder."""

from collections.abc import Sequence
from pathlib import Path

from nmsweep.commands.words import key_values
from nmsweep.results.leftovers import leftovers, remove


def main(words: Sequence[str]) -> int:
    """List leftovers; remove them if a word is ``remove``."""
    values = key_values([word for word in words if word != "remove"], ["results_dir"])
    entries = leftovers(Path(values.get("results_dir", "results")))
    for leftover in entries:
        print(f"{leftover.n_bytes / 1e6:10.2f} MB  {leftover.path}  ({leftover.what})")
    if "remove" in words:
        for leftover in entries:
            remove(leftover.path)
        print(f"{len(entries)} removed")
    else:
        print(f"{len(entries)} leftovers" + ("; `nmsweep gc remove` removes them" if entries else ""))
    return 0
