"""What tells one checkpoint from another without reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from minicache_trt.checkpoint.weights import WeightView, read_header, read_safetensors_file
from minicache_trt.errors import UserError

WHOLE_BYTES = 1 << 12
"""Tensors up to this size are read whole: norms, biases, scales."""
PIECES, PIECE_BYTES = 8, 1 << 8
"""Of larger ones, so many pieces of so many bytes, evenly spread, the first and the last bytes among them."""


def fingerprint(config: Path, files: Iterable[Path]) -> str:
    """SHA-256 over config.json and, per safetensors file, its name, size, header and bytes of every tensor.

    Of a tensor above `WHOLE_BYTES` only samples are read, 2 KiB each, so that 140 GB take as long as a few hundred
    tensors do. Training, merging an adapter or quantizing changes nearly all values of a tensor and is seen; a few
    values changed by hand between the samples are not.

    Raises
    ------
    UserError
        A file cannot be read, or is damaged.
    """
    try:
        digest = hashlib.sha256(config.read_bytes())
        for path in files:
            digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
            digest.update(read_header(path))
            with path.open("rb", buffering=0) as file:
                for view in sorted(read_safetensors_file(path).values(), key=lambda view: view.offset):
                    for offset, size in _samples(view):
                        file.seek(offset)
                        digest.update(file.read(size))
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror})", "check the path and its permissions"
        ) from error
    return digest.hexdigest()


def _samples(view: WeightView) -> list[tuple[int, int]]:
    """Offsets and sizes of what is read of a tensor."""
    if view.nbytes <= WHOLE_BYTES:
        return [(view.offset, view.nbytes)]
    last = view.nbytes - PIECE_BYTES
    return [(view.offset + last * piece // (PIECES - 1), PIECE_BYTES) for piece in range(PIECES)]
