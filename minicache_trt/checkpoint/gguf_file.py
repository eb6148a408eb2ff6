"""GGUF files as a source: numbers are dequantized by the ``gguf`` package, a few rows at a time.

16-bit and 32-bit tensors keep their type; quantized ones become float16. llama.cpp stores the rows of each query and
key head of Llama models with the two halves RoPE pairs interleaved; here they are put back in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicache_trt.checkpoint.binding import require_weights, stored_shape, stored_tensors, weight_shapes
from minicache_trt.checkpoint.gguf_config import Factors, read_gguf_config
from minicache_trt.checkpoint.hf_config import parse_config
from minicache_trt.checkpoint.source import Source
from minicache_trt.checkpoint.tensor_file import StoredTensor
from minicache_trt.checkpoint.weights import numpy_dtype
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError

_MODULES = {
    "embed": "token_embd",
    "input_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "post_attention_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "moe.router": "ffn_gate_inp",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}
_FUSED = {f"attention.{part}": "attn_qkv" for part in "qkv"} | {"mlp.gate": "ffn_up"}
"""Where modules are stacked as Phi-3's are in the Hugging Face checkpoint too."""

_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CHUNK = 1 << 22
"""Numbers dequantized at a time."""


def open_gguf(path: Path) -> Source:
    """A GGUF file, the first of its parts where it is split.

    Raises
    ------
    UserError
        The gguf package is missing, the file is damaged, or its model is not supported.
    """
    parts = [_Part(name) for name in _part_names(path)]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in tensors.items()}

    def divisors(name: str) -> NDArray[np.float32] | None:
        return None if name not in tensors else np.asarray(tensors[name].data, np.float32).reshape(-1)

    config = read_gguf_config(parts[0].values, shapes, Factors(divisors), str(path))
    embedding = tensors["token_embd.weight"].tensor_type.name
    config["dtype"] = _PLAIN.get(embedding, "float16")
    model = parse_config(config, path=str(path))
    return Source(
        "GGUF file",
        config,
        lambda: _stored(model, tensors, shapes, path, parts[0].values["general.architecture"]),
        finish=lambda directory: _save_tokenizer(path, parts[0].values, directory),
    )


def _part_names(path: Path) -> list[Path]:
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    count = int(match[3])
    names = [path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    absent = [name.name for name in names if not name.is_file()]
    if absent:
        raise UserError(f"{path.parent}: {', '.join(absent)} missing", "copy all parts of the GGUF file")
    return names


class _Part:
    """One file's metadata and tensors, memory-mapped."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise UserError(f"{path}: reading GGUF files needs the gguf package", "pip install gguf") from None
        try:
            reader = GGUFReader(path)
            self.values = {
                name: field.contents()
                for name, field in reader.fields.items()
                if not name.startswith("tokenizer.ggml.") or name.endswith("_token_id")
            }
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})", "check the path") from error
        except Exception as error:  # the reader raises whatever its parsing stumbles over
            raise UserError(
                f"{path}: not a GGUF file, or damaged ({str(error).splitlines()[0][:100] if str(error) else error!r})",
                "download or copy it again",
            ) from None
        size = path.stat().st_size
        for tensor in reader.tensors:
            if tensor.data_offset + tensor.n_bytes > size:
                raise UserError(f"{path}: truncated: {tensor.name} ends beyond the file", "download it again")
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}


def _stored(
    config: ModelConfig,
    tensors: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    path: Path,
    architecture: str,
) -> list[StoredTensor]:
    expected = weight_shapes(config)
    places = {hf: _places(parts, config, tensors) for hf, parts in stored_tensors(config).items()}
    require_weights([name for name, _ in places.values()], tensors, path)
    result = []
    for hf, parts in stored_tensors(config).items():
        name, expert = places[hf]
        shape = shapes[name] if expert is None else shapes[name][1:]
        if shape != stored_shape(expected, parts):
            raise UserError(
                f"{path}: {name}: expected shape {list(stored_shape(expected, parts))}, got {list(shape)}",
                "the file's metadata and weights do not belong together; download it again",
            )
        order = None
        module = parts[0].rpartition(".")[0]
        if architecture in ("llama", "mistral") and module.endswith(("attention.q", "attention.k")):
            heads = config.num_heads if module.endswith("q") else config.num_kv_heads
            order = _unpermuted(heads, config.head_dim)
        result.append(_tensor(hf, tensors[name], shape, expert, order, path))
    return result


def _places(parts: Sequence[str], config: ModelConfig, tensors: Mapping[str, Any]) -> tuple[str, int | None]:
    """Name of the GGUF tensor that holds a Hugging Face tensor, and which expert of it."""
    module, _, leaf = parts[0].rpartition(".")
    if not module.startswith("layers."):
        return f"{_MODULES[module]}.{leaf}", None
    _, layer, within = module.split(".", 2)
    if not within.startswith("moe.experts."):
        modules = _MODULES | (_FUSED if config.family == "phi3" else {})
        return f"blk.{layer}.{modules[within]}.{leaf}", None
    _, _, expert, name = within.split(".")
    alone = f"blk.{layer}.{_MODULES[name]}.{expert}.{leaf}"
    return (alone, None) if alone in tensors else (f"blk.{layer}.{_MODULES[name]}_exps.{leaf}", int(expert))


def _unpermuted(heads: int, head_dim: int) -> NDArray[np.intp]:
    """Rows in Hugging Face's order: of each head, the even ones first."""
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _tensor(
    name: str, tensor: Any, shape: tuple[int, ...], expert: int | None, order: NDArray[np.intp] | None, path: Path
) -> StoredTensor:
    kind = tensor.tensor_type.name
    dtype = _PLAIN.get(kind, "float16")
    if kind not in _PLAIN:
        _check_type(tensor, path)

    def read() -> Iterable[NDArray[Any]]:
        data = tensor.data if expert is None else tensor.data[expert]
        rows = data.reshape(shape[0], -1) if len(shape) > 1 else data.reshape(1, -1)
        if order is not None and len(shape) == 1:
            yield _numbers(rows, kind, dtype).reshape(-1)[order]
            return
        columns = shape[-1]
        step = max(1, _CHUNK // columns)
        for begin in range(0, len(rows), step):
            chunk = rows[begin : begin + step] if order is None else rows[order[begin : begin + step]]
            yield _numbers(chunk, kind, dtype)

    return StoredTensor(name, dtype, shape, read)


def _numbers(rows: NDArray[Any], kind: str, dtype: str) -> NDArray[Any]:
    if kind == "BF16":
        return np.ascontiguousarray(rows).view(numpy_dtype(dtype))
    if kind in _PLAIN:
        return np.asarray(rows)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(np.ascontiguousarray(rows), GGMLQuantizationType[kind]).astype(np.float16)


def _check_type(tensor: Any, path: Path) -> None:
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    _, size = GGML_QUANT_SIZES[tensor.tensor_type]
    try:
        dequantize(np.zeros((1, size), np.uint8), tensor.tensor_type)
    except NotImplementedError:
        raise UserError(
            f"{path}: {tensor.name}: type {tensor.tensor_type.name} cannot be dequantized",
            "use a file in another type, such as Q8_0 or Q4_K_M",
        ) from None


def _save_tokenizer(path: Path, values: Mapping[str, Any], directory: Path) -> list[str]:
    """Write the tokenizer in the file as transformers reads it; a note where it cannot."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        template = values.get("tokenizer.chat_template")
        if template and not tokenizer.chat_template:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(directory)
    except Exception as error:  # transformers raises whatever its conversion stumbles over
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        return [
            f"the tokenizer in {path.name} could not be converted ({reason}): give --tokenizer DIR, "
            "a directory with tokenizer.json, to use text"
        ]
    return []
