"""What does building an engine of a large model take: seconds, memory, disk?

``minicache-trt build`` runs as a process of its own, for a dummy of the preset and for a checkpoint directory of
several safetensors files. Those are sparse (the headers are real, the weights are holes), so that the script needs no
13 GB of disk; what a build that links its weights does with them is the same. ``--fill random`` writes real numbers,
for builds that read them (``--weights int4``); such a build is also killed half-way and started again.

    python benchmarks/build_7b.py
    python benchmarks/build_7b.py --preset llama3-70b --merge-start 40 --shards 30
    python benchmarks/build_7b.py --weights int4 --fill random --repeats 1
"""

from __future__ import annotations

import dataclasses
import json as json_module
import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import typer
from common import run
from costs import Cost, build_command, build_cost
from reporting import JsonFile, write_report

from minicache_trt.checkpoint.binding import stored_shape, stored_tensors, weight_shapes
from minicache_trt.checkpoint.presets import PRESETS
from minicache_trt.cli.console import stderr
from minicache_trt.units import format_bytes

SMALL, LARGE, CODES = (
    {"seconds": 60.0, "peak_bytes": 2 * 2**30, "added_bytes": 100 * 2**20},
    {"seconds": 120.0, "peak_bytes": 3 * 2**30},
    {"peak_bytes": 4 * 2**30},
)
"""Targets: a 7B model, a 70B model, and int8 or int4 weights."""


def write_checkpoint(directory: Path, preset: str, shards: int, fill: str = "holes") -> None:
    """A checkpoint of a preset's shape in float16: config, index and ``shards`` safetensors files.

    ``fill``: ``holes`` (sparse files, zeros), or ``random``: numbers as of a trained model, which take their space.
    """
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
        text += b" " * (-len(text) % 8)
        with (directory / f"model-{shard + 1:05}-of-{shards:05}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if fill == "random":
                _write_numbers(file, ends[shard], shard)
            file.truncate(8 + len(text) + ends[shard])
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json_module.dumps(index))
    (directory / "config.json").write_text(json_module.dumps(dict(model.raw_config)))
    os.sync()  # a build must not wait for the disk to take what this wrote


def _write_numbers(file: BinaryIO, size: int, seed: int) -> None:
    """Normal numbers of deviation 0.02 in float16, 64 MiB of them over and over, begun at another place each time."""
    rng = np.random.default_rng(seed)
    numbers = (rng.standard_normal(1 << 25, np.float32) * 0.02).astype(np.float16)
    while size:
        first = int(rng.integers(0, len(numbers) // 2))
        data = numbers[first : first + size // 2].tobytes()
        file.write(data)
        size -= len(data)


@dataclass(frozen=True)
class Killed:
    """Seconds a build ran before it was killed, and cores it used since the first weights were finished."""

    seconds: float
    cores: float


def kill_half_way(arguments: list[str], output: Path, layers: int) -> Killed:
    """Start a build, kill it when half of its weights are finished."""
    log = output.with_name(f".{output.name}.partial") / "finished"
    begin = time.perf_counter()
    process = subprocess.Popen(build_command(arguments, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first: tuple[float, float] | None = None
    while process.poll() is None:
        finished = log.read_bytes().count(b"codes") if log.exists() else 0
        if finished and first is None:
            first = time.perf_counter(), _cpu_seconds(process.pid)
        if first is not None and finished >= 7 * layers // 2:
            now, cpu = time.perf_counter(), _cpu_seconds(process.pid)
            process.send_signal(signal.SIGKILL)
            process.wait()
            return Killed(now - begin, (cpu - first[1]) / (now - first[0]))
        time.sleep(0.1)
    raise RuntimeError(f"the build ended (status {process.returncode}) before it could be killed")


def _cpu_seconds(pid: int) -> float:
    """User and system time of a running process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(
    preset: Annotated[str, typer.Option(help="Model.")] = "llama2-7b",
    merge_start: Annotated[int, typer.Option(help="First merged layer.")] = 16,
    shards: Annotated[int, typer.Option(help="Files of the checkpoint.")] = 3,
    repeats: Annotated[int, typer.Option(help="Builds of each kind; the worst counts.")] = 3,
    weights: Annotated[str, typer.Option(help="Weight format: fp32, int8 or int4.")] = "fp32",
    fill: Annotated[str, typer.Option(help="holes (sparse files) or random numbers.")] = "holes",
    work_dir: Annotated[Path | None, typer.Option(help="Where to build; default a temporary directory.")] = None,
    json: JsonFile = None,
) -> None:
    """Print what building costs."""
    codes = weights in ("int8", "int4")
    limits = CODES if codes else LARGE if PRESETS[preset].config.num_layers > 40 else SMALL
    rows: list[list[object]] = []
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=work_dir) as temporary:
        checkpoint = Path(temporary, preset)
        checkpoint.mkdir()
        write_checkpoint(checkpoint, preset, shards, fill)
        flags = ["--merge-start", str(merge_start), "--weights", weights]
        kinds = {f"checkpoint, {shards} files": (["--model", str(checkpoint)], checkpoint)}
        if not codes:
            kinds = {"dummy": (["--model", preset, "--load-format", "dummy"], None), **kinds}
        for kind, (arguments, source) in kinds.items():
            builds = []
            for repeat in range(repeats):
                stderr.print(f"{kind}: build {repeat + 1}/{repeats}")
                output = Path(temporary, f"engine-{len(results)}-{repeat}")
                builds.append(build_cost([*arguments, *flags], output, source))
                shutil.rmtree(output)
            _add(rows, results, kind, builds, limits)
        if codes:
            stderr.print("killed and built again")
            output, arguments = Path(temporary, "engine"), ["--model", str(checkpoint), *flags]
            killed = kill_half_way(arguments, output, PRESETS[preset].config.num_layers)
            kind = f"quantizing, until killed at {killed.seconds:.0f} s"
            rows.append([kind, "", "", "", f"{killed.cores:.2f}", ""])
            results.append({"kind": "killed", **dataclasses.asdict(killed)})
            resumed = [build_cost(arguments, output, checkpoint)]
            _add(rows, results, "built again after the kill", resumed, limits)
    names = {"seconds": "< {:.0f} s", "peak_bytes": "", "added_bytes": ""}
    bounds = [
        (names[name].format(limits[name]) if name == "seconds" else f"< {format_bytes(int(limits[name]))}")
        if name in limits
        else ""
        for name in names
    ]
    columns = ("model", "time", "peak memory", "added on disk", "cores used", "within targets")
    title = f"Building {preset}, {weights} weights, --merge-start {merge_start}, {fill}"
    write_report(title, columns, [*rows, ["target", *bounds, "", ""]], results, json)


def _add(
    rows: list[list[object]], results: list[dict[str, Any]], kind: str, builds: list[Cost], limits: dict[str, float]
) -> None:
    worst = Cost(*(max(values) for values in zip(*map(dataclasses.astuple, builds), strict=True)))
    met = all(getattr(worst, name) <= limit for name, limit in limits.items())
    memory, disk = format_bytes(worst.peak_bytes), format_bytes(worst.added_bytes)
    cores = f"{max(build.cpu_seconds / build.seconds for build in builds):.2f}"
    rows.append([kind, f"{worst.seconds:.2f} s", memory, disk, cores, "yes" if met else "no"])
    results.append({"kind": kind, "builds": [dataclasses.asdict(cost) for cost in builds]})


if __name__ == "__main__":
    run(main)
