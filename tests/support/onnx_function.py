"""Run one model-local function in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from minicache_trt.functions.tape import OPSETS


def run_function(function: ir.Function, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Outputs of ``function`` for ``inputs``, given in the order of its parameters."""
    values = [
        ir.val(f"in{i}", dtype=ir.DataType.from_numpy(array.dtype), shape=[f"d{i}_{a}" for a in range(array.ndim)])
        for i, array in enumerate(inputs)
    ]
    node = ir.Node(function.domain, function.name, values, num_outputs=len(function.outputs))
    for i, value in enumerate(node.outputs):
        value.name = f"out{i}"
        value.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports=dict(OPSETS), name="test")
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=10, functions=[function]))
    for value in model.graph.output:
        value.ClearField("type")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {f"in{i}": array for i, array in enumerate(inputs)})
