"""Can the paper's merge win a stream of a calibrated plan, at equal bytes?

For every pair of layers (0+1, 2+3, ...), keys and values: SLERP after head matching and Procrustes alignment (from the
same sums as the joint KLT), its directions in 4 bits after a Hadamard transform, without and with retained tokens, and
in 16 bits, which no quantizer can beat; beside the joint KLT of at most the bytes of the first. Each is compressed
alone, everything else is exact; the loss is what `minicache-trt calibrate` minimises, the divergence of the next
token's distribution from the uncompressed model's, in nats, of text and of recall.

    python benchmarks/slerp_streams.py --checkpoint DIR --calibration-text FILE --json FILE
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import run
from reporting import JsonFile, write_report

from minicache_trt.calibration.coded import CodedStream
from minicache_trt.calibration.collect import collect, first_moments
from minicache_trt.calibration.evaluator import Evaluator
from minicache_trt.calibration.families import Family, block_bytes
from minicache_trt.calibration.matching import procrustes
from minicache_trt.calibration.model import CalibrationModel
from minicache_trt.calibration.moments import Moments
from minicache_trt.calibration.rotary import average_moment
from minicache_trt.calibration.samples import sample_sets
from minicache_trt.calibration.search import LEAST_LOSS
from minicache_trt.calibration.settings import CalibrationSettings
from minicache_trt.checkpoint.resolve import resolve_config
from minicache_trt.cli.console import progress_bars
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import PARTS, Stream
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.runtime.tokenizer import load_tokenizer

MOST = 1000
"""Larger ratios are of losses that are rounding errors."""
COLUMNS = ("stream", "storage", "bits", "text", "recall", "over joint KLT")


def main(
    checkpoint: Annotated[Path, typer.Option(help="Hugging Face checkpoint directory.")],
    calibration_text: Annotated[Path, typer.Option(help="Text to calibrate and to measure on, different parts.")],
    context: Annotated[int, typer.Option(help="Positions keys after RoPE are averaged over.")] = 2048,
    moment_sequences: Annotated[int, typer.Option(help="Sequences for sums.")] = 48,
    gradient_sequences: Annotated[int, typer.Option(help="Of these, for sensitivities.")] = 16,
    search_sequences: Annotated[int, typer.Option(help="Sequences losses are measured on.")] = 4,
    name: Annotated[str | None, typer.Option(help="How results call the model; default its folder's name.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    json: JsonFile = None,
) -> None:
    """Measure and print a table."""
    torch.set_num_threads(threads)
    settings = CalibrationSettings(moment_sequences=moment_sequences, gradient_sequences=gradient_sequences,
                                   search_sequences=search_sequences, verify_sequences=2)  # fmt: skip
    config, tokenizer = resolve_config(str(checkpoint)).for_context(context), load_tokenizer(checkpoint)
    if tokenizer is None:
        raise UserError(f"{checkpoint}: no tokenizer")
    sets = sample_sets(calibration_text, tokenizer, config, settings)
    model = CalibrationModel(checkpoint, config)
    rows: list[dict[str, Any]] = []
    with progress_bars() as report:
        moments = collect(
            model, sets.moments, sets.gradients, np.ones(len(sets.moments)), settings.window,
            first_moments(model, sets.moments, 2), 0, lambda sums, done: None,
            lambda done, total: report("moments", done, total),
        )  # fmt: skip
        evaluator = Evaluator(model, sets.search, settings.window)
        places = [(part, first) for part in PARTS for first in range(0, config.num_layers - 1, 2)]
        for done, (part, first) in enumerate(places):
            report("streams", done, len(places))
            rows += pair(part, (first, first + 1), moments, config, settings, context, evaluator)
    wins = sum(row["over"] < 1 for row in rows if row["storage"].startswith("SLERP"))
    title = f"Aligned SLERP against joint KLT: {name or checkpoint.resolve().name}; SLERP is better {wins} times"
    write_report(title, COLUMNS, [cells(row) for row in rows], rows, json)


def pair(part: str, layers: tuple[int, int], moments: Moments, config: ModelConfig, settings: CalibrationSettings,
         context: int, evaluator: Evaluator) -> list[dict[str, Any]]:  # fmt: skip
    """All ways to store one pair, the joint KLT first."""
    family = Family(part, layers, "post_rope", moments, config, settings.damping, context)
    matrices: dict[str, Any] = {"align": rotations(family), "head_map": family.head_map.astype(np.int32)}
    few, whole = (Segment(config.head_dim, "int4", transform="hadamard"),), (Segment(config.head_dim),)
    slerp = {
        "SLERP, 4 bit": Stream(part, layers, few, merge="slerp", align=True, match_heads=True),
        "SLERP, 4 bit, 3 of 64 tokens exact": Stream(
            part, layers, few, merge="slerp", align=True, match_heads=True, retained=3
        ),
        "SLERP, 16 bit": Stream(part, layers, whole, merge="slerp", align=True, match_heads=True),
    }
    budget = block_bytes(slerp["SLERP, 4 bit"], config)
    best = min((c for c in family.candidates if c.block_bytes <= budget), key=lambda c: c.expected)
    storage = " + ".join(f"{s.format} x {s.length}" for s in best.stream.segments)
    streams = {f"joint KLT, {storage}": (best.stream, family.constants(best.stream))}
    streams |= {label: (stream, matrices) for label, stream in slerp.items()}
    rows: list[dict[str, Any]] = []
    for label, (stream, constants) in streams.items():
        losses = evaluator.measure([CodedStream.of(stream, constants, config)])
        numbers = 2 * config.num_kv_heads * config.head_dim * BLOCK_SIZE
        loss = max(LEAST_LOSS, losses.loss(settings.recall_share))
        rows.append({
            "part": part, "layers": list(layers), "storage": label, "bits": 8 * block_bytes(stream, config) / numbers,
            "text": losses.divergence[0], "recall": losses.divergence[1], "loss": loss,
            "over": loss / (rows[0]["loss"] if rows else loss),
        })  # fmt: skip
    return rows


def rotations(family: Family) -> np.ndarray[Any, np.dtype[np.float32]]:
    """``[2, H, D, D]``: the later layer's heads turned towards the earlier one's, keys at all positions."""
    moments, dim = family.moments, family.config.head_dim
    second = moments.group(moments.second, PARTS.index(family.part), family.layers)
    if family.part == "key":
        second = average_moment(family.config, second, family.positions)
    order = np.argsort(moments.head_map[PARTS.index(family.part), family.layers[0]])
    turned = procrustes(second[order][:, dim:, :dim])
    return np.stack([np.broadcast_to(np.eye(dim), turned.shape), turned]).astype(np.float32)


def cells(row: dict[str, Any]) -> list[str]:
    layers = "+".join(map(str, row["layers"]))
    return [f"{row['part']} {layers}", row["storage"], f"{row['bits']:.2f}", f"{row['text']:.1e}",
            f"{row['recall']:.1e}", f"{row['over']:.1f}" if row["over"] < MOST else f"> {MOST}"]  # fmt: skip


if __name__ == "__main__":
    run(main)
