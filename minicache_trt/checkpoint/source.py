"""What a checkpoint in another format becomes: a Hugging Face checkpoint, written once, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minicache_trt.checkpoint.tensor_file import Progress, StoredTensor, write_tensors
from minicache_trt.checkpoint.weights import WEIGHTS_FILE
from minicache_trt.errors import UserError

INT4_FILE = "int4.safetensors"
"""Linear layers of a checkpoint that is quantized to 4 bits, in the form of `minicache_trt.checkpoint.quantize`."""

QUANTIZED_FILE = "quantized.safetensors"
"""Where an engine directory has them, beside its graphs."""

INT4_MARK = "minicache_trt_int4"
"""Key of config.json that says the linear layers are in ``INT4_FILE``, or in an engine in ``QUANTIZED_FILE``."""


@dataclass(frozen=True)
class Source:
    """A checkpoint in another format, read but for its numbers.

    Parameters
    ----------
    format : str
        What it is, for people: ``TensorRT-LLM checkpoint``.
    config : dict
        Hugging Face's config.json of the same model.
    tensors : callable
        The tensors of the model under their Hugging Face names. Called only when the weights are wanted, as files are
        opened for it.
    sidecars : sequence of Path
        Tokenizer, chat template and generation config.
    finish : callable, optional
        Writes what else belongs into the directory, such as a tokenizer that has no files; returns what to tell people.
    int4 : callable, optional
        Tensors of ``INT4_FILE``: ``<linear>.codes``, ``.scales`` and, where zero points vary, ``.zeros``.
    """

    format: str
    config: dict[str, Any]
    tensors: Callable[[], Sequence[StoredTensor]]
    sidecars: Sequence[Path] = ()
    finish: Callable[[Path], list[str]] | None = field(default=None)
    int4: Callable[[], Sequence[StoredTensor]] | None = field(default=None)


def materialize(source: Source, directory: Path, progress: Progress) -> list[str]:
    """Write a source as a Hugging Face checkpoint: ``config.json``, ``model.safetensors``, sidecars.

    Returns notes for people: what could not be taken along.

    Raises
    ------
    UserError
        A weight is missing or damaged, or the directory cannot be written.
    """
    tensors = source.tensors()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        notes = [] if source.finish is None else source.finish(directory)
        for path in source.sidecars:
            shutil.copyfile(path, directory / path.name)
        config = dict(source.config)
        if source.int4 is not None:
            config[INT4_MARK] = True
            write_tensors(directory / INT4_FILE, source.int4(), progress, {"bits": "4"})
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensors(directory / WEIGHTS_FILE, tensors, progress)
    except OSError as error:
        raise UserError(
            f"{directory}: the converted checkpoint cannot be written ({error.strerror})",
            "converting needs as much space as the model's 16-bit weights take; choose an output on a larger disk",
        ) from error
    return notes
