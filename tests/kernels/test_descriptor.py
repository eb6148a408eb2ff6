"""Stream descriptions mean the same to Python and to the kernels."""

from __future__ import annotations

import re

import pytest

from minicache_trt.compression.segment import MODEL
from minicache_trt.config import ModelConfig
from minicache_trt.contract import plan_layout
from minicache_trt.descriptor import stream_descriptor, stream_numbers
from minicache_trt.kernels.library import KernelError, KernelLibrary, StreamShape
from tests.support.plans import all_plans

CONFIG = ModelConfig("llama", 4, 64, 64, 6, 2, 80, 100, 4096)


@pytest.mark.parametrize("name", all_plans(CONFIG))
def test_every_stream_can_be_described(host_library: KernelLibrary, name: str) -> None:
    for layout in plan_layout(all_plans(CONFIG)[name], CONFIG):
        for member in range(len(layout.stream.layers)):
            assert StreamShape(host_library, layout, member).address


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 9, "version 9"),
        (2, 7, "merge: expected 0 to 3, got 7"),
        (6, 5, "member: expected 0 to"),
        (9, 40, "sink_tokens"),
        (15, 24, "segments[0].length: expected a multiple of 16, got 24"),
        (16, 12, "segments[0].format"),
    ],
)
def test_bad_descriptions_are_refused(host_library: KernelLibrary, place: int, value: int, message: str) -> None:
    layout = plan_layout(all_plans(CONFIG)["minicache4"], CONFIG)[0]
    assert layout.segments[0].segment.kind != MODEL
    integers = stream_descriptor(layout)
    integers[place] = value
    with pytest.raises(KernelError, match=re.escape(message)):
        host_library.create_shape(integers, stream_numbers(layout), CONFIG.num_kv_heads, CONFIG.head_dim)
