"""Graphs with fewer nodes: TensorRT's time to build grows with them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common


def simplify(source: Path, target: Path) -> None:
    """Write a graph without functions, in which what several of their calls compute alike is computed once.

    Both files are in one folder, so that external data are where both say.
    """
    passes = (
        common.InlinePass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )
    model = ir.load(source)
    for each in passes:
        model = each(model).model
    ir.save(model, target)
