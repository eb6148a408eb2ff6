"""What the verbs print when all is well, and what build writes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache_trt.compression.methods import CALIBRATED_METHODS, METHODS
from minicache_trt.config import CALIBRATED_WEIGHTS, WEIGHT_BITS, WEIGHT_FORMATS
from minicache_trt.engine_directory import MATRICES, QUANTIZED, read_engine
from tests.cli.command import Invoke, assert_refused, run_process
from tests.cli.conftest import MAX_SEQ_LEN

VERBS = ("build", "calibrate", "run", "compare", "bench", "models", "plan", "inspect", "doctor")
PROMPT = "the cat sat on"
ONE_THREAD = ["--threads", "1"]
"""More would only wait for one another."""


def _json(invoke: Invoke, *arguments: object) -> Any:
    """The JSON that is all of stdout; nothing is on stderr."""
    result = invoke(*arguments, "--json")
    assert result.code == 0 and result.err == "", result
    return json.loads(result.out)


@pytest.mark.parametrize("verb", VERBS)
def test_help(invoke: Invoke, verb: str) -> None:
    for flag in ("--help", "-h"):
        result = invoke(verb, flag)
        assert result.code == 0 and result.err == ""
        assert "Example" in result.out and f"minicache-trt {verb}" in result.out and "--json" in result.out


def test_help_of_the_command(invoke: Invoke) -> None:
    result = invoke("--help")
    assert result.code == 0 and all(verb in result.out for verb in VERBS)
    assert invoke("--version").out.startswith("minicache-trt ")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, minicache_trt.cli.app; "
        "heavy = 'torch transformers onnxruntime onnx_ir onnx polygraphy matplotlib'; "
        "print([name for name in heavy.split() if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


BUILDS = [(method, "fp32") for method in METHODS]  # what a method stores does not depend on the weights
BUILDS += [("minicache4", weights) for weights in WEIGHT_FORMATS if weights not in ("fp32", "fp8")]  # fp8: TensorRT's


@pytest.mark.parametrize(("method", "weights"), BUILDS)
def test_build(
    invoke: Invoke, checkpoint: Path, calibration_text: Path, workspace: Path, method: str, weights: str
) -> None:
    flags: list[object] = ["--method", method, "--weights", weights, "--max-seq-len", "192"]
    calibrated = method in CALIBRATED_METHODS or weights == CALIBRATED_WEIGHTS
    flags += ["--calibration-text", calibration_text] if calibrated else []
    flags += ["--calibration-samples", "1"] if weights == CALIBRATED_WEIGHTS else []
    built = _json(invoke, "build", "-m", checkpoint, "-o", "a/b/engine", *flags)
    assert (built["method"], built["weights"], built["max_seq_len"]) == (method, weights, 192)
    engine = workspace / "a/b/engine"
    info = read_engine(engine)
    assert (info.plan.method, info.build.weights) == (method, weights)
    assert (engine / QUANTIZED).exists() == (weights in WEIGHT_BITS)
    assert (engine / "compressor.onnx").exists() == (method != "full")
    assert (engine / MATRICES).exists() == bool(info.plan.matrices) == (method in CALIBRATED_METHODS)
    assert [path.name for path in engine.parent.iterdir()] == ["engine"]
    flags = ["-p", PROMPT, "--max-tokens", "4", "--ignore-eos", *ONE_THREAD]
    (output,) = _json(invoke, "run", "-e", engine, *flags)["outputs"]
    assert len(output["token_ids"]) == 4


def test_build_calibrates(
    invoke: Invoke, checkpoint: Path, calibration_text: Path, smooth_engine: Path, workspace: Path
) -> None:
    flags = ["build", "-m", checkpoint, "--method", "smoothquant", "--backend", "torch"]
    _json(invoke, *flags, "-o", "engine", "--calibration-text", calibration_text)
    expected = read_engine(smooth_engine).plan.matrices
    matrices = read_engine(workspace / "engine").plan.matrices
    assert matrices.keys() == expected.keys()
    for name, value in matrices.items():
        np.testing.assert_array_equal(value, expected[name])
    decode = matrices["streams.0.decode"]
    assert (decode[:, range(16), range(16)] != 1).all()
    _json(invoke, *flags, "-o", "dummy", "--load-format", "dummy")
    (output,) = _json(invoke, "run", "-e", "engine", "-p", PROMPT, "--max-tokens", "70", "--ignore-eos")["outputs"]
    assert len(output["token_ids"]) == 70


def test_weights_are_linked(invoke: Invoke, sharded: Path, workspace: Path) -> None:
    built = _json(invoke, "build", "-m", sharded, "-o", "engine")
    assert built["weights_linked"] is True
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        linked = workspace / "engine/checkpoint" / shard.name
        assert linked.samefile(shard) and linked.stat().st_nlink >= 2
    weights = sum(shard.stat().st_size for shard in shards)
    assert 0 < built["bytes_added_on_disk"] < weights


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.ENOTSUP])
def test_weights_are_copied_where_links_are_impossible(
    monkeypatch: pytest.MonkeyPatch, invoke: Invoke, checkpoint: Path, workspace: Path, number: int
) -> None:
    def link(source: object, target: object) -> None:
        raise OSError(number, os.strerror(number), source, None, target)

    monkeypatch.setattr(os, "link", link)
    assert _json(invoke, "build", "-m", checkpoint, "-o", "engine")["weights_linked"] is False
    copy = workspace / "engine/checkpoint/model.safetensors"
    assert copy.stat().st_nlink == 1 and copy.read_bytes() == (checkpoint / copy.name).read_bytes()
    read_engine(workspace / "engine")


def test_underscores_in_flags(invoke: Invoke, checkpoint: Path, workspace: Path) -> None:
    flags = ["--max_seq_len", "128", "--max_batch_size=3", "--max_num_tokens", "64", "--load_format", "dummy"]
    assert invoke("build", "-m", checkpoint, "--output_dir", "engine_a", *flags).code == 0
    build = read_engine(workspace / "engine_a").build
    assert (build.max_seq_len, build.max_batch_size, build.max_num_tokens) == (128, 3, 64)


def test_dummy_of_a_checkpoint(invoke: Invoke, checkpoint: Path, workspace: Path) -> None:
    assert invoke("build", "-m", checkpoint, "-o", "engine", "--load-format", "dummy").code == 0
    assert _json(invoke, "inspect", "-e", "engine")["source"]["dummy"] is True
    assert [path.name for path in workspace.iterdir()] == ["engine"]


def test_names_with_special_characters(invoke: Invoke, checkpoint: Path) -> None:
    """Brackets are markup and colons emoji to the library that prints."""
    output = "[red]:x:[/blue] caf\u00e9"
    built = invoke("build", "-m", checkpoint, "-o", output)
    assert built.code == 0 and f"Engine {output}" in built.out
    assert f"Engine {output}" in invoke("inspect", "-e", output).out
    assert f"wrote {output}.json" in invoke("plan", "-m", checkpoint, "--save", f"{output}.json").err
    streamed = invoke("run", "-e", output, "-p", PROMPT, "--max-tokens", "2", *ONE_THREAD)
    assert streamed.code == 0 and streamed.out.startswith(PROMPT)


def test_inspect(invoke: Invoke, engine: Path) -> None:
    data = _json(invoke, "inspect", "-e", engine)
    assert data["plan"]["method"] == "minicache4" and data["build"]["max_seq_len"] == MAX_SEQ_LEN
    assert data["tensors"] and data["cache"]["ratio"] > 1
    text = invoke("inspect", "-e", engine)
    assert text.code == 0 and "decoder.onnx" in text.out and text.err == ""


def test_plan(invoke: Invoke) -> None:
    data = _json(invoke, "plan", "-m", "llama2-7b", "--merge-start", "16")
    assert data["method"] == "minicache" and len(data["layers"]) == 64
    assert invoke("plan", "-m", "llama2-7b").err == ""


def test_doctor(invoke: Invoke) -> None:
    checks = {check["name"]: check for check in _json(invoke, "doctor")}
    assert checks["ONNX Runtime"]["ok"] and checks["packages"]["found"].startswith("minicache-trt ")
    assert "ONNX Runtime" in invoke("doctor").out


def test_doctor_says_why_there_are_no_kernels(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    unusable = "MINICACHE_CPU_KERNELS: there is no file /nowhere.so"
    for switch, found, code in (("0", "switched off by MINICACHE_CPU_KERNELS=0", 0), ("/nowhere.so", unusable, 1)):
        monkeypatch.setenv("MINICACHE_CPU_KERNELS", switch)
        result = invoke("doctor", "--json")
        checks = {check["name"]: check for check in json.loads(result.out)}
        assert not checks["CPU kernels"]["ok"] and checks["CPU kernels"]["found"] == found
        assert result.code == code, "engines do without kernels, but not with some that are wrong"


def test_run_streams_what_json_reports(invoke: Invoke, engine: Path) -> None:
    for flags in (["--max-tokens", "40"], ["--temperature", "1.5", "--seed", "3", "--max-tokens", "20"]):
        (output,) = _json(invoke, "run", "-e", engine, "-p", PROMPT, *flags, *ONE_THREAD)["outputs"]
        assert output["prompt"] == PROMPT and output["text"]
        streamed = invoke("run", "-e", engine, "-p", PROMPT, *flags, *ONE_THREAD)
        assert streamed.code == 0 and streamed.out == f"{PROMPT}{output['text']}\n"
        assert "tokens/s" in streamed.err


def test_prompts_from_files(invoke: Invoke, engine: Path, workspace: Path) -> None:
    prompts = ["the cat", "the dog sat", "caf\u00e9 \u2028 and more"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (workspace / "prompts.jsonl").write_text("\n".join([*lines, "", ""]), encoding="utf-8")
    (workspace / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(prompts).encode())
    flags = ["run", "-e", engine, "--max-tokens", "4", *ONE_THREAD]
    expected = _json(invoke, *flags, *(part for prompt in prompts for part in ("-p", prompt, *ONE_THREAD)))["outputs"]
    assert [output["prompt"] for output in expected] == prompts
    for name in ("prompts.jsonl", "prompts.txt"):
        assert _json(invoke, *flags, "--prompts", name)["outputs"] == expected
    text = invoke(*flags, "--prompts", "prompts.txt")
    assert text.code == 0 and all(f"{output['prompt']}{output['text']}\n" in text.out for output in expected)


def test_prompt_as_long_as_the_engine(invoke: Invoke, engine: Path) -> None:
    prompt = "\u00e9" * (MAX_SEQ_LEN // 2)
    (output,) = _json(invoke, "run", "-e", engine, "-p", prompt, *ONE_THREAD)["outputs"]
    assert (output["prompt_tokens"], output["token_ids"]) == (MAX_SEQ_LEN, [])
    assert_refused(
        invoke("compare", "-e", engine, "-p", prompt, *ONE_THREAD), f"{MAX_SEQ_LEN} tokens", "nothing to compare"
    )


def test_compare(invoke: Invoke, engine: Path) -> None:
    data = _json(invoke, "compare", "-e", engine, "-p", PROMPT, "--max-tokens", "8", *ONE_THREAD)
    assert data["method"] == "minicache4" and len(data["prompts"]) == 1
    text = invoke("compare", "-e", engine, "-p", PROMPT, "--max-tokens", "8", *ONE_THREAD)
    assert text.code == 0 and text.err == "" and "PyTorch" in text.out


def test_libraries_are_quiet(engine: Path) -> None:
    """No progress bars, advice or warnings of other packages, on either stream."""
    result = run_process("compare", "-e", engine, "-p", PROMPT, "--max-tokens", "4", "--json", *ONE_THREAD)
    assert result.code == 0 and result.err == ""
    json.loads(result.out)


def test_what_libraries_say_at_the_very_end_is_not_heard() -> None:
    script = (
        "import atexit, os, sys; atexit.register(os.write, 2, b'leaked 514 functions!'); "
        "from minicache_trt.cli import main; sys.argv[1:] = ['--version']; main()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout and result.stderr == ""


def test_text_that_the_terminal_cannot_show(engine: Path, workspace: Path) -> None:
    (workspace / "caf\u00e9").symlink_to(engine)
    result = run_process("inspect", "-e", "caf\u00e9", PYTHONIOENCODING="ascii")
    assert result.code == 0 and result.err == "" and result.out.startswith("Engine caf\\xe9")


def test_rebuild_from_its_own_checkpoint(invoke: Invoke, own_engine: Path) -> None:
    """The weights an engine holds outlive its replacement."""
    assert invoke("build", "-m", own_engine / "checkpoint", "-o", own_engine, "--force", "--method", "full").code == 0
    assert read_engine(own_engine).plan.method == "full"
    assert [path.name for path in own_engine.parent.iterdir()] == ["engine"]
