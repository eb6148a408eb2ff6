"""What does building an engine of a 7B model take: seconds, memory, disk?

``minicache-trt build`` runs as a process of its own, for a dummy of the preset and for a checkpoint directory of
several safetensors files. Those are sparse (the headers are real, the weights are holes), so that the script needs no
13 GB of disk; what the build does with them is the same.
"""

from __future__ import annotations

import dataclasses
import json as json_module
import math
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from common import run
from costs import Cost, build_cost
from reporting import JsonFile, write_report

from minicache_trt.checkpoint.binding import stored_shape, stored_tensors, weight_shapes
from minicache_trt.checkpoint.presets import PRESETS
from minicache_trt.cli.console import stderr
from minicache_trt.units import format_bytes

LIMITS = {"seconds": 60.0, "peak_bytes": 2 * 2**30, "added_bytes": 100 * 2**20}
TARGETS = ["target", "< 60 s", "< 2 GB", "< 100 MB", ""]


def sparse_checkpoint(directory: Path, preset: str, shards: int) -> None:
    """A checkpoint of a preset's shape in float16: config, index and ``shards`` safetensors files without data."""
    model = PRESETS[preset]
    canonical = weight_shapes(model.config)
    shapes = {name: stored_shape(canonical, parts) for name, parts in stored_tensors(model.config).items()}
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    total, limit = sum(sizes.values()), sum(sizes.values()) / shards
    headers: list[dict[str, Any]] = [{} for _ in range(shards)]
    ends, begun = [0] * shards, 0
    weight_map = {}
    for name, size in sizes.items():
        shard = min(shards - 1, int(begun // limit))
        headers[shard][name] = {
            "dtype": "F16",
            "shape": shapes[name],
            "data_offsets": [ends[shard], ends[shard] + size],
        }
        weight_map[name] = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        ends[shard] += size
        begun += size
    for shard, header in enumerate(headers):
        text = json_module.dumps(header).encode()
        with (directory / f"model-{shard + 1:05}-of-{shards:05}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + ends[shard])
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json_module.dumps(index))
    (directory / "config.json").write_text(json_module.dumps(dict(model.raw_config)))


def main(
    preset: Annotated[str, typer.Option(help="Model.")] = "llama2-7b",
    merge_start: Annotated[int, typer.Option(help="First merged layer.")] = 16,
    shards: Annotated[int, typer.Option(help="Files of the sparse checkpoint.")] = 3,
    repeats: Annotated[int, typer.Option(help="Builds of each kind; the worst counts.")] = 3,
    work_dir: Annotated[Path | None, typer.Option(help="Where to build; default a temporary directory.")] = None,
    json: JsonFile = None,
) -> None:
    """Print what building costs."""
    rows: list[list[object]] = []
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=work_dir) as temporary:
        checkpoint = Path(temporary, preset)
        checkpoint.mkdir()
        sparse_checkpoint(checkpoint, preset, shards)
        kinds = {
            "dummy": (["--model", preset, "--load-format", "dummy"], None),
            f"checkpoint, {shards} files": (["--model", str(checkpoint)], checkpoint),
        }
        for kind, (arguments, source) in kinds.items():
            builds = []
            for repeat in range(repeats):
                stderr.print(f"{kind}: build {repeat + 1}/{repeats}")
                output = Path(temporary, f"engine-{len(results)}-{repeat}")
                builds.append(build_cost([*arguments, "--merge-start", str(merge_start)], output, source))
                shutil.rmtree(output)
            worst = Cost(*(max(values) for values in zip(*map(dataclasses.astuple, builds), strict=True)))
            met = all(value <= LIMITS[name] for name, value in dataclasses.asdict(worst).items())
            memory, disk = format_bytes(worst.peak_bytes), format_bytes(worst.added_bytes)
            rows.append([kind, f"{worst.seconds:.2f} s", memory, disk, "yes" if met else "no"])
            results.append({"kind": kind, "builds": [dataclasses.asdict(cost) for cost in builds]})
    columns = ("model", "time", "peak memory", "added on disk", "within targets")
    write_report(f"Building {preset}, --merge-start {merge_start}", columns, [*rows, TARGETS], results, json)


if __name__ == "__main__":
    run(main)
