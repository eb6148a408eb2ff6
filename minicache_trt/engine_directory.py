"""The engine directory: what is in it and how it is checked.

    config.json                      format version, model, plan, build options, contract hash, versions, source, files
    decoder.onnx, compressor.onnx    graphs; weights are external data (absent where only the torch backend can run)
    decoder.engine, compressor.engine  TensorRT's plans, and in engines.json what they were built from (those backends)
    quantized.safetensors            weight-only codes and scales (int8, int4)
    plan.safetensors                 calibrated constants of the plan, where it has any
    maps.safetensors                 what the graphs take of them: each layer's linear maps into and out of its streams
    checkpoint/                      the Hugging Face checkpoint: config, tokenizer, safetensors files hard-linked

How it comes into being: `minicache_trt.staging`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from minicache_trt.compression.matrices import load_matrices
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.plan_json import needs_matrices, plan_from_dict
from minicache_trt.config import BuildConfig, ModelConfig
from minicache_trt.contract import contract_hash
from minicache_trt.errors import UserError

FORMAT_VERSION = 4
CONFIG = "config.json"
DECODER = "decoder.onnx"
COMPRESSOR = "compressor.onnx"
DECODER_ENGINE = "decoder.engine"
COMPRESSOR_ENGINE = "compressor.engine"
ENGINES = "engines.json"
CHECKPOINT = "checkpoint"
QUANTIZED = "quantized.safetensors"
MATRICES = "plan.safetensors"
MAPS = "maps.safetensors"

_BUILD = "build an engine with minicache-trt build"
_REBUILD = "build the engine again with minicache-trt build"

_WHOLE_FILE_LIMIT = 32 << 20
_SAMPLE_BYTES, _SAMPLES = 4096, 64
_TOOLS = ("onnxruntime", "onnx", "onnx-ir", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class EngineInfo:
    """Contents of ``config.json``.

    Parameters
    ----------
    model : ModelConfig
    plan : CompressionPlan
    build : BuildConfig
    source : dict
        ``name``, ``directory``, ``revision``, ``checksum`` and ``dummy`` of the checkpoint.
    tools : dict
        Package versions at build time.
    files : dict
        Relative path to ``{"bytes", "sha256"}``; see `fingerprint`.
    """

    model: ModelConfig
    plan: CompressionPlan
    build: BuildConfig
    source: dict[str, Any]
    tools: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "contract": contract_hash(self.plan, self.model),
            "model": self.model.to_dict(),
            "plan": self.plan.to_dict(),
            "build": asdict(self.build),
            "source": self.source,
            "tools": self.tools,
            "files": self.files,
        }


def tool_versions() -> dict[str, str]:
    """Versions of this package and of the tools that shape an engine."""
    return {name: importlib.metadata.version(name) for name in ("minicache-trt", *_TOOLS)}


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file: of all of it up to 32 MiB, beyond that of 64 evenly spaced pages and both ends."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE_FILE_LIMIT:
            digest.update(file.read())
        else:
            for i in range(_SAMPLES + 1):
                file.seek((size - _SAMPLE_BYTES) * i // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_config(directory: Path, info: EngineInfo) -> None:
    """Fingerprint every file of a finished directory and write ``config.json``."""
    files = {
        path.relative_to(directory).as_posix(): fingerprint(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    complete = EngineInfo(info.model, info.plan, info.build, info.source, tool_versions(), files)
    (directory / CONFIG).write_text(json.dumps(complete.to_dict(), indent=1) + "\n", encoding="utf-8")


def is_engine_directory(path: str | Path) -> bool:
    """Whether a directory holds (or once held) an engine, rather than a checkpoint."""
    try:
        data = json.loads((Path(path) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and {"format_version", "contract"} <= data.keys()


def read_engine(path: str | Path) -> EngineInfo:
    """Read ``config.json`` and check every file against it.

    Raises
    ------
    UserError
        Not an engine directory, another format version or contract, or a file missing or changed.
    """
    directory = Path(path)
    data = _read_config(directory)
    try:
        info = _parse(data)
        contract = data["contract"]
    except KeyError as error:
        raise UserError(f"{directory / CONFIG} is damaged: field {error} is missing", _REBUILD) from error
    except (TypeError, ValueError, UserError) as error:
        cause = error.cause if isinstance(error, UserError) else str(error)
        raise UserError(f"{directory / CONFIG} is damaged: {cause}", _REBUILD) from error
    if contract != contract_hash(info.plan, info.model):
        raise UserError(f"{directory} was built for another tensor contract ({contract})", _REBUILD)
    for name, expected in info.files.items():
        _check_file(directory, name, expected)
    plan = info.plan
    if needs_matrices(plan):
        plan = replace(plan, matrices=load_matrices(directory / MATRICES))
    try:
        return replace(info, plan=plan.validate(info.model))
    except UserError as error:
        raise UserError(f"{directory / CONFIG} is damaged: {error.cause}", _REBUILD) from error


def _read_config(directory: Path) -> dict[str, Any]:
    """The object in ``config.json``, of this format version."""
    try:
        data = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory", "give the directory that build wrote") from error
        raise UserError(f"{directory} is not an engine directory: it has no {CONFIG}", _BUILD) from error
    except OSError as error:
        raise UserError(f"{directory / CONFIG} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{directory / CONFIG} is damaged: {error}", _REBUILD) from error
    if isinstance(data, dict) and ("architectures" in data or "model_type" in data):
        raise UserError(f"{directory} is a checkpoint, expected an engine directory", _BUILD)
    if not isinstance(data, dict) or "format_version" not in data:
        raise UserError(f"{directory} is not an engine directory: its {CONFIG} has no format_version", _BUILD)
    if data["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{directory} has engine format version {data['format_version']}, this release reads {FORMAT_VERSION}",
            _REBUILD,
        )
    return data


def _parse(data: dict[str, Any]) -> EngineInfo:
    """Raises KeyError for a missing field, and `UserError`, TypeError or ValueError for a wrong one."""
    model = ModelConfig.from_dict(_section(data, "model", [f.name for f in fields(ModelConfig)]))
    build = BuildConfig(**_section(data, "build", [f.name for f in fields(BuildConfig)]))
    source = _section(data, "source", ["name", "directory", "revision", "checksum", "dummy"])
    plan = plan_from_dict(data["plan"])
    files = _section(data, "files", [DECODER])
    for name in files:
        _section(files, name, ["bytes", "sha256"])
    return EngineInfo(model, plan, build, source, _section(data, "tools", []), files)


def _section(data: dict[str, Any], name: str, required: list[str]) -> dict[str, Any]:
    section = data[name]
    if not isinstance(section, dict):
        raise TypeError(f"{name}: expected an object, got {section!r}")
    for field_name in required:
        if field_name not in section:
            raise KeyError(f"{name}.{field_name}")
    return section


def _check_file(directory: Path, name: str, expected: dict[str, Any]) -> None:
    file = directory / name
    if not file.is_file():
        raise UserError(f"{directory}: {name} is missing", _REBUILD)
    try:
        actual = fingerprint(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    if actual["bytes"] != expected["bytes"]:
        raise UserError(
            f"{directory}: {name} was changed after the build, it has {actual['bytes']} bytes, "
            f"expected {expected['bytes']}",
            _REBUILD,
        )
    if actual != expected:
        raise UserError(f"{directory}: {name} was changed after the build", _REBUILD)
