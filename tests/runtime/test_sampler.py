"""The sampler against Hugging Face's logits processors and PyTorch's log-softmax."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minicache_trt.runtime.request import SamplingParams
from minicache_trt.runtime.sampler import NonFiniteLogits, sample, top_logprobs


class Fixed:
    """A generator that returns one given number."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


def reference_probabilities(logits, params, history):
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        processors.append(MinPLogitsWarper(params.min_p))
    scores = torch.from_numpy(logits).double()[None]
    return processors(torch.tensor([history]), scores).softmax(-1)[0].numpy()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0.2, 3.0),
    st.sampled_from([0, -1, 1, 2, 5, 100]),
    st.sampled_from([1.0, 0.9, 0.5, 0.05]),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    st.sampled_from([1.0, 1.3, 0.7]),
    st.floats(0, 1, exclude_max=True),
)
def test_sampling_against_transformers(seed, temperature, top_k, top_p, min_p, penalty, draw):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, 30).astype(np.float32)
    history = random.integers(0, 30, 12).tolist()
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    probabilities = reference_probabilities(logits, params, history)
    token = sample(logits, params, history, Fixed(draw))
    assert probabilities[token] > 0
    before = probabilities[:token].sum()
    assert before - 1e-9 <= draw <= before + probabilities[token] + 1e-9


@given(st.integers(0, 10**6), st.sampled_from([1.0, 1.5]))
def test_greedy_is_the_penalised_argmax(seed, penalty):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 1, 20).astype(np.float32)
    history = random.integers(0, 20, 5).tolist()
    params = SamplingParams(temperature=0, repetition_penalty=penalty)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([history]), torch.from_numpy(logits)[None])
    before = logits.copy()
    assert sample(logits, params, history, Fixed(0.99)) == int(expected.argmax())
    assert (logits == before).all()


def test_extreme_temperatures():
    logits = np.array([1.0, 3.0, 2.0, -1e30], np.float32)
    assert sample(logits, SamplingParams(temperature=1e-300), [0], Fixed(0.999)) == 1
    assert sample(logits, SamplingParams(temperature=1e35), [0], Fixed(0.999)) == 3


def test_frequencies_follow_the_distribution():
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    generator = np.random.default_rng(0)
    tokens = [sample(logits, SamplingParams(), [0], generator) for _ in range(4000)]
    assert np.abs(np.bincount(tokens) / 4000 - [0.1, 0.2, 0.3, 0.4]).max() < 0.03


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_non_finite_logits_are_refused(bad, temperature):
    logits = np.array([1.0, bad, 2.0], np.float32)
    with pytest.raises(NonFiniteLogits, match="expected 3 finite numbers, got 1 that are NaN or infinite"):
        sample(logits, SamplingParams(temperature=temperature), [0], Fixed(0.5))


@given(st.integers(0, 10**6), st.integers(0, 8), st.integers(0, 19))
def test_logprobs_against_torch(seed, count, token):
    logits = np.random.default_rng(seed).normal(0, 4, 20).astype(np.float32)
    expected = torch.from_numpy(logits).double().log_softmax(-1)
    order = expected.argsort(descending=True).tolist()
    entry = top_logprobs(logits, token, count)
    assert list(entry)[:count] == order[:count]
    assert set(entry) == {*order[:count], token}
    for index, value in entry.items():
        assert value.logprob == pytest.approx(float(expected[index]), abs=1e-9)
        assert value.rank == 1 + order.index(index)


def test_ties_do_not_add_tokens():
    entry = top_logprobs(np.zeros(10, np.float32), 9, 3)
    assert list(entry) == [0, 1, 2, 9] and {value.rank for value in entry.values()} == {1}


@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.5, -1.5]),
    st.sampled_from([0.0, 0.7, -2.0]),
    st.dictionaries(st.integers(0, 19), st.floats(-100, 100), max_size=4),
    st.sampled_from([1.0, 1.3]),
    st.integers(0, 10),
)
def test_greedy_with_bias_and_penalties(seed, presence, frequency, bias, repetition, prompt_len):
    """Against a loop over tokens in PyTorch, in the documented order."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, 20).astype(np.float32)
    history = random.integers(0, 20, 12).tolist()
    params = SamplingParams(
        temperature=0,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
        repetition_penalty=repetition,
    )
    expected = torch.from_numpy(logits).double()[None]
    for token, value in bias.items():
        expected[0, token] += value
    if repetition != 1:
        expected = RepetitionPenaltyLogitsProcessor(repetition)(torch.tensor([history]), expected)
    for token in history[prompt_len:]:
        expected[0, token] -= frequency
    for token in set(history[prompt_len:]):
        expected[0, token] -= presence
    chosen = sample(logits, params, history, Fixed(0.5), prompt_len)
    assert float(expected[0, chosen]) == pytest.approx(float(expected.max()), abs=1e-9)


@given(
    st.integers(0, 10**6), st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1.0, 1e30]), st.sampled_from([0, 3])
)
def test_only_allowed_tokens_come(seed, draw, temperature, top_k):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 5, 30).astype(np.float32)
    allowed = random.random(30) < 0.2
    allowed[int(random.integers(30))] = True
    token = sample(logits, SamplingParams(temperature=temperature, top_k=top_k), [0], Fixed(draw), 0, allowed)
    assert allowed[token]
    if temperature == 0:
        assert logits[token] == logits[allowed].max()
