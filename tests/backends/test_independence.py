"""A request's tokens do not depend on neighbours, chunk size, memory or preemption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache_trt.build import build_engine, load_engine
from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig, KvCacheConfig
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams
from tests.support.checkpoints import make_checkpoint

LENGTHS = [150, 130, 64, 7]
GREEDY = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=200, temperature=0.7, top_p=0.9, seed=5, ignore_eos=True)


@pytest.mark.parametrize("method", ["full", "kivi2", "minicache4"])
def test_same_tokens_in_every_company(tmp_path: Path, method: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    engines = {}
    for tokens in (2048, 33):

        def configure(config: Any, tokens: int = tokens) -> tuple[CompressionPlan, BuildConfig]:
            limits = BuildConfig(max_batch_size=4, max_seq_len=384, max_num_tokens=tokens, quantum=128)
            return make_plan(config, method), limits

        directory = build_engine(str(checkpoint), tmp_path / f"engine-{tokens}", configure).directory
        engines[tokens] = load_engine(directory, 1)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 101, length).tolist() for length in LENGTHS]
    alone = LLM.from_engine(engines[2048])
    params = [GREEDY, SAMPLED, GREEDY, SAMPLED]
    expected = [alone.generate(p, s)[0].outputs[0].token_ids for p, s in zip(prompts, params, strict=True)]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)

    def tokens(llm: LLM) -> list[list[int]]:
        outputs = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        llm.check_integrity()
        return outputs

    assert tokens(LLM.from_engine(engines[2048])) == expected
    assert tokens(LLM.from_engine(engines[33])) == expected
    sizes = alone.cache_sizes
    # Room for all prompts but not for all continuations: sequences are preempted and recomputed.
    full, compressed = (14, 0) if method == "full" else (sizes.full_blocks, 10)
    budget = sizes.full_block_bytes * full + sizes.compressed_block_bytes * compressed
    tight = LLM.from_engine(engines[33], kv_cache_config=KvCacheConfig(max_bytes=budget))
    assert tokens(tight) == expected
    assert tight.statistics.preemptions > 0
