"""Plans behind the figures of `paper_figures.py`: variants of MiniCache's merging, and what competes with it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from minicache_trt.calibration.klt import joint_transform
from minicache_trt.calibration.matching import match_heads, procrustes
from minicache_trt.calibration.model import CalibrationModel
from minicache_trt.calibration.rotary import unrotate
from minicache_trt.compression.methods import MethodOptions, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import PARTS, Stream
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.model.masked_attention import masked_attention, visible_keys

STATES = ("key", "key_pre", "value")
PIECE = 512
"""Tokens of the pieces a text is read in."""

States = dict[str, torch.Tensor]
"""``key`` (after RoPE), ``key_pre`` (before it) and ``value``: ``[num_layers, tokens, num_kv_heads, head_dim]``."""


@dataclass(frozen=True)
class Variant:
    """One point of a figure: the line it is on, where on it, and the plan."""

    series: str
    x: str
    plan: CompressionPlan

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for plans that are the same."""
        sums = tuple((name, float(np.abs(value).sum())) for name, value in sorted(self.plan.matrices.items()))
        return (self.plan.streams, sums)


@torch.inference_mode()
def states_of(checkpoint: Path, config: ModelConfig, text: str, tokens: int) -> States:
    """Keys and values of the first ``tokens`` tokens of a text, a multiple of `PIECE`, read piece by piece."""
    model, tokenizer = CalibrationModel(checkpoint, config), AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(text.replace("\n\0", "\n"), return_tensors="pt").input_ids[0, : tokens // PIECE * PIECE]
    visible = visible_keys(0, PIECE, config)
    seen: dict[str, list[list[torch.Tensor]]] = {part: [[] for _ in range(config.num_layers)] for part in STATES}

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        for part, x in zip(STATES, (key, unrotate(config.at_layer(layer), key), value), strict=True):
            seen[part][layer].append(x[0].transpose(0, 1))
        return masked_attention(query, key, value, visible[layer], config.attention_softcap)

    for piece in ids.split(PIECE):
        hidden = model.embed(piece[None])
        for layer in range(config.num_layers):
            hidden = model.layer(layer, hidden, 0, attend)
    return {part: torch.stack([torch.cat(pieces) for pieces in layers]) for part, layers in seen.items()}


def merged_layers(config: ModelConfig, start: int, group: int = 2) -> list[tuple[int, ...]]:
    """Groups of layers: single ones before ``start``, then ``group`` at a time."""
    singles = [(layer,) for layer in range(start)]
    return singles + [
        tuple(range(layer, min(layer + group, config.num_layers))) for layer in range(start, config.num_layers, group)
    ]


def grouped(
    config: ModelConfig, groups: list[tuple[int, ...]], merged: Callable[[str, tuple[int, ...]], Stream], name: str
) -> CompressionPlan:
    """A plan that keeps single layers in 16 bits and stores the others as ``merged`` says."""
    plain = (Segment(config.head_dim, "model"),)
    streams = tuple(
        Stream(part, layers, plain) if len(layers) == 1 else merged(part, layers)
        for layers, part in itertools.product(groups, PARTS)
    )
    return CompressionPlan(name, streams)


def changed(plan: CompressionPlan, **fields: Any) -> CompressionPlan:
    """The plan with fields of its merged streams replaced."""
    streams = tuple(dataclasses.replace(s, **fields) if len(s.layers) > 1 else s for s in plan.streams)
    return dataclasses.replace(plan, streams=streams)


def minicache(config: ModelConfig, **options: Any) -> CompressionPlan:
    return make_plan(config, "minicache", MethodOptions(**options))


def layers_merged(config: ModelConfig, states: States) -> list[Variant]:
    """Figure 1b: from the last pair of layers to all of them."""
    starts = sorted({config.num_layers - 2, *range(0, config.num_layers - 1, max(2, config.num_layers // 8))})
    return [
        Variant(name, f"{config.num_layers - start}", make_plan(config, name, MethodOptions(merge_start=start)))
        for name in ("minicache", "mean")
        for start in reversed(starts)
    ]


def merged_pairs(config: ModelConfig, firsts: Collection[int]) -> CompressionPlan:
    """MiniCache for the pairs that begin with ``firsts``; the other layers as they are."""
    whole, streams = minicache(config, merge_start=0), []
    for stream in whole.streams:
        if len(stream.layers) == 1 or stream.layers[0] in firsts:
            streams.append(stream)
        else:
            streams += [Stream(stream.part, (layer,), stream.segments) for layer in stream.layers]
    return dataclasses.replace(whole, streams=tuple(streams))


def single_pairs(config: ModelConfig, states: States) -> list[Variant]:
    """One pair of layers merged, all others as they are: which pairs bear it."""
    firsts = range(0, config.num_layers - 1, 2)
    return [Variant("one pair", f"{first}+{first + 1}", merged_pairs(config, {first})) for first in firsts]


def gamma(config: ModelConfig, states: States) -> list[Variant]:
    """Table 2: tokens retained exactly."""
    return [Variant("minicache", f"{g:g}", minicache(config, gamma=g)) for g in (0.0, 0.05, 0.25, 0.5)]


def interpolation(config: ModelConfig, states: States) -> list[Variant]:
    """The weight t of the later layer, and one t for every stream from the magnitudes of its two layers."""
    fixed = [Variant("same t everywhere", f"{t:g}", minicache(config, t=t)) for t in (0.0, 0.5, 0.6, 1.0)]
    base = minicache(config)

    def relative(stream: Stream, power: int) -> Stream:
        if len(stream.layers) == 1:
            return stream
        sizes = states[stream.part][list(stream.layers)].norm(dim=-1).mean((1, 2)) ** power
        return dataclasses.replace(stream, t=float(sizes[1] / sizes.sum()))

    dynamic = [
        Variant(
            "t of each stream",
            label,
            dataclasses.replace(base, streams=tuple(relative(s, power) for s in base.streams)),
        )
        for label, power in (("by norm", 1), ("by inverse norm", -1))
    ]
    return fixed + dynamic


def retention(config: ModelConfig, states: States) -> list[Variant]:
    """Which tokens are retained; the threshold rules may keep up to 16 of a block."""
    base = minicache(config)
    few = round(0.05 * BLOCK_SIZE)
    rules = [("none", base, {"retained": 0})]
    rules += [(f"topk {few}", base, {}), ("topk 16", base, {"retained": 16})]
    for rule, g in (("threshold", 0.5), ("paper_literal", 0.05), ("paper_literal", 0.5)):
        rules.append((f"{rule} {g:g}", base, {"retained": 16, "retention": rule, "gamma": g}))
    return [Variant("retention", name, changed(plan, **fields)) for name, plan, fields in rules]


def norm(config: ModelConfig, states: States) -> list[Variant]:
    """Magnitude and direction per token and head, or per token as in the paper."""
    return [
        Variant(f"gamma {g:g}", name, minicache(config, norm=name, gamma=g))
        for g in (0.0, 0.05)
        for name in ("head", "token")
    ]


def group_size(config: ModelConfig, states: States) -> list[Variant]:
    """More than two layers in one direction: the spherical mean, and the joint KLT of as many bytes."""
    start, found = config.num_layers // 2, []
    for size in (2, 4, 8):
        groups = merged_layers(config, start, size)
        if size > config.num_layers - start:
            continue

        def sphere(part: str, layers: tuple[int, ...]) -> Stream:
            return Stream(part, layers, (Segment(config.head_dim, "model"),), merge="slerp", t=0.5)

        found.append(Variant("spherical mean", f"{size}", grouped(config, groups, sphere, f"sphere{size}")))
        found.append(
            Variant("joint KLT, rank head_dim", f"{size}", klt(config, states, groups, config.head_dim, "model"))
        )
    return found


def quantized(config: ModelConfig, states: States) -> list[Variant]:
    """Merged and single layers in fewer bits, beside the same bits without merging."""
    merged = [("16", "model"), ("8", "int8"), ("4", "int4"), ("2", "int2")]
    found = [Variant("minicache", x, minicache(config, kv_format=f)) for x, f in merged]
    found += [Variant("no merging", x, make_plan(config, name)) for x, name in (("4", "kivi4"), ("2", "kivi2"))]
    groups = merged_layers(config, 0)
    found += [Variant("joint KLT, all pairs, half rank", x, klt(config, states, groups, config.head_dim, f))
              for x, f in (("8", "int8"), ("4", "int4"), ("2", "int2"))]  # fmt: skip
    return found


def alignment(config: ModelConfig, states: States) -> list[Variant]:
    """Later half of the layers in pairs, one vector of head_dim numbers for two, in 16 bits, nothing retained."""
    groups = merged_layers(config, config.num_layers // 2)
    raw = minicache(config, gamma=0.0)
    return [
        Variant("equal bytes", "mean", make_plan(config, "mean", MethodOptions(gamma=0.0))),
        Variant("equal bytes", "SLERP", raw),
        Variant("equal bytes", "SLERP, aligned", aligned(config, states, raw)),
        Variant("equal bytes", "SLERP, aligned, values only", values_only(aligned(config, states, raw))),
        Variant("equal bytes", "joint KLT", klt(config, states, groups, config.head_dim, "model", "post_rope")),
        Variant("equal bytes", "joint KLT, keys before RoPE", klt(config, states, groups, config.head_dim, "model")),
    ]


def values_only(plan: CompressionPlan) -> CompressionPlan:
    """Keys single and in 16 bits again."""
    streams, matrices = [], {}
    for index, stream in enumerate(plan.streams):
        own = {name: value for name, value in plan.matrices.items() if name.startswith(f"streams.{index}.")}
        if stream.part == "key":
            streams += [Stream("key", (layer,), (Segment(stream.rank, "model"),)) for layer in stream.layers]
            continue
        for name, value in own.items():
            matrices[f"streams.{len(streams)}.{name.split('.', 2)[2]}"] = value
        streams.append(stream)
    return CompressionPlan("aligned-values", tuple(streams), matrices)


def aligned(config: ModelConfig, states: States, plan: CompressionPlan) -> CompressionPlan:
    """Heads of the later layer matched to those of the earlier one, and turned towards them (Procrustes)."""
    streams, matrices = [], {}
    for index, stream in enumerate(plan.streams):
        if len(stream.layers) == 1:
            streams.append(stream)
            continue
        first, second = (states[stream.part][layer].double().numpy() for layer in stream.layers)
        heads, dim = config.num_kv_heads, config.head_dim
        order = match_heads(first, second)
        turn = np.zeros((2, heads, dim, dim), np.float32)
        turn[0] = np.eye(dim)
        turn[1] = procrustes(np.einsum("thd,the->hde", second[:, order], first))
        matrices[f"streams.{index}.align"] = turn
        matrices[f"streams.{index}.head_map"] = np.stack([np.arange(heads), order]).astype(np.int32)
        streams.append(dataclasses.replace(stream, align=True, match_heads=True))
    return CompressionPlan("aligned", tuple(streams), matrices)


def klt(
    config: ModelConfig, states: States, groups: list[tuple[int, ...]], rank: int, fmt: str, basis: str = "pre_rope"
) -> CompressionPlan:
    """Joint Karhunen-Loeve transform of the groups' keys and values, ``rank`` components for all layers of a group."""
    transform = "none" if fmt == "model" else "hadamard"

    def linear(part: str, layers: tuple[int, ...]) -> Stream:
        own = basis if part == "key" else "post_rope"
        return Stream(part, layers, (Segment(rank, fmt, transform=transform),), merge="linear", basis=own)

    plan, matrices = grouped(config, groups, linear, f"klt-{fmt}x{rank}"), {}
    for index, stream in enumerate(plan.streams):
        if stream.merge != "linear":
            continue
        part = "key_pre" if stream.basis == "pre_rope" else stream.part
        joined = states[part][list(stream.layers)].permute(2, 1, 0, 3).flatten(2).double().numpy()
        second = joined.swapaxes(1, 2) @ joined / joined.shape[1]
        plain = np.broadcast_to(np.eye(joined.shape[-1]), second.shape)  # every direction counts alike
        constants = joint_transform(second, joined.mean(1), plain, damping=0.0).constants(rank, stream.gaussian)
        matrices |= {f"streams.{index}.{name}": value for name, value in constants.items()}
    return dataclasses.replace(plan, matrices=matrices)


FIGURES: dict[str, tuple[str, str, Callable[[ModelConfig, States], list[Variant]]]] = {
    "layers": ("Layers merged (Figure 1b)", "layers merged", layers_merged),
    "pairs": ("One pair of layers merged", "layers", single_pairs),
    "gamma": ("Retained tokens (Table 2)", "gamma", gamma),
    "t": ("Interpolation", "t", interpolation),
    "retention": ("Which tokens are retained", "rule", retention),
    "norm": ("Granularity of magnitude and direction", "norm per token and ...", norm),
    "group": ("Layers in one group", "layers in a group, later half of the model", group_size),
    "quantized": ("Merging and quantization", "bits", quantized),
    "alignment": ("What shares a vector", "merge of the later half, equal bytes", alignment),
}
"""Title, name of the x axis, and variants."""
