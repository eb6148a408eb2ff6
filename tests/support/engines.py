"""Engines of small checkpoints, and whether they compute what the independent reference does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minicache_trt.build import build_engine, load_engine
from minicache_trt.compare import BlockRecorder
from minicache_trt.compression.methods import METHODS, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig, ModelConfig
from minicache_trt.engine_directory import read_engine
from minicache_trt.hf_reference import reference_for
from minicache_trt.reference.ties import TOLERANCE, Ties
from minicache_trt.runtime.llm import LLM
from tests.support.plans import full_codec_plans, lossless_plan, mixed_plan

LIMIT = 2e-3
"""Largest difference of logits."""

Lengths = list[int]


def build(checkpoint: Path, output: Path, method: str, **limits: Any) -> Path:
    def configure(config: Any) -> tuple[CompressionPlan, BuildConfig]:
        plan = plan_named(method, config)
        return plan, BuildConfig(**({"max_seq_len": config.max_position_embeddings, "max_batch_size": 4} | limits))

    return build_engine(str(checkpoint), output, configure).directory


def plan_named(name: str, config: ModelConfig) -> CompressionPlan:
    """A method, or a plan that no method has."""
    if name in METHODS:
        return make_plan(config, name)
    return {"mixed": mixed_plan, "lossless": lossless_plan}.get(name, lambda c: full_codec_plans(c)[name])(config)


def assert_equals_reference(
    directory: Path, lengths: Lengths, decoded: int, backend: str = "onnxruntime", farthest: float = TOLERANCE
) -> None:
    """Score random tokens in one ragged batch; every logit, greedy choice and stored code must be the reference's.

    ``farthest``: how far from its boundary a differing code may lie, in steps.
    """
    info = read_engine(directory)
    llm = LLM.from_engine(load_engine(directory, 1, backend))
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, info.model.vocab_size, length + decoded).tolist() for length in lengths]
    recorder = BlockRecorder(llm.engine)
    scores = llm.score(sequences, lengths, observe=recorder)
    llm.check_integrity()
    reference = reference_for(directory, info)
    for index, (tokens, length, mine) in enumerate(zip(sequences, lengths, scores, strict=True)):
        ties = Ties()
        expected = reference.logits(tokens, length, adopt=recorder.adopter(index, ties)).numpy()
        assert np.abs(mine - expected).max() <= LIMIT
        assert ties.disagreements == 0 or ties.farthest <= farthest, ties
        assert ties.differing_codes <= max(5, 2.0**-12 * ties.codes), ties
        best = np.sort(expected, -1)
        clear = best[:, -1] - best[:, -2] >= 2 * LIMIT
        assert (mine.argmax(-1) == expected.argmax(-1))[clear].all()
        if not info.plan.compresses:
            plain = reference.uncompressed_logits(tokens).numpy()
            assert np.abs(mine - plain).max() <= 1e-3
