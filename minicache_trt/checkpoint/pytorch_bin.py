"""PyTorch checkpoints (``pytorch_model.bin``, sharded or not) as a source.

Pickles are loaded as weights only: one that holds anything but tensors is refused, and no code of its own runs. Shards
are memory-mapped where their format allows it (PyTorch 1.6 and later); older ones are loaded one at a time.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from minicache_trt.checkpoint.binding import require_weights, stored_tensors
from minicache_trt.checkpoint.hf_config import parse_config
from minicache_trt.checkpoint.source import Source
from minicache_trt.checkpoint.tensor_file import StoredTensor
from minicache_trt.checkpoint.weights import ITEM_SIZES, numpy_dtype, read_json_object
from minicache_trt.errors import UserError

if TYPE_CHECKING:
    import torch

FILE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def has_pytorch_weights(directory: Path) -> bool:
    """Whether a directory has weights as transformers saved them before safetensors."""
    return (directory / FILE).is_file() or (directory / INDEX).is_file()


def open_pytorch(directory: Path, raw: Mapping[str, Any]) -> Source:
    """A directory with ``config.json`` (``raw``) and PyTorch weights.

    Raises
    ------
    UserError
        The model is not supported; later, when its weights are read: a shard or a weight is missing, damaged or unsafe.
    """
    config = parse_config(raw, path=str(directory / "config.json"))

    def tensors() -> list[StoredTensor]:
        needed = stored_tensors(config)
        shards = {path: _Shard(path) for path in _files(directory)}
        found = {name: shard for shard in shards.values() for name in shard.kinds}
        require_weights(needed, found, directory)
        return [shard.stored(name) for shard in shards.values() for name in shard.kinds if name in needed]

    return Source("PyTorch checkpoint", dict(raw), tensors)


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.is_file():
        return [directory / FILE]
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index}: weight_map: expected an object of file names", "restore the file")
    files = []
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise UserError(f"{index}: expected the names of files beside it, got {name!r}", "restore the file")
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: missing, {INDEX} names it", "download or copy this file again")
        files.append(directory / name)
    return files


class _Shard:
    """One file. Its tensors are loaded when they are read, unless they are mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        tensors, self._mapped = load_pickle(path)
        self.kinds = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}
        self._tensors = tensors if self._mapped else None
        self._left = 0

    def stored(self, name: str) -> StoredTensor:
        dtype, shape = self.kinds[name]
        if dtype not in ITEM_SIZES:
            raise UserError(
                f"{self._path}: {name}: expected dtype {', '.join(ITEM_SIZES)}, got {dtype}",
                "use the checkpoint's unquantized version",
            )
        self._left += 1
        return StoredTensor(name, dtype, shape, lambda: self._read(name, dtype))

    def _read(self, name: str, dtype: str) -> Iterable[NDArray[Any]]:
        if self._tensors is None:
            self._tensors, _ = load_pickle(self._path)
        tensor = self._tensors[name]
        self._left -= 1
        if not self._left:
            self._tensors = None
        yield as_array(tensor, dtype)


def as_array(tensor: torch.Tensor, dtype: str) -> NDArray[Any]:
    """A CPU tensor's numbers without a copy where it is contiguous; bfloat16 as ``ml_dtypes.bfloat16``."""
    import torch

    tensor = tensor.detach().contiguous()
    if dtype == "bfloat16":
        return tensor.view(torch.int16).numpy().view(numpy_dtype(dtype))
    return np.asarray(tensor.numpy())


def load_pickle(path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """The tensors in a file of ``torch.save``, and whether they are memory-mapped.

    Raises
    ------
    UserError
        The file is damaged, or holds something other than tensors by name.
    """
    import torch

    mapped = _is_zip(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if any(word in str(error) for word in ("GLOBAL", "Unsupported class", "Can only")):
            raise UserError(
                f"{path}: the pickle holds code or objects other than tensors and was not loaded",
                "use the model's safetensors files; if you trust it, load it yourself and save its state_dict() alone",
            ) from None
        raise _damaged(path, "the pickle cannot be read") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
    ):
        raise UserError(
            f"{path}: expected tensors by name, as save_pretrained writes them, got {type(loaded).__name__}",
            "save the model's state_dict() alone",
        )
    return loaded, mapped


def _is_zip(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the path and its permissions") from error
    if start.startswith(b"version "):
        raise UserError(f"{path}: a Git LFS pointer, not the file itself", "run 'git lfs pull' in the clone")
    return start.startswith(b"PK\x03\x04")


def _damaged(path: Path, detail: str) -> UserError:
    return UserError(f"{path}: not a file of torch.save, or damaged ({detail[:120]})", "download or copy it again")
