"""LoRA adapters (peft's format) merged into the weights of a source: W + scale * B A, one weight at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicache_trt.checkpoint.json_fields import JsonFields
from minicache_trt.checkpoint.source import Source
from minicache_trt.checkpoint.tensor_file import StoredTensor
from minicache_trt.checkpoint.weights import ITEM_SIZES, numpy_dtype, read_json_object, read_safetensors_file
from minicache_trt.errors import UserError

CONFIG, FILE, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
"""An adapter's two matrices: of a linear layer, and of an embedding."""
_STEP = 1024
"""Rows merged at a time."""

_REFUSED = {
    "use_dora": "DoRA also changes the magnitude of each row",
    "target_parameters": "adapters of fused expert parameters",
    "layer_replication": "layers are repeated",
    "megatron_config": "parallel layers",
    "trainable_token_indices": "embeddings of single tokens",
}


def with_lora(source: Source, directory: Path) -> Source:
    """The source with an adapter merged into its weights.

    Raises
    ------
    UserError
        The adapter is damaged, of another kind, or does not fit the model.
    """
    fields = JsonFields(_read_config(directory), str(directory / CONFIG))
    if source.int4 is not None:
        raise UserError(
            f"{directory}: an adapter cannot be merged into the 4-bit weights of the {source.format}",
            "give the unquantized checkpoint; build --weights int4 rounds the merged weights",
        )
    return replace(source, tensors=lambda: _merge(source.tensors(), fields, directory))


def _read_config(directory: Path) -> Mapping[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"--lora-dir: {directory}: no {CONFIG}", "give the directory peft's save_pretrained wrote")
    raw = read_json_object(path)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type: expected 'LORA', got {raw.get('peft_type')!r}", "use a LoRA adapter")
    for key, meaning in _REFUSED.items():
        if raw.get(key):
            raise UserError(f"{path}: {key} is not supported ({meaning})", "merge it with peft's merge_and_unload")
    return raw


def _merge(tensors: Sequence[StoredTensor], fields: JsonFields, directory: Path) -> list[StoredTensor]:
    adapter = _read_weights(directory)
    names = {tensor.name for tensor in tensors}
    used: set[str] = set()
    result = []
    for tensor in tensors:
        merged = tensor
        if tensor.name in adapter:
            used.add(tensor.name)
            merged = _replaced(tensor, adapter[tensor.name], directory)
        for pair in _PAIRS if tensor.name.endswith(".weight") else ():
            module = tensor.name.removesuffix(".weight")
            a, b = (f"{module}.{kind}" for kind in pair)
            if a not in adapter and b not in adapter:
                continue
            if a not in adapter or b not in adapter:
                alone = a if a in adapter else b
                raise UserError(
                    f"{directory}: {alone} is alone of its pair", "the adapter is incomplete; copy it again"
                )
            used |= {a, b}
            left, right = adapter[b].astype(np.float32), adapter[a].astype(np.float32)
            if pair is _PAIRS[1]:  # the columns of an embedding's A are tokens
                left, right = right.T, left.T
            merged = _merged(merged, module, left, right, fields, directory)
        result.append(merged)
    unused = [name for name in adapter if name not in used]
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        known = "" if any(_module_of(name) in names for name in unused) else ", which the model does not have"
        raise UserError(
            f"{directory}: nothing to merge {', '.join(unused[:3])}{more} into{known}",
            "the adapter is for another model, or of a kind that is not supported; peft's merge_and_unload may do it",
        )
    return result


def _module_of(name: str) -> str:
    return re.sub(r"\.lora_(embedding_)?[AB](\.weight)?$", ".weight", name)


def _read_weights(directory: Path) -> dict[str, NDArray[Any]]:
    """The adapter's tensors by the names of the model's modules."""
    found: dict[str, NDArray[Any]] = {}
    if (directory / FILE).is_file():
        for name, view in read_safetensors_file(directory / FILE).items():
            if view.dtype not in ITEM_SIZES:
                raise UserError(f"{view.file}: {name}: dtype {view.dtype}", f"expected {', '.join(ITEM_SIZES)}")
            found[name] = view.numpy()
    elif (directory / PICKLE).is_file():
        from minicache_trt.checkpoint.pytorch_bin import as_array, load_pickle

        tensors, _ = load_pickle(directory / PICKLE)
        found = {name: as_array(t, str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    else:
        raise UserError(f"{directory}: neither {FILE} nor {PICKLE}", "copy the adapter's weights beside its config")
    return {name.removeprefix(_PREFIX).replace(".base_layer.", "."): array for name, array in found.items()}


def _merged(
    tensor: StoredTensor,
    module: str,
    left: NDArray[np.float32],
    right: NDArray[np.float32],
    fields: JsonFields,
    directory: Path,
) -> StoredTensor:
    if left.ndim != 2 or left.shape[1] != right.shape[0] or (left.shape[0], right.shape[1]) != tensor.shape:
        raise UserError(
            f"{directory}: the adapter of {module} is {list(left.shape)} x {list(right.shape)}, its weight "
            f"{list(tensor.shape)}",
            "the adapter is for another model",
        )
    scale = np.float32(_scale(fields, module, right.shape[0]))

    def read() -> Iterable[NDArray[Any]]:
        first = 0
        for part in tensor.read():
            rows = np.asarray(part).reshape(-1, tensor.shape[1])
            for begin in range(0, len(rows), _STEP):
                chunk = rows[begin : begin + _STEP].astype(np.float32)
                chunk += scale * (left[first : first + len(chunk)] @ right)
                first += len(chunk)
                yield chunk.astype(numpy_dtype(tensor.dtype))

    return replace(tensor, read=read)


def _replaced(tensor: StoredTensor, array: NDArray[Any], directory: Path) -> StoredTensor:
    """A tensor that the adapter brings whole (``modules_to_save``, biases)."""
    if array.shape != tensor.shape:
        raise UserError(
            f"{directory}: {tensor.name}: expected shape {list(tensor.shape)}, got {list(array.shape)}",
            "an adapter that grows the vocabulary is not supported; merge it with peft's merge_and_unload",
        )
    return replace(tensor, read=lambda: iter([array.astype(numpy_dtype(tensor.dtype))]))


def _scale(fields: JsonFields, module: str, rank: int) -> float:
    alpha = _pattern(fields, "alpha_pattern", module, fields.get("lora_alpha", float))
    if fields.values.get("use_rslora"):
        return alpha / math.sqrt(rank)
    return alpha / rank


def _pattern(fields: JsonFields, key: str, module: str, default: float) -> float:
    """The value of the first pattern that matches the module's name, or the end of it."""
    for pattern, value in (fields.get(key, dict, optional=True) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return default
