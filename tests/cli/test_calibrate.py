"""``calibrate``: what it refuses, what it prints and writes, and that the other verbs take its plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minicache_trt import LLM
from minicache_trt.compression.plan_json import load_plan
from minicache_trt.compression.size import ratio
from tests.cli.command import Invoke, assert_refused, snapshot

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo_model" / "checkpoint"
SMALL = (
    *("--length", 192, "--moment-sequences", 6, "--gradient-sequences", 3, "--search-sequences", 2),
    *("--verify-sequences", 2, "--threads", 1),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "code.txt"
    sources = sorted((ROOT / "minicache_trt").rglob("*.py"))[:40]
    path.write_text("\n\0".join(source.read_text(encoding="utf-8") for source in sources), encoding="utf-8", newline="")
    return path


def test_a_plan_from_text_to_engine(invoke: Invoke, text: Path, tmp_path: Path) -> None:
    """Calibrate, read the record, build with the plan, score with the engine; other checkpoints refuse the plan."""
    output, plots = tmp_path / "new" / "plan.json", tmp_path / "plots"
    result = invoke(
        "calibrate", "-m", DEMO, "--text", text, "--target-ratio", 6, "--context", 1024, "-o", output,
        "--plot", plots, *SMALL, "--json",
    )  # fmt: skip
    assert result.code == 0 and result.err == "", result
    said = json.loads(result.out)
    config = load_plan(output)
    assert said["plan"]["ratio"] >= 6 and said["plan"]["loss"] < 0.05
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "plan.calibration.json", "plan.json", "plan.safetensors",
    ]  # fmt: skip
    record = json.loads((output.parent / "plan.calibration.json").read_text())
    assert record["plan"] == said["plan"] and record["text"]["name"] == "code.txt"
    assert record["checkpoint"]["checksum"] == config.calibrated_on
    assert {row["part"] for row in record["streams"]} == {"key", "value"}
    pairs = record["similarity"]
    before, after = (np.mean([pair["cosine"]["mean"] for pair in pairs[name]]) for name in ("before", "after"))
    assert after > before + 0.2
    assert sorted(path.name for path in plots.iterdir()) == ["alignment.png", "front.png", "streams.png"]
    assert said["plots"] == [str(plots / name) for name in ("alignment.png", "streams.png", "front.png")]

    built = invoke("build", "-m", DEMO, "--plan", output, "--max-seq-len", 256, "-o", tmp_path / "engine", "--json")
    assert built.code == 0, built
    llm = LLM(tmp_path / "engine", num_threads=1)
    assert ratio(llm.engine.plan, llm.engine.model, 1024, 64) == pytest.approx(said["plan"]["ratio"])
    tokens = llm.tokenizer.encode(text.read_text(encoding="utf-8")[:2000])[:250]
    logits = llm.score([tokens], [128], start=128)[0][:-1]
    log_p = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    assert -log_p[np.arange(len(logits)), tokens[129:]].mean() < 6

    other = tmp_path / "other"
    shutil.copytree(DEMO, other)
    config_file = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config_file, "rms_norm_eps": 1e-5}))
    refused = invoke("build", "-m", other, "--plan", output, "-o", tmp_path / "engine2")
    assert_refused(refused, "plan: it was calibrated on another checkpoint")
    assert not (tmp_path / "engine2").exists()


@pytest.mark.long
def test_what_is_printed(invoke: Invoke, text: Path, tmp_path: Path) -> None:
    result = invoke("calibrate", "-m", DEMO, "--text", text, "--max-loss", "2%", "--groups", 1, "-o", tmp_path, *SMALL)
    assert result.code == 0, result
    assert (tmp_path / "plan.json").exists() and "wrote" in result.err
    for part in ("Whole plans at 2048 tokens", "(written)", "kivi4", "products"):
        assert part in result.out, part


REFUSALS: list[tuple[tuple[object, ...], str]] = [
    (("--target-ratio", 5, "--max-loss", "1%"), "--target-ratio and --max-loss exclude each other"),
    (("--target-ratio", 1), "--target-ratio: expected a number above 1, got 1"),
    (("--target-ratio", "nan"), "--target-ratio: expected a number above 1"),
    (("--target-ratio", 40), "--target-ratio: 40x cannot be reached: at 2048 tokens the exact window alone allows"),
    (
        ("--target-ratio", 31),
        "--target-ratio: 31x cannot be reached at 2048 tokens: the smallest plan of this model is",
    ),
    (("--max-loss", "much"), "--max-loss: expected a percentage such as 0.5%"),
    (("--max-loss", "0%"), "--max-loss: expected a percentage such as 0.5%"),
    (("--groups", "1,3"), "--groups: expected sizes among 1, 2, 4"),
    (("--groups", "two"), "--groups: expected sizes such as 1,2,4"),
    (("--read-cost", "cheap"), "--read-cost: expected one of any, free"),
    (("--length", 100), "--length: expected a multiple of 64"),
    (("--length", 4096), "--length 4096 is beyond the model's 2048 positions"),
    (("--context", 4096), "--context 4096 is beyond the model's 2048 positions"),
    (("--context", 100), "--context: at 100 tokens nothing is compressed yet"),
    (("--recall-share", 1), "--recall-share: expected a number in [0, 1)"),
    (("--search-sequences", 1), "--search-sequences: expected at least 2"),
    (("--plot", __file__), "is a file, expected a directory"),
    (("--moment-sequences", 100000), "too short"),
]


@pytest.mark.parametrize("arguments, said", REFUSALS)
def test_refusals(invoke: Invoke, text: Path, tmp_path: Path, arguments: tuple[object, ...], said: str) -> None:
    result = invoke("calibrate", "-m", DEMO, "--text", text, "-o", tmp_path / "out" / "plan.json", *arguments)
    assert_refused(result, said)
    assert not (tmp_path / "out").exists()


def test_texts_that_do_not_do(invoke: Invoke, tmp_path: Path) -> None:
    assert_refused(invoke("calibrate", "-m", DEMO, "--text", tmp_path / "none.txt"), "cannot be read: No such file")
    short = tmp_path / "short.txt"
    short.write_text("def main(): pass\n")
    assert_refused(invoke("calibrate", "-m", DEMO, "--text", short, "-o", tmp_path / "p.json"), "is too short")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt", "work"] and not snapshot(tmp_path / "work")


def test_a_damaged_model(invoke: Invoke, text: Path, tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "checkpoint")
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    name = "model.layers.3.self_attn.v_proj.weight"
    weights[name] = np.full_like(weights[name], np.inf)
    save_file(weights, tmp_path / "checkpoint" / "model.safetensors")
    result = invoke(
        "calibrate", "-m", tmp_path / "checkpoint", "--text", text, "-o", tmp_path / "out" / "plan.json", *SMALL
    )
    assert_refused(result, "not finite on the calibration text")
    assert not (tmp_path / "out" / "plan.json").exists()
