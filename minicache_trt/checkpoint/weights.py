"""Weights as addresses: which bytes of which safetensors file hold a tensor. Nothing is loaded until it is used."""

from __future__ import annotations

import json
import math
import mmap
import warnings
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minicache_trt.checkpoint.names import listed
from minicache_trt.errors import UserError

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Weight dtypes and their bytes per element."""

SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}

_MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors format

# A Python mmap keeps its file descriptor, so a view each would use up the descriptors of a process. Views of one file
# share one mapping, which lives as long as an array on it.
_mappings: weakref.WeakValueDictionary[tuple[Path, int, int, int], mmap.mmap] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class WeightView:
    """The bytes of one tensor inside a safetensors file.

    Parameters
    ----------
    name : str
        Name of the tensor in the file.
    file : Path
        The safetensors file; in a hub cache, a symbolic link.
    offset, nbytes : int
        First byte, from the start of the file, and number of bytes. Offsets need not be aligned.
    shape : tuple of int
    dtype : str
        ``float16``, ``bfloat16`` or ``float32``. A tensor of another type keeps the file's own spelling of it
        (``F8_E4M3``); it has an address but cannot be read, and no weight of a ``Checkpoint`` is such a tensor.
    """

    name: str
    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str

    def rows(self, first: int, count: int) -> WeightView:
        """The bytes of some rows of the tensor (entries of its first axis); the whole tensor is itself."""
        row = self.nbytes // self.shape[0]
        return replace(self, offset=self.offset + first * row, nbytes=count * row, shape=(count, *self.shape[1:]))

    def numpy(self) -> np.ndarray:
        """Memory-mapped, read-only array of ``shape``; bfloat16 as ``ml_dtypes.bfloat16``."""
        count = math.prod(self.shape)
        return np.frombuffer(_map(self.file), numpy_dtype(self.dtype), count, self.offset).reshape(self.shape)

    def torch(self) -> torch.Tensor:
        """Memory-mapped tensor of ``shape``, never to be written to; copied only where ``offset`` is not aligned."""
        import torch

        count, item = math.prod(self.shape), numpy_dtype(self.dtype).itemsize
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
            if self.offset % item:
                data = bytearray(_map(self.file)[self.offset : self.offset + self.nbytes])
                return torch.frombuffer(data, dtype=getattr(torch, self.dtype)).reshape(self.shape)
            buffer = torch.frombuffer(
                _map(self.file), dtype=getattr(torch, self.dtype), count=count, offset=self.offset
            )
        return buffer.reshape(self.shape)


def numpy_dtype(dtype: str) -> np.dtype:
    """NumPy's type for one of ``ITEM_SIZES``."""
    if dtype not in ITEM_SIZES:
        raise ValueError(f"dtype: expected one of {', '.join(ITEM_SIZES)}, got {dtype!r}")
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def read_safetensors_index(directory: str | Path) -> dict[str, WeightView]:
    """Addresses of all tensors of a checkpoint directory, by their Hugging Face names in a model of text alone.

    Reads the headers of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` names.

    Raises
    ------
    UserError
        Weights are missing, or a file is truncated or damaged.
    """
    directory = Path(directory)
    if (directory / WEIGHTS_FILE).is_file():
        return _text_names(read_safetensors_file(directory / WEIGHTS_FILE))
    if (directory / INDEX_FILE).is_file():
        return _text_names(_read_shards(directory / INDEX_FILE))
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise UserError(
            f"{directory}: the weights are PyTorch pickles, expected safetensors",
            "convert them: AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(NEW_DIR)",
        )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    found = f" (found {', '.join(others[:3])})" if others else ""
    raise UserError(
        f"{directory}: no {WEIGHTS_FILE} and no {INDEX_FILE}{found}",
        "give a checkpoint in Hugging Face safetensors format, or use load_format 'dummy' to try the shape only",
    )


def _text_names(views: dict[str, WeightView]) -> dict[str, WeightView]:
    """Tensors of the language model of one that also takes images, as the language model alone would name them."""
    return {
        name.removeprefix("language_model.").replace("model.language_model.", "model.", 1): view
        for name, view in views.items()
    }


def read_safetensors_file(path: Path) -> dict[str, WeightView]:
    """Addresses of the tensors of one safetensors file."""
    header = read_header(path)
    try:
        entries = json.loads(header)
    except ValueError as error:
        raise _damaged(path, f"the header is not JSON ({error})") from None
    if not isinstance(entries, dict):
        raise _damaged(path, "the header is not a JSON object")
    base = 8 + len(header)
    views = {name: _view(path, name, entry, base) for name, entry in entries.items() if name != "__metadata__"}
    _check_layout(path, list(views.values()), base)
    return views


def read_header(path: Path) -> bytes:
    """The JSON header of a safetensors file, as stored."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            header = file.read(length) if length <= min(_MAX_HEADER_BYTES, size) else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the path and its permissions") from error
    if prefix == b"version ":
        raise UserError(
            f"{path}: a Git LFS pointer, not the file itself", "run 'git lfs pull' in the checkpoint's clone"
        )
    if size < 8:
        raise _damaged(path, f"truncated: expected at least 8 bytes, got {size}")
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise _damaged(path, f"not a safetensors file: it gives its header {length} bytes")
    if 8 + length > size:
        raise _damaged(path, f"truncated: the header ends at byte {8 + length}, the file has {size}")
    return header


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or a ``UserError`` that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the path and its permissions") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})", "restore the file from the original checkpoint") from None
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: expected a JSON object, got {type(value).__name__}",
            "restore the file from the original checkpoint",
        )
    return value


def _read_shards(index: Path) -> dict[str, WeightView]:
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise UserError(f"{index}: weight_map: expected an object of file names", "restore the file")
    shards: dict[str, dict[str, WeightView]] = {}
    damaged: list[UserError] = []
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard:
            raise UserError(f"{index}: expected the names of files beside it, got {shard!r}", "restore the file")
        try:
            shards[shard] = _read_shard(index, shard)
        except UserError as error:
            damaged.append(error)
    if damaged:
        raise UserError("; ".join(error.cause for error in damaged), damaged[0].remedy)
    absent: dict[str, list[str]] = {}
    for name, shard in names.items():
        if name not in shards[shard]:
            absent.setdefault(shard, []).append(name)
    if absent:
        lacks = "; ".join(f"{index.parent / shard}: lacks {listed(lost)}" for shard, lost in absent.items())
        raise UserError(
            f"{lacks}, which {INDEX_FILE} places there",
            "the index and the shards are of different checkpoints; download both again",
        )
    return {name: shards[shard][name] for name, shard in names.items()}


def _read_shard(index: Path, shard: str) -> dict[str, WeightView]:
    path = index.parent / shard
    if not path.is_file():
        raise UserError(f"{path}: missing, {index.name} names it", "download or copy this file again")
    return read_safetensors_file(path)


def _view(path: Path, name: str, entry: Any, base: int) -> WeightView:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        valid = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise _damaged(path, f"{name}: the header gives no valid dtype, shape and data_offsets")
    dtype = SAFETENSORS_DTYPES.get(dtype, dtype)
    expected = math.prod(shape) * ITEM_SIZES.get(dtype, 0)
    if dtype in ITEM_SIZES and end - begin != expected:
        raise _damaged(path, f"{name}: {dtype} {list(shape)} needs {expected} bytes, the header gives it {end - begin}")
    return WeightView(name, path, base + begin, end - begin, shape, dtype)


def _check_layout(path: Path, views: list[WeightView], base: int) -> None:
    end, before = base, ""
    for view in sorted(views, key=lambda view: (view.offset, view.nbytes)):
        if view.offset < end and view.nbytes:
            raise _damaged(path, f"{view.name} overlaps {before}")
        end, before = max(end, view.offset + view.nbytes), view.name
    size = path.stat().st_size
    if end > size:
        lost = listed(view.name for view in views if view.offset + view.nbytes > size)
        raise _damaged(path, f"truncated: expected {end} bytes, got {size}; {lost} cut off")


def _map(path: Path) -> mmap.mmap:
    stat = path.stat()
    key = (path.absolute(), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    mapping = _mappings.get(key)
    if mapping is None:
        with path.open("rb") as file:
            mapping = _mappings[key] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return mapping


def _damaged(path: Path, detail: str) -> UserError:
    return UserError(f"{path}: {detail}", "the file is damaged or incomplete; download or copy it again")
