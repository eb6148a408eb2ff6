"""AWQ and GPTQ checkpoints as a source: their 4-bit codes in the order of our weight-only form, never as floats.

    GPTQ  qweight int32 [in/8, out]   eight inputs in a word, low bits first; qzeros int32 [groups, out/8], one less
          than the zero point (``checkpoint_format`` gptq) or the zero point itself (gptq_v2); g_idx int32 [in]
    AWQ   qweight int32 [in, out/8]   eight outputs in a word, in the order 0 2 4 6 1 3 5 7; qzeros int32
          [groups, out/8] likewise (``version`` gemm)
    both  scales [groups, out]; weight = scale * (code - zero)

    ours  codes uint8 [out, blocks, block/2], scales float32 [out, blocks], zeros uint8 [out, ceil(blocks/2)]: low bits
          first, as ONNX Runtime's MatMulNBits reads them; zeros are left out where all are 8

Groups larger than 128 inputs become several blocks of 128 with the same scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicache_trt.checkpoint.binding import require_weights, stored_shape, stored_tensors, weight_shapes
from minicache_trt.checkpoint.hf_config import parse_config
from minicache_trt.checkpoint.source import Source
from minicache_trt.checkpoint.tensor_file import StoredTensor, from_view
from minicache_trt.checkpoint.weights import WeightView, read_safetensors_index
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError

METHODS = ("awq", "gptq")
_BLOCK_SIZES = (32, 64, 128)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in the word of outputs 0 to 7."""
_SYMMETRIC = 8


@dataclass(frozen=True)
class Packing:
    """How a checkpoint packs its codes; ``offset`` is what its zero points lack."""

    method: str
    group: int
    offset: int = 0


def int4_method(raw: Mapping[str, Any]) -> str | None:
    """``awq`` or ``gptq`` where config.json says so."""
    quantization = raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if method in METHODS else None


def open_int4(directory: Path, raw: Mapping[str, Any]) -> Source:
    """A directory with ``config.json`` (``raw``) of an AWQ or GPTQ checkpoint and its safetensors files.

    Raises
    ------
    UserError
        The packing or the model is not supported; later, when its weights are read: one is missing or damaged.
    """
    path = directory / "config.json"
    packing = _packing(raw["quantization_config"], str(path))
    plain = {key: value for key, value in raw.items() if key != "quantization_config"}
    config = parse_config(plain, path=str(path))
    opened: list[_Checkpoint] = []

    def checkpoint() -> _Checkpoint:
        if not opened:
            opened.append(_Checkpoint(directory, config, packing))
        return opened[0]

    return Source(
        f"{packing.method.upper()} checkpoint",
        plain,
        lambda: checkpoint().plain_tensors(),
        int4=lambda: checkpoint().int4_tensors(),
    )


def _packing(quantization: Mapping[str, Any], path: str) -> Packing:
    def refuse(key: str, expected: str, remedy: str) -> UserError:
        return UserError(
            f"{path}: quantization_config.{key}: expected {expected}, got {quantization.get(key)!r}", remedy
        )

    method, bits = str(quantization.get("quant_method")), quantization.get("bits", quantization.get("w_bit"))
    if bits != 4:
        raise refuse("bits", "4", "use the model's 4-bit or unquantized checkpoint")
    group = quantization.get("group_size", quantization.get("q_group_size", -1))
    if type(group) is not int or (group != -1 and group not in _BLOCK_SIZES and (group < 1 or group % 128)):
        raise refuse("group_size", "32, 64, a multiple of 128, or -1", "use a checkpoint with such groups")
    if method == "awq":
        version = str(quantization.get("version", "gemm")).lower()
        if version != "gemm":
            raise refuse("version", "'gemm'", "use the checkpoint packed for GEMM, or the unquantized one")
        return Packing(method, group)
    form = str(quantization.get("checkpoint_format", "gptq")).lower()
    if form not in ("gptq", "gptq_v2"):
        raise refuse("checkpoint_format", "'gptq' or 'gptq_v2'", "use a checkpoint in one of these forms")
    return Packing(method, group, 1 if form == "gptq" else 0)


class _Checkpoint:
    """The tensors of an AWQ or GPTQ checkpoint, by Hugging Face module."""

    def __init__(self, directory: Path, config: ModelConfig, packing: Packing) -> None:
        self._views = read_safetensors_index(directory)
        self._config, self._packing, self._directory = config, packing, directory
        self._shapes, self._stored = weight_shapes(config), stored_tensors(config)
        self._quantized = {
            name: name.removesuffix(".weight")
            for name in self._stored
            if f"{name.removesuffix('.weight')}.qweight" in self._views
        }
        if not self._quantized:
            raise UserError(
                f"{directory}: no weight is quantized, though config.json has a quantization_config",
                "remove quantization_config from config.json",
            )
        kinds = ("qweight", "qzeros", "scales")
        needed = [f"{module}.{kind}" for module in self._quantized.values() for kind in kinds]
        require_weights([name for name in self._stored if name not in self._quantized] + needed, self._views, directory)

    def plain_tensors(self) -> list[StoredTensor]:
        """What is not quantized, as it is."""
        return [from_view(self._views[name]) for name in self._stored if name not in self._quantized]

    def int4_tensors(self) -> list[StoredTensor]:
        """Codes, scales and zero points of every quantized linear layer, by canonical name."""
        result = []
        for name, module in self._quantized.items():
            rows, columns = stored_shape(self._shapes, self._stored[name])
            linear = _Linear(self, module, rows, columns)
            first = 0
            for part in self._stored[name]:
                count = self._shapes[part][0]
                result += linear.stored(part.removesuffix(".weight"), slice(first, first + count))
                first += count
        return result

    def view(self, module: str, kind: str) -> WeightView:
        return self._views[f"{module}.{kind}"]

    def has(self, name: str) -> bool:
        return name in self._views

    @property
    def packing(self) -> Packing:
        return self._packing


class _Linear:
    """One quantized module; what is stacked in it is cut apart by rows."""

    def __init__(self, checkpoint: _Checkpoint, module: str, rows: int, columns: int) -> None:
        self._checkpoint, self._module = checkpoint, module
        packing = checkpoint.packing
        self._group = columns if packing.group == -1 else packing.group
        self._block = self._group if self._group in _BLOCK_SIZES else 128
        if columns % self._group or self._group % self._block:
            raise UserError(
                f"{module}: {columns} inputs are not a multiple of groups of {self._group}",
                "use the model's unquantized checkpoint",
            )
        groups = columns // self._group
        awq = packing.method == "awq"
        self._expect("qweight", (columns, rows // 8) if awq else (columns // 8, rows), "I32")
        self._expect("qzeros", (groups, rows // 8), "I32")
        self._expect("scales", (groups, rows), "")
        self._rows, self._columns, self._groups = rows, columns, groups
        if checkpoint.has(f"{module}.g_idx"):
            self._check_order(checkpoint.view(module, "g_idx"))

    def stored(self, linear: str, rows: slice) -> list[StoredTensor]:
        count, blocks = rows.stop - rows.start, self._columns // self._block
        kinds: list[tuple[str, str, tuple[int, ...], Callable[[slice], NDArray[Any]]]] = [
            ("codes", "uint8", (count, blocks, self._block // 2), self._codes),
            ("scales", "float32", (count, blocks), self._scales),
        ]
        if not self._symmetric(rows):
            kinds.append(("zeros", "uint8", (count, -(-blocks // 2)), self._zeros))
        return [
            StoredTensor(f"{linear}.{kind}", dtype, shape, lambda read=read: iter([read(rows)]))  # type: ignore[misc]
            for kind, dtype, shape, read in kinds
        ]

    def _codes(self, rows: slice) -> NDArray[np.uint8]:
        words = self._words("qweight")
        if self._checkpoint.packing.method == "awq":
            codes = _unpack_columns(words, _AWQ_ORDER)[:, rows].T
        else:
            # Words hold eight inputs of one output: a word's bytes are already two inputs each, low bits first.
            packed = np.ascontiguousarray(words[:, rows].T).view(np.uint8)
            return packed.reshape(len(packed), -1, self._block // 2)
        return pack_pairs(codes).reshape(rows.stop - rows.start, -1, self._block // 2)

    def _scales(self, rows: slice) -> NDArray[np.float32]:
        scales = self._checkpoint.view(self._module, "scales").numpy()[:, rows].astype(np.float32).T
        return np.repeat(scales, self._group // self._block, 1)

    def _zero_points(self, rows: slice) -> NDArray[np.uint8]:
        packing = self._checkpoint.packing
        order = _AWQ_ORDER if packing.method == "awq" else tuple(range(8))
        zeros = _unpack_columns(self._words("qzeros"), order)[:, rows].T
        return np.asarray(zeros + np.uint8(packing.offset), np.uint8)

    def _zeros(self, rows: slice) -> NDArray[np.uint8]:
        zeros = self._zero_points(rows)
        if zeros.max() > 15:
            raise UserError(
                f"{self._module}.qzeros: zero points up to {zeros.max()}, expected 0 to 15",
                "set checkpoint_format to gptq_v2 in quantization_config if that is how it was packed",
            )
        zeros = np.repeat(zeros, self._group // self._block, 1)
        if zeros.shape[1] % 2:
            zeros = np.concatenate([zeros, np.zeros((len(zeros), 1), np.uint8)], 1)
        return pack_pairs(zeros)

    def _symmetric(self, rows: slice) -> bool:
        return bool((self._zero_points(rows) == _SYMMETRIC).all())

    def _words(self, kind: str) -> NDArray[np.int32]:
        view = self._checkpoint.view(self._module, kind)
        return np.memmap(view.file, np.uint8, "r", view.offset, view.nbytes).view(np.int32).reshape(view.shape)

    def _expect(self, kind: str, shape: tuple[int, ...], dtype: str) -> None:
        view = self._checkpoint.view(self._module, kind)
        if view.shape != shape or (dtype and view.dtype != dtype):
            raise UserError(
                f"{view.file}: {view.name}: expected {dtype or 'scales'} {list(shape)}, got {view.dtype} "
                f"{list(view.shape)}",
                "check group_size and version in quantization_config",
            )

    def _check_order(self, view: WeightView) -> None:
        """Refuse groups whose inputs are not neighbours: activation order needs inputs to be gathered first."""
        words = np.memmap(view.file, np.uint8, "r", view.offset, view.nbytes).view(np.int32)
        if not np.array_equal(words, np.arange(self._columns) // self._group):
            raise UserError(
                f"{view.file}: {view.name}: groups of inputs in activation order (desc_act) are not supported",
                "use a GPTQ checkpoint made with desc_act false, an AWQ one, or the unquantized model",
            )


def pack_pairs(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two 4-bit codes of the last axis in a byte, low bits first."""
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)


def _unpack_columns(words: NDArray[np.int32], order: Iterable[int]) -> NDArray[np.uint8]:
    """Codes ``[rows, 8 * words]`` of words whose column c holds outputs 8c to 8c+7, the n-th at place ``order[n]``."""
    unsigned = words.view(np.uint32)
    codes = np.empty((*words.shape, 8), np.uint8)
    for column, place in enumerate(order):
        codes[..., column] = (unsigned >> np.uint32(4 * place)) & 15
    return codes.reshape(len(words), -1)
