"""`check`: does a pool hold what was written to it? Strictly read-only.

Built on `vhostd.storage.format`, the reader that shares no code with the engine.
"""

from vhostd.storage.check.device import check_device
from vhostd.storage.check.report import CheckReport, CheckSummary, Finding, VolumeReport

__all__ = ["CheckReport", "CheckSummary", "Finding", "VolumeReport", "check_device"]
