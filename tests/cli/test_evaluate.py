"""What eval prints and writes, and what it refuses before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.command import Invoke, assert_refused
from tests.cli.conftest import MAX_SEQ_LEN

Refused = Callable[..., None]
SMALL = ["--length", MAX_SEQ_LEN, "--windows", 2, "--examples", 2, "--segment", 20, "--queries", 1, "--threads", 1]


@pytest.fixture
def text(workspace: Path) -> Path:
    path = workspace / "text.txt"
    path.write_text("the cat sat on the mat and the dog sat on the log. " * 80 + "\n\0" + "a dog and a log? " * 200)
    return path


@pytest.mark.parametrize("own", [True, False])
def test_methods_side_by_side(invoke: Invoke, checkpoint: Path, engine: Path, text: Path, own: bool) -> None:
    source = ["-e", engine] if own else ["-m", checkpoint]
    tasks = "perplexity,repeat,copy,passkey,keyvalue"
    result = invoke(
        "eval", *source, "--methods", "kivi2", "--text", text, "--tasks", tasks, *SMALL, "--json", "--plot", "front.svg"
    )
    assert result.code == 0, result
    data: dict[str, Any] = json.loads(result.out)
    assert [m["method"] for m in data["methods"]] == ["full", *(["engine"] if own else []), "kivi2"]
    assert data["length"] == MAX_SEQ_LEN and data["tasks"] == tasks.split(",")
    full, kivi2 = data["methods"][0], data["methods"][-1]
    assert full["memory"]["bits"] == 16 and 2 < kivi2["memory"]["bits"] < 3.5
    assert full["memory"]["ratio"] < 1 < kivi2["memory"]["ratio"] < kivi2["memory"]["sequence_ratio"]
    for method in data["methods"]:
        assert list(method["tasks"]) == tasks.split(",")
        for values in method["tasks"].values():
            assert values["nll_interval"][0] <= values["nll"] <= values["nll_interval"][1]
            assert np.isclose(values["perplexity"], np.exp(values["nll"]))
    assert full["tasks"]["perplexity"]["nll_change_interval"] == [0, 0]
    assert kivi2["tasks"]["perplexity"]["nll_change"] != 0
    assert Path("front.svg").read_bytes().startswith(b"<?xml")


def test_tables(invoke: Invoke, checkpoint: Path, text: Path, workspace: Path) -> None:
    assert invoke("plan", "-m", checkpoint, "--method", "rtn", "--save", "mine.json").code == 0
    result = invoke("eval", "-m", checkpoint, "--plan", "mine.json", "--text", text, *SMALL)
    assert result.code == 0, result
    for part in ("perplexity", "repeat", "full", "mine", "16.00", "+0.0%"):
        assert part in result.out, part


def test_smoothquant_is_calibrated(invoke: Invoke, checkpoint: Path, text: Path, refused: Refused) -> None:
    small = [*SMALL, "--tasks", "repeat", "--methods", "smoothquant", "-m", checkpoint, "--text", text]
    refused(["eval", *small], "needs text to calibrate on", "--calibration-text")
    result = invoke("eval", *small, "--calibration-text", text, "--json")
    assert result.code == 0, result
    # 8-bit codes, and a scale and a minimum in fp16 for the 16 numbers of a head.
    assert json.loads(result.out)["methods"][1]["memory"]["bits"] == 8 + 2 * 16 / 16


def test_finished_rows_are_kept(
    invoke: Invoke, refused: Refused, checkpoint: Path, text: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed in its second row goes on with it; what was measured is not measured again, and means the same."""
    from minicache_trt import LLM

    measured: list[int] = []
    likelihoods = LLM.likelihoods

    def counted(llm: LLM, *arguments: Any) -> Any:
        measured.append(1)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return likelihoods(llm, *arguments)

    monkeypatch.setattr(LLM, "likelihoods", counted)
    command = ["eval", "-m", checkpoint, "--text", text, *SMALL, "--results", "rows.json", "--json"]
    killed = invoke(*command, "--methods", "kivi2")
    assert killed.code != 0 and len(measured) == 2
    whole = invoke(*command, "--methods", "kivi2,kivi4")
    assert whole.code == 0 and len(measured) == 4, whole
    again = invoke(*command, "--methods", "kivi4,kivi2")
    rows = {row["method"]: row for row in json.loads(whole.out)["methods"]}
    assert len(measured) == 4 and {row["method"]: row for row in json.loads(again.out)["methods"]} == rows
    fresh = invoke(*command[:-3], "--json", "--methods", "kivi2,kivi4")
    assert {row["method"]: row for row in json.loads(fresh.out)["methods"]} == rows

    measured[:] = [1, 1]
    assert invoke(*command, "--seed", 1).code == 0 and len(measured) == 3  # other examples: full again
    assert invoke(*command, "--weights", "int8").code == 0 and len(measured) == 4
    rows_before = Path("rows.json").read_bytes()
    (workspace / "other.json").write_text('{"rows": {}}')
    for name, said in (("other.json", "holds no rows of eval"), ("text.txt", "holds no rows of eval"),
                       ("no/rows.json", "there is no folder")):  # fmt: skip
        refused([*command[:-2], name], said)
    assert Path("rows.json").read_bytes() == rows_before


def test_refusals(refused: Refused, checkpoint: Path, engine: Path, text: Path) -> None:
    model = ["eval", "-m", checkpoint, "--text", text]
    refused(["eval", "--text", text], "expected --engine or --model")
    refused([*model, "-e", engine], "expected --engine or --model")
    refused(["eval", "-m", checkpoint], "perplexity needs text", "--text FILE")
    refused(["eval", "-m", checkpoint, "--text", "absent.txt", *SMALL], "absent.txt", "No such file")
    refused([*model, "--length", 100], "windows of 100 tokens", "--length")
    refused([*model, "--length", 513], "513 tokens are beyond the model's 512 positions")
    refused([*model, *SMALL, "--methods", "kivi3"], "unknown method 'kivi3'", "did you mean")
    refused([*model, *SMALL, "--methods", "kivi4", "--plan", "absent.json"], "absent.json")
    refused([*model, *SMALL, "--tasks", " , "], "--tasks names no task")
    refused([*model, *SMALL, "--limit", 3], "--limit only goes with tasks of lm-eval-harness")
    refused([*model, *SMALL, "--depths", "0,deep"], "--depths: expected numbers")
    refused([*model, *SMALL, "--depths", "2"], "--depths: expected numbers in [0, 1]")
    refused([*model, *SMALL, "--weights", "int3"], "--weights: expected one of")
    refused([*model, *SMALL, "--plot", "front.xyz"], "no known suffix")
    refused([*model, *SMALL, "--segment", 190], "too short")
    refused(["eval", "-e", engine, "--text", text, "--length", 256], "built for sequences of 192 tokens")


def test_window_is_the_engines(invoke: Invoke, refused: Refused, checkpoint: Path, text: Path, workspace: Path) -> None:
    """Engines built beside one with a larger window have that window, and as much less to score."""
    from minicache_trt.build import build_engine
    from minicache_trt.compression.methods import make_plan
    from minicache_trt.config import BuildConfig

    limits = BuildConfig(2, MAX_SEQ_LEN, MAX_SEQ_LEN, window=128)
    build_engine(str(checkpoint), "wide", lambda config: (make_plan(config, "kivi4"), limits))
    arguments = ["eval", "-e", "wide", "--methods", "kivi4", "--text", text, *SMALL]
    refused(arguments, "windows of 192 tokens hold nothing to score, the first 193 are context")
    result = invoke(*arguments, "--tasks", "copy", "--length", 190, "--segment", 10, "--json")
    assert result.code == 2, result
    limits = BuildConfig(2, 320, 320, window=128)
    build_engine(str(checkpoint), "wider", lambda config: (make_plan(config, "kivi4"), limits))
    result = invoke("eval", "-e", "wider", "--methods", "kivi4", "--text", text, *SMALL, "--length", 320, "--json")
    assert result.code == 0, result
    _, own, built = json.loads(result.out)["methods"]
    assert own["tasks"]["perplexity"]["nll"] == pytest.approx(built["tasks"]["perplexity"]["nll"], rel=1e-5)


def test_two_rows_of_one_name(invoke: Invoke, refused: Refused, checkpoint: Path, text: Path, workspace: Path) -> None:
    assert invoke("plan", "-m", checkpoint, "--method", "rtn", "--save", "rtn.json").code == 0
    refused(["eval", "-m", checkpoint, "--text", text, "--methods", "rtn", "--plan", "rtn.json", *SMALL], "'rtn'")


def test_text_too_short(refused: Refused, checkpoint: Path, workspace: Path) -> None:
    (workspace / "short.txt").write_text("the cat")
    refused(["eval", "-m", checkpoint, "--text", "short.txt", *SMALL], "tokens are too few", "give a longer text")
    (workspace / "empty.txt").write_text(" \n")
    refused(["eval", "-m", checkpoint, "--text", "empty.txt", *SMALL], "there is no text in it")


def test_no_tokenizer(refused: Refused, own_checkpoint: Path, text: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own_checkpoint / name).unlink()
    refused(["eval", "-m", own_checkpoint, "--text", text, *SMALL], "has no tokenizer")


def test_dummy_weights(invoke: Invoke, checkpoint: Path, text: Path, workspace: Path) -> None:
    built = invoke("build", "-m", checkpoint, "--load-format", "dummy", "--max-seq-len", MAX_SEQ_LEN, "-o", "dummy")
    assert built.code == 0, built
    assert_refused(invoke("eval", "-e", "dummy", "--text", text, *SMALL), "dummy weights")


def test_without_lm_eval(refused: Refused, checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    refused(["eval", "-m", checkpoint, "--tasks", "hellaswag"], "lm-eval is not installed", "minicache-trt[eval]")
