"""What a calibration leaves beside its plan, and says about it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minicache_trt.calibration.evaluator import Losses
from minicache_trt.calibration.result import Calibration
from minicache_trt.calibration.search import Verified
from minicache_trt.calibration.settings import CalibrationSettings
from minicache_trt.calibration.target import Sizes
from minicache_trt.compression.size import constant_bytes
from minicache_trt.compression.stream import Stream
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.errors import UserError


def record_path(plan: Path) -> Path:
    """``plan.calibration.json`` for ``plan.json``."""
    return plan.with_name(f"{plan.stem}.calibration.json")


def record(result: Calibration, text: Path, settings: CalibrationSettings, seconds: float) -> dict[str, Any]:
    """Everything that was found out, as JSON data."""
    similarity = result.similarities
    return {
        "checkpoint": {"checksum": result.checksum},
        "text": {"name": text.name, "sha256": result.text_hash},
        "settings": asdict(settings),
        "context": result.sizes.context,
        "seconds": round(seconds, 1),
        "plan": plan_figures(result.chosen, result),
        "tried": [plan_figures(each, result) for each in result.tried],
        "baselines": [plan_figures(each, result) for each in result.baselines],
        "uncompressed": losses(result.uncompressed),
        "streams": stream_rows(result),
        "measured": {key: asdict(row) for key, row in result.search.measured.items()},
        "front": [asdict(point) for point in result.front],
        "similarity": None
        if similarity is None
        else {
            "before": [asdict(pair) for pair in similarity.before],
            "after": [asdict(pair) for pair in similarity.after],
        },
    }  # fmt: skip


def plan_figures(verified: Verified, result: Calibration) -> dict[str, Any]:
    """Size, losses and read cost of one whole plan."""
    sizes: Sizes = result.sizes
    before, after = result.uncompressed, verified.losses
    return {
        "name": verified.name,
        "method": verified.plan.method,
        "ratio": sizes.ratio(verified.block_bytes),
        "bits_per_number": sizes.bits(verified.block_bytes),
        "constant_bytes": constant_bytes(verified.plan),
        "loss": result.search.total(verified),
        "sum_of_streams": None if math.isnan(verified.expected) else verified.expected,
        "perplexity_change": math.expm1(after.nll[0] - before.nll[0]),
        "recall_change": after.right[1] - before.right[1],
        **losses(after),
        "rotated_products_per_token": sum(read_products(each, sizes.config.head_dim) for each in verified.plan.streams)
        * sizes.config.num_kv_heads,
    }


def losses(measured: Losses) -> dict[str, Any]:
    """Text and recall, apart."""
    parts = {"text": 0, "recall": 1}
    return {
        name: {"divergence": measured.divergence[i], "nll": measured.nll[i], "right": measured.right[i]}
        for name, i in parts.items()
    }


def read_products(stream: Stream, head_dim: int) -> int:
    """Multiplications per cached token, head and layer group that reading costs beyond attention itself.

    Keys stored before RoPE are restored, r components to D, and rotated for each layer; linear maps of all other
    streams are applied to queries and outputs, never to cached tokens.
    """
    if stream.basis != "pre_rope":
        return 0
    width = stream.rank if stream.merge == "linear" else 0
    return len(stream.layers) * head_dim * (width + 2)


def stream_rows(result: Calibration) -> list[dict[str, Any]]:
    """Each stream of the plan: how it is stored, its share of the size and what it alone costs."""
    rows = []
    for candidate in sorted(result.choice, key=lambda each: (each.stream.layers, each.stream.part)):
        stream, measured = candidate.stream, result.search.measured.get(candidate.key)
        numbers = len(stream.layers) * result.sizes.config.num_kv_heads * result.sizes.config.head_dim * BLOCK_SIZE
        rows.append({
            "part": stream.part,
            "layers": list(stream.layers),
            "basis": stream.basis,
            "rank": stream.rank,
            "segments": [f"{segment.format} x {segment.length}" for segment in stream.segments],
            "retained": stream.retained,
            "bits_per_number": 8 * candidate.block_bytes / numbers,
            "expected_loss": candidate.expected,
            "text_divergence": None if measured is None else measured.text,
            "recall_divergence": None if measured is None else measured.recall,
            "products_per_token": read_products(stream, result.sizes.config.head_dim),
        })  # fmt: skip
    return rows


def save_record(data: dict[str, Any], path: Path) -> None:
    """Write it.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    try:
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
