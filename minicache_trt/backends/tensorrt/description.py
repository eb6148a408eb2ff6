"""What an engine file is, as far as can be known without a GPU: written when it is built, beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minicache_trt.backends.tensorrt.builder import Shapes
from minicache_trt.backends.tensorrt.network import Network
from minicache_trt.backends.tensorrt.profiles import Profile
from minicache_trt.errors import UserError

TYPE_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
"""TensorRT's names of types in ours."""


def type_name(dtype: Any) -> str:
    """``DataType.HALF`` as ``float16``."""
    name = str(dtype).rpartition(".")[2]
    return TYPE_NAMES.get(name, name.lower())


def describe_network(network: Network, profiles: Sequence[Profile], shapes: Shapes) -> dict[str, Any]:
    """Layers by type, plugins, and every binding: name, dtype, symbolic shape, and ranges by profile."""
    inputs = [
        {
            "name": tensor.name,
            "dtype": type_name(tensor.dtype),
            "shape": list(shapes[tensor.name]),
            "profiles": {
                profile.name: [list(dims) for dims in profile.shapes(shapes[tensor.name])] for profile in profiles
            },
        }
        for tensor in network.inputs()
    ]
    outputs = [
        {"name": tensor.name, "dtype": type_name(tensor.dtype), "shape": [int(extent) for extent in tensor.shape]}
        for tensor in network.outputs()
    ]
    return {
        "layers": dict(network.layers().most_common()),
        "plugins": network.plugins(),
        "profiles": [profile.name for profile in profiles],
        "inputs": inputs,
        "outputs": outputs,
    }


def write_description(path: Path, description: dict[str, Any]) -> None:
    path.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def read_description(path: Path) -> dict[str, Any]:
    """Raises `UserError` if it is missing or damaged."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", "build the engine again with minicache-trt build") from error
    return result
