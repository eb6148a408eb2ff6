"""Every input that build cannot use: one line says why, and nothing is left behind or touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Invoke, assert_refused, run_process, snapshot

Refused = Callable[..., None]


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("./missing", ["./missing", "no such directory"]),
        ("lama2-7b", ["'lama2-7b'", "did you mean llama2-7b?"]),
        ("", ["''", "is not a directory, a preset or a hub id"]),
        ("a\nb", ["is not a directory, a preset or a hub id"]),
        ("[/red]:x:", ["[/red]:x:"]),
    ],
)
def test_model_that_is_not_there(refused: Refused, model: str, parts: list[str]) -> None:
    refused(["build", "-m", model, "-o", "engine"], *parts)


def test_model_that_is_a_file(refused: Refused, own_checkpoint: Path) -> None:
    refused(["build", "-m", own_checkpoint / "config.json", "-o", "engine"], "a file, expected a directory")


def test_model_that_is_an_engine(refused: Refused, own_engine: Path) -> None:
    refused(["build", "-m", own_engine, "-o", "new"], "is an engine, expected a checkpoint", "engine/checkpoint")


def test_checkpoint_in_its_own_process(own_checkpoint: Path) -> None:
    before = snapshot(own_checkpoint.parent)
    result = run_process("plan", "-m", own_checkpoint, "--save", own_checkpoint.parent / "p.json", "--merge-start", 3)
    assert_refused(result, "merge start 3 is out of range", "choose a layer from 0 to 2")
    assert snapshot(own_checkpoint.parent) == before


def _edit_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _overwrite(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


DAMAGED_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (lambda path: (path / "config.json").unlink(), ["no config.json"]),
    "config is not JSON": (lambda path: (path / "config.json").write_text("{"), ["config.json", "not JSON"]),
    "config is a list": (lambda path: (path / "config.json").write_text("[]"), ["config.json", "JSON object"]),
    "config is not text": (lambda path: (path / "config.json").write_bytes(b"\xff\xfe\xff"), ["config.json"]),
    "config is a directory": (
        lambda path: ((path / "config.json").unlink(), (path / "config.json").mkdir()),
        ["no config.json"],
    ),
    "unknown architecture": (
        lambda path: _edit_config(path, architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        ["GPT2LMHeadModel", "supported families: llama (LlamaForCausalLM", "mistral"],
    ),
    "wrong type": (lambda path: _edit_config(path, hidden_size="64"), ["hidden_size", "expected int", "'64'"]),
    "other shape": (lambda path: _edit_config(path, intermediate_size=112), ["expected shape [112, 64]", "[96, 64]"]),
    "more layers": (lambda path: _edit_config(path, num_hidden_layers=5), ["9 of 48 weights are missing"]),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), ["no model.safetensors"]),
    "empty weights": (lambda path: _truncate(path / "model.safetensors", 0), ["truncated"]),
    "truncated weights": (lambda path: _truncate(path / "model.safetensors", 9000), ["truncated", "got 9000"]),
    "truncated header": (lambda path: _truncate(path / "model.safetensors", 100), ["truncated", "the header ends"]),
    "header length": (lambda path: _overwrite(path / "model.safetensors", 0, b"\xff" * 8), ["not a safetensors file"]),
    "header": (lambda path: _overwrite(path / "model.safetensors", 8, b"}{}{"), ["the header is not JSON"]),
    "offsets": (
        lambda path: (path / "model.safetensors").write_bytes(
            (path / "model.safetensors").read_bytes().replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1)
        ),
        ["model.safetensors"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_CHECKPOINTS)
def test_damaged_checkpoint(refused: Refused, own_checkpoint: Path, damage: str) -> None:
    break_it, parts = DAMAGED_CHECKPOINTS[damage]
    break_it(own_checkpoint)
    refused(["build", "-m", own_checkpoint, "-o", "new/engine"], *parts)


DAMAGED_SHARDS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing": (lambda shard: shard.unlink(), ["missing, model.safetensors.index.json names it"]),
    "truncated": (lambda shard: _truncate(shard, 5000), ["truncated"]),
    "of another model": (
        lambda shard: shutil.copyfile(next(s for s in sorted(shard.parent.glob("*.safetensors")) if s != shard), shard),
        ["lacks", "model.safetensors.index.json"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_SHARDS)
def test_damaged_shard(refused: Refused, sharded: Path, workspace: Path, damage: str) -> None:
    checkpoint = shutil.copytree(sharded, workspace / "sharded")
    break_it, parts = DAMAGED_SHARDS[damage]
    shard = sorted(checkpoint.glob("*.safetensors"))[2]
    break_it(shard)
    refused(["build", "-m", checkpoint, "-o", "engine"], shard.name, *parts)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--merge-start", "-1"], ["merge start -1", "4 layers", "from 0 to 2"]),
        (["--merge-start", "3"], ["merge start 3", "4 layers", "from 0 to 2"]),
        (["--merge-start", "99999999999999999999"], ["merge start 99999999999999999999"]),
        (["--method", "kivi4", "--merge-start", "1"], ["'kivi4' merges no layers", "merge-start", "minicache"]),
        (["--method", "smoothquant", "--merge-start", "1", "--calibration-text", "x"], ["'smoothquant' merges no"]),
        (["--method", "smoothquant"], ["'smoothquant' needs text to calibrate on", "--calibration-text FILE"]),
        (["--method", "kivi4", "--calibration-text", "x"], ["method 'kivi4' takes no --calibration-text"]),
        (["--calibration-text", "x"], ["default method takes no --calibration-text", "take one: smoothquant"]),
        (["--plan", "x", "--calibration-text", "x"], ["--plan takes no --calibration-text"]),
        (["--method", "full", "--merge-start", "0"], ["'full' merges no layers"]),
        (["--method", "kivi4", "--t", "0.3"], ["'kivi4' merges no layers", "takes no t"]),
        (["--method", "minicach"], ["unknown method 'minicach'", "did you mean 'minicache'?", "kivi2"]),
        (["--method", ""], ["unknown method ''"]),
        (["--kv-format", "int3"], ["--kv-format 'int3'", "int4"]),
        (["--method", "kivi4", "--kv-format", "int4"], ["'kivi4' fixes its format"]),
        (["--weights", "int5"], ["weights", "fp32, int8, int4", "'int5'"]),
        (["--backend", "onnxruntme"], ["unknown backend 'onnxruntme'", "did you mean 'onnxruntime'?"]),
        (["--load-format", "pickle"], ["load_format", "auto or dummy", "'pickle'"]),
        (["--revision", "main"], ["a local directory has no revision"]),
        (["--t", "1.5", "--method", "minicache"], ["t: expected a number in [0, 1], got 1.5"]),
        (["--t", "nan", "--method", "minicache"], ["t: expected a number in [0, 1], got nan"]),
        (["--gamma", "0.9", "--method", "minicache"], ["gamma: expected a number in [0, 0.5], got 0.9"]),
        (["--norm", "block", "--method", "minicache"], ["norm: expected one of head, token, got 'block'"]),
        (["--sink-tokens", "9", "--method", "minicache"], ["sink_tokens", "9"]),
        (["--sink-tokens", "-1", "--method", "minicache"], ["sink_tokens", "-1"]),
        (["--max-seq-len", "513"], ["max_seq_len 513", "512 positions", "--max-seq-len 512"]),
        (["--max-seq-len", "0"], ["max_seq_len", "positive", "0"]),
        (["--max-batch-size", "-3"], ["max_batch_size", "positive", "-3"]),
        (["--max-num-tokens", "7"], ["max_num_tokens", "at least max_batch_size (8)", "7"]),
        (["--tp-size", "2"], ["backend onnxruntime runs one rank", "backends for several ranks: cuda, torch"]),
        (["--tp_size", "3", "--backend", "torch"], ["tp_size: 3 ranks cannot share the model's heads"]),
        (["--tp-size", "0"], ["tp_size: expected a positive number, got 0"]),
    ],
)
def test_flag_that_does_not_fit(refused: Refused, checkpoint: Path, flags: list[str], parts: list[str]) -> None:
    refused(["build", "-m", checkpoint, "-o", "new/deep/engine", *flags], *parts)


CALIBRATION_TEXTS: dict[str, tuple[bytes | None, list[str]]] = {
    "missing": (None, ["calibration text text.txt cannot be read: No such file"]),
    "empty": (b"", ["calibration text text.txt is too short: 0 tokens, expected at least 512"]),
    "short": (b"the cat", ["text.txt is too short", "give a longer text"]),
    "not text": (b"\xff\xfe" * 1000, ["text.txt is not UTF-8 text", "save it as UTF-8"]),
}


@pytest.mark.parametrize("case", CALIBRATION_TEXTS)
def test_text_to_calibrate_on(refused: Refused, checkpoint: Path, workspace: Path, case: str) -> None:
    content, parts = CALIBRATION_TEXTS[case]
    if content is not None:
        (workspace / "text.txt").write_bytes(content)
    flags = ["--method", "smoothquant", "--calibration-text", "text.txt"]
    refused(["build", "-m", checkpoint, "-o", "engine", *flags], *parts)


def test_calibration_without_a_tokenizer(refused: Refused, own_checkpoint: Path, calibration_text: Path) -> None:
    for file in own_checkpoint.glob("tokenizer*"):
        file.unlink()
    flags = ["--method", "smoothquant", "--calibration-text", calibration_text]
    refused(["build", "-m", own_checkpoint, "-o", "engine", *flags], "no tokenizer", "put tokenizer.json beside")


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "-m", "checkpoint"],
        ["build", "-o", "engine"],
        ["build", "-m", "checkpoint", "-o", "engine", "--max-seq-len", "many"],
        ["build", "-m", "checkpoint", "-o", "engine", "--gamma", "a bit"],
        ["build", "-m", "checkpoint", "-o", "engine", "--no-such-flag"],
        ["run", "-p", "text"],
        ["run", "-e", "engine", "-p", "text", "--max-tokens", "0"],
        ["run", "-e", "engine", "-p", "text", "--temperature", "warm"],
        ["compare", "-e", "engine", "-p", "text", "--threads", "0"],
        ["plan", "-m", "llama2-7b", "--context", "0"],
        ["inspect", "--json"],
        ["biuld"],
    ],
)
def test_usage_error(invoke: Invoke, workspace: Path, arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.code == 2 and result.out == ""
    assert "Usage: minicache-trt" in result.err and "Traceback" not in result.err
    assert not any(workspace.iterdir())


def test_output_is_something_else(refused: Refused, checkpoint: Path, workspace: Path) -> None:
    (workspace / "thesis").mkdir()
    (workspace / "thesis" / "chapter1.txt").write_text("years of work")
    (workspace / "file").write_text("text")
    (workspace / "settings").mkdir()
    (workspace / "settings" / "config.json").write_text('{"format_version": 2, "theme": "dark"}')
    (workspace / "number").mkdir()
    (workspace / "number" / "config.json").write_text("42")
    for output in ("thesis", "file", "settings", "number", "."):
        for force in ([], ["--force"]):
            refused(["build", "-m", checkpoint, "-o", output, *force], "it exists and is not an engine")


def test_output_is_a_checkpoint(refused: Refused, own_checkpoint: Path) -> None:
    refused(["build", "-m", own_checkpoint, "-o", own_checkpoint, "--force"], "it exists and is not an engine")


def test_output_is_an_engine(refused: Refused, checkpoint: Path, own_engine: Path) -> None:
    refused(["build", "-m", checkpoint, "-o", own_engine], "an engine is already there", "--force")


def test_failed_replacement_leaves_the_engine(refused: Refused, checkpoint: Path, own_engine: Path) -> None:
    refused(["build", "-m", checkpoint, "-o", own_engine, "--force", "--method", "best"], "unknown method 'best'")


def test_output_below_a_file(refused: Refused, checkpoint: Path, workspace: Path) -> None:
    (workspace / "file").write_text("text")
    refused(["build", "-m", checkpoint, "-o", "file/engine"], "cannot build", "file")
    refused(["build", "-m", checkpoint, "-o", "file/a/b/engine"], "cannot build", "file")


def test_output_with_a_name_too_long(refused: Refused, checkpoint: Path) -> None:
    refused(["build", "-m", checkpoint, "-o", "new/" + "n" * 300], "cannot build", "File name too long")


def test_output_in_a_directory_that_cannot_be_written(
    refused: Refused, checkpoint: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("size=64k,ro")
    refused(["build", "-m", checkpoint, "-o", disk / "engine"], "cannot build", str(disk), "Read-only file system")
    refused(["build", "-m", checkpoint, "-o", disk / "a/engine"], "cannot build", str(disk), "Read-only file system")
