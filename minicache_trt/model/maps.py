"""The linear maps of a plan as graph initializers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from minicache_trt.checkpoint.weights import WeightView, read_safetensors_file
from minicache_trt.compression.matrices import save_matrices, stream_matrices
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ModelConfig
from minicache_trt.contract import StreamLayout, plan_layout
from minicache_trt.functions.step import read_map_name
from minicache_trt.functions.stream_maps import read_maps, write_maps
from minicache_trt.model.weights import external_value

Arrays = dict[str, NDArray[np.generic]]


def write_map_name(stream: int, name: str) -> str:
    """Graph tensor of one of a stream's writing maps."""
    return f"stream.{stream}.write.{name}"


def names_below(prefix: str, tensors: Collection[str]) -> list[str]:
    """What follows a prefix in the names of graph tensors, in their order."""
    return [tensor.removeprefix(prefix) for tensor in tensors if tensor.startswith(prefix)]


def writer_maps(layout: StreamLayout, tensors: Collection[str]) -> dict[str, str]:
    """Maps `CompressBlocks` takes for a stream, parameter to graph tensor, in order; ``tensors`` as `plan_maps` has.

    A linear stream that retains tokens also takes its reading maps, to measure what each token loses.
    """
    result = {
        name: write_map_name(layout.index, name) for name in names_below(write_map_name(layout.index, ""), tensors)
    }
    if layout.stream.merge == "linear" and layout.stream.retained:
        for member in range(len(layout.stream.layers)):
            for name in ("map", "offset"):
                result[f"{name}.{member}"] = read_map_name(layout.index, member, name)
    return result


def plan_maps(plan: CompressionPlan, config: ModelConfig) -> Arrays:
    """Every map the two graphs of a plan take, by graph tensor."""
    result: Arrays = {}
    for layout in plan_layout(plan, config):
        matrices = stream_matrices(plan.matrices, layout.index)
        for member in range(len(layout.stream.layers)):
            for name, array in read_maps(layout, matrices, member).items():
                result[read_map_name(layout.index, member, name)] = array
        for name, array in write_maps(layout, matrices).items():
            result[write_map_name(layout.index, name)] = array
    return result


class GraphMaps:
    """Emits maps as initializers of one graph: matrices as external data where a file holds them, indices inline.

    Parameters
    ----------
    arrays : mapping
        As `plan_maps` returns them.
    views : mapping
        Maps that lie in a file, by graph tensor; the others become part of the graph.
    """

    def __init__(self, arrays: Mapping[str, NDArray[np.generic]], views: Mapping[str, WeightView]) -> None:
        self._arrays = arrays
        self._views = views
        self._values: dict[str, ir.Value] = {}

    @property
    def tensors(self) -> Collection[str]:
        """Names of all maps, whether emitted or not."""
        return self._arrays.keys()

    @property
    def initializers(self) -> list[ir.Value]:
        return list(self._values.values())

    def value(self, name: str) -> ir.Value:
        """A map by its graph tensor's name."""
        if name not in self._values:
            if name in self._views:
                view = self._views[name]
                self._values[name] = external_value(name, view, view.file.name)
            else:
                tensor = ir.tensor(self._arrays[name], name=name)
                self._values[name] = ir.Value(
                    name=name,
                    shape=ir.Shape(tensor.shape.numpy()),
                    type=ir.TensorType(tensor.dtype),
                    const_value=tensor,
                )
        return self._values[name]


def write_plan_maps(arrays: Arrays, path: Path) -> dict[str, WeightView]:
    """Write the matrices among ``arrays`` to a safetensors file and return their addresses; no file without any.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    matrices = {name: array for name, array in arrays.items() if array.dtype == np.float32}
    if not matrices:
        return {}
    save_matrices(matrices, path)
    return read_safetensors_file(path)
