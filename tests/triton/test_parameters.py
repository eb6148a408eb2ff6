"""From tensors to parameters, without a server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minicache_trt.errors import UserError
from minicache_trt.runtime.request import CompletionOutput, RequestOutput
from minicache_trt.runtime.sampling_params import GuidedDecodingParams, SamplingParams
from minicache_trt.serving.triton.answers import Times, row_tensors, stack
from minicache_trt.serving.triton.parameters import Ask, Returns, read_request
from minicache_trt.serving.triton.settings import InstanceSettings


def tensors(**values: Any) -> dict[str, Any]:
    def array(value: Any) -> Any:
        items = value if isinstance(value, list) else [value]
        kinds = {str: np.object_, bool: np.bool_, int: np.int32, float: np.float32}
        encoded = [item.encode() if isinstance(item, str) else item for item in items]
        return np.array(encoded, kinds[type(items[0])])

    return {name: array(value) for name, value in values.items()}


def read(batched: bool = False, streams: bool = True, settings: InstanceSettings | None = None, **values: Any) -> Ask:
    made = tensors(**values)
    if batched:
        made = {name: array[None] for name, array in made.items()}
    return read_request(made, batched, settings or InstanceSettings(), streams)


GREEDY = SamplingParams(temperature=0.0)


@pytest.mark.parametrize(
    ("given", "params"),
    [
        ({}, GREEDY),
        ({"max_tokens": 9}, SamplingParams(max_tokens=9, temperature=0)),
        ({"top_k": 5, "seed": 3}, SamplingParams(top_k=5, seed=3)),
        ({"top_p": 0.5, "temperature": 2.0}, SamplingParams(top_p=0.5, temperature=2)),
        ({"top_p": 0.0, "top_k": 5}, SamplingParams(top_k=5, temperature=0)),
        ({"min_p": 0.25}, SamplingParams(min_p=0.25)),
        ({"repetition_penalty": 1.5}, SamplingParams(temperature=0, repetition_penalty=1.5)),
        ({"stop_words": ["x", "y"]}, SamplingParams(temperature=0, stop=["x", "y"])),
        ({"stop_words": [""], "bad_words": [""]}, GREEDY),
        ({"end_id": 5}, SamplingParams(temperature=0, ignore_eos=True, stop_token_ids=[5])),
        ({"end_id": -1, "pad_id": 2}, SamplingParams(temperature=0, ignore_eos=True)),
        ({"random_seed": 4}, SamplingParams(temperature=0, seed=4)),
        ({"return_log_probs": True}, SamplingParams(temperature=0, logprobs=0)),
        ({"beam_width": 1, "frequency_penalty": 0.0, "min_tokens": 0, "length_penalty": 2.0}, GREEDY),
        (
            {"frequency_penalty": 0.5, "presence_penalty": -0.5, "min_tokens": 2},
            SamplingParams(temperature=0, frequency_penalty=0.5, presence_penalty=-0.5, min_tokens=2),
        ),
        (
            {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "[ab]+"},
            SamplingParams(temperature=0, guided_decoding=GuidedDecodingParams(regex="[ab]+")),
        ),
        (
            {"guided_decoding_guide_type": "json"},
            SamplingParams(temperature=0, guided_decoding=GuidedDecodingParams(json_object=True)),
        ),
    ],
)
def test_names_of_tensorrt_llm_become_sampling_parameters(given: dict[str, Any], params: SamplingParams) -> None:
    for batched in (False, True):
        (row,) = read(batched, text_input="hello", **given).rows
        assert (row.prompt, row.params) == ("hello", params)


def test_second_names_mean_the_same() -> None:
    one = read(text_input="a", max_tokens=3, temperature=0.5, top_k=2, top_p=0.5, seed=1, stop_words=["z"], stream=True)
    names = {"max_tokens": 3, "temperature": 0.5, "top_k": 2, "top_p": 0.5, "seed": 1, "stop": ["z"]}
    other = read(text_input="a", streaming=True, **{f"sampling_param_{name}": value for name, value in names.items()})
    assert one.rows == other.rows
    assert (one.returns.stream, one.returns.accumulate) == (True, False)
    assert (other.returns.stream, other.returns.accumulate) == (True, True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "text_input is missing"),
        ({"text_input": "a", "input_ids": [1]}, "both given"),
        ({"text_input": ["a", "b"]}, "expected one prompt, got 2"),
        ({"text_input": "a", "max_tokens": [1, 2]}, "max_tokens: expected one value, got 2"),
        ({"text_input": "a", "num_return_sequences": 3}, "num_return_sequences: expected 1, got 3"),
        ({"text_input": "a", "bad_words": ["b"]}, "bad_words"),
        ({"text_input": "a", "guided_decoding_guide_type": "ebnf_grammar"}, "expected one of json, json_schema"),
        ({"text_input": "a", "guided_decoding_guide_type": "regex"}, "guided_decoding_guide: is missing"),
        ({"text_input": "a", "seed": -1}, "seed: expected a number of at least 0"),
    ],
)
def test_what_cannot_be_used_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(**given)


def test_bytes_that_are_no_text_are_named() -> None:
    with pytest.raises(UserError, match="text_input: expected UTF-8"):
        read_request({"text_input": np.array([b"\xff"], np.object_)}, False, InstanceSettings(), True)


def test_rows_of_a_batch_are_asked_for_one_by_one() -> None:
    batch = {
        "text_input": np.array([[b"a"], [b"b"]], np.object_),
        "max_tokens": np.array([[1], [2]], np.int32),
        "stop_words": np.array([[b"x", b""], [b"", b""]], np.object_),
    }
    rows = read_request(batch, True, InstanceSettings(), True).rows
    assert [(row.prompt, row.params.max_tokens, row.params.stop) for row in rows] == [("a", 1, ["x"]), ("b", 2, None)]
    with pytest.raises(UserError, match="stream: expected one prompt, got 2"):
        read_request({**batch, "stream": np.array([[True], [True]])}, True, InstanceSettings(), True)
    with pytest.raises(UserError, match="equally many rows"):
        read_request({**batch, "stream": np.array([[True]])}, True, InstanceSettings(), True)


def test_a_model_that_answers_once_does_not_stream() -> None:
    with pytest.raises(UserError, match="stream: this model answers once"):
        read(streams=False, text_input="a", stream=True)
    assert not read(streams=False, text_input="a", stream=False).returns.stream


def output(text: str, diff: str, finished: bool = False) -> RequestOutput:
    completion = CompletionOutput(
        index=0,
        text=text,
        token_ids=[7, 8, 9],
        finish_reason="stop" if finished else None,
        stop_reason="x" if finished else None,
        text_diff=diff,
        token_ids_diff=[9],
    )
    return RequestOutput("0", "p", [1, 2], [completion], finished, 1)


def test_streamed_responses_hold_what_is_new_or_everything() -> None:
    new = row_tensors(output("abc", "c"), Returns(stream=True, output_ids=True), "", Times())
    assert (new["text_output"].tolist(), new["output_ids"].tolist()) == ([b"c"], [[9]])
    everything = row_tensors(output("abc", "c"), Returns(stream=True, accumulate=True, output_ids=True), "", Times())
    assert (everything["text_output"].tolist(), everything["output_ids"].tolist()) == ([b"abc"], [[7, 8, 9]])
    whole = row_tensors(output("abc", "", True), Returns(finish_reason=True, stop_reason=True), "p", Times())
    assert [whole[name].tolist() for name in ("text_output", "finish_reason", "stop_reason")] == [
        [b"pabc"],
        [b"stop"],
        [b"x"],
    ]


def test_rows_of_different_length_are_stacked() -> None:
    rows = [{"a": np.array([i]), "ids": np.arange(i + 1)[None]} for i in range(3)]
    made = stack(rows)
    assert made["a"].tolist() == [[0], [1], [2]]
    assert made["ids"].tolist() == [[[0, 0, 0]], [[0, 1, 0]], [[0, 1, 2]]]
    assert stack([{"t": np.array([b"x"], np.object_)}] * 2)["t"].tolist() == [[b"x"], [b"x"]]


def test_parameters_of_config_pbtxt_come_back() -> None:
    settings = InstanceSettings(max_queue_size=3, backend="torch", num_threads=2, exclude_input_in_output=False)
    assert InstanceSettings.from_parameters(settings.to_parameters()) == settings
    assert InstanceSettings.from_parameters({}) == InstanceSettings()
    for name, text in (("max_queue_size", "many"), ("accumulate_tokens", "perhaps"), ("num_threads", "0")):
        with pytest.raises(UserError, match=f"config.pbtxt: parameter {name}: expected"):
            InstanceSettings.from_parameters({name: text})
