"""From the fields of a request to `SamplingParams`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minicache_trt.runtime.sampling_params import GuidedDecodingParams, SamplingParams
from minicache_trt.serving.errors import ApiError
from minicache_trt.serving.protocol import SamplingFields

SAME_NAME = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "top_k",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "stop_token_ids",
    "min_tokens",
)


def sampling_params(
    fields: SamplingFields, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
) -> SamplingParams:
    """Parameters of one request; fields that are absent or null keep `SamplingParams`' defaults, which are OpenAI's.

    Raises
    ------
    ApiError
        When a field's value cannot be used.
    """
    _refuse(fields.use_beam_search, "use_beam_search", "beam search is not supported; sample n completions instead")
    unequal = fields.best_of is not None and fields.best_of != (fields.n or 1)
    _refuse(unequal, "best_of", "only as many completions as are returned can be generated; leave best_of out")
    given: dict[str, Any] = {name: value for name in SAME_NAME if (value := getattr(fields, name)) is not None}
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias=_logit_bias(fields.logit_bias),
            guided_decoding=_guided_decoding(fields),
            **given,
        )
    except ValueError as error:
        raise ApiError.of(error) from error


def of_choice(params: SamplingParams, index: int) -> SamplingParams:
    """Parameters of the completion number ``index`` of a prompt; with a seed, each has its own."""
    return params if params.seed is None else replace(params, seed=params.seed + index)


def _refuse(condition: bool | None, param: str, message: str) -> None:
    if condition:
        raise ApiError(400, f"{param}: {message}", param=param)


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    for token in bias:
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise ValueError(f"logit_bias: expected token ids as keys, got {token!r}")
    return {int(token): value for token, value in bias.items()}


def _guided_decoding(fields: SamplingFields) -> GuidedDecodingParams | None:
    """Raises ValueError for constraints that contradict each other or themselves."""
    wanted: list[dict[str, Any]] = []
    if fields.response_format is not None and fields.response_format.type != "text":
        schema = fields.response_format.json_schema
        if fields.response_format.type == "json_schema" and schema is None:
            raise ValueError("response_format: expected a json_schema with a schema, got none")
        wanted.append({"json_object": True} if schema is None else {"json": schema.json_schema})
    for name in ("json", "regex", "choice", "grammar"):
        if (value := getattr(fields, f"guided_{name}")) is not None:
            wanted.append({name: value})
    if (structured := fields.structured_outputs) is not None:
        values = structured.model_dump(exclude_none=True, by_alias=True)
        pattern = values.pop("whitespace_pattern", None)
        wanted.append(values if pattern is None else {**values, "whitespace_pattern": pattern})
    if not wanted:
        return None
    if len(wanted) > 1:
        raise ValueError(f"guided_decoding: expected one constraint, got {[*map(sorted, wanted)]}")
    if fields.guided_whitespace_pattern is not None:
        wanted[0].setdefault("whitespace_pattern", fields.guided_whitespace_pattern)
    return GuidedDecodingParams(**wanted[0])
