"""A thin layer over onnx-ir's tape: nodes with path-like names, shared constants, and functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from minicache_trt.contract import DOMAIN

OPSET = 23
"""Standard ONNX opset of every graph and function (RMSNormalization and RotaryEmbedding are in it)."""
OPSETS = {"": OPSET, DOMAIN: 1, "com.microsoft": 1}

Attributes = Mapping[str, object]


class Emitter:
    """Records nodes and names their values ``<prefix>.<n>``.

    The prefix keeps function values apart from every tensor of the calling graph: the TensorRT ONNX parser binds a
    function's parameter to an outer tensor of the same name.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._tapes = [Tape()]
        self._count = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    @property
    def nodes(self) -> Sequence[ir.Node]:
        return self._tapes[-1].nodes

    def _name(self) -> str:
        self._count += 1
        return f"{self._prefix}.{self._count}"

    def op(self, op_type: str, *inputs: ir.Value | None, attrs: Attributes | None = None, domain: str = "") -> ir.Value:
        """One node with one output."""
        return self.op_multi(op_type, *inputs, outputs=1, attrs=attrs, domain=domain)[0]

    def op_multi(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        attrs: Attributes | None = None,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        name = self._name()
        values = self._tapes[-1].op_multi_out(
            op_type,
            inputs,
            dict(attrs or {}),  # type: ignore[arg-type]
            num_outputs=outputs,
            domain=domain,
            name=name,
        )
        for i, value in enumerate(values):
            value.name = name if i == 0 else f"{name}.{i}"
        return values

    def constant(self, value: object, dtype: str = "int64") -> ir.Value:
        """A constant tensor; equal constants of one graph are one node."""
        array = np.asarray(value, dtype=dtype)
        key = (dtype, array.shape, array.tobytes())
        if len(self._tapes) > 1:
            return self._constant_node(array)
        if key not in self._constants:
            self._constants[key] = self._constant_node(array)
        return self._constants[key]

    def _constant_node(self, array: np.ndarray) -> ir.Value:
        return self.op("Constant", attrs={"value": ir.tensor(array)})

    def floats(self, value: object) -> ir.Value:
        return self.constant(value, "float32")

    # Small compositions that read like the algebra they stand for.

    def reshape(self, x: ir.Value, shape: Sequence[int | ir.Value]) -> ir.Value:
        """Reshape to known extents and ``[1]`` int64 values; zero extents are meant literally."""
        if all(isinstance(extent, int) for extent in shape):
            target = self.constant([extent for extent in shape if isinstance(extent, int)])
        else:
            parts = [extent if isinstance(extent, ir.Value) else self.constant([extent]) for extent in shape]
            target = self.op("Concat", *parts, attrs={"axis": 0})
        return self.op("Reshape", x, target, attrs={"allowzero": 1})

    def extent(self, x: ir.Value, axis: int) -> ir.Value:
        """Size of one axis as a ``[1]`` int64 value."""
        return self.op("Shape", x, attrs={"start": axis, "end": axis + 1})

    def transpose(self, x: ir.Value, perm: Sequence[int]) -> ir.Value:
        return self.op("Transpose", x, attrs={"perm": list(perm)})

    def swap_last(self, x: ir.Value, rank: int) -> ir.Value:
        return self.transpose(x, [*range(rank - 2), rank - 1, rank - 2])

    def unsqueeze(self, x: ir.Value, *axes: int) -> ir.Value:
        return self.op("Unsqueeze", x, self.constant(list(axes)))

    def reduce(self, kind: str, x: ir.Value, *axes: int, keep: bool = True) -> ir.Value:
        return self.op(f"Reduce{kind}", x, self.constant(list(axes)), attrs={"keepdims": int(keep)})

    def sum(self, parts: Sequence[ir.Value]) -> ir.Value:
        """Parts added up in their order."""
        total = parts[0]
        for part in parts[1:]:
            total = self.op("Add", total, part)
        return total

    def slice(self, x: ir.Value, start: int | ir.Value, end: int | ir.Value, axis: int) -> ir.Value:
        starts = start if isinstance(start, ir.Value) else self.constant([start])
        ends = end if isinstance(end, ir.Value) else self.constant([end])
        return self.op("Slice", x, starts, ends, self.constant([axis]))

    def pick(self, x: ir.Value, start: int, end: int, axis: int) -> ir.Value:
        """What `slice` gives, by a Gather: TensorRT's parser imports a Slice of dynamic extents as thirty layers."""
        return self.op("Gather", x, self.constant(list(range(start, end)), "int32"), attrs={"axis": axis})

    def concat(self, parts: Sequence[ir.Value], axis: int) -> ir.Value:
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, attrs={"axis": axis})

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.op("Cast", x, attrs={"to": int(dtype)})

    def float32(self, x: ir.Value) -> ir.Value:
        return self.cast(x, ir.DataType.FLOAT)

    def int64(self, x: ir.Value) -> ir.Value:
        return self.cast(x, ir.DataType.INT64)

    def int32(self, x: ir.Value) -> ir.Value:
        return self.cast(x, ir.DataType.INT32)

    @contextmanager
    def subgraph(self) -> Iterator[Tape]:
        """Record into a nested graph's tape (a Loop's body); outer values are captured."""
        tape = Tape()
        self._tapes.append(tape)
        try:
            yield tape
        finally:
            self._tapes.pop()

    def outside(self, emit: Callable[[], ir.Value]) -> ir.Value:
        """Record into the outermost graph, where the value is known to all graphs that are emitted from now on."""
        inner, self._tapes = self._tapes, self._tapes[:1]
        try:
            return emit()
        finally:
            self._tapes = inner

    def parameter(self, name: str) -> ir.Value:
        """An input of a function or a nested graph."""
        return ir.val(f"{self._prefix}.{name}")

    def function(self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Function:
        """Close the tape into a model-local function."""
        graph = ir.Graph(list(inputs), list(outputs), nodes=self.nodes, opset_imports=dict(OPSETS), name=name)
        return ir.Function(DOMAIN, name, graph=graph, attributes=[])
