"""A worker of `minicache_trt.benchmark.peers` that runs TensorRT-LLM through its public LLM API.

It is run as a file by the Python of an environment with tensorrt_llm: it imports nothing of this package.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import tensorrt_llm
from tensorrt_llm import LLM, SamplingParams
from tensorrt_llm.llmapi import KvCacheConfig


def load(checkpoint: str, batch: int, length: int, tokens: int) -> Any:
    """The model with TensorRT-LLM's own settings but for its limits; prompts are not found again in its cache."""
    return LLM(
        model=checkpoint,
        skip_tokenizer_init=True,
        max_batch_size=batch,
        max_seq_len=length,
        max_num_tokens=tokens,
        kv_cache_config=KvCacheConfig(enable_block_reuse=False),
    )


async def _stamps(llm: Any, prompt: list[int], params: Any) -> tuple[list[int], list[float]]:
    """The generated tokens of one prompt and when each came."""
    tokens: list[int] = []
    stamps: list[float] = []
    async for output in llm.generate_async(prompt, params, streaming=True):
        tokens = list(output.outputs[0].token_ids)
        stamps += [time.perf_counter()] * (len(tokens) - len(stamps))
    return tokens, stamps


async def _run(llm: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    params = SamplingParams(max_tokens=new_tokens, top_k=1, end_id=-1, pad_id=0, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    results = await asyncio.gather(*(_stamps(llm, prompt, params) for prompt in prompts))
    # The last sequence that begins decides when a step has all of them.
    ends = [max(row) for row in zip(*(stamps for _, stamps in results))]  # noqa: B905 - any Python 3
    return {
        "first_tokens": [stamps[0] - start for _, stamps in results],
        "steps": [after - before for before, after in zip(ends, ends[1:])],  # noqa: B905, RUF007 - any Python 3
        "tokens": [tokens for tokens, _ in results],
    }


def run(llm: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Fields of `minicache_trt.benchmark.timings.Timings`: all prompts at once, greedy, tokens as they stream."""
    return asyncio.run(_run(llm, prompts, new_tokens))


def main(checkpoint: str, batch: str, length: str, tokens: str) -> None:
    """Answer requests, a line of JSON each; the first line says who answers."""
    llm = load(checkpoint, int(batch), int(length), int(tokens))
    print(json.dumps({"name": "tensorrt-llm", "version": tensorrt_llm.__version__, "settings": {}}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run(llm, request["prompts"], request["new_tokens"])), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
