"""One rank's share of a model, of its weights and of its plan.

Attention is cut by heads, the MLP by columns (Megatron-LM, arXiv 1909.08053): projections into them hold some rows of
their weights, projections out of them some columns, so that a layer needs two sums. Streams store every KV head on its
own, so a rank's compressed tier is the part of the whole one that holds its heads, code by code. Where there are more
ranks than KV heads, neighbouring ranks hold a copy each of the head that their queries attend with, as in vLLM and
TensorRT-LLM.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.checkpoint.weights import WeightView
from minicache_trt.compression.matrices import stream_matrices
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError

_INTO = re.compile(r".*\.(attention\.[qkv]|mlp\.(gate|up)|experts\.\d+\.(gate|up))\.(weight|bias)")
_KV = re.compile(r".*\.attention\.[kv]\.(weight|bias)")
_OUT_OF = re.compile(r".*\.(attention\.o|mlp\.down|experts\.\d+\.down)\.weight")
_HEAD_AXES = {"head_map": 1, "align": 1, "encode": 0, "decode": 0, "mean": 0, "sigma": 0}


@dataclass(frozen=True)
class Shard:
    """Rank ``rank`` of ``size``; ``kv_copies`` neighbouring ranks hold the same KV heads."""

    rank: int = 0
    size: int = 1
    kv_copies: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank: expected 0 to {self.size - 1}, got {self.rank}")
        if self.kv_copies < 1 or self.size % self.kv_copies:
            raise ValueError(f"kv_copies: expected a divisor of {self.size}, got {self.kv_copies}")

    @classmethod
    def of(cls, model: ModelConfig, rank: int, size: int) -> Shard:
        """A rank of a whole model, which `check_shardable` accepts."""
        return cls(rank, size, max(1, size // model.num_kv_heads))

    def part(self, extent: int) -> slice:
        """This rank's share of ``extent`` things, which the number of ranks divides."""
        return self._share(extent, 1)

    def kv_part(self, extent: int) -> slice:
        """The same of KV heads, or of rows that belong to them, of which ranks may hold copies."""
        return self._share(extent, self.kv_copies)

    def _share(self, extent: int, copies: int) -> slice:
        count = extent * copies // self.size
        start = self.rank // copies * count
        return slice(start, start + count)


WHOLE = Shard()


def check_shardable(model: ModelConfig, plan: CompressionPlan, size: int) -> None:
    """Refuse what cannot be cut into ``size`` equal ranks.

    Raises
    ------
    UserError
        Naming the size that does not divide, or the stream that spans heads of several ranks.
    """
    if size < 1:
        raise UserError(f"tp_size: expected a positive number, got {size}")
    if not _divides(model, size):
        of = ", ".join(f"{name} {getattr(model, name)}" for name in ("num_kv_heads", "num_heads", "intermediate_size"))
        possible = [n for n in range(1, model.num_heads + 1) if _divides(model, n)]
        raise UserError(
            f"tp_size: {size} ranks cannot share the model's heads and columns evenly ({of})",
            f"possible for this model: {', '.join(map(str, possible))}",
        )
    for index, stream in enumerate(plan.streams if size > 1 else ()):
        if stream.norm == "token" and (stream.merge == "slerp" or stream.retained):
            raise UserError(
                f"plan: streams[{index}].norm: 'token' spans all heads, which lie on {size} ranks",
                "use norm 'head' (--norm head)",
            )
        if stream.match_heads:
            heads = stream_matrices(plan.matrices, index)["head_map"]
            each = max(1, model.num_kv_heads // size)
            if (heads // each != np.arange(model.num_kv_heads) // each).any():
                raise UserError(
                    f"plan: tensor streams.{index}.head_map matches heads of different ranks",
                    f"calibrate the plan with heads matched in groups of {each}, or use fewer ranks",
                )


def _divides(model: ModelConfig, size: int) -> bool:
    few, many = sorted((model.num_kv_heads, size))
    return not (many % few or model.num_heads % size or model.intermediate_size % size)


def shard_model(model: ModelConfig, shard: Shard) -> ModelConfig:
    """The shape one rank computes; vocabulary and hidden size are whole."""
    return replace(
        model,
        num_heads=model.num_heads // shard.size,
        num_kv_heads=model.num_kv_heads * shard.kv_copies // shard.size,
        intermediate_size=model.intermediate_size // shard.size,
    )


def shard_plan(plan: CompressionPlan, model: ModelConfig, shard: Shard) -> CompressionPlan:
    """The plan with the constants of one rank's heads; ``model`` is the whole one."""
    if shard.size == 1:
        return plan
    own = shard.kv_part(model.num_kv_heads)
    matrices: dict[str, NDArray[np.generic]] = {}
    for name, value in plan.matrices.items():
        kind = name.rsplit(".", 1)[1]
        part = value[:, own] if _HEAD_AXES[kind] else value[own]
        matrices[name] = (part - own.start).astype(part.dtype) if kind == "head_map" else part
    return replace(plan, matrices=matrices)


def shard_view(name: str, view: WeightView, shard: Shard) -> Tensor:
    """One rank's share of a mapped weight; rows stay in the file, columns are cut out when they are moved."""
    rows = rows_of(name, view.shape[0], shard)
    if rows is not None:
        return view.rows(rows.start, rows.stop - rows.start).torch()
    return shard_tensor(name, view.torch(), shard)


def shard_tensor(name: str, weight: Tensor, shard: Shard) -> Tensor:
    """One rank's share of a weight by canonical name, a view of it."""
    rows = rows_of(name, len(weight), shard)
    if rows is not None:
        return weight[rows]
    columns = columns_of(name, weight.shape[-1], shard)
    return weight if columns is None else weight[:, columns]


def rows_of(name: str, rows: int, shard: Shard) -> slice | None:
    """Rows of a weight that a rank holds; None for weights that are not cut along them."""
    if name in ("lm_head.weight", "lm_head.bias"):
        return shard.part(rows) if shard.size > 1 and splits_vocabulary(rows, shard) else None
    if shard.size == 1 or not _INTO.fullmatch(name):
        return None
    return shard.kv_part(rows) if _KV.fullmatch(name) else shard.part(rows)


def columns_of(name: str, columns: int, shard: Shard) -> slice | None:
    """Columns of a weight that a rank holds; None for weights that are not cut along them."""
    return shard.part(columns) if shard.size > 1 and _OUT_OF.fullmatch(name) else None


def add_output_rows(weights: dict[str, Tensor], shard: Shard) -> None:
    """Give a rank its rows of an output layer that is the embedding itself."""
    embed = weights["embed.weight"]
    if shard.size > 1 and "lm_head.weight" not in weights and splits_vocabulary(len(embed), shard):
        weights["lm_head.weight"] = embed[shard.part(len(embed))]


def splits_vocabulary(vocab_size: int, shard: Shard) -> bool:
    """Whether ranks compute a part of the logits each, or all of them."""
    return vocab_size % shard.size == 0


def sums_over_ranks(name: str) -> bool:
    """Whether a linear layer (without ``.weight``) takes what lies on several ranks. Experts are summed up first."""
    return name.endswith((".attention.o", ".mlp.down"))
