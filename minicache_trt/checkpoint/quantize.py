"""Files of codes: the linear layers of a weight-only engine, and the floats that were changed with them.

    <linear>.codes     uint8 [out, blocks, block * bits / 8], low bits first
    <linear>.scales    float32 [out, blocks]; weight = scale * (code - zero)
    <linear>.zeros     uint8 [out, ceil(blocks / 2)] of 4 bits, where zeros are not all 2^(bits-1)
    <name>.weight, <name>.bias    float32: these take the place of the checkpoint's (norms a scale was folded into)

The metadata say how many ``bits`` a code has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from minicache_trt.checkpoint.weights import WeightView, read_safetensors_file

_CODES = (".codes", ".scales", ".zeros")


class Sized(Protocol):
    @property
    def shape(self) -> Sequence[int]: ...


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


def quantized_views(path: Path) -> dict[str, WeightView]:
    """Views of a file of codes, its floats among them; codes are of type ``uint8``."""
    types = {"U8": "uint8"}
    return {
        name: replace(view, dtype=types.get(view.dtype, view.dtype))
        for name, view in read_safetensors_file(path).items()
    }


def changed_floats(views: Mapping[str, WeightView]) -> dict[str, WeightView]:
    """Of `quantized_views`, what takes the place of the checkpoint's weights, by canonical name."""
    return {name: view for name, view in views.items() if not name.endswith(_CODES)}


def read_codes(view: WeightView) -> NDArray[Any]:
    """Codes of a layer, memory-mapped: uint8, or float8 numbers, which safetensors' own reader does not know."""
    import ml_dtypes

    dtype = np.dtype(np.uint8 if view.dtype == "uint8" else ml_dtypes.float8_e4m3fn)
    stored = np.memmap(view.file, np.uint8, "r", view.offset, (view.nbytes,))
    return stored.view(dtype).reshape(view.shape)


def linears_in(path: Path) -> list[str]:
    """Canonical names of the linear layers in a file of codes."""
    return sorted(name.removesuffix(".codes") for name in read_safetensors_file(path) if name.endswith(".codes"))


def iterate_dequantized(path: Path, weights: Mapping[str, Sized]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Name and float32 ``[out, in]`` of every linear layer in a file of codes, one at a time.

    Parameters
    ----------
    path : Path
        Of an engine, or of a checkpoint that was quantized before.
    weights : mapping
        Anything with a ``shape`` by canonical name: the last blocks of a row may be padded. Layers that are not in it
        fill their blocks.
    """
    views = quantized_views(path)
    with safe_open(path, framework="numpy") as file:
        keys = set(file.keys())
        bits = int(file.metadata()["bits"])
        for name in sorted(key.removesuffix(".codes") for key in keys if key.endswith(".codes")):
            codes, scales = read_codes(views[f"{name}.codes"]), file.get_tensor(f"{name}.scales")
            zeros = file.get_tensor(f"{name}.zeros") if f"{name}.zeros" in keys else None
            original = weights.get(f"{name}.weight", weights["embed.weight"] if name == "lm_head" else None)
            columns = codes.shape[1] * codes.shape[2] * 8 // bits if original is None else original.shape[-1]
            yield name, dequantize_weight(codes, scales, bits, columns, zeros)


def changed_weights(path: Path, weights: Mapping[str, Sized]) -> dict[str, NDArray[np.float32]]:
    """Everything a file of codes says in place of the checkpoint, float32, by canonical name."""
    linears = {f"{name}.weight": weight for name, weight in iterate_dequantized(path, weights)}
    return linears | {name: view.numpy().copy() for name, view in changed_floats(quantized_views(path)).items()}
