"""Losses under a plan against the engine, token by token fed through its cache, and against the plain model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minicache_trt import LLM
from minicache_trt.calibration.coded import coded_streams
from minicache_trt.calibration.evaluator import Evaluator
from minicache_trt.calibration.model import CalibrationModel
from minicache_trt.calibration.samples import Samples, sample_sets
from minicache_trt.calibration.settings import CalibrationSettings
from minicache_trt.checkpoint import resolve_config
from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import BuildConfig, KvCacheConfig
from minicache_trt.reference import Reference
from minicache_trt.runtime.tokenizer import load_tokenizer
from tests.calibration.conftest import random_tokens
from tests.support.checkpoints import LAYERED, make_checkpoint
from tests.support.matrices import random_matrices

FIRST = 128


def samples_of(tokens: np.ndarray) -> Samples:
    scored = np.zeros(tokens.shape, bool)
    scored[:, FIRST:-1] = True
    return Samples(tokens, scored, np.arange(len(tokens)) % 2 == 1)


def mean_nll(logits: np.ndarray, tokens: np.ndarray) -> float:
    log_p = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    following = tokens[FIRST + 1 :]
    return float(-log_p[np.arange(len(following)), following].mean())


def mean_divergence(logits: np.ndarray, exact: np.ndarray) -> float:
    log_p, log_q = (torch.from_numpy(x).double().log_softmax(-1) for x in (exact, logits))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def linear_pairs(config) -> CompressionPlan:  # type: ignore[no-untyped-def]
    """Pairs of keys before RoPE in integers, values in gaussian segments, with matched heads and a retained token."""
    dim = config.head_dim
    integers = (Segment(dim, "int8", transform="hadamard"), Segment(dim, "int4", transform="hadamard"))
    gaussian = (Segment(dim, "g4", transform="hadamard"), Segment(dim, "g2", transform="hadamard"))
    streams = []
    for start in range(0, config.num_layers, 2):
        layers = (start, start + 1)
        streams.append(Stream("key", layers, integers, merge="linear", basis="pre_rope", match_heads=True, retained=1))
        streams.append(Stream("value", layers, gaussian, merge="linear", match_heads=True))
    plan = CompressionPlan("custom", tuple(streams))
    return replace(plan, matrices=random_matrices(plan, config)).validate(config)


@pytest.mark.parametrize("which", ["kivi4", "linear"])
def test_losses_are_the_engines(demo: Path, code_text: Path, which: str) -> None:
    config = resolve_config(str(demo)).for_context(384)
    plan = linear_pairs(config) if which == "linear" else make_plan(config, which)
    settings = CalibrationSettings(length=384, search_sequences=2, recall_share=0.5)
    tokenizer = load_tokenizer(demo)
    assert tokenizer is not None
    tokens = sample_sets(code_text, tokenizer, config, settings).search.tokens
    found = Evaluator(CalibrationModel(demo, config), samples_of(tokens), 64).measure(coded_streams(plan, config))
    limits = BuildConfig(max_batch_size=2, max_seq_len=384, max_num_tokens=512)
    scores = []
    for each in (plan, make_plan(config, "full")):
        llm = LLM(demo, plan=each, build_config=limits, num_threads=1, kv_cache_config=KvCacheConfig(active_prefills=2))
        rows = llm.score(tokens.tolist(), [FIRST] * 2, start=FIRST)
        scores.append([logits[:-1] for logits in rows])
    for row in range(2):
        ours, exact = scores[0][row], scores[1][row]
        divergence = mean_divergence(ours, exact)
        assert divergence > 1e-4
        assert found.nll[row] == pytest.approx(mean_nll(ours, tokens[row]), abs=5e-3)
        assert found.divergence[row] == pytest.approx(divergence, rel=0.05, abs=1e-6)
        right = (ours.argmax(-1) == tokens[row, FIRST + 1 :]).mean()
        assert found.right[row] == pytest.approx(right, abs=0.01)


SHAPES = {
    "llama": {},
    "mistral, window 150": {"family": "mistral", "sliding_window": 150},
    "qwen3": {"family": "qwen3"},
    "phi3, partial rotary": {
        "family": "phi3",
        "head_dim": None,
        "hidden_size": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    },
    "mixtral": {"family": "mixtral", "num_local_experts": 4},
    "qwen2, window from layer 2": LAYERED["qwen2, window from layer 2"],
    "gemma2, caps": LAYERED["gemma2, scale 20, caps 5 and 3, GQA 6:2, bfloat16"],
    "gemma3": LAYERED["gemma3"],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_families_against_the_reference(tmp_path: Path, shape: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPES[shape])
    config = resolve_config(str(checkpoint)).for_context(256)
    plan = make_plan(config, "kivi4")
    tokens = random_tokens(2, 256, config.vocab_size)
    evaluator = Evaluator(CalibrationModel(checkpoint, config), samples_of(tokens), 64)
    reference = Reference(checkpoint, plan)
    found = evaluator.measure(coded_streams(plan, config))
    for row in range(2):
        exact = reference.uncompressed_logits(tokens[row].tolist(), FIRST)[:-1].numpy()
        ours = reference.logits(tokens[row].tolist(), FIRST, FIRST)[:-1].numpy()
        assert evaluator.uncompressed.nll[row] == pytest.approx(mean_nll(exact, tokens[row]), abs=1e-4)
        assert found.nll[row] == pytest.approx(mean_nll(ours, tokens[row]), abs=5e-3)
        assert found.divergence[row] == pytest.approx(mean_divergence(ours, exact), rel=0.03, abs=1e-5)
    assert evaluator.uncompressed.divergence == pytest.approx((0.0, 0.0), abs=2e-5)


def test_layers_below_need_not_be_run_again(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve_config(str(demo)).for_context(256)
    model, tokens = CalibrationModel(demo, config), random_tokens(2, 256, config.vocab_size)
    streams = coded_streams(make_plan(config, "kivi2"), config)[10:12]
    cached = Evaluator(model, samples_of(tokens), 64).measure(streams)
    monkeypatch.setattr("minicache_trt.calibration.evaluator.CACHE_BYTES", 0)
    everything = Evaluator(model, samples_of(tokens), 64).measure(streams)
    assert cached.divergence[0] > 1e-5
    np.testing.assert_allclose(cached.divergence, everything.divergence, rtol=1e-3)
