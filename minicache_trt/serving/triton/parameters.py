"""From the tensors of a request to prompts, sampling parameters and what to return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicache_trt.errors import UserError
from minicache_trt.runtime.sampling_params import GuidedDecodingParams, SamplingParams
from minicache_trt.serving.triton.settings import InstanceSettings
from minicache_trt.serving.triton.tensors import ALIASES, INPUTS, STRING

Tensors = Mapping[str, NDArray[Any]]

_LISTS = {tensor.name for tensor in INPUTS if tensor.dims != (1,)}
_STRINGS = {tensor.name for tensor in INPUTS if tensor.data_type == STRING}
_DIRECT = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "ignore_eos",
)
_NEUTRAL: dict[str, Any] = {"beam_width": 1, "num_return_sequences": 1, "bad_words": []}
"""What we have nothing for, and the values that change nothing."""
_GUIDES = {"json": "json_object", "json_schema": "json", "regex": "regex", "lark_grammar": "grammar"}
_CHOOSERS = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Returns:
    """What the responses hold, for all rows of a request.

    Parameters
    ----------
    stream : bool
        Respond whenever there is more.
    accumulate : bool
        Streamed text and tokens are all so far, not only the new ones.
    prompt : bool
        The text begins with the prompt.
    finish_reason, stop_reason, cumulative_logprob, log_probs, output_ids, num_input_tokens, num_output_tokens,
    perf_metrics : bool
        Which tensors come beside ``text_output``.
    """

    stream: bool = False
    accumulate: bool = False
    prompt: bool = False
    finish_reason: bool = False
    stop_reason: bool = False
    cumulative_logprob: bool = False
    log_probs: bool = False
    output_ids: bool = False
    num_input_tokens: bool = False
    num_output_tokens: bool = False
    perf_metrics: bool = False


@dataclass(frozen=True)
class Row:
    """One prompt of a request and how to complete it."""

    prompt: str | list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None


@dataclass(frozen=True)
class Ask:
    """Everything a request asks for; ``stop``: end those of the same request id."""

    rows: list[Row]
    returns: Returns
    stop: bool = False


def read_request(tensors: Tensors, batched: bool, settings: InstanceSettings, streams: bool) -> Ask:
    """What a request asks for.

    Parameters
    ----------
    tensors : mapping
        Inputs by name, with a leading dimension of rows if ``batched``.
    batched : bool
        Whether the model has a batch dimension.
    settings : InstanceSettings
        Defaults.
    streams : bool
        Whether the model may send several responses.

    Raises
    ------
    UserError
        Naming the tensor that is missing, given twice or unusable.
    """
    accumulate = settings.accumulate_tokens or "streaming" in tensors
    named = _canonical(tensors)
    num_rows = _num_rows(named) if batched else 1
    values = [_values(named, row if batched else None) for row in range(num_rows)]
    first = values[0]
    if first.get("stop"):
        return Ask([], Returns(), stop=True)
    stream = bool(first.get("stream", False))
    if stream and not streams:
        raise UserError("stream: this model answers once", "deploy it decoupled, or leave stream out")
    if stream and num_rows > 1:
        raise UserError(f"stream: expected one prompt, got {num_rows}", "send one request for each")
    returns = Returns(
        stream=stream,
        accumulate=accumulate,
        prompt=not first.get("exclude_input_in_output", settings.exclude_input_in_output),
        log_probs=bool(first.get("return_log_probs")),
        **{name: bool(first.get(f"return_{name}")) for name in _RETURNED},
    )
    return Ask([_row(row, returns) for row in values], returns)


_RETURNED = (
    "finish_reason",
    "stop_reason",
    "cumulative_logprob",
    "output_ids",
    "num_input_tokens",
    "num_output_tokens",
    "perf_metrics",
)


def _canonical(tensors: Tensors) -> dict[str, NDArray[Any]]:
    named: dict[str, NDArray[Any]] = {}
    for given, array in tensors.items():
        name = ALIASES.get(given, given)
        if name in named:
            raise UserError(f"{given}: means {name}, which is given by another name too", "give one of them")
        named[name] = array
    return named


def _num_rows(named: Tensors) -> int:
    counts = {len(array) for array in named.values()}
    if len(counts) != 1 or 0 in counts:
        raise UserError(f"expected tensors with equally many rows, at least one, got {sorted(counts)}")
    return counts.pop()


def _values(named: Tensors, row: int | None) -> dict[str, Any]:
    """Python values of one row."""
    values: dict[str, Any] = {}
    for name, array in named.items():
        items = (array if row is None else array[row]).reshape(-1).tolist()
        if name in _STRINGS:
            items = [_text(name, item) for item in items]
        if name in _LISTS:
            values[name] = items
        elif len(items) != 1:
            raise UserError(f"{name}: expected one value, got {len(items)}")
        else:
            values[name] = items[0]
    return values


def _text(name: str, item: bytes | str) -> str:
    try:
        return item.decode("utf-8") if isinstance(item, bytes) else str(item)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: expected UTF-8, got other bytes") from error


def _row(values: Mapping[str, Any], returns: Returns) -> Row:
    texts, ids = values.get("text_input"), values.get("input_ids")
    prompt: str | list[int]
    if (texts is None) == (ids is None):
        problem = "is missing" if texts is None else "and input_ids are both given"
        raise UserError(f"text_input {problem}", "give the prompt as text_input or as input_ids")
    if texts is not None and len(texts) != 1:
        raise UserError(f"text_input: expected one prompt, got {len(texts)}", "send one request for each")
    prompt = values["input_ids"] if texts is None else texts[0]
    return Row(prompt, _sampling(values, returns), values.get("priority", 0), values.get("cache_salt") or None)


def _sampling(values: Mapping[str, Any], returns: Returns) -> SamplingParams:
    chosen = {name: values[name] for name in _DIRECT if name in values}
    for name, neutral in _NEUTRAL.items():
        value = values.get(name, neutral)
        if value not in (neutral, [""]):
            raise UserError(f"{name}: expected {neutral}, got {value}", "this release has no other")
    # Without a word about choosing, TensorRT-LLM takes the most likely token; with it, top_p 0 means the same.
    if not any(name in values for name in _CHOOSERS) or chosen.get("top_p") == 0:
        chosen |= {"temperature": 0.0, "top_p": 1.0}
    if "end_id" in values:
        chosen["ignore_eos"] = True
        chosen["stop_token_ids"] = [values["end_id"]] if values["end_id"] >= 0 else None
    if values.get("stop_words"):
        chosen["stop"] = [word for word in values["stop_words"] if word] or None
    if returns.log_probs or returns.cumulative_logprob:
        chosen["logprobs"] = 0
    try:
        return SamplingParams(**chosen, guided_decoding=_guided(values))
    except ValueError as error:
        raise UserError(str(error)) from error


def _guided(values: Mapping[str, Any]) -> GuidedDecodingParams | None:
    kind, guide = values.get("guided_decoding_guide_type"), values.get("guided_decoding_guide")
    if not kind:
        return None
    if kind not in _GUIDES:
        raise UserError(f"guided_decoding_guide_type: expected one of {', '.join(_GUIDES)}, got {kind!r}")
    if kind != "json" and not guide:
        raise UserError(f"guided_decoding_guide: is missing for guide type {kind!r}")
    constraint: dict[str, Any] = {_GUIDES[kind]: True if kind == "json" else guide}
    return GuidedDecodingParams(**constraint)


def as_tensors(inputs: list[Any]) -> dict[str, NDArray[Any]]:
    """A request's inputs by name."""
    return {tensor.name(): np.asarray(tensor.as_numpy()) for tensor in inputs}
