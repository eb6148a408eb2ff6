"""What an engine file holds, where it can be deserialized: that takes the GPU, or one of the kind, it was built for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minicache_trt.backends.tensorrt.description import type_name
from minicache_trt.backends.tensorrt.module import PRODUCTS, Messages, load_module, start
from minicache_trt.backends.tensorrt.plugins import find_plugins, load_plugins, supports_plugins
from minicache_trt.errors import UserError


def inspect_engine(backend: str, path: Path) -> dict[str, Any]:
    """Layers, memory and bindings as TensorRT reports them.

    Returns
    -------
    dict
        ``layers``: their number after fusion; ``layer_information``: TensorRT's own description of each;
        ``device_memory_bytes``: of activations, worst profile; ``streamable_weights_bytes``; ``bindings``: name, mode,
        dtype and shape.

    Raises
    ------
    UserError
        The module is missing, or the engine cannot be deserialized on this machine.
    """
    trt, messages = load_module(backend), Messages()
    library = find_plugins() if supports_plugins(trt) else None
    if library is not None:
        load_plugins(trt, library)
    runtime = start(trt, "Runtime", messages)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        reason = messages.first("no reason given").partition("(In ")[0].strip()
        raise UserError(f"{PRODUCTS[backend].name} cannot deserialize it on this machine: {reason}")
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return {
        "layers": engine.num_layers,
        "layer_information": _layers(trt, engine),
        "device_memory_bytes": int(engine.device_memory_size_v2),
        "streamable_weights_bytes": int(getattr(engine, "streamable_weights_size", 0)),
        "bindings": [
            {
                "name": name,
                "mode": str(engine.get_tensor_mode(name)).rpartition(".")[2].lower(),
                "dtype": type_name(engine.get_tensor_dtype(name)),
                "shape": [int(extent) for extent in engine.get_tensor_shape(name)],
            }
            for name in names
        ],
    }


def _layers(trt: Any, engine: Any) -> Any:
    """IEngineInspector's JSON; names only, unless the engine was built with detailed profiling verbosity."""
    inspector = engine.create_engine_inspector()
    try:
        return json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    except (AttributeError, RuntimeError, ValueError):
        return None
