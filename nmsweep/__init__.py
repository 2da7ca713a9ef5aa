"""nmsweep: what happens to a language model when only N of every M input channels are kept.

`sparsify` is the whole of the Python API that most programs need; the command line is `nmsweep --help`.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("nmsweep")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from nmsweep.sparsity.api import sparsify as sparsify

__all__ = ["__version__", "sparsify"]


def __getattr__(name: str) -> Any:  # torch costs seconds: load it when `sparsify` is asked for, not for --help
    if name == "sparsify":
        from nmsweep.sparsity.api import sparsify

        return sparsify
    raise AttributeError(f"module 'nmsweep' has no attribute {name!r}")
