"""Graphs written for TensorRT with plugins: their nodes are those the plugins are tested with."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from minicache_trt.functions.form import GraphForm
from tests.gpu.cases import model
from tests.support.plugin_nodes import Nodes, nodes_named, plans_of

CONFIG = model(80, 3)
TENSORRT_FORM = GraphForm(ir.DataType.FLOAT16, loops=False)


@pytest.mark.parametrize("name", plans_of(CONFIG))
def test_nodes_say_the_same_in_every_form(name: str) -> None:
    """Attributes, inputs in order, and constants with their types: what a plugin gets does not depend on the form."""
    mine = Nodes.of_plan(CONFIG, plans_of(CONFIG)[name], TENSORRT_FORM)
    other = nodes_named(CONFIG, name)
    for these, those in ((mine.attention, other.attention), (mine.compression, other.compression)):
        assert [(node.op, node.attributes, list(node.inputs)) for node in these] == [
            (node.op, node.attributes, list(node.inputs)) for node in those
        ]
    assert mine.constants.keys() == other.constants.keys()
    for tensor, value in mine.constants.items():
        assert value.dtype == other.constants[tensor].dtype
        np.testing.assert_array_equal(value, other.constants[tensor])
