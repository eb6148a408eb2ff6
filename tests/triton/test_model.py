"""The model without a server: what Triton's stub needs of it that no client sees."""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from minicache_trt.serving.triton.model import TritonModel


class MetricFamily:
    """Stands for Triton's: a family and its metrics, all of which are kept in ``alive`` as long as they exist."""

    COUNTER, GAUGE = "counter", "gauge"
    alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.alive.add(self)

    def Metric(self, labels: dict[str, str]) -> Any:
        assert labels["process"] == str(os.getpid())  # no two instances share a value, whatever else is equal
        self.alive.add(metric := Metric())
        return metric


class Metric:
    def increment(self, value: float) -> None:
        assert value > 0

    def set(self, value: float) -> None:
        pass


def test_nothing_of_tritons_is_left_when_a_model_has_ended(engine: Path, tmp_path: Path) -> None:
    """The stub unmaps its memory before it destroys the model; destructors of what is left would crash it then."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "engine").symlink_to(engine)
    config = {"max_batch_size": 0, "parameters": {"num_threads": {"string_value": "1"}}}
    args = {
        "model_config": json.dumps(config),
        "model_instance_kind": "CPU",
        "model_repository": str(tmp_path),
        "model_version": "1",
        "model_name": "demo",
        "model_instance_name": "demo_0",
    }
    model = TritonModel(args, SimpleNamespace(MetricFamily=MetricFamily))
    assert MetricFamily.alive and model.is_ready()
    gc.disable()  # the stub does not collect garbage before it unmaps its memory
    try:
        model.finalize()
        assert not MetricFamily.alive
    finally:
        gc.enable()
