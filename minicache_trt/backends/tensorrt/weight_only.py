"""Weight-only linear layers as TensorRT takes them: signed codes, and scales in the engine's compute type.

TensorRT-RTX keeps int4 codes with a scale for each block of inputs, and int8 and float8 (e4m3) codes with a scale for
each output; those with scales for blocks it would turn into numbers of the compute type while it builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from minicache_trt.checkpoint.quantize import quantized_views, read_codes
from minicache_trt.checkpoint.streaming import Progress, encode_header
from minicache_trt.checkpoint.weights import SAFETENSORS_DTYPES, WeightView, numpy_dtype, read_safetensors_file
from minicache_trt.compression.constants import FLOAT8_MAX
from minicache_trt.errors import UserError

SIGN = {4: 0x88, 8: 0x80}
"""Bits of a byte that tell codes with the zero 2^(bits-1) from two's complement, by bits of a code."""
LARGEST_CODE = 127
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126}
"""Smallest scale by compute type."""
FLOAT8 = "F8_E4M3"
"""Safetensors' name of float8 e4m3."""


def row_codes(weight: NDArray[np.float32], fmt: str) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """Codes ``[out, 1, in]`` of ``int8`` (uint8 with the zero 128) or ``fp8`` (e4m3 numbers), and scales ``[out, 1]``.

    Scales are positive, as TensorRT wants them: a row of zeros has 1.
    """
    largest = np.abs(weight).max(-1, keepdims=True)
    top = np.float32(LARGEST_CODE if fmt == "int8" else FLOAT8_MAX)
    scales = np.where(largest > 0, largest / top, 1).astype(np.float32)
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    ratio = np.clip(weight / scales, -top, top)
    codes = (np.rint(ratio) + 128).astype(np.uint8) if fmt == "int8" else ratio.astype(ml_dtypes.float8_e4m3fn)
    return codes[:, None], scales


def write_row_codes(
    path: Path, linears: Mapping[str, WeightView], fmt: str, progress: Progress
) -> dict[str, WeightView]:
    """A file of 8-bit codes as `minicache_trt.checkpoint.quantize` reads it, each row one block.

    Parameters
    ----------
    path : Path
    linears : mapping
        Name of a linear layer to its weight ``[out, in]``.
    fmt : str
        One of `ROW_FORMATS`.
    progress : callable
    """
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, view in linears.items():
        rows, columns = view.shape
        tensors[f"{name}.codes"] = ("U8" if fmt == "int8" else FLOAT8, (rows, 1, columns))
        tensors[f"{name}.scales"] = "F32", (rows, 1)
    with path.open("wb") as file:
        file.write(encode_header(tensors, {"bits": "8"}))
        for done, view in enumerate(linears.values()):
            progress(done, len(linears))
            for part in row_codes(view.numpy().astype(np.float32), fmt):
                file.write(np.ascontiguousarray(part).view(np.uint8).data)
        progress(len(linears), len(linears))
    return quantized_views(path)


def write_signed(
    path: Path, codes: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, progress: Progress
) -> dict[str, WeightView]:
    """The linear layers of a file of codes, for TensorRT's DequantizeLinear.

    Parameters
    ----------
    path : Path
        File to write.
    codes : Path
        File of codes.
    shapes : mapping
        Name of a linear layer to ``(out, in)``.
    dtype : str
        Compute type.
    progress : callable

    Returns
    -------
    dict of WeightView
        ``<name>.codes``, ``int4``, ``int8`` or ``F8_E4M3`` ``[out, in]``, and ``<name>.scales`` ``[out, blocks]``, in
        ``dtype``.

    Raises
    ------
    UserError
        A layer has zero points, or blocks its inputs do not fill.
    """
    views = quantized_views(codes)
    names = sorted(key.removesuffix(".codes") for key in views if key.endswith(".codes"))
    stored = next(key for key, value in SAFETENSORS_DTYPES.items() if value == dtype)
    bits: dict[str, int] = {}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in names:
        bits[name] = _bits(name, views, shapes[name])
        rows, columns = shapes[name]
        tensors[f"{name}.codes"] = "U8", (rows, columns * bits[name] // 8)
        tensors[f"{name}.scales"] = stored, views[f"{name}.scales"].shape
    target = numpy_dtype(dtype)
    with path.open("wb") as file, safe_open(codes, framework="numpy") as source:
        file.write(encode_header(tensors))
        for done, name in enumerate(names):
            progress(done, len(names))
            array = read_codes(views[f"{name}.codes"]).view(np.uint8)
            number = views[f"{name}.codes"].dtype == FLOAT8
            file.write((array if number else np.bitwise_xor(array, np.uint8(SIGN[bits[name]]))).data)
            scales = source.get_tensor(f"{name}.scales").astype(target)
            if bits[name] == 8:  # positive, however small
                scales = np.maximum(scales, target.type(SMALLEST[dtype]))
            file.write(np.ascontiguousarray(scales).view(np.uint8).data)
        progress(len(names), len(names))
    written = read_safetensors_file(path)
    for name in names:
        kept = views[f"{name}.codes"].dtype
        kind = kept if kept == FLOAT8 else f"int{bits[name]}"
        written[f"{name}.codes"] = replace(written[f"{name}.codes"], shape=shapes[name], dtype=kind)
    return written


def _bits(name: str, views: Mapping[str, WeightView], shape: tuple[int, ...]) -> int:
    """Bits of a layer's codes, if TensorRT can take it."""
    _, blocks, size = views[f"{name}.codes"].shape
    if f"{name}.zeros" in views:
        raise UserError(
            f"{name}: its 4-bit weights have zero points, TensorRT takes symmetric ones only",
            "use --backend onnxruntime or cuda, or give the unquantized checkpoint with --weights int4",
        )
    bits = 8 * blocks * size // shape[1]
    if bits not in SIGN or bits * shape[1] != 8 * blocks * size:
        raise UserError(
            f"{name}: {shape[1]} inputs do not fill {blocks} blocks of codes, which TensorRT's have to",
            "leave out --weights: the engine's are of its --dtype",
        )
    return bits
