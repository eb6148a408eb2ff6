"""Plans: reading, writing, validation messages."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from minicache_trt.compression.methods import METHODS, MethodOptions, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.plan_json import load_plan, plan_from_dict, save_plan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError
from tests.support.plans import full_codec_plans, mixed_plan
from tests.support.strategies import streams

CONFIG = ModelConfig("llama", 4, 64, 64, 4, 2, 64, 100, 4096)
FULL = full_codec_plans(CONFIG)


@pytest.mark.parametrize("method", METHODS)
def test_plans_survive_a_round_trip(tmp_path: Path, method: str) -> None:
    plan = make_plan(CONFIG, method)
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert (tmp_path / "plan.safetensors").exists() == bool(plan.matrices)


@pytest.mark.parametrize("name", FULL)
def test_matrices_survive_a_round_trip(tmp_path: Path, name: str) -> None:
    plan = FULL[name]
    save_plan(plan, tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json").validate(CONFIG)
    assert loaded == plan and loaded.matrices.keys() == plan.matrices.keys()
    for tensor, value in plan.matrices.items():
        np.testing.assert_array_equal(loaded.matrices[tensor], value)
        assert loaded.matrices[tensor].dtype == value.dtype


@settings(max_examples=100, deadline=None)
@given(streams(CONFIG))
def test_any_stream_survives_a_round_trip(stream: Stream) -> None:
    plan = CompressionPlan("custom", (stream,))
    assert plan_from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_rank_beyond_the_group_or_the_kernels_is_refused() -> None:
    with pytest.raises(UserError, match=r"lengths add up to 80, expected at most layers \* head_dim 64"):
        CompressionPlan("custom", (Stream("key", (0,), (Segment(80),), merge="linear"),)).validate(CONFIG)
    with pytest.raises(ValueError, match="segments: expected at most 256 components, got 272"):
        Stream("key", (0, 1, 2, 3), (Segment(272),), merge="linear")
    with pytest.raises(ValueError, match=r"layers: expected 1 to 8 layer\(s\) for merge 'linear'"):
        Stream("key", tuple(range(9)), (Segment(64),), merge="linear")


def broken(path: str, value: Any) -> dict[str, Any]:
    """The mixed plan as JSON data with one place changed (or removed, for ``...``)."""
    data = json.loads(json.dumps(mixed_plan(CONFIG).to_dict()))
    target, keys = data, [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in keys[:-1]:
        target = target[key]
    if value is ...:
        del target[keys[-1]]
    else:
        target[keys[-1]] = copy.deepcopy(value)
    return data


CASES = [
    ("streams", "none", "streams: expected list"),
    ("streams.0.part", "keys", "streams[0].part: expected one of key, value"),
    ("streams.0.part", ..., "streams[0]: field 'part' is missing"),
    ("streams.0.layers", [0], "streams[0].layers: expected 2 to 8 layer(s) for merge 'slerp', got [0]"),
    ("streams.1.layers", [1, 2], "streams[1].layers: expected 1 layer(s) for merge 'none', got [1, 2]"),
    ("streams.1.merge", "mean", "streams[1].layers: expected 2 to 8 layer(s) for merge 'mean'"),
    ("streams.0.layers", [3, 0], "streams[0].layers: expected ascending"),
    ("streams.0.layers", [0, "3"], "streams[0].layers[1]: expected int"),
    ("streams.0.layers", [0, 9], "streams[0].layers: layer 9 does not exist"),
    ("streams.1.layers", [0], "the keys of layer 0 are in streams[0] and in streams[1]"),
    ("streams.0.merge", "sum", "streams[0].merge: expected one of"),
    ("streams.0.t", 1.5, "streams[0].t: expected a number in [0, 1]"),
    ("streams.0.t", "0.6", "streams[0].t: expected int or float"),
    ("streams.0.norm", "layer", "streams[0].norm: expected one of"),
    ("streams.0.retained", 40, "streams[0].retained: expected 0 to 32"),
    ("streams.0.retained", True, "streams[0].retained: expected int"),
    ("streams.1.retained", 2, "streams[1].retained: expected 0 for merge 'none'"),
    ("streams.0.sink_tokens", 3, "streams[0].sink_tokens: expected 0 to retained (2)"),
    ("streams.0.basis", "rope", "streams[0].basis: expected one of post_rope, pre_rope"),
    ("streams.3.basis", "pre_rope", "streams[3].basis: expected 'post_rope' for values"),
    ("streams.0.align", 1, "streams[0].align: expected bool, got 1"),
    ("streams.0.align", True, "streams[0] needs a tensor align"),
    ("streams.0.match_heads", "yes", "streams[0].match_heads: expected bool"),
    ("streams.0.match_heads", True, "streams[0] needs a tensor head_map"),
    ("streams.0.merge", "linear", "streams[0] needs a tensor decode"),
    ("streams.0.retention", "best", "streams[0].retention: expected one of topk, threshold, paper_literal"),
    ("streams.0.gamma", -0.1, "streams[0].gamma: expected a number in [0, 1], got -0.1"),
    ("streams.0.gamma", None, "streams[0].gamma: expected int or float"),
    ("streams.0.retained_format", "int2", "streams[0].retained_format: expected one of model, fp8, int8, int4"),
    ("streams.0.residual", "g2", "streams[0].residual: expected one of none, int8, int4, int2"),
    ("streams.3.residual", "int2", "streams[3].residual: expected 'none' unless merge is 'slerp'"),
    ("streams.0.colour", "red", "streams[0]: unknown field 'colour'"),
    ("streams.0.segments.0.length", 24, "streams[0].segments[0].length: expected a positive multiple of 16"),
    ("streams.0.segments.0.format", "int3", "streams[0].segments[0].format: expected one of"),
    ("streams.0.segments.0.axis", "head", "streams[0].segments[0].axis: expected one of"),
    ("streams.0.segments.0.transform", "dct", "streams[0].segments[0].transform: expected one of none, hadamard"),
    ("streams.0.segments.0.transform", True, "streams[0].segments[0].transform: expected str"),
    ("streams.3.segments.1.format", "g4", "streams[3].segments: expected gaussian segments only"),
    ("streams.0.segments", [{"length": 64, "format": "g4"}], "streams[0].segments: expected no gaussian ones"),
    ("streams.1.segments", [{"length": 64, "format": "drop"}], "streams[1].segments: expected at least one that is"),
    ("streams.1.segments", [{"length": 16}] * 5, "streams[1].segments: expected 1 to 4 segments, got 5"),
    ("streams.0.segments.0.length", 32, "streams[0].segments: lengths add up to 80, expected head_dim 64"),
    ("streams.4", ..., "no stream holds value 2, value 3"),
]


@pytest.mark.parametrize(("path", "value", "message"), CASES)
def test_messages_name_the_field(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_from_dict(broken(path, value)).validate(CONFIG)
    assert message in caught.value.cause
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", [-1, 3, 4, 99])
def test_merge_start_out_of_range(start: int) -> None:
    with pytest.raises(UserError, match=r"merge start .* is out of range: the model has 4 layers"):
        make_plan(CONFIG, "minicache", MethodOptions(merge_start=start))


def test_an_odd_last_layer_stays_single() -> None:
    config = ModelConfig("llama", 7, 64, 64, 4, 2, 64, 100, 4096)
    layers = [s.layers for s in make_plan(config, "minicache", MethodOptions(merge_start=2)).streams if s.part == "key"]
    assert layers == [(0,), (1,), (2, 3), (4, 5), (6,)]


def test_unknown_method_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'minicache4'"):
        make_plan(CONFIG, "minicach4")


def test_options_of_merging_are_refused_elsewhere() -> None:
    with pytest.raises(UserError, match="'kivi4' merges no layers, so it takes no merge-start"):
        make_plan(CONFIG, "kivi4", MethodOptions(merge_start=2))


def test_two_layers_are_merged_and_one_is_refused() -> None:
    two = ModelConfig("llama", 2, 64, 64, 4, 2, 64, 100, 4096)
    assert [stream.layers for stream in make_plan(two, "minicache").streams] == [(0, 1), (0, 1)]
    with pytest.raises(UserError, match="one layer"):
        make_plan(ModelConfig("llama", 1, 64, 64, 4, 2, 64, 100, 4096), "minicache")
