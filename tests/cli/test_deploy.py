"""Model repositories as the command writes them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from minicache_trt.serving.triton.repository import this_environment
from minicache_trt.serving.triton.tensors import ALIASES, INPUTS, OUTPUTS
from tests.cli.command import Invoke, assert_refused, snapshot

Run = Callable[..., None]


@pytest.fixture
def run(invoke: Invoke, engine: Path) -> Run:
    """``run(repository, *arguments)``: the engine is deployed."""

    def call(repository: Path, *arguments: object) -> None:
        result = invoke("deploy", "triton", "-e", engine, "-o", repository, *arguments)
        assert result.code == 0, result

    return call


def parse_text_format(text: str) -> dict[str, list[object]]:
    """Protobuf's text format, as far as we write it: an independent reader, fields by name."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[\w.\-]+|[{}\[\]:,]', text)

    def value(at: int) -> tuple[object, int]:
        if tokens[at] == "{":
            return message(at + 1, "}")
        if tokens[at] == "[":
            items, at = [], at + 1
            while tokens[at] != "]":
                item, at = value(at)
                items.append(item)
                at += tokens[at] == ","
            return items, at + 1
        return tokens[at].strip('"'), at + 1

    def message(at: int, end: str | None) -> tuple[dict[str, list[object]], int]:
        fields: dict[str, list[object]] = {}
        while at < len(tokens) and tokens[at] != end:
            name, at = tokens[at], at + 1
            at += tokens[at] == ":"
            item, at = value(at)
            fields.setdefault(name, []).append(item)
        return fields, at + 1

    return message(0, None)[0]


def test_the_repository_holds_engine_shim_and_config(run: Run, invoke: Invoke, engine: Path, tmp_path: Path) -> None:
    run(
        tmp_path / "repo",
        "--model-name",
        "m",
        "--max-queue-size",
        7,
        "--kv-cache-memory",
        "64MiB",
        "--gpus",
        "0,2",
    )
    model = tmp_path / "repo" / "m"
    assert {path.name for path in model.iterdir()} == {"config.pbtxt", "1"}
    assert snapshot(model / "1" / "engine") == snapshot(engine)
    compile((model / "1" / "model.py").read_text(), "model.py", "exec")
    assert (model / "1" / "packages.pth").read_text().splitlines() == [str(path) for path in this_environment()]
    config = parse_text_format((model / "config.pbtxt").read_text())
    assert config["name"] == ["m"] and config["backend"] == ["python"] and config["max_batch_size"] == ["0"]
    assert config["model_transaction_policy"] == [{"decoupled": ["true"]}]
    assert config["instance_group"] == [[{"count": ["1"], "kind": ["KIND_GPU"], "gpus": [["0", "2"]]}]]
    parameters = {p["key"][0]: p["value"][0]["string_value"][0] for p in config["parameters"]}
    assert parameters["max_queue_size"] == "7" and parameters["kv_cache_memory"] == str(64 << 20)
    inputs = {tensor["name"][0]: tensor for tensor in config["input"][0]}
    assert inputs["text_input"] == {
        "name": ["text_input"],
        "data_type": ["TYPE_STRING"],
        "dims": [["-1"]],
        "optional": ["true"],
    }
    assert len(inputs) == len(INPUTS) and len(config["output"][0]) == len(OUTPUTS)
    assert set(ALIASES) | set(ALIASES.values()) <= set(inputs)


def test_files_are_linked_or_copied(run: Run, invoke: Invoke, engine: Path, tmp_path: Path) -> None:
    run(tmp_path / "linked")
    run(tmp_path / "copied", "--copy")
    name = Path("minicache") / "1" / "engine" / "decoder.onnx"
    assert os.path.samefile(tmp_path / "linked" / name, engine / "decoder.onnx")
    assert not os.path.samefile(tmp_path / "copied" / name, engine / "decoder.onnx")


def test_a_second_version_leaves_the_first_alone(run: Run, invoke: Invoke, engine: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    run(repository)
    before = snapshot(repository)
    run(repository, "--version", 2)
    after = snapshot(repository)
    assert before.items() <= after.items() and "minicache/2/engine/config.json" in after
    run(repository, "--version", 2, "--force", "--max-queue-size", 9)
    assert 'string_value: "9"' in (repository / "minicache" / "config.pbtxt").read_text()
    assert set(snapshot(repository)) == set(after)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model-name", "a/b"), "name: expected letters"),
        (("--version", "0"), "--version: expected a positive number"),
        (("--gpus", "x"), "--gpus: expected numbers"),
        (("--instance-count", "0"), "instance_count: expected a positive number"),
        (("--max-queue-size=-1",), "max_queue_size: expected a number of at least 0"),
        (("--kv-cache-memory", "lots"), "--kv-cache-memory: expected a size"),
        (("--backend", "tpu"), "unknown --backend 'tpu'"),
        ((), "version 1 is already there"),
    ],
)
def test_refusals_write_nothing(
    run: Run, invoke: Invoke, engine: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    if not arguments:
        run(tmp_path / "repo")
    before = snapshot(tmp_path)
    result = invoke("deploy", "triton", "-e", engine, "-o", tmp_path / "repo", *arguments)
    assert_refused(result, message)
    assert snapshot(tmp_path) == before


def test_something_else_of_that_name_is_not_touched(run: Run, invoke: Invoke, engine: Path, tmp_path: Path) -> None:
    (tmp_path / "repo" / "minicache").mkdir(parents=True)
    (tmp_path / "repo" / "minicache" / "config.pbtxt").write_text('name: "minicache"\n')
    before = snapshot(tmp_path)
    result = invoke("deploy", "triton", "-e", engine, "-o", tmp_path / "repo")
    assert_refused(result, "is not a model of minicache-trt")
    result = invoke("deploy", "triton", "-e", tmp_path, "-o", tmp_path / "repo")
    assert_refused(result, "is not an engine directory")
    assert snapshot(tmp_path) == before
