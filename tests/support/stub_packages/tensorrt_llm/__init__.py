"""A stand-in with the part of TensorRT-LLM's LLM API that is used: it counts up from the sum of each prompt.

Names and call shapes are those of the public API: ``LLM(model=..., ...)``, ``generate_async(inputs, sampling_params,
streaming=True)``, an asynchronous iterator of outputs whose ``outputs[0].token_ids`` grow.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from tensorrt_llm.llmapi import KvCacheConfig

__version__ = "1.2.0"


@dataclass(kw_only=True)
class SamplingParams:
    """Of the real one, the fields that are used."""

    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    top_k: int | None = None
    ignore_eos: bool = False
    detokenize: bool = True


@dataclass
class CompletionOutput:
    """What has been generated so far."""

    token_ids: list[int]


@dataclass
class RequestOutput:
    """One update of a request."""

    outputs: list[CompletionOutput]


class LLM:
    """Refuses what the real one would."""

    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        max_batch_size: int,
        max_seq_len: int,
        max_num_tokens: int,
        kv_cache_config: KvCacheConfig,
    ) -> None:
        if not (Path(model) / "config.json").is_file():
            raise ValueError(f"{model} is no checkpoint")
        assert skip_tokenizer_init and not kv_cache_config.enable_block_reuse
        assert max_num_tokens >= max_seq_len
        self._batch, self._length, self._running = max_batch_size, max_seq_len, 0

    async def generate_async(
        self, inputs: list[int], sampling_params: SamplingParams, *, streaming: bool = False
    ) -> AsyncIterator[RequestOutput]:
        params = sampling_params
        assert streaming and len(inputs) + params.max_tokens <= self._length
        assert params.top_k == 1 and params.ignore_eos and params.end_id == -1
        self._running += 1
        assert self._running <= self._batch
        tokens: list[int] = []
        for _ in range(params.max_tokens):
            await asyncio.sleep(0.001)
            tokens.append((sum(inputs) + len(tokens)) % 11)
            yield RequestOutput([CompletionOutput(list(tokens))])
        self._running -= 1
