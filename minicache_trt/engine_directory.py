"""The engine directory: what is in it, how it comes into being, how it is checked.

    config.json                      format version, model, plan, build options, contract hash, versions, source, files
    decoder.onnx, compressor.onnx    graphs; weights are external data
    quantized.safetensors            weight-only codes and scales (int8, int4)
    checkpoint/                      the Hugging Face checkpoint: config, tokenizer, safetensors files hard-linked

A directory is written under a temporary name beside its destination and renamed when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig, ModelConfig
from minicache_trt.contract import contract_hash
from minicache_trt.errors import UserError

FORMAT_VERSION = 1
CONFIG = "config.json"
DECODER = "decoder.onnx"
COMPRESSOR = "compressor.onnx"
CHECKPOINT = "checkpoint"
QUANTIZED = "quantized.safetensors"

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
        return "format_version" in json.loads((Path(path) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def read_engine(path: str | Path) -> EngineInfo:
    """Read ``config.json`` and check every file against it.

    Raises
    ------
    UserError
        Not an engine directory, another format version or contract, or a file missing or changed.
    """
    directory = Path(path)
    rebuild = "build the engine again with minicache-trt build"
    try:
        data = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{directory} is not an engine directory: it has no {CONFIG}", rebuild) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / CONFIG} cannot be read: {error}", rebuild) from error
    if not isinstance(data, dict) or "format_version" not in data:
        raise UserError(f"{directory} is not an engine directory: its {CONFIG} has no format_version", rebuild)
    if data["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{directory} has engine format version {data['format_version']}, this release reads {FORMAT_VERSION}",
            rebuild,
        )
    try:
        model, plan = ModelConfig.from_dict(data["model"]), CompressionPlan.from_dict(data["plan"])
        info = EngineInfo(model, plan, BuildConfig(**data["build"]), data["source"], data["tools"], data["files"])
        contract = data["contract"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / CONFIG} is damaged: {type(error).__name__}: {error}", rebuild) from error
    if contract != contract_hash(plan, model):
        raise UserError(f"{directory} was built for another tensor contract ({contract})", rebuild)
    for name, expected in info.files.items():
        file = directory / name
        if not file.is_file():
            raise UserError(f"{directory}: {name} is missing", rebuild)
        actual = fingerprint(file)
        if actual != expected:
            grew = f", it has {actual['bytes']} bytes, expected {expected['bytes']}" * (
                actual["bytes"] != expected["bytes"]
            )
            raise UserError(f"{directory}: {name} was changed after the build{grew}", rebuild)
    return info


@contextmanager
def staged(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory that becomes ``output`` if the block ends well and vanishes if it does not.

    Raises
    ------
    UserError
        ``output`` exists (and is not an engine to overwrite), its parent cannot be written, or the disk is full.
    """
    if output.exists() and not (overwrite and is_engine_directory(output)):
        what = "an engine is already there" if is_engine_directory(output) else "it exists and is not an engine"
        remedy = "add --force to replace it" if is_engine_directory(output) else "choose another directory"
        raise UserError(f"cannot write {output}: {what}", remedy)
    staging: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        staging.chmod(0o755)
        yield staging
        if output.exists():
            old = staging.with_name(staging.name + ".old")
            output.rename(old)
            staging.rename(output)
            shutil.rmtree(old)
        else:
            staging.rename(output)
        staging = None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on the disk of {output.parent} while building", "free some space and build again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"cannot write {error.filename or output}: {error.strerror}") from error
        raise
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> bool:
    """Hard-link a file, or copy it where the file system cannot; True if it was linked.

    A symbolic link would not do: ONNX Runtime refuses external data outside the model's directory.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    real = source.resolve()
    try:
        os.link(real, target)
        return True
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP):
            raise
    shutil.copyfile(real, target)
    return False
