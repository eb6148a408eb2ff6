"""A graph's weights, mapped from their files for the parser, and out of memory again where nobody reads them."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import onnx


class MappedWeights:
    """External data of a graph by address.

    The parser maps external data too, but a page that was read once then counts as the process's memory until the
    network is gone, beside the copies the builder makes. Here `release` gives such pages back; they are read from the
    file again where they are needed.

    Parameters
    ----------
    graph : Path
        Its external data are relative to its directory.

    Raises
    ------
    OSError
        A file cannot be mapped.
    """

    def __init__(self, graph: Path) -> None:
        self.model = onnx.load(graph, load_external_data=False)
        """The graph without its weights."""
        self._files: dict[str, mmap.mmap] = {}
        self._addresses: dict[str, int] = {}
        self._directory = graph.parent

    def load(self, parser: Any) -> bool:
        """Give a parser the graph and its weights; False if it refuses one of them."""
        if not parser.load_model_proto(self.model.SerializeToString(), str(self._directory / "graph.onnx")):
            return False
        for tensor in self.model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            address = self._address(entries["location"]) + int(entries.get("offset", 0))
            if not parser.load_initializer(tensor.name, address, int(entries["length"])):
                return False
        return True

    def release(self) -> None:
        """Give back the pages that were read; they can be read again."""
        for file in self._files.values():
            if hasattr(file, "madvise"):
                file.madvise(mmap.MADV_DONTNEED)

    def _address(self, location: str) -> int:
        if location not in self._files:
            with (self._directory / location).open("rb") as file:
                self._files[location] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._addresses[location] = np.frombuffer(self._files[location], np.uint8).ctypes.data
        return self._addresses[location]
