"""The whole runtime on the fake engine: outputs depend on the request alone, whatever the schedule."""

import dataclasses
import itertools

import numpy as np
import pytest
from bpe import bpe_tokenizer
from fake_engine import VOCAB, FakeEngine, expected_logits, small_build
from hypothesis import event, given, settings
from hypothesis import strategies as st

from minicache_trt.config import KvCacheConfig
from minicache_trt.errors import UserError
from minicache_trt.runtime.cache_sizes import CacheSizes
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams
from minicache_trt.runtime.sampler import sample

METHODS = ("minicache", "full")


@pytest.fixture
def make_llm():
    """Builds LLMs on fake engines and checks every block when the test ends."""
    made = []

    def make(method="minicache", tokenizer=None, max_bytes=None, engine_options=None, **build):
        engine = FakeEngine(small_build(**build), method, **(engine_options or {}))
        made.append(LLM.from_engine(engine, tokenizer=tokenizer, kv_cache_config=KvCacheConfig(max_bytes)))
        return made[-1]

    yield make
    for llm in made:
        check_idle(llm)


def check_idle(llm):
    llm.check_integrity()
    cache = llm._runner.cache
    assert cache.full_pool.num_used == cache.compressed_pool.num_used == 0


def tokens(seed, count):
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def smallest_budget(engine):
    """Bytes that are just enough for one sequence of max_seq_len."""
    block_bytes = engine.allocate(1, 0), engine.allocate(0, 1)
    one = dataclasses.replace(engine.build, max_batch_size=1)
    return CacheSizes.plan(one, KvCacheConfig(), engine.plan.compresses, *block_bytes).num_bytes


def expected_output(prompt, params, build, compresses):
    """Generate without cache or scheduler, from the formula of the fake engine."""
    known = list(prompt)
    generator = np.random.default_rng(params.seed)
    while len(known) < min(len(prompt) + params.max_tokens, build.max_seq_len):
        logits = expected_logits(known, len(prompt), build, compresses)
        known.append(sample(logits[-1], params, known, generator))
    return known[len(prompt) :]


@st.composite
def schedules(draw):
    batch = draw(st.sampled_from([1, 2, 4, 5]))
    build = small_build(
        max_batch_size=batch,
        max_num_tokens=draw(st.integers(batch, 300)),
        window=draw(st.sampled_from([1, 64, 100])),
        quantum=draw(st.sampled_from([64, 128, 256])),
        max_seq_len=draw(st.sampled_from([200, 330])),
    )
    engine = FakeEngine(build, draw(st.sampled_from(METHODS)))
    scarcity = draw(st.sampled_from([1, 1, 1.2, 2, None]))
    return engine, KvCacheConfig(scarcity and int(smallest_budget(engine) * scarcity))


def disturb(llm, period):
    """Preempt the youngest sequence in every ``period``-th step, short of blocks or not."""
    scheduler = llm._runner.scheduler
    demote, calls = scheduler.demote, itertools.count(1)

    def demote_after_preemption():
        if len(scheduler.running) > 1 and next(calls) % period == 0:
            scheduler._preempt_last()
        return demote()

    scheduler.demote = demote_after_preemption


periods = st.sampled_from([2, 7, 31, 10**9])
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=40, deadline=None)
@given(schedules(), st.data())
def test_outputs_depend_on_the_request_alone(schedule, data):
    engine, cache_config = schedule
    llm = LLM.from_engine(engine, kv_cache_config=cache_config)
    disturb(llm, data.draw(periods))
    random = np.random.default_rng(data.draw(seeds))
    prompts, params = [], []
    for index in range(random.integers(1, 7)):
        prompts.append(tokens(index, random.integers(1, engine.build.max_seq_len + 1)))
        temperature = float(random.choice([0, 0.8]))
        params.append(SamplingParams(max_tokens=int(random.integers(1, 130)), temperature=temperature, seed=index))
    outputs = llm.generate(prompts, params)
    check_idle(llm)
    for prompt, item, output in zip(prompts, params, outputs, strict=True):
        expected = expected_output(prompt, item, engine.build, engine.plan.compresses)
        assert output.outputs[0].token_ids == expected
        assert output.prompt_token_ids == prompt and output.finished
        assert output.outputs[0].finish_reason == "length"
    event(f"preempted: {llm.statistics.preemptions > 0}, demoted: {llm.statistics.demotions > 0}")


@settings(max_examples=40, deadline=None)
@given(schedules(), st.data())
def test_scores_equal_the_formula_at_every_position(schedule, data):
    """Every logit is a hash of its exact history: equality proves c, tables and replay at every position."""
    engine, cache_config = schedule
    llm = LLM.from_engine(engine, kv_cache_config=cache_config)
    disturb(llm, data.draw(periods))
    random = np.random.default_rng(data.draw(seeds))
    sequences = [tokens(i, random.integers(1, engine.build.max_seq_len + 1)) for i in range(random.integers(1, 7))]
    prompt_lens = [int(random.integers(1, len(sequence) + 1)) for sequence in sequences]
    starts = [int(random.choice([0, 50, prompt_len, 400])) for prompt_len in prompt_lens]
    scores = llm.score(sequences, prompt_lens, starts)
    check_idle(llm)
    for sequence, prompt_len, start, logits in zip(sequences, prompt_lens, starts, scores, strict=True):
        expected = expected_logits(sequence, prompt_len, engine.build, engine.plan.compresses)[start:]
        assert logits.shape == expected.shape and (logits == expected).all()
    event(f"preempted: {llm.statistics.preemptions > 0}, demoted: {llm.statistics.demotions > 0}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_num_tokens", [5, 64, 300])
def test_preempted_requests_lose_nothing(make_llm, method, max_num_tokens):
    """Five growing sequences on a cache for one of full length, generated and scored."""
    build = {"max_batch_size": 5, "max_seq_len": 400, "max_num_tokens": max_num_tokens}
    llm = make_llm(method, max_bytes=smallest_budget(FakeEngine(small_build(**build), method)), **build)
    compresses = method != "full"
    prompts = [tokens(seed, 30 + 25 * seed) for seed in range(5)]
    params = [SamplingParams(max_tokens=220, temperature=seed % 2, seed=seed) for seed in range(5)]
    outputs = llm.generate(prompts, params)
    assert llm.statistics.preemptions >= 1
    for prompt, item, output in zip(prompts, params, outputs, strict=True):
        assert output.outputs[0].token_ids == expected_output(prompt, item, llm.engine.build, compresses)
    sequences = [tokens(seed, 300) for seed in range(5)]
    scores = llm.score(sequences, [len(prompt) for prompt in prompts])
    assert llm.statistics.preemptions >= 1
    for sequence, prompt, logits in zip(sequences, prompts, scores, strict=True):
        assert (logits == expected_logits(sequence, len(prompt), llm.engine.build, compresses)).all()


@settings(max_examples=25, deadline=None)
@given(schedules(), st.data())
def test_likelihoods_read_the_same_history(schedule, data):
    """What is computed at once says of every token what the formula says of it, whatever the batch and the cache."""
    engine, cache_config = schedule
    llm = LLM.from_engine(engine, kv_cache_config=cache_config)
    disturb(llm, data.draw(periods))
    random = np.random.default_rng(data.draw(seeds))
    most = engine.build.max_seq_len + 1
    sequences = [tokens(i, random.integers(2, most + 1)) for i in range(random.integers(1, 7))]
    prompt_lens = [int(random.integers(1, len(sequence))) for sequence in sequences]
    starts = [int(random.integers(0, len(sequence) - 1)) for sequence in sequences]
    found = llm.likelihoods(sequences, prompt_lens, starts)
    check_idle(llm)
    for sequence, prompt_len, start, (nll, likeliest) in zip(sequences, prompt_lens, starts, found, strict=True):
        logits = expected_logits(sequence[:-1], prompt_len, engine.build, engine.plan.compresses)[start:]
        log_p = logits - np.logaddexp.reduce(logits.astype(np.float64), -1, keepdims=True)
        following = sequence[start + 1 :]
        np.testing.assert_allclose(nll, -log_p[np.arange(len(following)), following], rtol=1e-5, atol=1e-6)
        assert (likeliest == (logits.argmax(-1) == following)).all()


@pytest.mark.parametrize("method", METHODS)
def test_likelihoods_take_a_block_in_a_step(make_llm, method):
    """As many tokens as share one history: none but the first of a step changes what has been compressed."""
    llm = make_llm(method, max_seq_len=400, max_num_tokens=300)
    llm.likelihoods([tokens(0, 385)], [128])
    steps = llm.statistics.prefill_steps + llm.statistics.decode_steps
    assert steps == (1 + (384 - 128) // 64 if method != "full" else 2)


def test_the_formula_notices_a_wrong_history():
    build = small_build()
    sequence = tokens(0, 300)
    right = expected_logits(sequence, 200, build)
    changes = [
        expected_logits(sequence, 200, build, compresses=False),
        expected_logits(sequence, 201, build),
        expected_logits(sequence, 200, small_build(window=65)),
        expected_logits([(sequence[0] + 1) % VOCAB, *sequence[1:]], 200, build),
    ]
    assert all((right[-1] != changed[-1]).any() for changed in changes)


@pytest.mark.parametrize("method", METHODS)
def test_scoring_decodes_the_continuation_token_by_token(make_llm, method):
    llm = make_llm(method)
    llm.score([tokens(0, 40), tokens(1, 60)], [10, 20])
    assert (llm.statistics.prefill_steps, llm.statistics.decode_steps) == (1, 40)
    assert llm.statistics.generated_tokens == 30 + 40
    llm.score([tokens(0, 40)])
    assert (llm.statistics.prefill_steps, llm.statistics.decode_steps) == (1, 0)


def test_statistics(make_llm):
    llm = make_llm()
    llm.generate([tokens(0, 200), tokens(1, 10)], SamplingParams(max_tokens=100, temperature=0))
    statistics, sizes = llm.statistics, llm.cache_sizes
    assert (statistics.prompt_tokens, statistics.generated_tokens) == (210, 200)
    assert statistics.prefill_tokens + statistics.decode_tokens == 210 + 2 * 99
    assert statistics.demotions == (298 - 64) // 64, "the second never has a block beyond its window"
    assert statistics.preemptions == 0
    assert statistics.full_bytes_allocated == sizes.full_bytes and sizes.num_bytes == llm.engine.allocate(
        sizes.full_blocks, sizes.compressed_blocks
    )
    assert statistics.compressed_bytes_used == 3 * sizes.compressed_block_bytes
    assert 4 * sizes.full_block_bytes <= statistics.full_bytes_used <= 5 * sizes.full_block_bytes
    assert statistics.prefill_tokens_per_second > 0 and statistics.decode_tokens_per_second > 0


def test_prompt_shapes(make_llm):
    llm = make_llm(tokenizer=FakeTokenizer())
    ids = [1, 2, 3]
    mapping = {"prompt_token_ids": ids}
    expected = greedy_tokens(llm, ids, 16)
    for prompts in (ids, [ids], mapping, [mapping], "abc", ["abc"], {"prompt": "abc"}):
        (output,) = llm.generate(prompts, SamplingParams(temperature=0))
        assert output.prompt_token_ids == ids
        assert output.outputs[0].token_ids == expected
    assert output.prompt == "abc"
    assert llm.generate([]) == []
    assert len({output.request_id for output in llm.generate([ids, ids])}) == 2


class FakeTokenizer:
    """Token i is the i-th letter; 27 and above print nothing."""

    def encode(self, text):
        return [ord(character) - ord("a") + 1 for character in text]

    def decode(self, token_ids, *, skip_special_tokens, clean_up_tokenization_spaces):
        return "".join(chr(ord("a") + token - 1) for token in token_ids if 1 <= token <= 26)


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[]], None, r"prompts\[0\]: expected at least one token"),
        ([[1], [2] * 513], None, r"prompts\[1\] has 513 tokens, the engine was built for max_seq_len 512"),
        ([[1, 48]], None, r"prompts\[0\]: expected token ids from 0 to 47, got 48"),
        ([[-1]], None, "got -1"),
        ("abc", None, r"prompts\[0\] is text, but there is no tokenizer"),
        ([3.5], None, r"prompts\[0\]: expected text or a list of token ids, got float"),
        ([{"text": "abc"}], None, r"prompts\[0\]: expected one key, prompt or prompt_token_ids, got \['text'\]"),
        ([[1], [2]], [SamplingParams()] * 3, "sampling_params: expected 1 or 2"),
        ([[1]], SamplingParams(stop="x"), "stop strings need a tokenizer"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(make_llm, prompts, params, message):
    llm = make_llm()
    with pytest.raises(UserError, match=message):
        llm.generate(prompts, params)
    assert llm.engine.num_steps == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1, 2]], [3]), r"prompt_lens\[0\]: expected 1 to 2, got 3"),
        (([[1, 2]], [0]), r"prompt_lens\[0\]: expected 1 to 2, got 0"),
        (([[1, 2]], [1, 1]), "prompt_lens: expected 1 numbers"),
        (([[1] * 513], [1]), r"token_ids\[0\] has 513 tokens"),
        (([[1]], [1], -1), "start: expected positions of at least 0, got -1"),
        (([[1]], [1], [0, 0]), "start: expected 1 numbers"),
    ],
)
def test_bad_scores_are_refused(make_llm, arguments, message):
    with pytest.raises(UserError, match=message):
        make_llm().score(*arguments)


def test_too_small_a_cache_is_refused():
    engine = FakeEngine(small_build())
    budget = smallest_budget(engine)
    LLM.from_engine(engine, kv_cache_config=KvCacheConfig(budget))
    with pytest.raises(UserError, match="raise max_bytes"):
        LLM.from_engine(engine, kv_cache_config=KvCacheConfig(budget - 1))


def test_generation_stops_at_max_seq_len(make_llm):
    llm = make_llm(max_seq_len=100)
    outputs = llm.generate([tokens(0, 95), tokens(1, 100)], SamplingParams(max_tokens=50))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [5, 0]
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "length"]


def greedy_tokens(llm, prompt, count):
    params = SamplingParams(max_tokens=count, temperature=0)
    return expected_output(prompt, params, llm.engine.build, llm.engine.plan.compresses)


def test_stop_tokens(make_llm):
    llm = make_llm()
    prompt = tokens(0, 10)
    expected = greedy_tokens(llm, prompt, 12)
    stop = expected[5]
    first = expected.index(stop)
    params = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[stop])
    completion = llm.generate(prompt, params)[0].outputs[0]
    assert completion.token_ids == expected[: first + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)

    llm = make_llm(engine_options={"eos_token_ids": (stop,)})
    completion = llm.generate(prompt, SamplingParams(max_tokens=12, temperature=0))[0].outputs[0]
    assert completion.token_ids == expected[: first + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    completion = llm.generate(prompt, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))[0].outputs[0]
    assert completion.token_ids == expected and completion.finish_reason == "length"


def test_stop_strings_and_text(make_llm):
    llm = make_llm(tokenizer=FakeTokenizer())
    expected = greedy_tokens(llm, [1, 2, 3], 40)
    text = FakeTokenizer().decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert llm.generate("abc", SamplingParams(max_tokens=40, temperature=0))[0].outputs[0].text == text
    stop = text[3:6]
    params = SamplingParams(max_tokens=40, temperature=0, stop=["ZZ", stop])
    completion = llm.generate("abc", params)[0].outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert "".join(llm.generate_stream("abc", params)) == completion.text


def test_events_add_up_to_the_output(make_llm):
    llm = make_llm(tokenizer=FakeTokenizer())
    events = []
    outputs = llm.generate(["abc", "xyz"], SamplingParams(max_tokens=20, seed=3), on_token=events.append)
    for output in outputs:
        mine = [event for event in events if event.request_id == output.request_id]
        assert [event.token_id for event in mine] == output.outputs[0].token_ids
        assert "".join(event.text for event in mine) == output.outputs[0].text
        assert [event.finish_reason for event in mine] == [None] * 19 + ["length"]


def test_logprobs(make_llm):
    llm = make_llm()
    prompt = tokens(0, 100)
    completion = llm.generate(prompt, SamplingParams(max_tokens=5, seed=1, logprobs=2))[0].outputs[0]
    known = list(prompt)
    total = 0.0
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        logits = expected_logits(known, len(prompt), llm.engine.build)[-1].astype(float)
        reference = logits - np.log(np.exp(logits).sum())
        assert list(entry)[:2] == np.argsort(-reference)[:2].tolist()
        assert entry[token].logprob == pytest.approx(reference[token])
        total += reference[token]
        known.append(token)
    assert completion.cumulative_logprob == pytest.approx(total)
    completion = llm.generate(prompt, SamplingParams(max_tokens=5))[0].outputs[0]
    assert completion.logprobs is None and completion.cumulative_logprob is None


def test_bad_logits_end_only_their_request(make_llm):
    llm = make_llm(engine_options={"poison": 25})
    outputs = llm.generate([tokens(0, 20), tokens(1, 90)], SamplingParams(max_tokens=12, temperature=0))
    poisoned, healthy = (output.outputs[0] for output in outputs)
    assert poisoned.finish_reason == "error" and "NaN or infinite" in poisoned.stop_reason
    assert poisoned.token_ids == greedy_tokens(llm, tokens(0, 20), 6)
    assert healthy.finish_reason == "length" and healthy.token_ids == greedy_tokens(llm, tokens(1, 90), 12)
    with pytest.raises(UserError, match="the request ended early: logits: expected 48 finite numbers"):
        list(llm.generate_stream(tokens(0, 20)))


def test_a_stream_can_be_abandoned(make_llm):
    llm = make_llm(tokenizer=FakeTokenizer())
    stream = llm.generate_stream("abc", SamplingParams(max_tokens=200))
    next(stream)
    with pytest.raises(UserError, match="another generation is still running"):
        llm.generate("abc")
    stream.close()
    check_idle(llm)
    assert len(llm.generate("abc")[0].outputs[0].token_ids) == 16


def test_a_failing_callback_or_engine_leaves_no_blocks_behind(make_llm):
    llm = make_llm()

    def fail(*_):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        llm.generate([tokens(0, 200)], on_token=fail)
    check_idle(llm)
    llm.engine.compress = fail
    with pytest.raises(RuntimeError, match="broken"):
        llm.generate([tokens(0, 400)])
    check_idle(llm)


def test_seeds(make_llm):
    llm = make_llm()
    prompt = tokens(0, 30)

    def run(**changes):
        return llm.generate([prompt], SamplingParams(max_tokens=12, **changes))[0].outputs[0].token_ids

    assert run(seed=1) == run(seed=1) != run(seed=2)
    assert run() != run()


def test_byte_level_text_end_to_end(make_llm):
    tokenizer = bpe_tokenizer()
    llm = make_llm(tokenizer=tokenizer)
    completion = llm.generate([1, 2, 3], SamplingParams(max_tokens=30, seed=0))[0].outputs[0]
    assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_progress_bar(make_llm, capsys):
    make_llm().generate([[1], [2]], use_tqdm=True)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize(("window", "quantum"), [(1, 64), (64, 256), (100, 128)])
def test_an_answer_that_becomes_a_prompt_is_computed_as_a_prompt(make_llm, window, quantum):
    """Its tokens saw another c than they do as a prompt, so only what is the same may be found."""
    llm = make_llm(window=window, quantum=quantum, max_seq_len=600)
    known = tokens(0, 10)
    for _ in range(2):
        for _ in range(2):
            (output,) = llm.generate([known], SamplingParams(max_tokens=200, temperature=0))
            assert output.outputs[0].token_ids == greedy_tokens(llm, known, 200)
        known = [*known, *output.outputs[0].token_ids, 7]
    assert llm.statistics.hit_tokens > 0
