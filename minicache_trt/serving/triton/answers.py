"""From outputs of the engine to the tensors of a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicache_trt.config import BLOCK_SIZE
from minicache_trt.runtime.request import CompletionOutput, RequestOutput
from minicache_trt.serving.triton.parameters import Returns


@dataclass
class Times:
    """Monotonic nanoseconds of a request; 0 until it comes to that."""

    arrival: int = 0
    first_token: int = 0
    last_token: int = 0

    def tokens_came(self, now: int) -> None:
        """More output is there."""
        self.first_token = self.first_token or now
        self.last_token = now


def row_tensors(output: RequestOutput, returns: Returns, prompt: str, times: Times) -> dict[str, NDArray[Any]]:
    """Tensors of one row, without a batch dimension.

    Parameters
    ----------
    output : RequestOutput
        With what is new in ``text_diff`` and ``token_ids_diff``.
    returns : Returns
        Which tensors, and whether all so far or what is new.
    prompt : str
        Goes before the text; empty when it should not, or has gone.
    times : Times
        Of this request.
    """
    completion = output.outputs[0]
    new_only = returns.stream and not returns.accumulate
    text = prompt + (completion.text_diff if new_only else completion.text)
    tokens = completion.token_ids_diff if new_only else completion.token_ids
    tensors = {"text_output": _strings(text)}
    if returns.finish_reason:
        tensors["finish_reason"] = _strings(completion.finish_reason or "")
    if returns.stop_reason:
        tensors["stop_reason"] = _strings("" if completion.stop_reason is None else str(completion.stop_reason))
    if returns.output_ids:
        tensors["output_ids"] = np.array([tokens], np.int32)
    if returns.num_input_tokens:
        tensors["num_input_tokens"] = np.array([len(output.prompt_token_ids)], np.int32)
    if returns.num_output_tokens:
        tensors["num_output_tokens"] = np.array([len(completion.token_ids)], np.int32)
    tensors |= _log_probs(completion, returns, len(tokens))
    if returns.perf_metrics:
        tensors |= _performance(output, times)
    return tensors


def stack(rows: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Rows as one batch; what is of different length is filled up with zeros."""
    return {name: _stack([row[name] for row in rows]) for name in rows[0]}


def _stack(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    if arrays[0].ndim == 1:
        return np.stack(arrays)
    longest = max(array.shape[-1] for array in arrays)
    return np.stack([np.pad(array, ((0, 0), (0, longest - array.shape[-1]))) for array in arrays])


def _log_probs(completion: CompletionOutput, returns: Returns, num_new: int) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {}
    total = np.array([completion.cumulative_logprob or 0.0], np.float32)
    if returns.cumulative_logprob:
        tensors["cumulative_logprob"] = total
    if returns.log_probs:
        chosen = zip(completion.token_ids, completion.logprobs or (), strict=False)
        every = [entry[token].logprob for token, entry in chosen]
        tensors["cum_log_probs"] = total
        tensors["output_log_probs"] = np.array([every[len(every) - num_new :]], np.float32)
    return tensors


def _performance(output: RequestOutput, times: Times) -> dict[str, NDArray[Any]]:
    reused, prompt = output.num_cached_tokens, len(output.prompt_token_ids)
    counts = {
        "kv_cache_reused_block": reused // BLOCK_SIZE,
        "kv_cache_missed_block": -(-(prompt - reused) // BLOCK_SIZE),
    }
    stamps = {f"{name}_time_ns": getattr(times, name) for name in ("arrival", "first_token", "last_token")}
    return {
        **{name: np.array([value], np.int32) for name, value in counts.items()},
        "kv_cache_hit_rate": np.array([reused / prompt], np.float32),
        **{name: np.array([value], np.int64) for name, value in stamps.items()},
    }


def _strings(text: str) -> NDArray[Any]:
    return np.array([text.encode()], np.object_)
