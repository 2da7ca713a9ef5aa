"""The sweeper under the name that Hydra accepts: it takes plugins only from a package called `hydra_plugins`.

There is no `__init__.py` beside this file: `hydra_plugins` is a namespace package that other wheels share.
"""

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore


class NMSweeper(BasicSweeper):
    """A union of grids; its cells are launched together, and a failure does not hide the others.

    Args:
        max_batch_size: as in Hydra's basic sweeper.
        params: values to sweep over by key, one grid.
        grids: several such grids; `params` holds for each of them.
    """

    def __init__(self, max_batch_size: int | None = None, params: Any = None, grids: Any = None) -> None:
        super().__init__(max_batch_size=max_batch_size, params=params)

    def sweep(self, arguments: list[str]) -> Any:
        from nmsweep.commands.run import sweep_cells

        return sweep_cells(self.launcher, arguments, self.config)


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="nmsweep",
    node={"_target_": "hydra_plugins.nmsweep.NMSweeper", "max_batch_size": None, "params": None, "grids": None},
    provider="nmsweep",
)
