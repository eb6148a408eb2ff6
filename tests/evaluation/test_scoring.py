"""Scores of examples: by hand, from models that know the answer or do not, and against Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minicache_trt.build import load_engine
from minicache_trt.compression.methods import make_plan
from minicache_trt.evaluation.contenders import Contender, build_for
from minicache_trt.evaluation.evaluate import evaluate
from minicache_trt.evaluation.examples import Example, Source, key_values, passkey
from minicache_trt.evaluation.report import figures, summarize
from minicache_trt.evaluation.scoring import Scores, answer_scores, score_examples
from minicache_trt.evaluation.tasks import Cell
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.scoring import LikelihoodRows, token_nll
from tests.support.engines import build

DEMO = Path(__file__).parents[2] / "examples" / "demo_model" / "checkpoint"
VOCAB = 300


def likelihoods(logits: np.ndarray, following: Sequence[int]) -> tuple[Any, Any]:
    """What an engine finds in logits, a row after another."""
    rows = LikelihoodRows(following)
    for index, row in enumerate(logits):
        rows.keep(index, row[None])
    return rows.result()


def test_answer_scores_by_hand() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], np.float32))
    example = Example([0, 0, 1, 2, 1], ((1, 3), (4, 5)))
    # Rows predict tokens 1 to 3; the one of token 4 is missing until it is appended.
    rows = np.concatenate([logits, np.log(np.array([[0.1, 0.3, 0.6]], np.float32))])
    nll, right, count, exact, answers = answer_scores(example, 0, *likelihoods(rows, example.tokens[1:]))
    assert np.isclose(nll, -np.log([0.5, 0.8, 0.3]).sum(), rtol=1e-6)
    assert (right, count, exact, answers) == (2, 3, 1, 2)
    assert np.isclose(token_nll(np.array([[1e4, 0.0]], np.float32), np.array([1]))[0], 1e4)


class Model:
    """Predicts what it is told to: the next token of the sequence, or another one."""

    def __init__(self, wrong: int = 0) -> None:
        self.wrong, self.prompts, self.sizes = wrong, list[int](), list[int]()

    def likelihoods(
        self, token_ids: Sequence[list[int]], prompt_lens: Sequence[int] | None, start: int | Sequence[int],
        progress: Callable[[int], None] | None,
    ) -> list[Any]:  # fmt: skip
        assert prompt_lens is not None and not isinstance(start, int)
        self.prompts += prompt_lens
        self.sizes.append(len(token_ids))
        found = []
        for tokens, first in zip(token_ids, start, strict=True):
            targets = (np.array(tokens[first + 1 :]) + self.wrong) % VOCAB
            logits = np.where(np.arange(VOCAB) == targets[:, None], np.float32(30), np.float32(0))
            found.append(likelihoods(logits, tokens[first + 1 :]))
        return found


@pytest.fixture
def asked() -> list[Example]:
    source = Source(lambda text: list(text.encode()), range(200, 250), [299], np.array(list(b"lorem ipsum ") * 90))
    rng = np.random.default_rng(0)
    return [passkey(source, rng, 250, depth) for depth in (0.0, 0.5, 1.0)] + [key_values(source, rng, 250, 4)]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_who_knows_is_right(asked: list[Example], batch: int) -> None:
    model = Model()
    scores = score_examples(model, asked, 128, batch, lambda done: None)
    assert scores.answers.tolist() == [1, 1, 1, 4] == scores.exact.tolist()
    assert scores.count.tolist() == scores.right.tolist() == [5, 5, 5, 20]
    assert scores.nll.max() < 1e-6
    assert model.prompts == [example.prompt for example in asked] and max(model.sizes) == min(batch, 4)


def test_who_does_not_is_wrong(asked: list[Example]) -> None:
    scores = score_examples(Model(wrong=1), asked, 128, 8, lambda done: None)
    assert not scores.right.any() and not scores.exact.any()
    assert np.allclose(scores.nll, 30 * scores.count, atol=1e-3)
    known = score_examples(Model(), asked, 128, 8, lambda done: None)
    values = figures(scores, known)
    assert (values["accuracy"], values["exact"], values["exact_change"]) == (0, 0, -1)
    assert values["exact_change_interval"] == (-1, -1) and np.isclose(values["nll_change"], 30)


def test_one_wrong_token_spoils_its_answer_only() -> None:
    logits = np.zeros((9, VOCAB), np.float32)
    example = Example(list(range(10)), ((2, 5), (7, 10)))
    for row, token in enumerate(example.tokens[2:], 1):
        logits[row, token if token != 8 else 0] = 20
    _, right, count, exact, answers = answer_scores(example, 0, *likelihoods(logits, example.tokens[1:]))
    assert (right, count, exact, answers) == (5, 6, 1, 2)


def test_perplexity_is_hugging_faces(tmp_path: Path) -> None:
    """Uncompressed, through the engine's cache, against one forward pass of Hugging Face's own model."""
    llm = LLM.from_engine(load_engine(build(DEMO, tmp_path / "engine", "full", max_seq_len=256), 1))
    rng = np.random.default_rng(0)
    rows = [[0, *rng.integers(2, 3072, 199).tolist()] for _ in range(3)]
    scores = score_examples(llm, [Example(r, ((129, 200),)) for r in rows], 128, 2, lambda done: None)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    for index, row in enumerate(rows):
        ids = torch.tensor([row])
        labels = ids.clone()
        labels[:, :129] = -100
        loss = model(ids, labels=labels).loss.item()
        assert np.isclose(scores.nll[index] / scores.count[index], loss, rtol=1e-5), index
    assert scores.count.tolist() == [71] * 3


def test_compressed_history_is_read(tmp_path: Path) -> None:
    """The same tokens cost more with 2-bit history, but only those that read any of it."""
    rng = np.random.default_rng(0)
    segment = rng.integers(2, 3072, 60).tolist()
    row = [0, *(segment * 5)]
    spans = [Example(row, ((62, 128),)), Example(row, ((200, 301),))]
    nll = {}
    for method in ("full", "minicache"):
        directory = build(DEMO, tmp_path / method, method, max_seq_len=320)
        nll[method] = score_examples(LLM.from_engine(load_engine(directory, 1)), spans, 128, 4, lambda done: None).nll
    assert np.isclose(nll["full"][0], nll["minicache"][0], rtol=1e-3)
    assert nll["minicache"][1] > nll["full"][1] + 1


@pytest.mark.parametrize("method", ["kivi2", "minicache4"])
def test_blocks_at_once_are_as_decoded(tmp_path: Path, method: str) -> None:
    """A block of tokens in one step costs what its tokens cost one by one, on the engine's own kernels."""
    llm = LLM.from_engine(load_engine(build(DEMO, tmp_path / "engine", method, max_seq_len=384), 1))
    rng = np.random.default_rng(0)
    rows = [[0, *np.resize(rng.integers(2, 3072, 70), size).tolist()] for size in (300, 340)]
    found = llm.likelihoods(rows, [128, 200], [140, 150])
    logits = llm.score([row[:-1] for row in rows], [128, 200], [140, 150])
    for row, first, (nll, likeliest), decoded in zip(rows, (140, 150), found, logits, strict=True):
        following = np.array(row[first + 1 :])
        np.testing.assert_allclose(nll, token_nll(decoded, following), rtol=1e-3, atol=1e-3)
        assert (likeliest == (decoded.argmax(-1) == following)).mean() > 0.99


def test_memory_is_what_is_allocated(tmp_path: Path) -> None:
    """A row's ratio comes from the blocks an engine really holds; counted here from its pools' bytes."""
    from minicache_trt.checkpoint import resolve_config
    from minicache_trt.contract import compressed_pools

    config, limits = resolve_config(str(DEMO)), build_for(512, 4)
    cells = {"repeat": [Cell(200, None, (Example([0, *[7] * 199], ((150, 200),)),))]}
    plan = make_plan(config, "kivi4")
    results = evaluate([Contender("row", DEMO, plan, limits)], cells, None, 1, None, lambda *_: None)
    memory = results[0].memory
    llm = Contender("row", DEMO, plan, limits).open(1, None)
    tier = [llm.engine.pool(pool.name) for pool in compressed_pools(plan, llm.engine.model)]
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 64
    blocks = {len(pool) for pool in tier}
    assert len(blocks) == 1
    (count,) = blocks
    # fp16 parameters and packed codes take their own width; nothing in kivi4 is stored in the compute type.
    assert np.isclose(memory.bits, 8 * sum(pool.nbytes for pool in tier) / count / numbers)
    assert 4.4 < memory.bits < 4.6
    full = llm.cache_sizes.full_blocks * numbers * 2
    assert np.isclose(memory.ratio, 4 * 512 / 64 * numbers * 2 / (full + sum(pool.nbytes for pool in tier)))
    assert isinstance(results[0].scores("repeat"), Scores) and summarize(results)[0]["memory"]["bits"] == memory.bits
