"""What Triton's metrics endpoint shows of an instance; names as of our own server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from minicache_trt.runtime.llm import LLM
from minicache_trt.serving import engine_metrics as shared

ALL_COUNTERS = {**shared.COUNTERS, shared.REQUESTS_FINISHED: shared.REQUESTS_FINISHED_TEXT}


class InstanceMetrics:
    """Families of the model and this instance's values, brought up to date by `update`.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    llm : LLM
        What is measured.
    model, version, instance : str
        Labels of every value. The fourth, ``process``, keeps the values of an instance apart from those of the one that
        is loaded in its place before it has ended: Triton counts references to values of equal labels for each alone,
        and writes of one to what the other has freed would corrupt its memory.
    """

    def __init__(self, pb_utils: Any, llm: LLM, model: str, version: str, instance: str) -> None:
        self._llm = llm
        self._labels = {"model": model, "version": version, "instance": instance, "process": str(os.getpid())}
        family = pb_utils.MetricFamily
        self._families = {
            **{
                name: family(name=shared.PREFIX + name, description=text, kind=family.GAUGE)
                for name, text in shared.GAUGES.items()
            },
            **{
                name: family(name=f"{shared.PREFIX}{name}_total", description=text, kind=family.COUNTER)
                for name, text in ALL_COUNTERS.items()
            },
        }
        self._metrics: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}
        self._shown: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._finished = dict.fromkeys((*shared.OUTCOMES, "rejected"), 0)
        self.update()

    def finished(self, reason: str) -> None:
        """A sequence has ended, or was ``rejected``."""
        self._finished[reason] += 1

    def update(self) -> None:
        """Tell Triton what has changed; each change is a message to another process."""
        for name, labels, value in self._values():
            key = name, labels
            metric = self._metrics.get(key)
            if metric is None:
                metric = self._metrics[key] = self._families[name].Metric(labels=self._labels | dict(labels))
                self._shown[key] = 0.0
            if value == self._shown[key]:
                continue
            if name in ALL_COUNTERS:
                metric.increment(value - self._shown[key])
            else:
                metric.set(value)
            self._shown[key] = value

    def close(self) -> None:
        """Give the metrics back to Triton.

        Their destructors speak to the server, over memory that Triton's stub unmaps before it destroys its model.
        """
        self._metrics.clear()
        self._families.clear()

    def _values(self) -> Iterator[shared.Value]:
        yield from shared.engine_values(self._llm)
        for reason, count in self._finished.items():
            yield shared.Value(shared.REQUESTS_FINISHED, (("reason", reason),), count)
