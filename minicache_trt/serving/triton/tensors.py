"""Every tensor of the Triton model: `config.pbtxt` is written from these tables, requests are read by them.

Names, types and shapes are those of TensorRT-LLM's Triton models, so that their clients work unchanged: ``llmapi``
(``streaming``, ``sampling_param_*``, ``return_*``) and ``tensorrt_llm_bls``, which the ensemble shares (``stream``,
``max_tokens``, ``stop_words``, ...). What neither has is marked as ours.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tensor:
    """An input or output; ``dims`` without the batch dimension, -1 for any number."""

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)


STRING, BOOL, FP32 = "TYPE_STRING", "TYPE_BOOL", "TYPE_FP32"
INT32, INT64, UINT64 = "TYPE_INT32", "TYPE_INT64", "TYPE_UINT64"
MANY = (-1,)

PROMPT = (
    Tensor("text_input", STRING, MANY),
    Tensor("input_ids", INT32, MANY),  # ours: the prompt as token ids, in place of text_input
)
CONTROL = (
    Tensor("stream", BOOL),
    Tensor("streaming", BOOL),
    Tensor("stop", BOOL),
    Tensor("exclude_input_in_output", BOOL),
    Tensor("sampling_param_exclude_input_from_output", BOOL),
    Tensor("priority", INT32),  # ours: smaller is earlier
    Tensor("cache_salt", STRING),  # ours: who shares cached prefixes
)
SAMPLING = (
    Tensor("max_tokens", INT32),
    Tensor("temperature", FP32),
    Tensor("top_k", INT32),
    Tensor("top_p", FP32),
    Tensor("min_p", FP32),
    Tensor("seed", UINT64),
    Tensor("stop_words", STRING, MANY),
    Tensor("bad_words", STRING, MANY),
    Tensor("repetition_penalty", FP32),
    Tensor("presence_penalty", FP32),
    Tensor("frequency_penalty", FP32),
    Tensor("min_tokens", INT32),
    Tensor("end_id", INT32),
    Tensor("pad_id", INT32),
    Tensor("length_penalty", FP32),
    Tensor("beam_width", INT32),
    Tensor("num_return_sequences", INT32),
    Tensor("guided_decoding_guide_type", STRING),
    Tensor("guided_decoding_guide", STRING),
    Tensor("ignore_eos", BOOL),  # ours
    Tensor("random_seed", UINT64),  # the ensemble's name for seed, in older releases
    Tensor("sampling_param_max_tokens", INT32),
    Tensor("sampling_param_temperature", FP32),
    Tensor("sampling_param_top_k", INT32),
    Tensor("sampling_param_top_p", FP32),
    Tensor("sampling_param_seed", UINT64),
    Tensor("sampling_param_stop", STRING, MANY),
    Tensor("sampling_param_presence_penalty", FP32),
    Tensor("sampling_param_frequency_penalty", FP32),
    Tensor("sampling_param_best_of", INT32),
)
RETURNS = (
    Tensor("return_log_probs", BOOL),
    Tensor("return_finish_reason", BOOL),
    Tensor("return_stop_reason", BOOL),
    Tensor("return_cumulative_logprob", BOOL),
    Tensor("return_num_input_tokens", BOOL),
    Tensor("return_num_output_tokens", BOOL),
    Tensor("return_perf_metrics", BOOL),
    Tensor("sampling_param_return_perf_metrics", BOOL),
    Tensor("return_output_ids", BOOL),  # ours
)

INPUTS = (*PROMPT, *CONTROL, *SAMPLING, *RETURNS)
"""All optional in config.pbtxt: what is missing is said by us, with a remedy."""

OUTPUTS = (
    Tensor("text_output", STRING, MANY),
    Tensor("finish_reason", STRING, MANY),
    Tensor("stop_reason", STRING, MANY),
    Tensor("cumulative_logprob", FP32, MANY),
    Tensor("cum_log_probs", FP32, MANY),
    Tensor("output_log_probs", FP32, (-1, -1)),
    Tensor("output_ids", INT32, (-1, -1)),
    Tensor("num_input_tokens", INT32, MANY),
    Tensor("num_output_tokens", INT32, MANY),
    Tensor("kv_cache_reused_block", INT32, MANY),
    Tensor("kv_cache_missed_block", INT32, MANY),
    Tensor("kv_cache_hit_rate", FP32, MANY),
    Tensor("arrival_time_ns", INT64, MANY),
    Tensor("first_token_time_ns", INT64, MANY),
    Tensor("last_token_time_ns", INT64, MANY),
)

ALIASES = {
    "streaming": "stream",
    "sampling_param_exclude_input_from_output": "exclude_input_in_output",
    "sampling_param_return_perf_metrics": "return_perf_metrics",
    "sampling_param_max_tokens": "max_tokens",
    "sampling_param_temperature": "temperature",
    "sampling_param_top_k": "top_k",
    "sampling_param_top_p": "top_p",
    "sampling_param_seed": "seed",
    "random_seed": "seed",
    "sampling_param_stop": "stop_words",
    "sampling_param_presence_penalty": "presence_penalty",
    "sampling_param_frequency_penalty": "frequency_penalty",
    "sampling_param_best_of": "num_return_sequences",
}
"""Second names of the same thing."""
