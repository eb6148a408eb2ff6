"""TensorRT's progress as ours."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from typing import Any

from minicache_trt.engine_writer import Report


def make_progress_monitor(trt: Any, report: Report, engine: str, stepped: Callable[[], None], stop: Event) -> Any:
    """A monitor of the module that reports the outermost phases of a build as stages ``<engine>: <phase>``.

    ``stepped``: called after each step of every phase; ``stop``: ends the build at its next step.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._steps[phase_name] = num_steps
                report(self._stage(phase_name), 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            stepped()
            if phase_name in self._steps:
                report(self._stage(phase_name), min(step + 1, self._steps[phase_name]), self._steps[phase_name])
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            total = self._steps.pop(phase_name, None)
            if total is not None:
                report(self._stage(phase_name), total, total)

        def _stage(self, phase: str) -> str:
            return f"{engine}: {phase.lower()}"

    return Monitor()
