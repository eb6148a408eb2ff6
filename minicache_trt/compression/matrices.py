"""The calibrated constants of a plan: which tensors a stream needs, with their shapes, and their file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minicache_trt.compression.stream import Stream
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError

MATRICES_SUFFIX = ".safetensors"
"""``plan.json`` keeps its matrices beside it in ``plan.safetensors``."""

Matrices = Mapping[str, NDArray[np.generic]]
"""One stream's constants by name, or a whole plan's by ``streams.<i>.<name>``."""

ORTHOGONALITY = 1e-3
"""Largest deviation of ``align``'s products from the identity."""


def required(stream: Stream, config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Constants a stream needs, name to dtype and shape.

    ========  =======  ===============  ============================================================================
    name      dtype    shape            meaning (vectors are rows; H KV heads, D head_dim, m layers, r rank)
    ========  =======  ===============  ============================================================================
    head_map  int32    [m, H]           KV head of layer i that slot h holds; a permutation of each row
    align     float32  [m, H, D, D]     x_i A_i, per slot; orthogonal
    encode    float32  [H, m * D, r]    ``linear``: y = ([x_1 .. x_m] - mean) encode
    decode    float32  [H, r, m * D]    ``linear``: [x_1 .. x_m] ~ y decode + mean
    mean      float32  [H, m * D]       ``linear``
    sigma     float32  [H, r]           ``linear`` with gaussian segments: standard deviations of y, positive
    ========  =======  ===============  ============================================================================
    """
    heads, dim, members = config.num_kv_heads, config.head_dim, len(stream.layers)
    result: dict[str, tuple[str, tuple[int, ...]]] = {}
    if stream.match_heads:
        result["head_map"] = ("int32", (members, heads))
    if stream.align:
        result["align"] = ("float32", (members, heads, dim, dim))
    if stream.merge == "linear":
        result["encode"] = ("float32", (heads, members * dim, stream.rank))
        result["decode"] = ("float32", (heads, stream.rank, members * dim))
        result["mean"] = ("float32", (heads, members * dim))
        if stream.gaussian:
            result["sigma"] = ("float32", (heads, stream.rank))
    return result


def stream_matrices(matrices: Matrices, index: int) -> dict[str, NDArray[np.generic]]:
    """The constants of stream ``index`` by their own names."""
    prefix = f"streams.{index}."
    return {name.removeprefix(prefix): value for name, value in matrices.items() if name.startswith(prefix)}


def check_matrices(matrices: Matrices, index: int, stream: Stream, config: ModelConfig) -> None:
    """Check one stream's constants.

    Raises
    ------
    UserError
        A tensor is missing, unknown, of another shape or type, or cannot be what it is called.
    """
    own, expected = stream_matrices(matrices, index), required(stream, config)
    for name in sorted(expected.keys() - own.keys()):
        raise UserError(
            f"plan: streams[{index}] needs a tensor {name}",
            f"the file of matrices must hold streams.{index}.{name} {list(expected[name][1])}",
        )
    for name, value in own.items():
        if name not in expected:
            raise UserError(f"plan: tensor streams.{index}.{name} belongs to nothing in the plan")
        dtype, shape = expected[name]
        if value.dtype != dtype or value.shape != shape:
            raise UserError(
                f"plan: tensor streams.{index}.{name}: expected {dtype} {list(shape)}, "
                f"got {value.dtype} {list(value.shape)}"
            )
        problem = _problem(name, value)
        if problem:
            raise UserError(f"plan: tensor streams.{index}.{name}: {problem}")


def _problem(name: str, value: NDArray[np.generic]) -> str | None:
    if not np.isfinite(value).all():
        return "expected finite numbers"
    if name == "head_map" and (np.sort(value, -1) != np.arange(value.shape[-1])).any():
        return "expected a permutation of the KV heads for each layer"
    if name == "sigma" and (value <= np.zeros_like(value)).any():
        return "expected positive numbers"
    if name == "align":
        wide = value.astype(np.float64)
        if np.abs(wide @ wide.swapaxes(-1, -2) - np.eye(wide.shape[-1])).max() > ORTHOGONALITY:
            return "expected orthogonal matrices"
    return None


def load_matrices(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read a plan's constants.

    Raises
    ------
    UserError
        The file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors: dict[str, NDArray[np.generic]] = load_file(path)
    except OSError as error:
        raise UserError(
            f"plan: cannot read its matrices {path}: {error.strerror or error}",
            "keep the .safetensors file beside plan.json",
        ) from error
    except SafetensorError as error:
        raise UserError(f"plan: {path} is damaged: {error}", "copy or calibrate it again") from error
    return tensors


def save_matrices(matrices: Matrices, path: Path) -> None:
    """Write a plan's constants.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    from safetensors.numpy import save

    try:
        path.write_bytes(save({name: np.ascontiguousarray(value) for name, value in matrices.items()}))
    except OSError as error:
        raise UserError(f"plan: cannot write {path}: {error.strerror or error}") from error
