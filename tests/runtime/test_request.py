import pytest

from minicache_trt.runtime.request import SamplingParams, Sequence


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("min_tokens", 17),
        ("min_tokens", -1),
    ],
)
def test_sampling_params_name_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: expected .*, got ") as error:
        SamplingParams(**{field: value})
    assert repr(value) in str(error.value)


def test_stop_strings_accept_one_or_many():
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")


@pytest.mark.parametrize(
    ("logits_start", "start", "end", "expected"),
    [
        (None, 0, 4, []),
        (None, 4, 10, [9]),
        (0, 0, 4, [0, 1, 2, 3]),
        (2, 0, 4, [2, 3]),
        (4, 0, 4, []),
        (7, 0, 4, []),
        (3, 4, 6, [4, 5]),
    ],
)
def test_logit_positions(logits_start, start, end, expected):
    sequence = Sequence(list(range(10)), 10, 20, logits_start)
    assert list(sequence.logit_positions(start, end)) == expected
