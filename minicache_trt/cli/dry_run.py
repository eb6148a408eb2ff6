"""``minicache-trt build --dry-run``: what a build needs, and whether this machine has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minicache_trt.backends.tensorrt.estimate import Room, build_needs, check_room
from minicache_trt.backends.tensorrt.options import TensorRtOptions
from minicache_trt.build import Configure
from minicache_trt.build_checks import check_build
from minicache_trt.checkpoint.resolve import resolve_config
from minicache_trt.cli.console import print_json, stdout, table
from minicache_trt.compression.size import bytes_per_token, ratio
from minicache_trt.units import format_bytes


def dry_run(
    model: str, output: Path, configure: Configure, tensorrt: TensorRtOptions, revision: str | None, json: bool
) -> None:
    """Print it; of a hub id only config.json is downloaded, of a preset nothing.

    Raises
    ------
    UserError
        What the build would say before it reads any weight, and where it does not fit.
    """
    config = resolve_config(model, revision=revision)
    plan, build = configure(config)
    build = check_build(config, plan, build, tensorrt)
    needs, room = build_needs(config, build), Room.here(output.parent)
    summary: dict[str, Any] = {
        "model": model,
        "method": plan.method,
        "backend": build.backend,
        "dtype": build.dtype,
        "weights": build.weights,
        "cache_bytes_per_token": round(bytes_per_token(plan, config, build.max_seq_len, build.window), 1),
        "ratio_to_16_bit": round(ratio(plan, config, build.max_seq_len, build.window), 3),
    }
    here = {"memory_bytes": room.memory_bytes, "disk_bytes": room.disk_bytes}
    if json:
        estimate = needs and {key: getattr(needs, key) for key in ("weight_bytes", *here)}
        print_json({**summary, "needs": estimate, "here": here})
    else:
        rows = table(f"Building {output} would take", "what", "value", "this machine has", left=2)
        for key, value in summary.items():
            rows.add_row(key.replace("_", " "), str(value), "")
        if needs is None:
            rows.add_row("weights", "linked from the checkpoint", "")
        else:
            rows.add_row("weights in the engine", format_bytes(needs.weight_bytes), "")
            rows.add_row("memory, about", format_bytes(needs.memory_bytes), format_bytes(room.memory_bytes))
            rows.add_row("disk, about", format_bytes(needs.disk_bytes), format_bytes(room.disk_bytes))
        stdout.print(rows)
    if needs is not None:
        check_room(needs, room, build)
