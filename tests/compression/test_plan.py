"""Plans: reading, writing, validation messages."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from minicache_trt.compression.methods import METHODS, MethodOptions, make_plan
from minicache_trt.compression.plan_json import load_plan, plan_from_dict, save_plan
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError
from tests.support.plans import mixed_plan

CONFIG = ModelConfig("llama", 4, 64, 64, 4, 2, 64, 100, 4096)


@pytest.mark.parametrize("method", METHODS)
def test_plans_survive_a_round_trip(tmp_path: Path, method: str) -> None:
    plan = make_plan(CONFIG, method)
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


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
    ("streams.0.layers", [0], "streams[0].layers: expected 2 layer(s)"),
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
    ("streams.0.colour", "red", "streams[0]: unknown field 'colour'"),
    ("streams.0.segments.0.length", 24, "streams[0].segments[0].length: expected a positive multiple of 16"),
    ("streams.0.segments.0.format", "int3", "streams[0].segments[0].format: expected one of"),
    ("streams.0.segments.0.axis", "head", "streams[0].segments[0].axis: expected one of"),
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
