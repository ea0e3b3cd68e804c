"""Making catalog and maps again from segments, for `pool rebuild-catalog` and `check --repair`.

`survey` reads what segments say, `engine` has the maps made, `commit` writes the catalog.
"""

from vhostd.storage.rebuild.catalog import rebuild_catalog
from vhostd.storage.rebuild.plan import Report, VolumeOutcome
from vhostd.storage.rebuild.repair import repair

__all__ = ["Report", "VolumeOutcome", "rebuild_catalog", "repair"]
