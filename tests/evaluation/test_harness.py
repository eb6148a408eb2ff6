"""lm-eval-harness through the engine, against its own Hugging Face model on the same checkpoint and tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache_trt.build import load_engine
from minicache_trt.checkpoint import resolve_config
from minicache_trt.errors import UserError
from minicache_trt.evaluation.harness import HarnessTasks, with_changes
from minicache_trt.runtime.llm import LLM
from tests.evaluation.conftest import BODIES
from tests.support.engines import build

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
DEMO = Path(__file__).parents[2] / "examples" / "demo_model" / "checkpoint"
LENGTH = 256


def open_engine(output: Path, method: str) -> LLM:
    assert resolve_config(str(DEMO)).vocab_size == 3072
    engine = load_engine(build(DEMO, output, method, max_seq_len=LENGTH), 1)
    return LLM.from_engine(engine, tokenizer=DEMO)


@pytest.fixture(scope="module")
def hugging_face(task_folder: Path) -> dict[str, Any]:
    """What lm-eval-harness's own model says: results and samples."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(DEMO), dtype="float32", device="cpu", max_length=LENGTH, batch_size=1)
    output: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=list(BODIES),
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return output


def responses(output: dict[str, Any], task: str) -> list[Any]:
    return [row["filtered_resps"] for row in sorted(output["samples"][task], key=lambda row: int(row["doc_id"]))]


def test_answers_are_hugging_faces(tmp_path: Path, task_folder: Path, hugging_face: dict[str, Any]) -> None:
    """Every log-likelihood and every generated text, some of them of documents that are cut on the left."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from minicache_trt.evaluation.harness_model import EngineLM

    mine: dict[str, Any] = simple_evaluate(
        model=EngineLM(open_engine(tmp_path / "engine", "full")),
        tasks=list(BODIES),
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        bootstrap_iters=0,
    )
    choices, theirs = responses(mine, "local_choice"), responses(hugging_face, "local_choice")
    assert [len(row) for row in choices] == [4] * 6
    assert np.allclose([[p for p, _ in row] for row in choices], [[p for p, _ in row] for row in theirs], atol=2e-3)
    assert [[g for _, g in row] for row in choices] == [[g for _, g in row] for row in theirs]
    assert np.allclose(responses(mine, "local_text"), responses(hugging_face, "local_text"), rtol=1e-5)
    assert responses(mine, "local_answer") == responses(hugging_face, "local_answer")
    assert len({str(text) for text in responses(mine, "local_answer")}) > 1


def test_metrics_and_changes(tmp_path: Path, task_folder: Path, hugging_face: dict[str, Any]) -> None:
    tasks = HarnessTasks(tuple(BODIES), task_folder)
    full = tasks(open_engine(tmp_path / "full", "full"))
    for task, metric in (("local_choice", "acc"), ("local_text", "byte_perplexity"), ("local_answer", "exact_match")):
        assert np.isclose(full[task][metric]["value"], hugging_face["results"][task][f"{metric},none"], rtol=1e-4)
    merged = tasks(open_engine(tmp_path / "minicache", "minicache"))
    lines = with_changes(merged, full)
    # Most of these texts is decoded against merged history.
    assert lines["local_text"]["byte_perplexity"]["change"] > 0.01
    assert "change_interval" not in lines["local_text"]["byte_perplexity"]
    choice = lines["local_choice"]["acc"]
    assert choice["documents"] == 6
    assert choice["change_interval"][0] <= choice["change"] <= choice["change_interval"][1]


def test_limit(tmp_path: Path, task_folder: Path) -> None:
    found = HarnessTasks(("local_choice",), task_folder, limit=2)(open_engine(tmp_path / "engine", "full"))
    assert len(found["local_choice"]["acc"]["samples"]) == 2


def test_what_cannot_be_loaded_is_said(task_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown task 'local_choise', did you mean 'local_choice'"):
        HarnessTasks(("local_choise",), task_folder)
    with pytest.raises(UserError, match="no such directory"):
        HarnessTasks(("local_choice",), tmp_path / "nowhere")
    broken = tmp_path / "broken"
    broken.mkdir()
    text = (task_folder / "local_choice.yaml").read_text().replace("documents.jsonl", "absent.jsonl")
    (broken / "task.yaml").write_text(text.replace("local_choice", "local_broken"))
    with pytest.raises(UserError, match=r"local_broken: lm-eval-harness cannot load it: .*absent\.jsonl"):
        HarnessTasks(("local_broken",), broken)
