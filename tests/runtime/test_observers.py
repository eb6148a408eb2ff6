"""What a request's observer sees, log-probabilities of prompts, and the least length of outputs."""

import numpy as np
import pytest
import torch
from fake_engine import VOCAB, WAIT, FakeEngine, expected_logits, small_build
from test_llm import check_idle, disturb, greedy_tokens, smallest_budget, tokens

from minicache_trt.config import KvCacheConfig
from minicache_trt.errors import UserError
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams


class Recorder:
    def __init__(self):
        self.calls = []

    def started(self, sequence):
        self.calls.append(("started", sequence.prompt_len, sequence.num_cached_tokens))
        assert sequence.first_step is not None

    def sampled(self, position, logits):
        self.calls.append(("sampled", position, logits.copy()))

    def advanced(self, event):
        self.calls.append(("advanced", event.token_id, event.finish_reason))


def make_llm(scarce=False, **options):
    engine = FakeEngine(small_build(), **options)
    memory = int(1.1 * smallest_budget(engine)) if scarce else None
    return LLM.from_engine(engine, kv_cache_config=KvCacheConfig(memory))


def test_an_observer_sees_each_token_and_its_logits():
    llm, recorder = make_llm(), Recorder()
    prompt = tokens(0, 150)
    params = SamplingParams(max_tokens=4, temperature=0)
    output = llm.generate_async(prompt, params, observer=recorder).result(WAIT).outputs[0]
    assert output.token_ids == greedy_tokens(llm, prompt, 4)
    expected = expected_logits(prompt + output.token_ids, 150, llm.engine.build)
    kinds = [call[0] for call in recorder.calls]
    assert kinds == ["started", *["sampled", "advanced"] * 4]
    for index, token in enumerate(output.token_ids):
        _, position, logits = recorder.calls[1 + 2 * index]
        assert position == 150 + index and (logits == expected[position - 1]).all()
        assert recorder.calls[2 + 2 * index] == ("advanced", token, "length" if index == 3 else None)
    llm.shutdown()


def test_an_observer_sees_the_end_of_a_request_that_needs_no_step():
    llm, recorder = make_llm(), Recorder()
    llm.generate_async(tokens(0, 512), observer=recorder).result(WAIT)
    assert recorder.calls == [("advanced", None, "length")]


@pytest.mark.parametrize("count", [0, 3])
def test_log_probabilities_of_prompts(count):
    llm = make_llm(scarce=True)
    disturb(llm, 5)
    prompts = [tokens(seed, 150 + 20 * seed) for seed in range(4)]
    params = SamplingParams(max_tokens=70, temperature=0, logprobs=count, prompt_logprobs=count)
    outputs = llm.generate(prompts, params)
    assert llm.statistics.preemptions > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        known = prompt + output.outputs[0].token_ids
        rows = torch.from_numpy(expected_logits(known, len(prompt), llm.engine.build)).double().log_softmax(-1)
        entries = [*output.prompt_logprobs, *output.outputs[0].logprobs]
        assert entries[0] is None and len(entries) == len(known)
        for row, token, entry in zip(rows, known[1:], entries[1:], strict=False):
            assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-6)
            assert list(entry)[:count] == row.argsort(descending=True, stable=True)[:count].tolist()
    check_idle(llm)


def test_min_tokens_keep_end_and_stop_tokens_away():
    plain = make_llm()
    prompt = tokens(1, 40)
    ids = greedy_tokens(plain, prompt, 30)
    eos, stop = ids[2], ids[4]
    llm = make_llm(eos_token_ids=(eos,))
    for least in (0, 1, 3, 10):
        params = SamplingParams(max_tokens=60, temperature=0, min_tokens=least, stop_token_ids=[stop])
        output = llm.generate([prompt], params)[0].outputs[0]
        known = list(prompt)
        for index, token in enumerate(output.token_ids):
            row = expected_logits(known, len(prompt), llm.engine.build)[-1].copy()
            if index < least:
                row[[eos, stop]] = -np.inf
            assert token == row.argmax()
            known.append(token)
        ends = [token in (eos, stop) for token in output.token_ids]
        assert not any(ends[:-1]) and (ends[-1] or output.finish_reason == "length")
        assert len(output.token_ids) > least


@pytest.mark.parametrize("field", ["stop_token_ids", "logit_bias"])
def test_token_ids_outside_the_vocabulary_are_refused(field):
    value = [VOCAB] if field == "stop_token_ids" else {VOCAB: 1.0}
    with pytest.raises(UserError, match=f"{field}: expected token ids from 0 to 47, got 48"):
        make_llm().generate([[1]], SamplingParams(**{field: value}))
