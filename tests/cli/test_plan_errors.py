"""Plan files that do not fit, and the plan verb."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache_trt.checkpoint import resolve_config
from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.plan_json import save_plan
from minicache_trt.engine_directory import read_engine
from tests.cli.command import Invoke, assert_refused, run_process

Refused = Callable[..., None]
Plan = dict[str, Any]


def _stream(plan: Plan, index: int, **changes: Any) -> None:
    plan["streams"][index] |= changes


WRONG_PLANS: dict[str, tuple[Callable[[Plan], Any], list[str]]] = {
    "unknown field": (lambda plan: plan.update(colour="red"), ["plan: unknown field 'colour'", "method, streams"]),
    "missing field": (lambda plan: plan.pop("streams"), ["field 'streams' is missing"]),
    "streams is an object": (lambda plan: plan.update(streams={}), ["streams: expected list, got {}"]),
    "stream is a number": (lambda plan: plan["streams"].append(7), ["streams[12]: expected dict, got 7"]),
    "unknown field of a stream": (lambda plan: _stream(plan, 1, bits=4), ["streams[1]: unknown field 'bits'"]),
    "missing field of a stream": (lambda plan: plan["streams"][0].pop("part"), ["streams[0]: field 'part'"]),
    "wrong type": (lambda plan: _stream(plan, 4, t="0.5"), ["streams[4].t: expected int or float, got '0.5'"]),
    "number for a truth": (lambda plan: _stream(plan, 4, align=1), ["streams[4].align: expected bool, got 1"]),
    "truth for a number": (lambda plan: _stream(plan, 4, retained=True), ["streams[4].retained: expected int"]),
    "layer is text": (lambda plan: _stream(plan, 0, layers=["0"]), ["streams[0].layers[0]: expected int, got '0'"]),
    "no layers": (lambda plan: _stream(plan, 0, layers=[]), ["streams[0].layers: expected 1 layer(s)"]),
    "unknown part": (lambda plan: _stream(plan, 0, part="query"), ["streams[0].part: expected one of key, value"]),
    "unknown merge": (lambda plan: _stream(plan, 0, merge="sum"), ["streams[0].merge", "none, mean, slerp"]),
    "out of range": (lambda plan: _stream(plan, 4, t=-0.1), ["streams[4].t: expected a number in [0, 1], got -0.1"]),
    "layer twice": (
        lambda plan: _stream(plan, 2, layers=[0]),
        ["keys of layer 0 are in streams[0] and in streams[2]", "once per part"],
    ),
    "layer twice in a stream": (lambda plan: _stream(plan, 4, layers=[2, 2]), ["ascending, distinct layers"]),
    "layer that does not exist": (
        lambda plan: _stream(plan, 0, layers=[4]),
        ["streams[0].layers: layer 4 does not exist", "layers 0 to 3"],
    ),
    "negative layer": (lambda plan: _stream(plan, 0, layers=[-1]), ["layer -1 does not exist"]),
    "layer without a stream": (lambda plan: plan["streams"].pop(3), ["no stream holds value 1"]),
    "segments too short": (
        lambda plan: _stream(plan, 0, segments=[]),
        ["streams[0].segments: expected 1 to 4 segments, got 0"],
    ),
    "segments too long": (
        lambda plan: _stream(plan, 0, segments=[{"length": 16}, {"length": 16}]),
        ["streams[0].segments: lengths add up to 32, expected head_dim 16"],
    ),
    "odd segment": (lambda plan: _stream(plan, 0, segments=[{"length": 8}]), ["segments[0].length", "multiple of 16"]),
    "unknown format": (
        lambda plan: _stream(plan, 0, segments=[{"length": 16, "format": "int3"}]),
        ["segments[0].format: expected one of model, fp8, int8, int4, int2, g4, g3, g2, g1, drop, got 'int3'"],
    ),
}


@pytest.fixture
def plan_data(checkpoint: Path) -> Plan:
    """Streams 0 to 3 are single layers, 4 and 5 merge layers 2 and 3."""
    return json.loads(json.dumps(make_plan(resolve_config(str(checkpoint)), "minicache").to_dict()))


@pytest.mark.parametrize("change", WRONG_PLANS)
def test_wrong_plan(refused: Refused, checkpoint: Path, workspace: Path, plan_data: Plan, change: str) -> None:
    apply, parts = WRONG_PLANS[change]
    if change == "stream is a number":
        plan_data["streams"] *= 2
    apply(plan_data)
    (workspace / "plan.json").write_text(json.dumps(plan_data))
    refused(["build", "-m", checkpoint, "-o", "engine", "--plan", "plan.json"], *parts)
    refused(["plan", "-m", checkpoint, "--plan", "plan.json"], *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["cannot read plan.json: No such file or directory"]),
        (b"{'method'", ["plan.json is not JSON"]),
        (b"", ["plan.json is not JSON"]),
        (b"\xff\xff", ["cannot read plan.json"]),
        (b"[]", ["plan: expected dict, got []"]),
        (b"7", ["plan: expected dict, got 7"]),
    ],
)
def test_file_that_is_no_plan(
    refused: Refused, checkpoint: Path, workspace: Path, content: bytes | None, parts: list[str]
) -> None:
    if content is not None:
        (workspace / "plan.json").write_bytes(content)
    refused(["build", "-m", checkpoint, "-o", "engine", "--plan", "plan.json"], *parts)


@pytest.mark.parametrize(
    "flags", [["--method", "kivi4"], ["--merge-start", "0"], ["--t", "0.6"], ["--kv-format", "int4"]]
)
def test_plan_and_flags(refused: Refused, checkpoint: Path, workspace: Path, plan_data: Plan, flags: list[str]) -> None:
    (workspace / "plan.json").write_text(json.dumps(plan_data))
    refused(["build", "-m", checkpoint, "-o", "engine", "--plan", "plan.json", *flags], "--plan", flags[0])


def test_saved_plan_builds(invoke: Invoke, checkpoint: Path, workspace: Path) -> None:
    assert invoke("plan", "-m", checkpoint, "--merge-start", "1", "--save", "plan.json").code == 0
    result = invoke("build", "-m", checkpoint, "-o", "engine", "--plan", "plan.json", "--json")
    assert result.code == 0 and json.loads(result.out)["method"] == "minicache"
    saved = json.loads((workspace / "plan.json").read_text())
    assert json.loads((workspace / "engine" / "config.json").read_text())["plan"] == saved


def test_plan_with_matrices_beside_it(
    invoke: Invoke, refused: Refused, checkpoint: Path, smooth_engine: Path, workspace: Path
) -> None:
    plan = read_engine(smooth_engine).plan
    save_plan(plan, workspace / "smooth.json")
    shown = json.loads(invoke("plan", "-m", checkpoint, "--plan", "smooth.json", "--json").out)
    assert shown["constant_bytes"] == sum(value.nbytes for value in plan.matrices.values()) > 0
    assert invoke("plan", "-m", checkpoint, "--plan", "smooth.json", "--save", "copy.json").code == 0
    assert (workspace / "copy.safetensors").read_bytes() == (workspace / "smooth.safetensors").read_bytes()
    build = ["build", "-m", checkpoint, "--plan", "copy.json", "--backend", "torch"]
    assert invoke(*build, "-o", "engine").code == 0
    for name, value in plan.matrices.items():
        np.testing.assert_array_equal(read_engine(workspace / "engine").plan.matrices[name], value)
    for damage, parts in {"flipped": ["copy.safetensors is damaged"], "missing": ["cannot read its matrices"]}.items():
        if damage == "flipped":
            (workspace / "copy.safetensors").write_bytes(b"\xff" * 100)
        else:
            (workspace / "copy.safetensors").unlink()
        refused([*build, "-o", "new"], *parts)
        refused(["plan", "-m", checkpoint, "--plan", "copy.json"], *parts)


def test_plan_of_another_shape_of_model(refused: Refused, smooth_engine: Path, workspace: Path) -> None:
    save_plan(read_engine(smooth_engine).plan, workspace / "smooth.json")
    refused(["plan", "-m", "llama2-7b", "--plan", "smooth.json"], "streams.0.decode: expected float32 [32, 16, 128]")


def test_plan_that_is_not_calibrated(refused: Refused, invoke: Invoke) -> None:
    refused(
        ["plan", "-m", "llama2-7b", "--method", "smoothquant", "--save", "plan.json"],
        "method 'smoothquant' has no plan to save before it is calibrated",
        "--calibration-text",
    )
    shown = invoke("plan", "-m", "llama2-7b", "--method", "smoothquant")
    assert shown.code == 0 and "constants, once per model" in shown.out
    assert "constants" not in invoke("plan", "-m", "llama2-7b", "--method", "hadamard4").out


def test_plan_that_cannot_be_saved(refused: Refused) -> None:
    refused(["plan", "-m", "llama2-7b", "--save", "no/such/plan.json"], "no/such/plan.json", "No such file")
    refused(["plan", "-m", "llama2-7b", "--save", "."], "cannot write .", "Is a directory")


def test_unknown_preset(refused: Refused) -> None:
    refused(["plan", "-m", "llama2-7"], "'llama2-7'", "did you mean llama2-7b?", "mistral-7b")


def test_hub_id_without_network(workspace: Path) -> None:
    home = workspace / "hub"
    result = run_process("plan", "-m", "some-org/some-model", HF_HUB_OFFLINE="1", HF_HOME=str(home))
    assert_refused(result, "some-org/some-model: the Hugging Face Hub cannot be reached", "HF_HUB_OFFLINE")
