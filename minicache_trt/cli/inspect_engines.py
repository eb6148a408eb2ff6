"""What ``inspect`` says of TensorRT engines: how they were built, and what this machine's TensorRT finds in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minicache_trt.backends.tensorrt.description import read_description
from minicache_trt.backends.tensorrt.inspection import inspect_engine
from minicache_trt.cli.console import stdout, table
from minicache_trt.engine_directory import ENGINES
from minicache_trt.errors import UserError
from minicache_trt.units import format_bytes


def engines_json(directory: Path) -> dict[str, Any]:
    """The description written by the build; per engine also ``inspected``, or ``not_inspected`` and why."""
    description = read_description(directory / ENGINES)
    for name, engine in description["engines"].items():
        try:
            engine["inspected"] = inspect_engine(description["backend"], directory / name)
        except UserError as error:
            engine["not_inspected"] = error.cause
    return description


def print_engines(directory: Path) -> None:
    description = engines_json(directory)
    for name, engine in description["engines"].items():
        rows = table(f"{name}, built by {description['backend']} {description['version']}", "what", "value")
        layers = sum(engine["layers"].values())
        kinds = ", ".join(f"{count} {kind.lower()}" for kind, count in list(engine["layers"].items())[:6])
        rows.add_row("size", format_bytes(engine["bytes"]))
        rows.add_row("layers before fusion", f"{layers} ({kinds}, ...)")
        rows.add_row("plugins", str(engine["plugins"]) if engine["plugins"] else "none: cache operators by functions")
        if "inspected" in engine:
            found = engine["inspected"]
            rows.add_row("layers", str(found["layers"]))
            rows.add_row("memory of activations", format_bytes(found["device_memory_bytes"]))
            rows.add_row("weights that can be streamed", format_bytes(found["streamable_weights_bytes"]))
        else:
            rows.add_row("layers and memory here", f"unknown: {engine['not_inspected']}")
        stdout.print(rows)
        _print_bindings(name, engine)


def _print_bindings(name: str, engine: dict[str, Any]) -> None:
    rows = table(f"Bindings of {name}", "tensor", "", "type", "shape", *engine["profiles"], left=4)
    for tensor in engine["inputs"]:
        ranges = [_range(tensor["profiles"][profile]) for profile in engine["profiles"]]
        rows.add_row(tensor["name"], "in", tensor["dtype"], _dims(tensor["shape"]), *ranges)
    for tensor in engine["outputs"]:
        rows.add_row(tensor["name"], "out", tensor["dtype"], _dims(tensor["shape"]), *("" for _ in engine["profiles"]))
    stdout.print(rows)


def _dims(shape: list[Any]) -> str:
    return "[" + ", ".join("?" if extent == -1 else str(extent) for extent in shape) + "]"


def _range(shapes: list[list[int]]) -> str:
    """Extents that vary, as ``1 .. 8``."""
    smallest, _, largest = shapes
    varying = [f"{a} .. {b}" for a, b in zip(smallest, largest, strict=True) if a != b]
    return ", ".join(varying) or "fixed"
