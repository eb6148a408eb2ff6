"""Engines TensorRT-RTX builds without a GPU, and what refuses to be built."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minicache_trt.backends.tensorrt import estimate
from minicache_trt.backends.tensorrt.module import PRODUCTS
from minicache_trt.backends.tensorrt.network import parse_network
from minicache_trt.backends.tensorrt.plugins import PLUGINS_VARIABLE
from minicache_trt.backends.tensorrt.profiles import Profile, Range, decoder_profiles, tensor_shapes
from minicache_trt.checkpoint.presets import PRESETS
from minicache_trt.cli.app import app
from minicache_trt.compression.methods import METHODS, make_plan
from minicache_trt.config import BuildConfig
from minicache_trt.contract import LOGITS, compressed_pools, full_pools
from minicache_trt.engine_directory import ENGINES, read_engine
from minicache_trt.errors import UserError
from tests.support.checkpoints import LAYERED, make_checkpoint
from tests.support.engines import build

trt = pytest.importorskip("tensorrt_rtx")

DEMO = Path(__file__).parents[2] / "examples" / "demo_model" / "checkpoint"
ORDINARY = [("full", "float16"), ("kivi4", "bfloat16"), ("minicache4", "float16")]
EVERY = [(method, dtype) for method in (*METHODS, "mixed") for dtype in ("float16", "bfloat16")]


@pytest.mark.parametrize("method, dtype", ORDINARY)
def test_representative_plans_build(tmp_path: Path, method: str, dtype: str) -> None:
    assert_builds(tmp_path, method, dtype)


def test_both_profiles_of_tensorrt_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``--backend tensorrt`` asks of a builder without plugins, asked of TensorRT-RTX's."""
    product = dataclasses.replace(PRODUCTS["tensorrt"], module="tensorrt_rtx")
    monkeypatch.setitem(PRODUCTS, "tensorrt", product)
    monkeypatch.setenv(PLUGINS_VARIABLE, "0")
    assert_builds(tmp_path, "minicache4", "float16", "tensorrt", ["decode", "prefill"])


@pytest.mark.long
@pytest.mark.parametrize("method, dtype", [case for case in EVERY if case not in ORDINARY])
def test_every_method_builds(tmp_path: Path, method: str, dtype: str) -> None:
    assert_builds(tmp_path, method, dtype)


def assert_builds(
    tmp_path: Path, method: str, dtype: str, backend: str = "tensorrt-rtx", profiles: Sequence[str] = ("step",)
) -> None:
    """Both engines of a small model: their size, and every binding against the contract."""
    limits: dict[str, Any] = {"backend": backend, "dtype": dtype, "max_seq_len": 1024, "max_num_tokens": 512}
    source = make_checkpoint(tmp_path / "hf", head_dim=64) if method == "mixed" else DEMO  # four layers
    directory = build(source, tmp_path / "engine", method, **limits)
    info = read_engine(directory)
    engines = json.loads((directory / ENGINES).read_text())["engines"]
    needs = estimate.build_needs(info.model, info.build)
    assert needs is not None
    weights = needs.weight_bytes
    assert weights <= (directory / "decoder.engine").stat().st_size <= 1.1 * weights + (16 << 20)
    assert not list(directory.glob("cast.*"))
    full, compressed = full_pools(info.model), compressed_pools(info.plan, info.model)
    types = {"model": dtype, "int8": "int8", "float16": "float16"}
    decoder = engines["decoder.engine"]
    pools = {
        pool.name: [types[pool.dtype], [blocks, *pool.shape]]
        for blocks, group in (("Nf", full), ("Nc", compressed))
        for pool in group
    }
    found = {tensor["name"]: [tensor["dtype"], tensor["shape"]] for tensor in decoder["inputs"]}
    steps = {name: value for name, value in found.items() if name not in pools}
    assert {name: found[name] for name in pools} == pools
    assert all(kind == "int32" for kind, _ in steps.values())
    assert set(steps) == set(tensor_shapes(info.plan, info.model, True)) - set(pools)
    outputs = {tensor["name"]: [tensor["dtype"], tensor["shape"]] for tensor in decoder["outputs"]}
    assert outputs.pop(LOGITS) == ["float32", [-1, info.model.vocab_size]]
    assert outputs == {pool.output_name: [dtype, [-1, *pool.shape]] for pool in full}
    assert decoder["profiles"] == list(profiles) and decoder["plugins"] == 0
    assert ("compressor.engine" in engines) == info.plan.compresses == (directory / "compressor.engine").exists()
    if info.plan.compresses:
        written = {tensor["name"]: tensor["dtype"] for tensor in engines["compressor.engine"]["outputs"]}
        assert written == {pool.output_name: types[pool.dtype] for pool in compressed}


def test_mixture_of_experts_is_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtral's graph has no branch and TensorRT imports it."""
    monkeypatch.setattr("minicache_trt.backends.tensorrt.build.build_engines", lambda *arguments: None)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family="mixtral", num_local_experts=4, head_dim=48)
    directory = build(checkpoint, tmp_path / "engine", "kivi4", backend="tensorrt-rtx", dtype="float16")
    network = parse_network(trt, directory / "decoder.onnx")
    layers = network.layers()
    assert not [kind for kind in layers if kind.startswith(("CONDITION", "LOOP", "ITERATOR"))]
    assert layers["MATRIX_MULTIPLY"] >= 4 * 4 * 3


def test_layers_that_differ_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's graph in bfloat16: what layers need of a step is computed once for each kind of layer."""
    monkeypatch.setattr("minicache_trt.backends.tensorrt.build.build_engines", lambda *arguments: None)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **LAYERED["gemma2"])
    directory = build(checkpoint, tmp_path / "engine", "kivi4", backend="tensorrt-rtx", max_seq_len=512)
    assert read_engine(directory).build.dtype == "bfloat16"
    layers = parse_network(trt, directory / "decoder.onnx").layers()
    assert layers["SOFTMAX"] == 4 and not [kind for kind in layers if kind.startswith(("CONDITION", "LOOP"))]


def test_a_graph_tensorrt_cannot_import_is_named(tmp_path: Path) -> None:
    """Scan, which its parser does not know, is in every graph for the CPU."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    directory = build(checkpoint, tmp_path / "engine", "full")
    with pytest.raises(UserError, match=r"TensorRT cannot import decoder\.onnx: Scan .* in layers\.0\.attention"):
        parse_network(trt, directory / "decoder.onnx")


INTERRUPTED = """
import os, signal, sys
from minicache_trt.backends.tensorrt import builder
from minicache_trt.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
write = builder._write

def interrupted(network, config, path):
    if path.name == "decoder.engine":
        os.kill(os.getpid(), signal.SIGINT)
    done = write(network, config, path)
    sys.stderr.write(f"{path.name} {done}\\n")  # in one piece: another thread writes, too
    return done

builder._write = interrupted
main()
"""


def test_an_interrupt_ends_both_builds(tmp_path: Path) -> None:
    flags = ["-m", DEMO, "--method", "kivi4", "--backend", "tensorrt-rtx", "--dtype", "float16"]
    command = [sys.executable, "-c", INTERRUPTED, "build", *flags, "-o", tmp_path / "engine"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 130 and process.stdout == "" and "Traceback" not in process.stderr
    assert "decoder.engine False" in process.stderr
    assert not list(tmp_path.iterdir())


def test_profiles_hold_what_a_step_can_be() -> None:
    config = PRESETS["llama2-7b"].config
    plan = make_plan(config, "kivi4")
    limits = BuildConfig(max_batch_size=6, max_seq_len=1000, max_num_tokens=300, backend="tensorrt")
    shapes = tensor_shapes(plan, config, True)
    decode, prefill = decoder_profiles(limits, plan, config, plugins=False)
    assert [dims[0] for dims in decode.shapes(shapes["query_start"])] == [2, 4, 7]
    assert [dims for dims in decode.shapes(shapes["full_table"])][2] == (6, 16)
    assert prefill.shapes(shapes["input_ids"])[2] == (300,) and prefill.shapes(shapes["context_len"])[2] == (1,)
    assert decode.shapes(shapes["kv.0"])[2] == ((2**31 - 1) // (2 * 32 * 64 * 128), 2, 32, 64, 128)
    (both,) = decoder_profiles(dataclasses.replace(limits, backend="tensorrt-rtx"), plan, config, plugins=False)
    for tensor in shapes.values():
        ranges = [list(zip(*profile.shapes(tensor), strict=True)) for profile in (decode, prefill, both)]
        for a, b, whole in zip(*ranges, strict=True):
            assert whole == (min(a[0], b[0]), b[1], max(a[2], b[2]))
    mixed_decode, mixed = decoder_profiles(limits, plan, config, plugins=True)
    assert mixed.shapes(shapes["prefill_rows"]) == ((1, 1), (1, 300), (6, 300))
    assert mixed.shapes(shapes["decode_rows"])[2] == (5,) and mixed_decode.shapes(shapes["prefill_rows"])[2] == (0, 0)
    with pytest.raises(ValueError, match="range: expected ascending"):
        Profile("x", {"T": Range(2, 1, 3)})


def test_a_build_that_cannot_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PRESETS["llama2-7b"].config
    build_config = BuildConfig(backend="tensorrt-rtx", dtype="float16")
    needs = estimate.build_needs(config, build_config)
    assert needs is not None and needs.weight_bytes == 2 * 6_738_415_616
    room = estimate.Room(needs.memory_bytes, needs.disk_bytes, tmp_path)
    estimate.check_room(needs, room, build_config)
    with pytest.raises(UserError, match=r"needs about .* GiB of memory \(12\.6 GiB of weights\), this machine has"):
        estimate.check_room(needs, dataclasses.replace(room, memory_bytes=needs.memory_bytes - 1), build_config)
    with pytest.raises(UserError, match=r"needs about .* of disk"):
        estimate.check_room(needs, dataclasses.replace(room, disk_bytes=needs.disk_bytes - 1), build_config)
    monkeypatch.setattr(estimate, "available_memory", lambda: 123)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 456))
    assert estimate.Room.here(tmp_path / "a" / "b") == estimate.Room(123, 456, tmp_path)


def test_a_dry_run_says_what_a_build_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a preset, whose weights nobody has; nothing is written, and what does not fit ends as the build would."""
    arguments = ["build", "-m", "llama2-7b", "--backend", "tensorrt-rtx", "-o", str(tmp_path / "engine"), "--dry-run"]
    needs = estimate.build_needs(PRESETS["llama2-7b"].config, BuildConfig(backend="tensorrt-rtx", dtype="float16"))
    assert needs is not None
    for missing in (0, 1):
        room = estimate.Room(needs.memory_bytes - missing, needs.disk_bytes, tmp_path)
        monkeypatch.setattr(estimate.Room, "here", classmethod(lambda cls, directory, room=room: room))
        result = CliRunner().invoke(app, [*arguments, "--json"])
        printed = json.loads(result.stdout)
        assert isinstance(result.exception, UserError) == bool(missing) and (missing or result.exit_code == 0)
        assert printed["needs"]["memory_bytes"] == needs.memory_bytes
        assert printed["here"]["memory_bytes"] == needs.memory_bytes - missing
    assert not list(tmp_path.iterdir())
