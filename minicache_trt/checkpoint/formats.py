"""Which format a local checkpoint has.

Hugging Face safetensors are used where they lie; everything else is a `Source`, to be written as such first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicache_trt.checkpoint.binding import require_weights, stored_tensors
from minicache_trt.checkpoint.hf_config import parse_config
from minicache_trt.checkpoint.int4 import int4_method, open_int4
from minicache_trt.checkpoint.pytorch_bin import has_pytorch_weights, open_pytorch
from minicache_trt.checkpoint.source import INT4_MARK, Source
from minicache_trt.checkpoint.tensor_file import StoredTensor, from_view
from minicache_trt.checkpoint.trtllm import open_trtllm
from minicache_trt.checkpoint.trtllm_config import is_trtllm
from minicache_trt.checkpoint.weights import ITEM_SIZES, read_json_object, read_safetensors_index
from minicache_trt.errors import UserError


def open_source(path: Path) -> Source | None:
    """The checkpoint at a path, where it is in another format than Hugging Face safetensors.

    Parameters
    ----------
    path : Path
        A directory, or a GGUF file.

    Raises
    ------
    UserError
        It is damaged or its model is not supported.
    """
    if path.suffix == ".gguf":
        return _open_gguf(path)
    config = path / "config.json"
    if not config.is_file():
        return _open_gguf_in(path)
    raw = read_json_object(config)
    if is_trtllm(raw):
        return open_trtllm(path, raw)
    if int4_method(raw) is not None:
        return open_int4(path, raw)
    if has_pytorch_weights(path) and not any(path.glob("model*.safetensors*")):
        return open_pytorch(path, raw)
    return None


def hugging_face(directory: Path, raw: Mapping[str, Any]) -> Source:
    """A Hugging Face safetensors checkpoint as a source, for what has to change its weights."""
    config = parse_config(raw, path=str(directory / "config.json"))
    if raw.get(INT4_MARK):
        raise UserError(f"{directory}: its weights are 4-bit codes", "give the unquantized checkpoint")

    def tensors() -> list[StoredTensor]:
        views = read_safetensors_index(directory)
        needed = stored_tensors(config)
        require_weights(needed, views, directory)
        for name in needed:
            if views[name].dtype not in ITEM_SIZES:
                raise UserError(
                    f"{views[name].file}: {name}: expected dtype {', '.join(ITEM_SIZES)}, got {views[name].dtype}",
                    "use the checkpoint's unquantized version",
                )
        return [from_view(views[name], name) for name in needed]

    return Source("Hugging Face checkpoint", dict(raw), tensors)


def _open_gguf(path: Path) -> Source:
    from minicache_trt.checkpoint.gguf_file import open_gguf

    return open_gguf(path)


def _open_gguf_in(directory: Path) -> Source | None:
    files = sorted(directory.glob("*.gguf"))
    first = [path for path in files if "-of-" not in path.name or "-00001-of-" in path.name]
    if not files:
        return None
    if len(first) != 1:
        raise UserError(
            f"{directory}: {len(files)} GGUF files ({', '.join(path.name for path in files[:3])})",
            f"give one of them: {files[0]}",
        )
    return _open_gguf(first[0])
