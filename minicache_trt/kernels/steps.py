"""A step's inputs on the device: every int32 tensor of a batch in one buffer, moved by one copy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.kernels.attention import StepTensors
from minicache_trt.runtime.batch import Batch

_ALIGNMENT = 64
"""int32 numbers between the beginnings of two tensors are a multiple of this."""


@dataclass(frozen=True)
class StepShape:
    """Everything about a step that shapes of tensors and launches depend on.

    The first ``decodes`` sequences have one token each; ``rows``: rows of logits.
    """

    tokens: int
    sequences: int
    decodes: int
    full_columns: int
    compressed_columns: int
    longest_chunk: int
    rows: int

    @classmethod
    def of(cls, batch: Batch) -> StepShape:
        """A batch as it is."""
        decodes = len(batch.decode_rows)
        chunks = np.diff(batch.query_start[decodes:])
        return cls(
            tokens=batch.num_tokens,
            sequences=len(batch.context_len),
            decodes=decodes,
            full_columns=batch.full_table.shape[1],
            compressed_columns=batch.compressed_table.shape[1],
            longest_chunk=int(chunks.max(initial=0)),
            rows=len(batch.logit_index),
        )

    @classmethod
    def of_decodes(cls, sequences: int, full_columns: int, compressed_columns: int) -> StepShape:
        """A step of one-token sequences, all with logits."""
        return cls(sequences, sequences, sequences, full_columns, compressed_columns, 0, sequences)

    def fields(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the contract's tensors that kernels and decoder take."""
        return {
            "input_ids": (self.tokens,),
            "positions": (self.tokens,),
            "query_start": (self.sequences + 1,),
            "context_len": (self.sequences,),
            "compressed_len": (self.sequences,),
            "slot_mapping": (self.tokens,),
            "full_table": (self.sequences, self.full_columns),
            "compressed_table": (self.sequences, self.compressed_columns),
            "logit_index": (self.rows,),
        }


class StepInputs:
    """The int32 tensors of steps of one shape, at fixed addresses on a device.

    Until the first `load`, and behind what it fills, every sequence is *padding*: a token 0 at position 0 with nothing
    before it, written to block 0, which no request owns, and reading only itself there. So a captured step runs any
    batch of at most its shape.

    Parameters
    ----------
    shape : StepShape
    device : torch.device
    """

    def __init__(self, shape: StepShape, device: torch.device) -> None:
        self.shape = shape
        fields = shape.fields()
        sizes = {name: int(np.prod(extent)) for name, extent in fields.items()}
        starts = dict(zip(sizes, np.cumsum([0, *map(_padded, sizes.values())]).tolist(), strict=False))
        total = sum(map(_padded, sizes.values()))
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        flat = self._host.numpy()
        self._arrays: dict[str, NDArray[np.int32]] = {
            name: flat[starts[name] : starts[name] + sizes[name]].reshape(fields[name]) for name in fields
        }
        self.tensors: dict[str, Tensor] = {
            name: self._device[starts[name] : starts[name] + sizes[name]].view(fields[name]) for name in fields
        }
        self._pad()
        self._device.copy_(self._host)

    def load(self, batch: Batch) -> None:
        """Fill in a batch: of this shape exactly, or decodes alone and at most as many, with tables at most as wide.

        The copy is asynchronous; the next `load` must not come before the step's results have been waited for.
        """
        exact = StepShape.of(batch) == self.shape
        if not exact:
            self._pad()
        for name, array in self._arrays.items():
            if exact or name != "logit_index":
                value = getattr(batch, name)
                array[tuple(slice(extent) for extent in value.shape)] = value
        self._device.copy_(self._host, non_blocking=True)

    def attention(self, compresses: bool) -> StepTensors:
        """What attention takes of them; ``compresses``: whether there is a compressed tier."""
        tensors = self.tensors
        return StepTensors(
            query_start=tensors["query_start"],
            context_len=tensors["context_len"],
            slot_mapping=tensors["slot_mapping"],
            full_table=tensors["full_table"],
            compressed_len=tensors["compressed_len"] if compresses else None,
            compressed_table=tensors["compressed_table"] if compresses else None,
            decodes=self.shape.decodes,
            longest_chunk=self.shape.longest_chunk,
        )

    def _pad(self) -> None:
        for array in self._arrays.values():
            array.fill(0)
        self._arrays["context_len"].fill(1)
        for name in ("query_start", "logit_index"):
            array = self._arrays[name]
            array[:] = np.arange(len(array))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
