"""Steps as a TensorRT engine takes them: apart where it has no plugin, with the inputs that are shapes alone."""

from __future__ import annotations

import numpy as np

from minicache_trt.kernels.steps import StepShape
from minicache_trt.runtime.batch import Batch

Dims = tuple[int, ...]


def split_step(batch: Batch) -> list[Batch]:
    """The decodes of a step, then each of its prefill chunks: together they compute what the step does.

    Sequences see nothing of one another within a step, so the order does not matter; rows of logits keep theirs.
    """
    decodes = len(batch.decode_rows)
    bounds = [(0, decodes)] if decodes else []
    bounds += [(s, s + 1) for s in range(decodes, len(batch.context_len))]
    return [_sequences(batch, first, last, decodes) for first, last in bounds]


def _sequences(batch: Batch, first: int, last: int, decodes: int) -> Batch:
    begin, end = int(batch.query_start[first]), int(batch.query_start[last])
    wanted = batch.logit_index[(batch.logit_index >= begin) & (batch.logit_index < end)]
    own, tokens = slice(first, last), slice(begin, end)
    chunk = first >= decodes
    none = np.zeros(0, np.int32)
    return Batch(
        input_ids=batch.input_ids[tokens],
        positions=batch.positions[tokens],
        query_start=batch.query_start[first : last + 1] - np.int32(begin),
        context_len=batch.context_len[own],
        compressed_len=batch.compressed_len[own],
        slot_mapping=batch.slot_mapping[tokens],
        full_table=batch.full_table[own],
        compressed_table=batch.compressed_table[own],
        full_work=none,
        compressed_work=none,
        decode_rows=none if chunk else np.arange(end - begin, dtype=np.int32),
        prefill_rows=np.arange(end - begin, dtype=np.int32)[None] if chunk else np.zeros((0, 0), np.int32),
        prefill_past=none,
        logit_index=wanted - np.int32(begin),
    )


def count_shapes(shape: StepShape, plugins: bool) -> dict[str, Dims]:
    """Shapes of the inputs whose contents nobody reads.

    Without plugins only the width of ``prefill_rows`` says anything: the longest chunk, 1 for decodes.
    """
    chunks = shape.sequences - shape.decodes
    result: dict[str, Dims] = {"full_work": (1,), "compressed_work": (1,)}
    if plugins:
        rows = (chunks, shape.longest_chunk) if chunks else (0, 0)
        return result | {"decode_rows": (shape.decodes,), "prefill_rows": rows, "prefill_past": (0,)}
    return result | {"decode_rows": (1,), "prefill_rows": (1, max(1, shape.longest_chunk)), "prefill_past": (1,)}
