"""A decoder's graph with its trace points as outputs."""

from __future__ import annotations

from pathlib import Path

import onnx

from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.tracing.points import attention_point, norm_inputs, output_point, trace_points


def traced_decoder(path: Path, config: ModelConfig) -> bytes:
    """Read a decoder, without its weights, and make every trace point an output by its own name.

    Values have generated names. What finds them is what the builder promises: the names of the `PagedAttention` nodes
    and of the norms' weights.

    Returns
    -------
    bytes
        The serialized model, its trace points float32 ``[T, width]`` whatever it computes in; its external weights are
        relative to the directory of ``path``.

    Raises
    ------
    UserError
        The file is no graph, or lacks one of the points.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's parse errors share no public base class
        raise UserError(f"{path} is not an ONNX graph", "build the engine again") from error
    found, wide = _find(model.graph, config), onnx.TensorProto.FLOAT
    for point, width in trace_points(config).items():
        if point not in found:
            raise UserError(f"{path} has no value for {point}, so it cannot be traced", "build the engine again")
        model.graph.node.append(onnx.helper.make_node("Cast", [found[point]], [point], name=f"{point}.trace", to=wide))
        model.graph.output.append(onnx.helper.make_tensor_value_info(point, wide, ["T", width]))
    serialized: bytes = model.SerializeToString()
    return serialized


def _find(graph: onnx.GraphProto, config: ModelConfig) -> dict[str, str]:
    """Trace point to value name."""
    attention = {attention_point(layer) for layer in range(config.num_layers)}
    norms = norm_inputs(config)
    producers = {name: node for node in graph.node for name in node.output}
    found = {}
    for node in graph.node:
        if node.name in attention:
            found[node.name] = node.output[0]
        if node.op_type == "RMSNormalization":
            weight = _weight(node.input[1], producers)
            if weight in norms:
                found[norms[weight]] = node.input[0]
            elif weight == "norm":
                rows = producers[node.input[0]]  # the Gather of the rows whose logits are wanted
                found[output_point(config.num_layers - 1)] = rows.input[0]
    return found


def _weight(name: str, producers: dict[str, onnx.NodeProto]) -> str:
    """The canonical name, without ``.weight``, of the initializer a value is or is cast from."""
    while name in producers and producers[name].op_type == "Cast":
        name = producers[name].input[0]
    return name.removesuffix(".weight")
