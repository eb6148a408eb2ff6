"""Loads a plugin library into TensorRT-RTX's registry, in a process of its own, and tells what it finds there.

Usage: registry_probe.py LIBRARY, with a JSON list of [op, fields] on standard input. Prints JSON: the creators as
[name, namespace, version, fields], each plugin as [name, namespace, version, outputs, metadata] or null where it was
refused, and the errors that were logged.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorrt_rtx as trt

CAPABILITY, FIELD = trt.PluginCapabilityType, trt.PluginFieldType


class Recorder(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity == trt.ILogger.Severity.ERROR:
            self.errors.append(message)


def field(name: str, value: int | str) -> Any:
    if isinstance(value, int):
        return trt.PluginField(name, np.array([value], np.int32), FIELD.INT32)
    return trt.PluginField(name, np.frombuffer(value.encode(), np.int8).copy(), FIELD.CHAR)


def create(registry: Any, op: str, fields: Mapping[str, int | str]) -> list[Any] | None:
    creator = registry.get_creator(op, "1", "minicache")
    collection = trt.PluginFieldCollection([field(name, value) for name, value in fields.items()])
    plugin = creator.create_plugin(op, collection, trt.TensorRTPhase.BUILD)
    if plugin is None:
        return None
    core, build = (plugin.get_capability_interface(kind) for kind in (CAPABILITY.CORE, CAPABILITY.BUILD))
    return [core.plugin_name, core.plugin_namespace, core.plugin_version, build.num_outputs, build.metadata_string]


def main(library: str) -> None:
    logger = Recorder()
    builder = trt.Builder(logger)
    registry = builder.get_plugin_registry()
    registry.load_library(library)
    creators = [
        [creator.name, creator.plugin_namespace, creator.plugin_version, [field.name for field in creator.field_names]]
        for creator in registry.all_creators
    ]
    plugins = [create(registry, op, fields) for op, fields in json.load(sys.stdin)]
    print(json.dumps({"creators": creators, "plugins": plugins, "errors": logger.errors}))


if __name__ == "__main__":
    main(sys.argv[1])
