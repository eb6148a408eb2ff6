"""TensorRT-LLM checkpoints (``config.json`` and ``rank<i>.safetensors``, releases up to 1.2) as a source.

    rank p * tp + t    pipeline stage p (layers numbered from 0 in each), tensor-parallel part t
    split by rows      attention.qkv (each rank [q; k; v] of its own heads), mlp.fc (HF gate), mlp.gate (HF up), lm_head
    split by columns   attention.dense, mlp.proj
    experts            mlp.fc [experts, up over gate, in], mlp.proj [experts, out, in]: by expert, then as above
    Phi-3              mlp.fc is up over gate

Shards are joined while the weights are written: memory holds a few rows of one weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minicache_trt.checkpoint.binding import stored_tensors, weight_shapes
from minicache_trt.checkpoint.hf_config import parse_config
from minicache_trt.checkpoint.source import Source
from minicache_trt.checkpoint.tensor_file import StoredTensor, beside, stacked
from minicache_trt.checkpoint.trtllm_config import Ranks, read_trtllm_config
from minicache_trt.checkpoint.weights import ITEM_SIZES, WeightView, read_safetensors_file
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError

_MODULES = {
    "embed": "transformer.vocab_embedding",
    "input_norm": "input_layernorm",
    "attention.q": "attention.qkv",
    "attention.k": "attention.qkv",
    "attention.v": "attention.qkv",
    "attention.o": "attention.dense",
    "attention.q_norm": "attention.q_layernorm",
    "attention.k_norm": "attention.k_layernorm",
    "post_attention_norm": "post_layernorm",
    "mlp.gate": "mlp.fc",
    "mlp.up": "mlp.gate",
    "mlp.down": "mlp.proj",
    "moe.router": "mlp.router",
    "gate": "mlp.fc",
    "up": "mlp.fc",
    "down": "mlp.proj",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
"""Canonical module, within its layer or expert, to the checkpoint's."""

_BY_ROWS, _BY_COLUMNS = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up"), ("attention.o", "mlp.down")


def open_trtllm(directory: Path, raw: Mapping[str, Any]) -> Source:
    """A TensorRT-LLM checkpoint directory; ``raw``: its config.json.

    Raises
    ------
    UserError
        The model is not supported; later, when its weights are read: a rank's file or a weight is missing or damaged.
    """
    hf, ranks = read_trtllm_config(raw, str(directory / "config.json"))
    if not (directory / "rank0.safetensors").is_file():
        raise UserError(
            f"{directory}: a TensorRT-LLM config.json without rank0.safetensors",
            "give the checkpoint directory, which has rank0.safetensors beside config.json",
        )
    files = [directory / f"rank{rank}.safetensors" for rank in range(ranks.tp * ranks.pp)]
    last = read_safetensors_file(files[-1]) if files[-1].is_file() else {}
    if last and "lm_head.weight" not in last:
        hf["tie_word_embeddings"] = True
    config = parse_config(hf, path=str(directory / "config.json"))

    def tensors() -> list[StoredTensor]:
        return _Joiner(directory, raw, config, ranks, files).tensors()

    return Source("TensorRT-LLM checkpoint", hf, tensors)


class _Joiner:
    """Finds the pieces of every weight in the ranks' files."""

    def __init__(
        self, directory: Path, raw: Mapping[str, Any], config: ModelConfig, ranks: Ranks, files: Sequence[Path]
    ) -> None:
        absent = [path.name for path in files if not path.is_file()]
        if absent:
            raise UserError(
                f"{directory}: {', '.join(absent)} missing: mapping says tp_size {ranks.tp}, pp_size {ranks.pp}",
                "copy the files of all ranks into the directory",
            )
        self._views = [read_safetensors_file(path) for path in files]
        self._config, self._ranks, self._directory = config, ranks, directory
        self._shapes = weight_shapes(config)
        self._embedding_axis = (
            int(raw.get("embedding_sharding_dim") or 0) if raw.get("use_parallel_embedding") else None
        )
        self._stage_of = {
            layer: (stage, layer - layers.start)
            for stage, layers in enumerate(ranks.stage_layers(config.num_layers))
            for layer in layers
        }

    def tensors(self) -> list[StoredTensor]:
        """Every tensor of the Hugging Face checkpoint."""
        return [
            self._join(name, [self._pieces(part) for part in parts])
            for name, parts in stored_tensors(self._config).items()
        ]

    def _join(self, name: str, parts: list[tuple[int, list[WeightView]]]) -> StoredTensor:
        axis, views = parts[0]
        if axis == 1:
            return beside(name, views)
        return stacked(name, [view for _, part in parts for view in part])

    def _pieces(self, canonical: str) -> tuple[int, list[WeightView]]:
        """The axis along which a weight's pieces are joined, and the pieces, checked against the weight's shape."""
        module, _, leaf = canonical.rpartition(".")
        if module.startswith("layers."):
            _, layer, within = module.split(".", 2)
            axis, views = self._layer_pieces(int(layer), within, leaf)
        else:
            axis, views = self._outer_pieces(module, leaf)
        joined = list(views[0].shape)
        joined[axis] = sum(view.shape[axis] for view in views)
        if tuple(joined) != self._shapes[canonical] or len({view.dtype for view in views}) > 1:
            kinds = ", ".join(sorted({view.dtype for view in views}))
            raise UserError(
                f"{views[0].file}: {views[0].name}: {canonical} joins to {joined} of {kinds}, expected "
                f"{list(self._shapes[canonical])} of one type from config.json",
                "check that config.json and the rank files are of one checkpoint",
            )
        return axis, views

    def _outer_pieces(self, module: str, leaf: str) -> tuple[int, list[WeightView]]:
        first = 0 if module == "embed" else self._ranks.pp - 1
        name = f"{_MODULES[module]}.{leaf}"
        split = {"embed": self._embedding_axis, "lm_head": 0, "norm": None}[module]
        if split is None or self._ranks.tp == 1:
            views = [self._view(first, 0, name)]
        else:
            views = [self._view(first, part, name) for part in range(self._ranks.tp)]
        if module != "norm" and split in (None, 0):
            views = _without_padding(views, self._config.vocab_size)
        return split or 0, views

    def _layer_pieces(self, layer: int, within: str, leaf: str) -> tuple[int, list[WeightView]]:
        stage, local = self._stage_of[layer]
        prefix = f"transformer.layers.{local}."
        if within.startswith("moe.experts."):
            _, _, expert, module = within.split(".")
            return self._expert_pieces(stage, prefix, int(expert), module)
        name = f"{prefix}{_MODULES[within]}.{leaf}"
        if self._config.family == "phi3" and within in ("mlp.gate", "mlp.up"):
            views = [self._view(stage, part, f"{prefix}mlp.fc.{leaf}") for part in range(self._ranks.tp)]
            return 0, [_half(view, within == "mlp.gate") for view in views]
        if within in ("attention.q", "attention.k", "attention.v"):
            return 0, self._heads(stage, name, within[-1])
        if within in _BY_ROWS:
            return 0, [self._view(stage, part, name) for part in range(self._ranks.tp)]
        if within in _BY_COLUMNS and leaf == "weight":
            return 1, [self._view(stage, part, name) for part in range(self._ranks.tp)]
        return 0, [self._view(stage, 0, name)]

    def _heads(self, stage: int, name: str, which: str) -> list[WeightView]:
        """Rows of q, k or v in every rank; a KV head that several ranks hold is taken from the first of them."""
        config, tp = self._config, self._ranks.tp
        kv = max(1, config.num_kv_heads // tp) * config.head_dim
        query = config.num_heads // tp * config.head_dim
        first, count = {"q": (0, query), "k": (query, kv), "v": (query + kv, kv)}[which]
        step = max(1, tp // config.num_kv_heads) if which != "q" else 1
        views = []
        for part in range(0, tp, step):
            view = self._view(stage, part, name)
            if view.shape[0] != query + 2 * kv:
                raise UserError(
                    f"{view.file}: {view.name}: expected {query + 2 * kv} rows ({tp} ranks), got {view.shape[0]}",
                    "check num_attention_heads, num_key_value_heads and mapping in config.json",
                )
            views.append(view.rows(first, count))
        return views

    def _expert_pieces(self, stage: int, prefix: str, expert: int, module: str) -> tuple[int, list[WeightView]]:
        ranks = self._ranks
        group, local = divmod(expert, max(1, self._config.num_experts // ranks.moe_ep))
        views = []
        for part in range(ranks.moe_tp):
            name = f"{prefix}{_MODULES[module]}.weight"
            view = self._view(stage, part * ranks.moe_ep + group, name)
            if len(view.shape) != 3 or view.shape[0] * ranks.moe_ep != self._config.num_experts:
                raise UserError(
                    f"{view.file}: {view.name}: expected {self._config.num_experts // ranks.moe_ep} experts, "
                    f"got {list(view.shape)}",
                    "check moe and mapping in config.json",
                )
            one = view.rows(local, 1)
            one = replace(one, shape=one.shape[1:])
            views.append(one if module == "down" else _half(one, module == "gate"))
        return int(module == "down"), views

    def _view(self, stage: int, part: int, name: str) -> WeightView:
        rank = stage * self._ranks.tp + part
        view = self._views[rank].get(name)
        if view is None:
            others = [other for other in self._views[rank] if other.rpartition(".")[2] == "weight"]
            raise UserError(
                f"{self._directory / f'rank{rank}.safetensors'}: {name} is missing (it has {len(others)} weights)",
                "check that config.json belongs to these files and that they are complete",
            )
        if view.dtype not in ITEM_SIZES:
            raise UserError(
                f"{view.file}: {name}: expected dtype {', '.join(ITEM_SIZES)}, got {view.dtype}",
                "quantized TensorRT-LLM checkpoints are not supported; convert without quantization",
            )
        return view


def _half(view: WeightView, second: bool) -> WeightView:
    """The upper or the lower half of a matrix's rows."""
    count = view.shape[0] // 2
    return view.rows(count if second else 0, count)


def _without_padding(views: list[WeightView], rows: int) -> list[WeightView]:
    """The first ``rows`` rows: vocabularies are padded to a multiple of the ranks."""
    kept = []
    for view in views:
        count = min(rows, view.shape[0])
        if count:
            kept.append(view.rows(0, count))
        rows -= count
    return kept
