"""Weight-only quantization of linear layers: symmetric round-to-nearest, blocks of 32 inputs, streamed to disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from minicache_trt.checkpoint.streaming import encode_header
from minicache_trt.checkpoint.weights import WeightView

QUANTIZATION_BLOCK = 32
"""Inputs that share one scale."""

Progress = Callable[[int, int], None]
"""Called with weights done and weights in all."""


class Sized(Protocol):
    @property
    def shape(self) -> Sequence[int]: ...


def block_scales(weight: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Blocks ``[out, blocks, block]`` (the last one padded with zeros) and their scales ``[out, blocks]``.

    The entry of largest magnitude maps to -2^(bits-1), the one code without a counterpart, so the whole range is used.
    """
    rows, columns = weight.shape
    block = QUANTIZATION_BLOCK
    blocks = -(-columns // block)
    padded = np.zeros((rows, blocks * block), np.float32)
    padded[:, :columns] = weight
    grouped = padded.reshape(rows, blocks, block)
    largest = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], -1)[..., 0]
    return grouped, (largest / -(1 << (bits - 1))).astype(np.float32)


def quantize_weight(weight: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes uint8 ``[out, blocks, block * bits / 8]`` (low bits first, zero 2^(bits-1)), scales ``[out, blocks]``."""
    grouped, scales = block_scales(weight, bits)
    zero = 1 << (bits - 1)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.clip(np.rint(grouped * inverse[..., None]) + zero, 0, 2 * zero - 1).astype(np.uint8)
    if bits == 8:
        return codes, scales
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8), scales


def dequantize_weight(
    codes: NDArray[Any],
    scales: NDArray[np.float32],
    bits: int,
    columns: int,
    zeros: NDArray[np.uint8] | None = None,
) -> NDArray[np.float32]:
    """``[out, columns]`` as the engine's weight-only linear layers see it.

    ``zeros``: 4-bit zero points ``[out, ceil(blocks / 2)]``, low bits first, of checkpoints that have them.
    """
    if codes.dtype != np.uint8:  # numbers themselves, of float8
        return (codes.astype(np.float32) * scales[..., None]).reshape(len(codes), -1)[:, :columns]
    wide = codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)
    zero: NDArray[np.float32] | float = float(1 << (bits - 1))
    if zeros is not None:
        zero = np.stack([zeros & 15, zeros >> 4], -1).reshape(len(zeros), -1)[:, : scales.shape[1], None]
        zero = zero.astype(np.float32)
    values = (wide.astype(np.float32) - zero) * scales[..., None]
    return values.reshape(len(codes), -1)[:, :columns]


def write_quantized(
    path: Path, linears: Mapping[str, WeightView], bits: int, progress: Progress
) -> dict[str, WeightView]:
    """Quantize linear layers one at a time into a safetensors file.

    Parameters
    ----------
    path : Path
        File to create.
    linears : mapping
        Name of a linear layer to its weight ``[out, in]``.
    bits : int
        Bits per code, 4 or 8.
    progress : callable

    Returns
    -------
    dict of WeightView
        ``<name>.codes`` and ``<name>.scales`` in the new file. Memory in use is that of the largest weight.
    """
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, view in linears.items():
        rows, blocks = view.shape[0], -(-view.shape[1] // QUANTIZATION_BLOCK)
        tensors[f"{name}.codes"] = "U8", (rows, blocks, QUANTIZATION_BLOCK * bits // 8)
        tensors[f"{name}.scales"] = "F32", (rows, blocks)
    with path.open("wb") as file:
        file.write(encode_header(tensors))
        for done, view in enumerate(linears.values()):
            progress(done, len(linears))
            for part in quantize_weight(view.numpy().astype(np.float32), bits):
                file.write(np.ascontiguousarray(part).data)
        progress(len(linears), len(linears))
    return quantized_views(path)


def quantized_views(path: Path) -> dict[str, WeightView]:
    """Views of a file `write_quantized` wrote."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    base = 8 + size
    return {
        name: WeightView(
            name,
            path,
            base + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
            tuple(entry["shape"]),
            {"U8": "uint8", "F32": "float32"}.get(entry["dtype"], entry["dtype"]),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read_codes(view: WeightView) -> NDArray[Any]:
    """Codes of a layer, memory-mapped: uint8, or float8 numbers, which safetensors' own reader does not know."""
    import ml_dtypes

    dtype = np.dtype(np.uint8 if view.dtype == "uint8" else ml_dtypes.float8_e4m3fn)
    stored = np.memmap(view.file, np.uint8, "r", view.offset, (view.nbytes,))
    return stored.view(dtype).reshape(view.shape)


def linears_in(path: Path) -> list[str]:
    """Canonical names of the linear layers in a file of codes."""
    with safe_open(path, framework="numpy") as file:
        return sorted({key.rpartition(".")[0] for key in file.keys()})  # noqa: SIM118 (not iterable itself)


def iterate_dequantized(path: Path, weights: Mapping[str, Sized]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Name and float32 ``[out, in]`` of every linear layer in a file of codes, one at a time.

    Parameters
    ----------
    path : Path
        Written by `write_quantized`, or from a checkpoint that was quantized before (whose metadata gives the bits).
    weights : mapping
        Anything with a ``shape`` by canonical name: the last blocks of a row may be padded. Layers that are not in it
        fill their blocks.
    """
    views = quantized_views(path)
    with safe_open(path, framework="numpy") as file:
        keys = set(file.keys())
        given = (file.metadata() or {}).get("bits")
        for name in sorted({key.rpartition(".")[0] for key in keys}):
            codes, scales = read_codes(views[f"{name}.codes"]), file.get_tensor(f"{name}.scales")
            zeros = file.get_tensor(f"{name}.zeros") if f"{name}.zeros" in keys else None
            bits = int(given) if given else 8 * codes.shape[-1] // QUANTIZATION_BLOCK
            original = weights.get(f"{name}.weight", weights["embed.weight"] if name == "lm_head" else None)
            columns = codes.shape[1] * codes.shape[2] * 8 // bits if original is None else original.shape[-1]
            yield name, dequantize_weight(codes, scales, bits, columns, zeros)


def dequantized_linears(path: Path, weights: Mapping[str, Sized]) -> dict[str, NDArray[np.float32]]:
    """All of `iterate_dequantized`, by name."""
    return dict(iterate_dequantized(path, weights))
