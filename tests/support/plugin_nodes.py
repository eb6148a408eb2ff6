"""Nodes of the custom ops as the graphs of an engine have them: attributes, and which tensor each input is."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from minicache_trt.checkpoint.binding import weight_shapes
from minicache_trt.checkpoint.weights import WeightView
from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ModelConfig
from minicache_trt.contract import DOMAIN
from minicache_trt.engine_directory import COMPRESSOR, DECODER
from minicache_trt.functions.form import CPU_FORM, GraphForm
from minicache_trt.model.graph import build_compressor, build_decoder
from minicache_trt.model.maps import GraphMaps, plan_maps
from minicache_trt.model.weights import GraphWeights
from tests.support.plans import all_plans

NOT_FIELDS = ("plugin_namespace", "plugin_version")
"""Attributes by which TensorRT's parser finds a plugin; the plugin does not get them."""


@dataclass(frozen=True)
class Node:
    """``inputs``: graph tensors by what the node calls them, in order; ``outputs``: graph tensors."""

    op: str
    name: str
    attributes: dict[str, int | str]
    inputs: dict[str, str]
    outputs: tuple[str, ...]

    @property
    def fields(self) -> dict[str, int | str]:
        return {name: value for name, value in self.attributes.items() if name not in NOT_FIELDS}


@dataclass(frozen=True)
class Nodes:
    """``attention`` by layer, ``compression`` by stream; ``constants``: initializers they take."""

    attention: list[Node]
    compression: list[Node]
    constants: dict[str, NDArray[np.generic]]

    @classmethod
    def of_plan(cls, config: ModelConfig, plan: CompressionPlan, form: GraphForm = CPU_FORM) -> Nodes:
        """From graphs whose weights are nowhere."""
        views = {
            name: WeightView(name, Path("weights"), 0, 4 * math.prod(shape), shape, "float32")
            for name, shape in weight_shapes(config).items()
        }
        arrays = plan_maps(plan, config)
        decoder = build_decoder(
            config, plan, GraphWeights(config, views, {"weights": "weights"}, form=form), GraphMaps(arrays, {}), form
        )
        return cls._of([decoder, build_compressor(config, plan, GraphMaps(arrays, {}), form)])

    @classmethod
    def of_engine(cls, directory: Path) -> Nodes:
        paths = [directory / name for name in (DECODER, COMPRESSOR)]
        return cls._of([ir.load(path) for path in paths if path.exists()])

    @classmethod
    def _of(cls, models: list[ir.Model]) -> Nodes:
        found: dict[str, list[Node]] = {"PagedAttention": [], "CompressBlocks": []}
        constants: dict[str, NDArray[np.generic]] = {}
        for model in models:
            for node in model.graph:
                if node.domain != DOMAIN:
                    continue
                found[node.op_type].append(_node(node))
                for value in node.inputs:
                    if value is not None and value.const_value is not None:
                        constants[str(value.name)] = value.const_value.numpy().copy()
        return cls(found["PagedAttention"], found["CompressBlocks"], constants)


def _node(node: ir.Node) -> Node:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    names = str(attributes["input_names"]).split()
    tensors = [str(value.name) for value in node.inputs if value is not None]
    inputs = dict(zip(names, tensors, strict=True))
    assert len(inputs) == len(names)
    return Node(node.op_type, str(node.name), attributes, inputs, tuple(str(value.name) for value in node.outputs))


@functools.cache
def plans_of(config: ModelConfig) -> Mapping[str, CompressionPlan]:
    """Every plan the plugins are tested with, by name."""
    return {"full": make_plan(config, "full")} | all_plans(config)


@functools.cache
def nodes_named(config: ModelConfig, plan: str) -> Nodes:
    """`Nodes.of_plan` of one of `plans_of`."""
    return Nodes.of_plan(config, plans_of(config)[plan])
