"""Peak resident memory of a process, from one moment to another."""

from __future__ import annotations

from pathlib import Path


class PeakMemory:
    """The kernel's own high-water mark of a process (Linux); elsewhere it reads None.

    Parameters
    ----------
    pid : int
        This process, or a child of it.
    """

    def __init__(self, pid: int) -> None:
        self._process = Path("/proc", str(pid))

    def reset(self) -> None:
        """Start over from what is resident now; where that is not allowed, the mark stays since the process began."""
        try:
            (self._process / "clear_refs").write_text("5")
        except OSError:
            return

    def read(self) -> int | None:
        """Bytes."""
        try:
            status = (self._process / "status").read_text()
        except OSError:
            return None
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
