"""What run, compare and inspect refuse: engine directories that are damaged, prompts and settings that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.cli.command import Invoke, assert_refused, run_process
from tests.cli.conftest import MAX_SEQ_LEN

Refused = Callable[..., None]

VERBS: dict[str, list[object]] = {"run": ["run", "-p", "the cat"], "compare": ["compare", "-p", "the cat"]}
VERBS["inspect"] = ["inspect"]
VERBS["layers"] = ["compare", "-p", "the cat", "--layers"]
VERBS["plot"] = ["inspect", "-p", "the cat", "--plot", "plots"]


def _edit_config(engine: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = engine / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda engine: _edit_config(engine, change)


DAMAGED_ENGINES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing": (shutil.rmtree, ["no such directory"]),
    "a file": (lambda engine: (shutil.rmtree(engine), engine.write_text("x")), ["no such directory"]),
    "empty": (
        lambda engine: (shutil.rmtree(engine), engine.mkdir()),
        ["not an engine directory: it has no config.json"],
    ),
    "checkpoint": (
        lambda engine: [shutil.copyfile(file, engine / file.name) for file in (engine / "checkpoint").iterdir()],
        ["is a checkpoint, expected an engine directory", "minicache-trt build"],
    ),
    "config of something else": (lambda engine: (engine / "config.json").write_text("{}"), ["no format_version"]),
    "config is a list": (lambda engine: (engine / "config.json").write_text("[1]"), ["not an engine directory"]),
    "config truncated": (lambda engine: _truncate(engine / "config.json"), ["config.json is damaged"]),
    "config not text": (lambda engine: (engine / "config.json").write_bytes(b"\xff\xfe"), ["config.json is damaged"]),
    "other format version": (
        _config(lambda data: data.update(format_version=7)),
        ["format version 7, this release reads 4", "build the engine again"],
    ),
    "earlier format version": (
        _config(lambda data: data.update(format_version=1)),
        ["format version 1, this release reads 4", "build the engine again"],
    ),
    "other contract": (_config(lambda data: data.update(contract="0" * 64)), ["another tensor contract"]),
    "field missing": (_config(lambda data: data.pop("plan")), ["config.json is damaged: field 'plan' is missing"]),
    "field of the model missing": (_config(lambda data: data["model"].pop("rms_norm_eps")), ["model.rms_norm_eps"]),
    "field of the build missing": (_config(lambda data: data["build"].pop("window")), ["'build.window' is missing"]),
    "unknown field": (_config(lambda data: data["build"].update(colour="red")), ["config.json is damaged", "colour"]),
    "wrong value": (_config(lambda data: data["build"].update(max_batch_size=0)), ["damaged: max_batch_size"]),
    "wrong type": (_config(lambda data: data["model"].update(num_layers="4")), ["config.json is damaged"]),
    "source is text": (_config(lambda data: data.update(source="here")), ["source: expected an object, got 'here'"]),
    "files is a list": (_config(lambda data: data.update(files=["decoder.onnx"])), ["files: expected an object"]),
    "no graph listed": (_config(lambda data: data["files"].pop("decoder.onnx")), ["files.decoder.onnx"]),
    "file entry": (_config(lambda data: data["files"].update({"decoder.onnx": 5})), ["decoder.onnx: expected an obj"]),
    "plan of another model": (
        _config(lambda data: data["model"].update(num_layers=6)),
        ["was built for another tensor contract"],
    ),
    "plan without a stream": (
        _config(lambda data: data["plan"]["streams"].pop()),
        ["was built for another tensor contract"],
    ),
    "wrong plan": (
        _config(lambda data: data["plan"]["streams"][0].update(part="query")),
        ["config.json is damaged: plan: streams[0].part"],
    ),
    "graph changed": (lambda engine: _flip(engine / "decoder.onnx"), ["decoder.onnx was changed after the build"]),
    "graph missing": (lambda engine: (engine / "compressor.onnx").unlink(), ["compressor.onnx is missing"]),
    "weights changed": (
        lambda engine: _flip(engine / "checkpoint/model.safetensors"),
        ["checkpoint/model.safetensors was changed"],
    ),
    "weights truncated": (
        lambda engine: _truncate(engine / "checkpoint/model.safetensors"),
        ["checkpoint/model.safetensors was changed", "bytes, expected"],
    ),
    "weights missing": (
        lambda engine: (engine / "checkpoint/model.safetensors").unlink(),
        ["checkpoint/model.safetensors is missing"],
    ),
    "quantized changed": (lambda engine: _flip(engine / "quantized.safetensors"), ["quantized.safetensors was chang"]),
    "quantized truncated": (lambda engine: _truncate(engine / "quantized.safetensors"), ["bytes, expected"]),
    "tokenizer changed": (lambda engine: _flip(engine / "checkpoint/tokenizer.json"), ["checkpoint/tokenizer.json"]),
}


@pytest.mark.parametrize("damage", DAMAGED_ENGINES)
def test_damaged_engine(refused: Refused, own_engine: Path, damage: str) -> None:
    break_it, parts = DAMAGED_ENGINES[damage]
    break_it(own_engine)
    for arguments in VERBS.values():
        refused([*arguments, "-e", "engine"], "engine", *parts)


DAMAGED_MATRICES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "changed": (lambda engine: _flip(engine / "plan.safetensors"), ["plan.safetensors was changed after the build"]),
    "missing": (lambda engine: (engine / "plan.safetensors").unlink(), ["plan.safetensors is missing"]),
    "not listed": (
        lambda engine: (
            _edit_config(engine, lambda data: data["files"].pop("plan.safetensors")),
            (engine / "plan.safetensors").unlink(),
        ),
        ["plan: cannot read its matrices", "plan.safetensors"],
    ),
    "of another model": (
        lambda engine: (
            _edit_config(engine, lambda data: data["files"].pop("plan.safetensors")),
            save_file({"streams.0.mean": np.zeros(3, np.float32)}, engine / "plan.safetensors"),
        ),
        ["config.json is damaged: plan: streams[0] needs a tensor decode"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_MATRICES)
def test_damaged_matrices(refused: Refused, smooth_engine: Path, workspace: Path, damage: str) -> None:
    shutil.copytree(smooth_engine, workspace / "engine")
    break_it, parts = DAMAGED_MATRICES[damage]
    break_it(workspace / "engine")
    for arguments in VERBS.values():
        refused([*arguments, "-e", "engine"], "engine", *parts)


def test_damaged_engine_in_its_own_process(own_engine: Path) -> None:
    _flip(own_engine / "decoder.onnx")
    assert_refused(run_process("inspect", "-e", own_engine), "decoder.onnx was changed")


def test_checkpoint_in_place_of_an_engine(refused: Refused, checkpoint: Path) -> None:
    for arguments in VERBS.values():
        refused([*arguments, "-e", checkpoint], f"{checkpoint} is a checkpoint, expected an engine directory")


def test_graph_that_does_not_load(refused: Refused, own_engine: Path) -> None:
    """A file that passes its check and still is no graph: what a faulty exporter would write."""
    from minicache_trt.engine_directory import fingerprint

    (own_engine / "decoder.onnx").write_bytes(b"\x08\x0a")
    _edit_config(
        own_engine, lambda data: data["files"].update({"decoder.onnx": fingerprint(own_engine / "decoder.onnx")})
    )
    refused(["run", "-e", "engine", "-p", "the cat"], "ONNX Runtime cannot load", "decoder.onnx")


LONG_PROMPT = "\u00e9" * (MAX_SEQ_LEN // 2 + 5)  # two bytes each, and none of them merged


@pytest.mark.parametrize("verb", ["run", "compare"])
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["-p", "caf\udce9"], ["prompt 'caf\\udce9' is not valid Unicode"]),
        ([], ["no prompt was given", "--prompt TEXT"]),
        (["--prompts", "missing.txt"], ["--prompts: cannot read missing.txt: No such file"]),
        (["--prompts", "."], ["--prompts: cannot read .: Is a directory"]),
        (["--prompts", "empty.txt"], ["--prompts: empty.txt holds no prompt"]),
        (["--prompts", "latin1.txt"], ["--prompts: cannot read latin1.txt"]),
        (["--prompts", "text.jsonl"], ["text.jsonl, line 1: expected an object with a field prompt"]),
        (["--prompts", "other.jsonl"], ["other.jsonl, line 2: expected an object with a field prompt"]),
        (["--prompts", "list.jsonl"], ["list.jsonl, line 1: expected an object with a field prompt"]),
        (["--prompts", "number.jsonl"], ["number.jsonl, line 1: prompt: expected text, got 5"]),
    ],
)
def test_prompts_that_cannot_be_read(
    refused: Refused, workspace: Path, engine: Path, verb: str, flags: list[str], parts: list[str]
) -> None:
    (workspace / "empty.txt").write_text("\n  \n\n")
    (workspace / "latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (workspace / "text.jsonl").write_text("the cat\n")
    (workspace / "other.jsonl").write_text('{"prompt": "the cat"}\n{"text": "the dog"}\n')
    (workspace / "list.jsonl").write_text('["the cat"]\n')
    (workspace / "number.jsonl").write_text('{"prompt": 5}\n')
    refused([verb, "-e", engine, *flags], *parts)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["-p", LONG_PROMPT], [f"prompts[0] has {2 * len(LONG_PROMPT)} tokens", f"max_seq_len {MAX_SEQ_LEN}"]),
        (["-p", "the cat", "-p", LONG_PROMPT], [f"prompts[1] has {2 * len(LONG_PROMPT)} tokens"]),
        (["-p", ""], ["prompts[0]: expected at least one token, got none"]),
        (["-p", "the cat", "--kv-cache-memory", "lots"], ["--kv-cache-memory: expected a size", "'lots'"]),
        (["-p", "the cat", "--kv-cache-memory", "-5MB"], ["--kv-cache-memory: expected a size", "'-5MB'"]),
        (["-p", "the cat", "--kv-cache-memory", "0"], ["--kv-cache-memory: expected 1 byte to", "got 0"]),
        (["-p", "the cat", "--kv-cache-memory", "9" * 400], ["--kv-cache-memory: expected 1 byte to"]),
        (["-p", "the cat", "--kv-cache-memory", "9000TB"], ["--kv-cache-memory: expected 1 byte to 1024.0 TiB"]),
        (["-p", "the cat", "--kv-cache-memory", "900TB"], ["too little memory", "--kv-cache-memory"]),
        (["-p", "the cat", "--kv-cache-memory", "900TB", "--backend", "torch"], ["too little memory"]),
        (["-p", "the cat", "--kv-cache-memory", "4 KiB"], ["4096 bytes (4.0 KiB)", "which needs", "at least"]),
        (["-p", "the cat", "--backend", "pytorch"], ["unknown backend 'pytorch'", "torch"]),
    ],
)
def test_prompt_or_setting_that_does_not_fit(
    refused: Refused, engine: Path, flags: list[str], parts: list[str]
) -> None:
    refused(["run", "-e", engine, "--threads", "1", *flags], *parts)


def test_compare_refuses_a_long_prompt(refused: Refused, engine: Path) -> None:
    refused(["compare", "-e", engine, "-p", LONG_PROMPT], f"{2 * len(LONG_PROMPT)} tokens", str(MAX_SEQ_LEN))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--temperature", "-1"], ["temperature: expected a finite number of at least 0, got -1.0"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--temperature", "inf"], ["temperature", "inf"]),
        (["--top-k", "-2"], ["top_k", "-2"]),
        (["--top-p", "0"], ["top_p: expected a number in (0, 1], got 0.0"]),
        (["--top-p", "1.1"], ["top_p", "1.1"]),
        (["--min-p", "2"], ["min_p", "2.0"]),
        (["--repetition-penalty", "0"], ["repetition_penalty", "0.0"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--stop", ""], ["stop: expected strings that are not empty"]),
    ],
)
def test_sampling_value_out_of_range(refused: Refused, engine: Path, flags: list[str], parts: list[str]) -> None:
    refused(["run", "-e", engine, "-p", "the cat", *flags], *parts)


def test_memory_the_error_asks_for_is_enough(invoke: Invoke, engine: Path) -> None:
    flags = ["run", "-e", engine, "-p", "the cat", "--max-tokens", "4", "--threads", "1", "--json", "--kv-cache-memory"]
    message = invoke(*flags, "1KiB").err
    needed = int(message.rpartition("at least ")[2].split(",")[0])
    assert invoke(*flags, needed).code == 0
    assert_refused(invoke(*flags, needed - 1), f"{needed - 1} bytes", f"needs {needed} bytes")


def test_engine_without_tokenizer(invoke: Invoke, refused: Refused, own_checkpoint: Path) -> None:
    for file in own_checkpoint.glob("tokenizer*"):
        file.unlink()
    assert invoke("build", "-m", own_checkpoint, "-o", "engine").code == 0
    for verb in ("run", "compare"):
        refused(
            [verb, "-e", "engine", "-p", "the cat", "--threads", "1"], "engine has no tokenizer, so it takes no text"
        )
    assert invoke("inspect", "-e", "engine").code == 0


def test_engine_with_a_broken_tokenizer(invoke: Invoke, refused: Refused, own_checkpoint: Path) -> None:
    (own_checkpoint / "tokenizer.json").write_text("{")
    assert invoke("build", "-m", own_checkpoint, "-o", "engine").code == 0
    refused(["run", "-e", "engine", "-p", "the cat"], "tokenizer: cannot load")


def test_logits_that_are_not_numbers(invoke: Invoke, own_checkpoint: Path) -> None:
    """Weights of infinity: what was generated is printed, and the exit code tells."""
    path = own_checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    begin, end = header["lm_head.weight"]["data_offsets"]
    base = 8 + int.from_bytes(content[:8], "little")
    content[base + begin : base + end] = b"\x00\x00\x80\x7f" * ((end - begin) // 4)
    path.write_bytes(content)
    assert invoke("build", "-m", own_checkpoint, "-o", "engine").code == 0
    for flags in (["-p", "the cat"], ["-p", "the cat", "-p", "the dog"], ["-p", "the cat", "--json"]):
        result = invoke("run", "-e", "engine", "--threads", "1", *flags)
        assert result.code == 2 and "ended early" in result.err and "Traceback" not in result.err
