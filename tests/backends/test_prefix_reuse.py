"""A request's tokens do not depend on what it finds in the cache."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache_trt.build import build_engine, load_engine
from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig, KvCacheConfig
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import RequestOutput, SamplingParams
from tests.support.checkpoints import make_checkpoint

PARAMS = SamplingParams(max_tokens=180, temperature=0.0, ignore_eos=True)
SHARED = 200


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("method", ["full", "kivi4", "minicache", "minicache4"])
def test_same_tokens_with_and_without_hits(tmp_path: Path, method: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    engines = {}
    for tokens in (2048, 37):

        def configure(config: Any, tokens: int = tokens) -> tuple[CompressionPlan, BuildConfig]:
            limits = BuildConfig(max_batch_size=4, max_seq_len=448, max_num_tokens=tokens, quantum=128)
            return make_plan(config, method), limits

        directory = build_engine(str(checkpoint), tmp_path / f"engine-{tokens}", configure).directory
        engines[tokens] = load_engine(directory, 1)
    rng = np.random.default_rng(3)
    document = rng.integers(0, 101, SHARED).tolist()
    prompts = [document[:cut] + rng.integers(0, 101, 30).tolist() for cut in (SHARED, 140, SHARED, 70)]
    plain = LLM.from_engine(engines[2048], kv_cache_config=KvCacheConfig(enable_block_reuse=False))
    expected = [token_ids(plain.generate([prompt], PARAMS))[0] for prompt in prompts]
    assert plain.statistics.hit_tokens == 0
    # A second turn: the first answer has become a part of the prompt.
    turn = [*prompts[3], *expected[3][:70], *range(20)]
    expected_turn = token_ids(plain.generate([turn], PARAMS))
    sizes = plain.cache_sizes

    for tokens in engines:
        llm = LLM.from_engine(engines[tokens])
        assert [token_ids(llm.generate([prompt], PARAMS))[0] for prompt in prompts] == expected
        assert token_ids(llm.generate(prompts, PARAMS)) == expected
        assert llm.statistics.hit_tokens >= 64 * 4
        assert token_ids(llm.generate([prompts[3]], PARAMS)) == expected[3:]
        assert token_ids(llm.generate([turn], PARAMS)) == expected_turn
        assert llm.statistics.hit_tokens >= 64
        llm.check_integrity()

    full, compressed = (14, 0) if method == "full" else (sizes.full_blocks, 10)
    budget = sizes.full_block_bytes * full + sizes.compressed_block_bytes * compressed
    tight = LLM.from_engine(engines[37], kv_cache_config=KvCacheConfig(max_bytes=budget))
    preemptions = hits = 0
    for _ in range(2):
        assert token_ids(tight.generate(prompts, PARAMS)) == expected
        preemptions += tight.statistics.preemptions
        hits += tight.statistics.hit_tokens
        tight.check_integrity()
    assert hits > 0

    async def together() -> list[RequestOutput]:
        requests = [tight.generate_async(p, PARAMS, priority=-i) for i, p in enumerate(prompts)]
        return [await request for request in requests]

    assert token_ids(asyncio.run(together())) == expected
    assert tight.shutdown()
    tight.check_integrity()
    assert preemptions + tight.statistics.preemptions > 0
