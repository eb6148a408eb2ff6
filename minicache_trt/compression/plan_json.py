"""plan.json: reading, with errors that name the field, and writing; matrices are beside it in plan.safetensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from minicache_trt.compression.matrices import MATRICES_SUFFIX, Matrices, load_matrices, save_matrices
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.errors import UserError


def plan_from_dict(data: Any, matrices: Matrices | None = None) -> CompressionPlan:
    """Read a plan from JSON data.

    Parameters
    ----------
    data : JSON value
    matrices : mapping, optional
        The plan's constants; `CompressionPlan.validate` checks them.

    Raises
    ------
    UserError
        Naming the path of the field that is missing, unknown or out of range.
    """
    fields = _object(data, "", {"method", "calibrated_on", "streams"}, {"method", "streams"})
    streams = tuple(_stream(item, f"streams[{i}]") for i, item in enumerate(_list(fields["streams"], "streams")))
    source = None if "calibrated_on" not in fields else _typed(fields["calibrated_on"], str, "calibrated_on")
    return CompressionPlan(_typed(fields["method"], str, "method"), streams, matrices or {}, source)


def needs_matrices(plan: CompressionPlan) -> bool:
    """Whether any stream takes calibrated constants."""
    return any(stream.merge == "linear" or stream.align or stream.match_heads for stream in plan.streams)


def load_plan(path: str | Path) -> CompressionPlan:
    """Read ``plan.json`` and, where a stream needs them, the matrices beside it; see `plan_from_dict` for errors."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"plan: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"plan: {path} is not JSON: {error}") from error
    plan = plan_from_dict(data)
    if not needs_matrices(plan):
        return plan
    return dataclasses.replace(plan, matrices=load_matrices(Path(path).with_suffix(MATRICES_SUFFIX)))


def save_plan(plan: CompressionPlan, path: str | Path) -> None:
    """Write ``plan.json`` and the plan's matrices, if it has any, beside it.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    if plan.matrices:
        save_matrices(plan.matrices, Path(path).with_suffix(MATRICES_SUFFIX))
    try:
        Path(path).write_text(json.dumps(plan.to_dict(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"plan: cannot write {path}: {error.strerror}") from error


def _place(path: str) -> str:
    """A field's path for errors; the empty path is the plan itself."""
    return f"plan: {path}" if path else "plan"


def _typed(value: Any, kind: type | tuple[type, ...], path: str) -> Any:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(f"{_place(path)}: expected {' or '.join(k.__name__ for k in kinds)}, got {value!r}")
    return value


def _list(value: Any, path: str) -> list[Any]:
    result: list[Any] = _typed(value, list, path)
    return result


def _object(data: Any, path: str, known: set[str], required: set[str]) -> dict[str, Any]:
    fields: dict[str, Any] = _typed(data, dict, path)
    for name in sorted(set(fields) - known):
        raise UserError(f"{_place(path)}: unknown field {name!r}", f"known fields: {', '.join(sorted(known))}")
    for name in sorted(required - set(fields)):
        raise UserError(f"{_place(path)}: field {name!r} is missing")
    return fields


_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float), "bool": bool}


def _build(cls: type, fields: dict[str, Any], path: str) -> Any:
    for field in dataclasses.fields(cls):
        if field.name in fields and str(field.type) in _FIELD_TYPES:
            _typed(fields[field.name], _FIELD_TYPES[str(field.type)], f"{path}.{field.name}")
    try:
        return cls(**fields)
    except ValueError as error:
        raise UserError(f"plan: {path}.{error}") from error


def _names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _stream(data: Any, path: str) -> Stream:
    fields = dict(_object(data, path, _names(Stream), {"part", "layers", "segments"}))
    layers = _list(fields["layers"], f"{path}.layers")
    fields["layers"] = tuple(_typed(layer, int, f"{path}.layers[{i}]") for i, layer in enumerate(layers))
    segments = []
    for i, item in enumerate(_list(fields["segments"], f"{path}.segments")):
        where = f"{path}.segments[{i}]"
        segments.append(_build(Segment, _object(item, where, _names(Segment), {"length"}), where))
    fields["segments"] = tuple(segments)
    stream: Stream = _build(Stream, fields, path)
    return stream
