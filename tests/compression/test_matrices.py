"""The plan's constants: what is missing, wrong or damaged is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache_trt.compression.matrices import load_matrices, required, save_matrices
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.plan_json import load_plan, save_plan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.compression.stream_constants import StreamConstants
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError
from tests.support.plans import completed, full_codec_plans

CONFIG = ModelConfig("llama", 4, 64, 64, 4, 2, 64, 100, 4096)
PLAN = completed(
    CONFIG,
    Stream("key", (0, 1), (Segment(32, "g4"),), merge="linear", align=True, match_heads=True),
    Stream("value", (0,), (Segment(32, "int4"),), merge="linear"),
)
Tensors = dict[str, Any]


def _scale(name: str, factor: float) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: (factor * tensors[name]).astype(tensors[name].dtype)})


def _poison(name: str, value: float) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].flat[3] = value

    return change


CASES: dict[str, tuple[Callable[[Tensors], Any], list[str]]] = {
    "missing": (
        lambda t: t.pop("streams.0.sigma"),
        ["plan: streams[0] needs a tensor sigma", "streams.0.sigma [2, 32]"],
    ),
    "missing encode": (lambda t: t.pop("streams.1.encode"), ["streams[1] needs a tensor encode", "[2, 64, 32]"]),
    "of no use": (
        lambda t: t.update({"streams.1.sigma": np.ones((2, 32), np.float32)}),
        ["tensor streams.1.sigma belongs to nothing in the plan"],
    ),
    "of no stream": (
        lambda t: t.update({"streams.99.mean": np.ones(3, np.float32)}),
        ["tensor streams.99.mean belongs to no stream"],
    ),
    "stray name": (lambda t: t.update({"mean": np.ones(3, np.float32)}), ["tensor mean belongs to no stream"]),
    "wrong shape": (
        lambda t: t.update({"streams.0.mean": np.ones((2, 64), np.float32)}),
        ["tensor streams.0.mean: expected float32 [2, 128], got float32 [2, 64]"],
    ),
    "wrong type": (
        lambda t: t.update({"streams.0.head_map": t["streams.0.head_map"].astype(np.int64)}),
        ["tensor streams.0.head_map: expected int32 [2, 2], got int64 [2, 2]"],
    ),
    "half precision": (
        lambda t: t.update({"streams.1.decode": t["streams.1.decode"].astype(np.float16)}),
        ["tensor streams.1.decode: expected float32"],
    ),
    "not orthogonal": (_scale("streams.0.align", 1.01), ["tensor streams.0.align: expected orthogonal matrices"]),
    "no permutation": (
        lambda t: t.update({"streams.0.head_map": np.zeros((2, 2), np.int32)}),
        ["tensor streams.0.head_map: expected a permutation"],
    ),
    "no deviation": (_poison("streams.0.sigma", 0.0), ["tensor streams.0.sigma: expected positive numbers"]),
    "not a number": (_poison("streams.0.decode", np.nan), ["tensor streams.0.decode: expected finite numbers"]),
    "infinite": (_poison("streams.1.mean", np.inf), ["tensor streams.1.mean: expected finite numbers"]),
}


@pytest.mark.parametrize("case", CASES)
def test_messages_name_the_tensor(tmp_path: Path, case: str) -> None:
    change, parts = CASES[case]
    tensors = dict(PLAN.matrices)
    change(tensors)
    save_plan(replace(PLAN, matrices=tensors), tmp_path / "plan.json")
    with pytest.raises(UserError) as caught:
        load_plan(tmp_path / "plan.json").validate(CONFIG)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_of_matrices(tmp_path: Path) -> None:
    save_plan(PLAN, tmp_path / "plan.json")
    file = tmp_path / "plan.safetensors"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"x" * 99):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged") as caught:
            load_plan(tmp_path / "plan.json")
        assert str(file) in caught.value.cause and "calibrate it again" in caught.value.remedy
    file.unlink()
    with pytest.raises(UserError, match="cannot read its matrices") as caught:
        load_plan(tmp_path / "plan.json")
    assert "beside plan.json" in caught.value.remedy
    with pytest.raises(UserError, match="cannot write"):
        save_matrices(PLAN.matrices, tmp_path / "nowhere" / "plan.safetensors")


def test_views_are_saved_as_they_look(tmp_path: Path) -> None:
    square = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_matrices({"t": square.T, "b": np.broadcast_to(square[0], (2, 4))}, tmp_path / "m.safetensors")
    loaded = load_matrices(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(loaded["t"], square.T)
    np.testing.assert_array_equal(loaded["b"], square[[0, 0]])


@pytest.mark.parametrize("name", full_codec_plans(CONFIG))
def test_every_stream_has_exactly_the_constants_it_needs(name: str) -> None:
    plan = full_codec_plans(CONFIG)[name]
    for index, stream in enumerate(plan.streams):
        constants = StreamConstants.of(plan, index)
        needed = required(stream, CONFIG)
        for field in ("head_map", "align", "encode", "decode", "mean", "sigma"):
            tensor = getattr(constants, field)
            assert (tensor is not None) == (field in needed)
            if tensor is not None:
                assert tuple(tensor.shape) == needed[field][1]


def test_a_plan_without_matrices_has_no_constants() -> None:
    assert StreamConstants.of(CompressionPlan("custom"), 0) == StreamConstants()
