"""What a runtime takes of a graph: the type it computes in, and whether graphs may loop and branch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

COMPUTE_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
"""Compute types by the name checkpoints and options give them."""

LARGEST = {ir.DataType.FLOAT: 3.0e38, ir.DataType.FLOAT16: math.inf, ir.DataType.BFLOAT16: math.inf}
"""Numbers of at least this magnitude and NaN are appended as zero."""


@dataclass(frozen=True)
class GraphForm:
    """Parameters of every graph of an engine.

    Parameters
    ----------
    compute : ir.DataType
        Type of activations, of weights where they are used, and of cache pools of the model's own type. Attention and
        compression compute in float32 whatever it is.
    loops : bool
        With loops (Scan) and branches (If), decodes are attended block by block and prefill chunks tile by tile, in
        memory that stays in a core's cache. Without, a step is one batch of chunks: TensorRT's parser imports no Scan.
    plugins : bool
        Whether a runtime may have kernels for the nodes of `PagedAttention`: they take the step's inputs then. Else,
        in graphs without loops, what all layers need of a step is computed once (`ChunkStep`), and they take that.
    ranks : int
        Graphs of one of so many ranks: a decoder's has nodes of TensorRT's op `DistCollective`.
    """

    compute: ir.DataType = ir.DataType.FLOAT
    loops: bool = True
    plugins: bool = True
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.compute not in LARGEST:
            raise ValueError(f"compute: expected one of {', '.join(COMPUTE_TYPES)}, got {self.compute}")

    @property
    def wide(self) -> bool:
        """Whether the compute type is float32 already."""
        return self.compute == ir.DataType.FLOAT

    @property
    def shared_step(self) -> bool:
        """Whether nodes of `PagedAttention` take the outputs of a `ChunkStep`."""
        return not self.loops and not self.plugins


CPU_FORM = GraphForm()
"""Graphs for ONNX Runtime on the CPU."""
