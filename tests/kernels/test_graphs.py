"""Buckets, padding and replay of captured steps, with a recorder that captures nothing."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from torch import Tensor

from minicache_trt.config import BuildConfig
from minicache_trt.kernels.graphs import CompressGraphs, DecodeGraphs, GraphLimits, Run, bucket, run_again, wide_bucket
from minicache_trt.kernels.steps import StepInputs, StepShape
from minicache_trt.runtime.batch import Batch
from tests.support.steps import step

CPU = torch.device("cpu")
LIMITS = GraphLimits(sequences=20, full_columns=6, compressed_columns=24)


class Recorder:
    """Counts what is captured and what is replayed."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run: Run) -> Run:
        self.captured += 1

        def replay() -> Tensor:
            self.replayed += 1
            return run()

        return replay


def test_buckets_hold_what_they_are_for() -> None:
    for limit in (1, 5, 20, 128):
        sizes = {bucket(count, limit) for count in range(1, limit + 1)}
        assert max(sizes) == limit and len(sizes) <= 4 + limit // 8 + 1
        for count in range(1, limit + 1):
            assert count <= bucket(count, limit) <= min(max(2 * count, count + 8), limit)
            assert count <= wide_bucket(count, limit) <= min(2 * count, limit)
    assert [bucket(n, 128) for n in (1, 2, 3, 5, 8, 9, 17, 128)] == [1, 2, 4, 8, 8, 16, 24, 128]


def decodes(*lengths: tuple[int, int]) -> Batch:
    """Sequences given as (length after the step, compressed length)."""
    return step([(n, c, 1) for n, c in lengths])


def test_decodes_of_one_bucket_share_a_capture() -> None:
    record = Recorder()
    graphs = DecodeGraphs(LIMITS, lambda tensors: tensors.tensors["context_len"][:, None].float(), record, CPU)
    for lengths in ([(70, 0), (5, 0), (130, 64)], [(71, 0), (6, 0), (131, 64), (9, 0)], [(72, 0), (7, 0), (132, 64)]):
        logits = graphs(decodes(*lengths))
        assert logits[:, 0].tolist() == [n for n, _ in lengths]
    assert (record.captured, record.replayed, len(graphs)) == (1, 3, 1)
    graphs(decodes(*[(5, 0)] * 5))
    graphs(decodes((400, 320)))
    assert record.captured == len(graphs) == 3


def test_limits_are_those_of_the_engine() -> None:
    build = BuildConfig(max_batch_size=3, max_seq_len=1000)
    assert GraphLimits.of(build, compresses=True) == GraphLimits(3, 16, 16)
    assert GraphLimits.of(build, compresses=False) == GraphLimits(3, 16, 1)


def check_padding(tensors: StepInputs, used: int) -> None:
    """Sequences from ``used`` on read one token of block 0 and write there."""
    values = {name: tensor.numpy() for name, tensor in tensors.tensors.items()}
    assert (values["context_len"][used:] == 1).all()
    for name in ("input_ids", "positions", "compressed_len", "slot_mapping", "full_table", "compressed_table"):
        assert not values[name][used:].any(), name
    count = tensors.shape.sequences
    assert values["query_start"].tolist() == list(range(count + 1))
    assert values["logit_index"].tolist() == list(range(count))


def test_what_a_batch_does_not_fill_is_padding() -> None:
    tensors = StepInputs(StepShape.of_decodes(4, 3, 2), CPU)
    check_padding(tensors, 0)
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.tensors.items()}
    for batch in (decodes((180, 64), (5, 0), (70, 0), (1, 0)), decodes((190, 128), (6, 0)), decodes((3, 0))):
        tensors.load(batch)
        used = len(batch.context_len)
        check_padding(tensors, used)
        for name, tensor in tensors.tensors.items():
            value = getattr(batch, name)
            if name != "logit_index":
                assert (tensor.numpy()[tuple(map(slice, value.shape))] == value).all(), name
            if name.endswith("table"):
                assert not tensor[:used, value.shape[1] :].any(), name
    assert addresses == {name: tensor.data_ptr() for name, tensor in tensors.tensors.items()}


def test_a_step_with_chunks_is_loaded_as_it_is() -> None:
    batch = step([(70, 0, 1), (200, 64, 30), (90, 0, 90)])
    tensors = StepInputs(StepShape.of(batch), CPU)
    tensors.load(batch)
    for name, tensor in tensors.tensors.items():
        assert (tensor.numpy() == getattr(batch, name)).all(), name
        assert tensor.data_ptr() % 16 == 0
    assert (tensors.shape.decodes, tensors.shape.sequences, tensors.shape.longest_chunk) == (1, 3, 90)


@pytest.mark.parametrize("compresses", [True, False])
def test_kernels_get_the_addresses(compresses: bool) -> None:
    batch = step([(70, 0, 1), (200, 64, 30)])
    tensors = StepInputs(StepShape.of(batch), CPU)
    tensors.load(batch)
    struct = tensors.attention(compresses).struct()
    assert (struct.tokens, struct.sequences, struct.decodes, struct.longest_chunk) == (31, 2, 1, 30)
    assert (struct.full_columns, struct.compressed_columns) == (3, 1 if compresses else 0)
    assert (struct.compressed_len is not None) == (struct.compressed_table is not None) == compresses
    read = ctypes.cast(struct.context_len, ctypes.POINTER(ctypes.c_int32))
    assert [read[0], read[1]] == [70, 200]


def test_blocks_are_compressed_in_padded_turns() -> None:
    calls: list[list[list[int]]] = []

    def compute(*columns: Tensor) -> None:
        calls.append([column.tolist() for column in columns])

    record = Recorder()
    graphs = CompressGraphs(compute, record, CPU, limit=4)
    source, target, index = (np.arange(1, 7, dtype=np.int32) + start for start in (0, 10, 20))
    graphs(source, target, index)
    assert calls == [
        [[1, 2, 3, 4], [11, 12, 13, 14], [21, 22, 23, 24]],
        [[5, 6], [15, 16], [25, 26]],
    ]
    graphs(source[:3], target[:3], index[:3])
    assert calls[-1] == [[1, 2, 3, 0], [11, 12, 13, 0], [21, 22, 23, 0]]
    assert (record.captured, record.replayed) == (2, 3)


def test_the_recorder_of_the_host_captures_nothing() -> None:
    numbers = iter((1.0, 2.0))
    replay = run_again(lambda: torch.tensor(next(numbers)))
    assert (replay().item(), replay().item()) == (1.0, 2.0)
