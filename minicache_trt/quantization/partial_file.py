"""A safetensors file that several threads write, tensor by tensor, and that a killed run leaves to the next one.

    <directory>/weights       the file itself, of its full size from the start; tensors are written where they belong
    <directory>/manifest      what it is made of and from: another one, and everything here is begun anew
    <directory>/finished      a line per group of tensors that are complete, with checksums

A line is written after its tensors; a checksum that does not match (the machine went down, not the process) makes the
group unfinished.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicache_trt.checkpoint.streaming import encode_header
from minicache_trt.staging import link_or_copy

WEIGHTS, MANIFEST, FINISHED = "weights", "manifest", "finished"
_READ_BYTES = 8 << 20

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Safetensors dtype and shape by name."""


class PartialFile:
    """Open a file to write, or the part of it that an earlier run has written.

    Parameters
    ----------
    directory : Path
        Of this file alone.
    tensors : mapping
        In the order of the file.
    key : str
        Of everything the tensors are computed from.
    metadata : mapping, optional
        Of the safetensors header.
    """

    def __init__(self, directory: Path, tensors: Shapes, key: str, metadata: Mapping[str, str] | None = None) -> None:
        header = encode_header(tensors, metadata)
        entries: dict[str, Any] = json.loads(header[8:])
        self._places = {
            name: (len(header) + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in entries.items()
            if name != "__metadata__"
        }
        self.names = list(self._places)
        size = len(header) + sum(nbytes for _, nbytes in self._places.values())
        self.directory, self.path = directory, directory / WEIGHTS
        self.finished: set[str] = set()
        self._lock = threading.Lock()
        manifest = json.dumps({"key": key, "header": zlib.crc32(header), "bytes": size})
        if not self._matches(manifest, size):
            self._begin(manifest, header, size)
        self._file = os.open(self.path, os.O_RDWR)
        self._read_finished()
        self._log = (directory / FINISHED).open("a", encoding="utf-8")
        self._log.write("\n")  # a line that was cut off would swallow the next one

    def _matches(self, manifest: str, size: int) -> bool:
        try:
            return (self.directory / MANIFEST).read_text() == manifest and self.path.stat().st_size == size
        except (OSError, UnicodeDecodeError):
            return False

    def _begin(self, manifest: str, header: bytes, size: int) -> None:
        for path in self.directory.iterdir():
            path.unlink()
        with self.path.open("wb") as file:
            file.write(header)
            file.truncate(size)
        temporary = self.directory / f"{MANIFEST}.new"
        temporary.write_text(manifest)
        temporary.rename(self.directory / MANIFEST)

    def _read_finished(self) -> None:
        """Groups whose bytes are those that were written; a line that was cut off counts for nothing."""
        with suppress(OSError):
            for line in (self.directory / FINISHED).read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError, AttributeError):
                    sums = json.loads(line)
                    if all(self._checksum(name) == crc for name, crc in sums.items()):
                        self.finished |= sums.keys()

    def _checksum(self, name: str) -> int:
        offset, nbytes = self._places[name]
        crc = 0
        for start in range(offset, offset + nbytes, _READ_BYTES):
            crc = zlib.crc32(os.pread(self._file, min(_READ_BYTES, offset + nbytes - start), start), crc)
        return crc

    def write(self, names: Iterable[str], parts: Iterable[tuple[str, NDArray[Any]]]) -> None:
        """Write a group of tensors; any thread may.

        Parameters
        ----------
        names : iterable of str
            The group's tensors.
        parts : iterable of (str, ndarray)
            Pieces of them, each tensor's in order.

        Raises
        ------
        ValueError
            A tensor has another number of bytes than its shape says.
        """
        written = {name: (0, 0) for name in names}
        for name, part in parts:
            data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
            done, crc = written[name]
            offset, nbytes = self._places[name]
            if done + len(data) <= nbytes:
                _write_all(self._file, data, offset + done)
            written[name] = done + len(data), zlib.crc32(data, crc)
        for name, (done, _) in written.items():
            if done != self._places[name][1]:
                raise ValueError(f"{name}: expected {self._places[name][1]} bytes, got {done}")
        with self._lock:
            self._log.write(json.dumps({name: crc for name, (_, crc) in written.items()}) + "\n")
            self._log.flush()
            self.finished |= written.keys()

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if not self._log.closed:
            self._log.close()
            os.close(self._file)

    def publish(self, target: Path) -> None:
        """Give the complete file a name of its own."""
        unfinished = self._places.keys() - self.finished
        if unfinished:
            raise ValueError(f"{len(unfinished)} tensors are not written, {min(unfinished)} among them")
        self.close()
        link_or_copy(self.path, target)


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
