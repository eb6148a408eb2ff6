"""Weights of a graph: views into linked safetensors files, or weight-only quantized copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from minicache_trt.checkpoint.weights import WeightView
from minicache_trt.config import ModelConfig
from minicache_trt.functions.form import CPU_FORM, GraphForm
from minicache_trt.functions.tape import Emitter

_TYPES = {
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "float32": ir.DataType.FLOAT,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
}


def external_value(name: str, view: WeightView, location: str) -> ir.Value:
    """An initializer whose data stays where it is; ``location``: the file's path as seen from the graph."""
    shape = ir.Shape(view.shape)
    tensor = ir.ExternalTensor(location, view.offset, view.nbytes, _TYPES[view.dtype], shape=shape, name=name)
    return ir.Value(name=name, shape=ir.Shape(view.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


class GraphWeights:
    """Emits weights and linear layers on one tape.

    Nothing is loaded: a weight is an external tensor, an offset in a file of the engine directory.

    Parameters
    ----------
    config : ModelConfig
    views : mapping
        Canonical name to view.
    locations : mapping
        Name of a view's file to its path relative to the engine directory.
    quantized : mapping
        ``<linear>.codes`` (uint8 ``[out, blocks, bytes]``), ``<linear>.scales`` (float32 ``[out, blocks]``) and, where
        zero points vary, ``<linear>.zeros`` (uint8 ``[out, bytes]``) of the weight-only format; empty for floats. Where
        an 8-bit row is one block in graphs without loops, and where codes are numbers (``int8``, ``int4``,
        ``F8_E4M3``), they are dequantized.
    bits : int, optional
        Bits of a weight-only code.
    form : GraphForm
    """

    def __init__(
        self,
        config: ModelConfig,
        views: Mapping[str, WeightView],
        locations: Mapping[str, str],
        quantized: Mapping[str, WeightView] | None = None,
        bits: int | None = None,
        form: GraphForm = CPU_FORM,
    ) -> None:
        self.emitter = Emitter("decoder")
        self._config = config
        self._views = views
        self._quantized = quantized or {}
        self._locations = locations
        self._bits = bits
        self._form = form
        self._tables: dict[str, ir.Value] = {}
        self._casts: dict[str, ir.Value] = {}

    @property
    def initializers(self) -> list[ir.Value]:
        return list(self._tables.values())

    def _external(self, name: str, view: WeightView) -> ir.Value:
        if name not in self._tables:
            self._tables[name] = external_value(name, view, self._locations[view.file.name])
        return self._tables[name]

    def table(self, name: str) -> ir.Value:
        """A weight in its stored type."""
        return self._external(name, self._views[name])

    def weight(self, name: str) -> ir.Value:
        """A weight in compute type; the runtime folds the cast, if one is needed, when it loads the graph."""
        if _TYPES[self._views[name].dtype] == self._form.compute:
            return self.table(name)
        if name not in self._casts:
            self._casts[name] = self.emitter.outside(lambda: self.emitter.cast(self.table(name), self._form.compute))
        return self._casts[name]

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """``x @ W.T (+ bias)`` with W as the checkpoint stores it, ``[out, in]``."""
        bias = self.weight(f"{name}.bias") if f"{name}.bias" in self._views else None
        if f"{name}.codes" in self._quantized:
            return self._quantized_linear(x, name, bias)
        tied = name == "lm_head" and self._config.tie_word_embeddings
        weight = self.weight("embed.weight" if tied else f"{name}.weight")
        return self.emitter.op("Gemm", x, weight, *([bias] if bias is not None else []), attrs={"transB": 1})

    def _quantized_linear(self, x: ir.Value, name: str, bias: ir.Value | None) -> ir.Value:
        assert self._bits is not None
        view = self._quantized[f"{name}.codes"]
        by_row = self._bits == 8 and view.shape[1] == 1 and not self._form.loops  # as TensorRT has int8
        if view.dtype != "uint8" or by_row:
            weight = self._dequantized(name, view)
            return self.emitter.op("Gemm", x, weight, *([bias] if bias is not None else []), attrs={"transB": 1})
        rows, blocks, size = view.shape
        block = size * 8 // self._bits
        tied = name == "lm_head" and self._config.tie_word_embeddings
        original = self._views.get("embed.weight" if tied else f"{name}.weight")
        columns = blocks * block if original is None else original.shape[1]
        codes, scales, zeros = (
            self._external(f"{name}.{kind}", self._quantized[f"{name}.{kind}"])
            if f"{name}.{kind}" in self._quantized
            else None
            for kind in ("codes", "scales", "zeros")
        )
        assert scales is not None
        scales = scales if self._form.wide else self.emitter.cast(scales, self._form.compute)
        attrs = {"K": columns, "N": rows, "bits": self._bits, "block_size": block, "accuracy_level": 4}
        # Inputs 4 to 6 are zero points (absent: symmetric), group index (absent) and bias.
        inputs = [x, codes, scales, zeros, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        return self.emitter.op("MatMulNBits", *inputs, attrs=attrs, domain="com.microsoft")

    def _dequantized(self, name: str, view: WeightView) -> ir.Value:
        """A weight ``[out, in]`` in compute type, from codes with one scale for each row, or for each of its blocks."""
        g, rows, columns = self.emitter, view.shape[0], view.shape[-1]
        codes = self._external(f"{name}.codes", replace(view, shape=(rows, columns)))
        stored = self._quantized[f"{name}.scales"]
        blocks = stored.shape[1]
        shape = (rows,) if blocks == 1 else stored.shape
        scales = self._external(f"{name}.scales", replace(stored, shape=shape))
        if _TYPES[stored.dtype] != self._form.compute:
            scales = g.cast(scales, self._form.compute)
        zeros = [g.constant([128] * rows, "uint8")] if view.dtype == "uint8" else []
        attrs = {"axis": 0} if blocks == 1 else {"axis": 1, "block_size": columns // blocks}
        return g.op("DequantizeLinear", codes, scales, *zeros, attrs=attrs)
