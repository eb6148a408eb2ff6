"""From an ONNX graph to a TensorRT network."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicache_trt.backends.tensorrt.mapped_weights import MappedWeights
from minicache_trt.backends.tensorrt.module import Messages, start
from minicache_trt.errors import UserError


@dataclass(frozen=True)
class Network:
    """A parsed network and what has to live as long as it: builder, parser, weights, log."""

    trt: Any
    builder: Any
    definition: Any
    parser: Any
    weights: MappedWeights
    messages: Messages

    def inputs(self) -> list[Any]:
        return [self.definition.get_input(i) for i in range(self.definition.num_inputs)]

    def outputs(self) -> list[Any]:
        return [self.definition.get_output(i) for i in range(self.definition.num_outputs)]

    def layers(self) -> Counter[str]:
        """Layers by type, as ``MATRIX_MULTIPLY``."""
        kinds = (self.definition.get_layer(i).type for i in range(self.definition.num_layers))
        return Counter(str(kind).rpartition(".")[2] for kind in kinds)

    def plugins(self) -> int:
        """Nodes that became plugins."""
        return sum(count for kind, count in self.layers().items() if kind.startswith("PLUGIN"))


def parse_network(trt: Any, path: Path) -> Network:
    """Import a graph, strongly typed; its weights stay in their files.

    Raises
    ------
    UserError
        TensorRT cannot start, or cannot import it: which node, and why.
    """
    messages = Messages()
    builder = start(trt, "Builder", messages)
    strongly = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    # TensorRT 11 has strongly typed networks only, and may drop the flag.
    definition = builder.create_network(0 if strongly is None else 1 << int(strongly))
    parser = trt.OnnxParser(definition, builder.logger)
    weights = MappedWeights(path)
    if not weights.load(parser) or not parser.parse_model_proto():
        raise _cannot_import(parser, path, messages)
    return Network(trt, builder, definition, parser, weights, messages)


def _cannot_import(parser: Any, path: Path, messages: Messages) -> UserError:
    if not parser.num_errors:
        return UserError(f"TensorRT cannot import {path.name}: {messages.first('no reason given')}")
    error = parser.get_error(0)
    stack = " in ".join([f"{error.node_operator()} {error.node_name()}", *error.local_function_stack()])
    reason = " ".join(error.desc().split())[:200]
    return UserError(
        f"TensorRT cannot import {path.name}: {stack}: {reason}",
        "build for another --backend, or report it with the model's config.json",
    )
