"""What bench measures and writes, and what it refuses before it measures. How fast anything is, no test says."""

from __future__ import annotations

import csv
import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Invoke, assert_refused
from tests.cli.conftest import CONFIG, MAX_SEQ_LEN
from tests.support import fake_peer

Refused = Callable[..., None]
SMALL = ["--batch-sizes", "1,2", "--contexts", "5,80", "--new-tokens", "4", "--rounds", "2", "--threads", "1"]
FIGURES = {
    "prefill_tokens_per_second", "time_to_first_token", "decode_tokens_per_second", "inter_token_latency",
    "decode_steps", "peak_bytes", "cache_bytes_used", "cache_bytes_allocated",
}  # fmt: skip


def _json(invoke: Invoke, *arguments: object) -> Any:
    result = invoke("bench", *arguments, "--json")
    assert result.code == 0 and result.err == "", result
    return json.loads(result.out)


def _check_figures(figures: dict[str, Any], rounds: int) -> None:
    assert set(figures) == FIGURES
    for name in ("prefill_tokens_per_second", "time_to_first_token", "decode_tokens_per_second"):
        assert len(figures[name]) == rounds and min(figures[name]) > 0
    latency = figures["inter_token_latency"]
    assert list(latency) == ["p50", "p90", "p99"] and 0 < latency["p50"] <= latency["p90"] <= latency["p99"]


@pytest.fixture
def genai(workspace: Path) -> list[object]:
    """Flags for a stand-in for onnxruntime-genai: an executable that speaks its worker's protocol, and an export."""
    python, export = workspace / "python", workspace / "export"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{fake_peer.__file__}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    export.mkdir()
    decoder = {"num_hidden_layers": CONFIG["num_hidden_layers"], "hidden_size": CONFIG["hidden_size"]}
    model = {"context_length": 512, "vocab_size": CONFIG["vocab_size"], "decoder": decoder}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": fake_peer.CRASH}
    (export / "genai_config.json").write_text(json.dumps({"model": model | special}))
    return ["--against", "onnxruntime-genai", "--peer-python", python, "--peer-model", export]


def test_alone(invoke: Invoke, engine: Path) -> None:
    data = _json(invoke, "-e", engine, *SMALL)
    assert (data["method"], data["weights"], data["backend"]) == ("minicache4", "int8", "onnxruntime")
    assert (data["threads"], data["new_tokens"], data["rounds"], data["peers"]) == (1, 4, 2, {})
    assert [(cell["batch"], cell["context"]) for cell in data["cells"]] == [(1, 5), (1, 80), (2, 5), (2, 80)]
    for cell in data["cells"]:
        assert list(cell["figures"]) == ["minicache-trt"] and cell["ratios"] == {} and cell["same_tokens"] is None
        figures = cell["figures"]["minicache-trt"]
        _check_figures(figures, 2)
        assert 0 < figures["cache_bytes_used"] <= figures["cache_bytes_allocated"]
        assert 2 <= figures["decode_steps"] <= 6


def test_table_csv_and_plots(invoke: Invoke, engine: Path, workspace: Path) -> None:
    result = invoke("bench", "-e", engine, *SMALL, "--csv", "cells.csv", "--plot", "a/plots")
    assert result.code == 0 and result.err == "", result
    for part in ("2 x 80", "prefill", "decode", "p99", "peak resident", "cache allocated"):
        assert part in result.out
    with (workspace / "cells.csv").open(newline="") as file:
        assert [(row["batch"], row["context"]) for row in csv.DictReader(file)] == [
            ("1", "5"), ("1", "80"), ("2", "5"), ("2", "80"),
        ]  # fmt: skip
    assert sorted(path.name for path in (workspace / "a/plots").iterdir()) == [
        "latency.png", "memory.png", "throughput.png",
    ]  # fmt: skip


def test_against_genai(invoke: Invoke, engine: Path, genai: list[object]) -> None:
    """The pad token of the export crashes the stand-in: it must not begin a prompt."""
    data = _json(invoke, "-e", engine, *SMALL, *genai)
    settings = data["peers"]["onnxruntime-genai"]["settings"]
    assert settings["arguments"][-2:] == [str(genai[-1]), "1"]
    for cell in data["cells"]:
        theirs, ours = cell["figures"]["onnxruntime-genai"], cell["figures"]["minicache-trt"]
        _check_figures(theirs, 2)
        assert theirs["decode_tokens_per_second"] == pytest.approx([cell["batch"] / fake_peer.STEP] * 2)
        assert theirs["cache_bytes_used"] is None and theirs["decode_steps"] == 6
        ratios = [value * fake_peer.STEP / cell["batch"] for value in ours["decode_tokens_per_second"]]
        found = cell["ratios"]["decode"]
        assert (found["low"], found["median"], found["high"]) == pytest.approx(
            (min(ratios), sum(ratios) / 2, max(ratios))
        )
    assert "Ratio" in invoke("bench", "-e", engine, *SMALL, *genai).out


def test_against_transformers(invoke: Invoke, checkpoint: Path) -> None:
    """Uncompressed and in fp32 it is the same model: so are its tokens."""
    flags = ["--method", "full", "--max-batch-size", "2", "--max-seq-len", "64"]
    assert invoke("build", "-m", checkpoint, "-o", "engine", *flags).code == 0
    flags = ["--batch-sizes", "2", "--contexts", "16", "--new-tokens", "8", "--rounds", "1", "--threads", "1"]
    data = _json(invoke, "-e", "engine", *flags, "--against", "hf")
    assert data["peers"]["hf"]["name"] == "transformers"
    assert set(data["peers"]["hf"]["settings"]["attention_probe"]) == {"sdpa", "eager"}
    (cell,) = data["cells"]
    _check_figures(cell["figures"]["hf"], 1)
    assert set(cell["ratios"]) == {"prefill", "decode"} and cell["same_tokens"] == 1.0


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--batch-sizes", "1,x"], ["--batch-sizes: expected positive numbers separated by commas, got '1,x'"]),
        (["--batch-sizes", ""], ["--batch-sizes: expected positive numbers"]),
        (["--batch-sizes", "0"], ["--batch-sizes: expected positive numbers"]),
        (["--batch-sizes", "1,,2"], ["--batch-sizes: expected positive numbers"]),
        (["--batch-sizes", "1,3"], ["3 is beyond the engine's max_batch_size 2", "--max-batch-size"]),
        (["--contexts", "-1"], ["--contexts: expected positive numbers"]),
        (["--contexts", "1.5"], ["--contexts: expected positive numbers"]),
        (["--contexts", "\u0663"], ["--contexts: expected positive numbers"]),
        (["--contexts", "9" * 5000], ["--contexts: expected positive numbers"]),
        (["--contexts", f"16,{MAX_SEQ_LEN}"], [f"max_seq_len {MAX_SEQ_LEN}", "--max-seq-len"]),
        (["--new-tokens", f"{MAX_SEQ_LEN}"], [f"max_seq_len {MAX_SEQ_LEN}"]),
        (["--new-tokens", "1"], ["--new-tokens: expected at least 2, got 1"]),
        (["--rounds", "0"], ["--rounds: expected at least 1, got 0"]),
        (["--rounds", "-3"], ["--rounds: expected at least 1, got -3"]),
        (["--against", "vllm"], ["unknown peer 'vllm'", "hf, onnxruntime-genai"]),
        (["--against", "onnxruntime-genai"], ["needs --peer-model", "benchmarks/peers.py"]),
        (
            ["--against", "onnxruntime-genai", "--peer-model", "x"],
            ["build/peers/onnxruntime-genai/bin/python: no such file", "benchmarks/peers.py"],
        ),
        (["--peer-model", "x"], ["belong to --against onnxruntime-genai"]),
        (["--against", "hf", "--peer-python", "x"], ["belong to --against onnxruntime-genai"]),
        (["--backend", "tensorflow"], ["unknown backend 'tensorflow'"]),
        (["--kv-cache-memory", "lots"], ["--kv-cache-memory: expected a size"]),
        (["--kv-cache-memory", "1KiB"], ["cannot hold one sequence"]),
        (["--csv", "no/such/cells.csv"], ["--csv: cannot write no/such/cells.csv"]),
        (["--csv", "."], ["--csv: cannot write"]),
    ],
)
def test_bad_input(refused: Refused, engine: Path, flags: list[str], parts: list[str]) -> None:
    refused(["bench", "-e", engine, *SMALL, *flags], *parts)


def test_bad_files(refused: Refused, engine: Path, genai: list[object], workspace: Path) -> None:
    refused(["bench", "-e", "nowhere", *SMALL], "nowhere: no such directory")
    (workspace / "plots").write_text("")
    refused(["bench", "-e", engine, *SMALL, "--plot", "plots"], "--plot: plots is not a directory")
    refused(["bench", "-e", engine, *SMALL, *genai[:-1], "nowhere"], "nowhere is no export", "benchmarks/peers.py")
    (workspace / "export/genai_config.json").write_text("{")
    refused(["bench", "-e", engine, *SMALL, *genai], "genai_config.json is damaged")


def test_environment_without_the_peer(refused: Refused, engine: Path, genai: list[object]) -> None:
    flags = [*genai[:3], sys.executable, *genai[4:]]
    refused(["bench", "-e", engine, *SMALL, *flags], "No module named 'onnxruntime_genai'", "benchmarks/peers.py")


def test_sequences_that_cannot_decode_together(invoke: Invoke, engine: Path) -> None:
    """The smallest cache holds one sequence; the second waits for its end."""
    flags = ["bench", "-e", engine, "--threads", "1", "--kv-cache-memory"]
    message = invoke(*flags, "1KiB", *SMALL).err
    needed = int(message.rpartition("at least ")[2].split(",")[0])
    length = str(MAX_SEQ_LEN - 8)
    result = invoke(*flags, needed, "--batch-sizes", "2", "--contexts", length, "--new-tokens", "8", "--rounds", "1")
    assert_refused(result, "never decode all together", "--kv-cache-memory")
