"""Checkpoints with a model's shape and no real weights, to measure and test what weights do not matter for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from minicache_trt.checkpoint.binding import stored_shape, stored_tensors, weight_shapes
from minicache_trt.checkpoint.weights import ITEM_SIZES, SAFETENSORS_DTYPES, WEIGHTS_FILE, numpy_dtype, read_json_object
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError

DUMMY_MARK = "minicache_trt_dummy"
"""Key of config.json that marks a dummy checkpoint."""

PAGE = 4096
STRIDE = 2 << 20
DENSE_LIMIT = 16 << 20
"""Weights up to this size in all are random throughout."""

_SCALE = 0.02


def write_dummy(directory: Path, config: ModelConfig, raw: Mapping[str, Any]) -> None:
    """Write ``config.json`` and a sparse ``model.safetensors`` into ``directory``.

    Norms multiply by one. Every other tensor is zero but for one page of 4 KiB at its start and at every 2 MiB, which
    holds seeded normal numbers of standard deviation 0.02: activations are not degenerate, and a 7B shape takes about
    27 MB of disk. Only embeddings of tokens in such a page differ from zero. Models up to 16 MiB are random throughout.

    Parameters
    ----------
    directory : Path
        Created if it is absent. Another dummy in it is replaced; a real checkpoint is refused.
    config : ModelConfig
    raw : mapping
        config.json, from which ``config`` was parsed.

    Raises
    ------
    UserError
        The directory holds a real checkpoint or cannot be written.
    """
    _refuse_real_checkpoint(directory)
    dtype_key = "dtype" if raw.get("dtype") is not None else "torch_dtype"
    marked = {**raw, dtype_key: config.dtype, DUMMY_MARK: True}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(marked, indent=2) + "\n", encoding="utf-8")
        temporary = directory / f"{WEIGHTS_FILE}.tmp"
        with temporary.open("wb") as file:
            _write_weights(file, config)
        temporary.replace(directory / WEIGHTS_FILE)
    except OSError as error:
        raise UserError(
            f"{directory}: the dummy checkpoint cannot be written ({error.strerror})",
            "give a work directory on a disk with space that supports sparse files",
        ) from error


def _refuse_real_checkpoint(directory: Path) -> None:
    config = directory / "config.json"
    has_weights = any(directory.glob("*.safetensors")) or any(directory.glob("*.bin"))
    marked = config.is_file() and read_json_object(config).get(DUMMY_MARK)
    if not marked and (has_weights or config.is_file()):
        raise UserError(f"{directory}: holds a checkpoint, which a dummy would replace", "give an empty work directory")


def _write_weights(file: IO[bytes], config: ModelConfig) -> None:
    shapes = weight_shapes(config)
    code = next(code for code, name in SAFETENSORS_DTYPES.items() if name == config.dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin, places = 0, []
    for name, parts in stored_tensors(config).items():
        shape = stored_shape(shapes, parts)
        nbytes = math.prod(shape) * ITEM_SIZES[config.dtype]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, begin + nbytes]}
        places.append((parts[0], begin, nbytes))
        begin += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data starts on a page boundary, so that a page of numbers is one block of the disk and not two.
    text += b" " * (-(8 + len(text)) % PAGE)
    file.write(len(text).to_bytes(8, "little") + text)
    base = 8 + len(text)
    file.truncate(base + begin)
    stride = PAGE if begin <= DENSE_LIMIT else STRIDE
    rng, dtype = np.random.default_rng(0), numpy_dtype(config.dtype)
    for canonical, offset, nbytes in places:
        if canonical.endswith("norm.weight"):
            file.seek(base + offset)
            file.write(np.full(nbytes // dtype.itemsize, 0 if config.unit_offset_norm else 1, dtype).tobytes())
            continue
        for at, length in _pages(offset, nbytes, stride):
            values = rng.standard_normal(length // dtype.itemsize, dtype=np.float32) * _SCALE
            file.seek(base + at)
            file.write(values.astype(dtype).tobytes())


def _pages(offset: int, nbytes: int, stride: int) -> list[tuple[int, int]]:
    """Half-open byte ranges, as (begin, length), of a tensor that hold numbers: on page boundaries where it has any."""
    end = offset + nbytes
    first = -(-offset // PAGE) * PAGE
    if stride == PAGE or first + PAGE > end:
        return [(at, min(PAGE, end - at)) for at in range(offset, end, PAGE)]
    return [(at, min(PAGE, end - at)) for at in range(first, end, stride)]
