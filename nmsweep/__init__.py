"""nmsweep: post-training N:M activation sparsity of language models.

The names below are the whole of the Python API; the command line is `nmsweep --help`.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("nmsweep")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from nmsweep.calibration.api import calibrate as calibrate
    from nmsweep.methods.base import Criterion as Criterion
    from nmsweep.methods.base import Fitter as Fitter
    from nmsweep.methods.base import Layer as Layer
    from nmsweep.methods.base import Mitigation as Mitigation
    from nmsweep.methods.base import Slots as Slots
    from nmsweep.methods.base import State as State
    from nmsweep.methods.base import Tokens as Tokens
    from nmsweep.methods.base import WeightCriterion as WeightCriterion
    from nmsweep.report.numbers.frame import load_results as load_results
    from nmsweep.sparsity.api import sparsify as sparsify
    from nmsweep.testing import check_method as check_method

_MODULES = {
    "sparsify": "sparsity.api",  # make a model sparse
    "calibrate": "calibration.api",  # compute the state of calibrated methods
    "load_results": "report.numbers.frame",  # read a results folder into a table
    "check_method": "testing",  # check a method of your own
    "Criterion": "methods.base",  # the classes that methods derive from and use
    "WeightCriterion": "methods.base",
    "Mitigation": "methods.base",
    "Fitter": "methods.base",
    "Layer": "methods.base",
    "Slots": "methods.base",
    "State": "methods.base",
    "Tokens": "methods.base",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:  # `nmsweep --help` must not wait for torch
    if name not in _MODULES:
        raise AttributeError(f"module 'nmsweep' has no attribute {name!r}")
    return getattr(import_module(f"nmsweep.{_MODULES[name]}"), name)
