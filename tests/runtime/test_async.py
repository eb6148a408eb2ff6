"""Requests that come and go while an engine thread runs."""

import asyncio
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from bpe import bpe_tokenizer
from fake_engine import VOCAB, WAIT, FakeEngine, Gate, small_build
from test_llm import FakeTokenizer, check_idle, greedy_tokens

from minicache_trt.backends.base import EngineLost
from minicache_trt.config import KvCacheConfig
from minicache_trt.errors import UserError
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams

GREEDY = SamplingParams(max_tokens=60, temperature=0)
LONG = SamplingParams(max_tokens=450, temperature=0)


def tokens(seed, count):
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


@pytest.fixture
def make_llm():
    """Builds LLMs on fake engines; at the end nothing may run and every block must be accounted for."""
    made = []

    def make(tokenizer=None, engine_options=None, **build):
        engine = FakeEngine(small_build(**build), **(engine_options or {}))
        made.append(LLM.from_engine(engine, tokenizer=tokenizer, kv_cache_config=KvCacheConfig()))
        return made[-1]

    yield make
    for llm in made:
        assert llm.shutdown(timeout=WAIT)
        check_idle(llm)


def outcome(request):
    completion = request.result(WAIT).outputs[0]
    return completion.finish_reason, completion.token_ids


def test_awaited_and_iterated_requests_equal_generate(make_llm):
    llm = make_llm(tokenizer=FakeTokenizer())
    prompts = [tokens(seed, 20 + 60 * seed) for seed in range(6)]
    params = [SamplingParams(max_tokens=30, temperature=seed % 2, seed=seed, logprobs=1) for seed in range(6)]
    expected = make_llm(tokenizer=FakeTokenizer()).generate(prompts, params)

    async def stream(request):
        seen = [output async for output in request]
        completions = [output.outputs[0] for output in seen]
        for earlier, later in pairwise(completions):
            assert later.token_ids == earlier.token_ids + later.token_ids_diff
            assert later.text == earlier.text + later.text_diff
        assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
        assert all(len(c.logprobs) == len(c.token_ids) for c in completions)
        assert all(c.finish_reason is None for c in completions[:-1])
        return seen[-1]

    async def main():
        requests = [llm.generate_async(*pair) for pair in zip(prompts, params, strict=True)]
        streamed = await asyncio.gather(*map(stream, requests[:3]))
        awaited = [await request for request in requests[3:]]
        assert requests[0].finished and await requests[0] == requests[0].result()
        return [*streamed, *awaited]

    for got, want in zip(asyncio.run(main()), expected, strict=True):
        ours, theirs = got.outputs[0], want.outputs[0]
        assert got.prompt_token_ids == want.prompt_token_ids and got.finished
        assert (ours.token_ids, ours.text, ours.finish_reason) == (theirs.token_ids, theirs.text, theirs.finish_reason)
        assert ours.logprobs == theirs.logprobs and ours.cumulative_logprob == theirs.cumulative_logprob


def test_text_is_streamed_up_to_a_possible_stop_string(make_llm):
    llm = make_llm(tokenizer=FakeTokenizer())
    text = llm.generate("abc", GREEDY)[0].outputs[0].text
    params = SamplingParams(max_tokens=60, temperature=0, stop=text[3:6])

    async def main():
        return [output.outputs[0] async for output in llm.generate_async("abc", params)]

    completions = asyncio.run(main())
    assert completions[-1].text == text[: text.index(text[3:6])]
    assert all(completions[-1].text.startswith(completion.text) for completion in completions)
    assert (completions[-1].finish_reason, completions[-1].stop_reason) == ("stop", text[3:6])


def test_a_slow_reader_gets_several_tokens_at_once(make_llm):
    llm = make_llm()
    request = llm.generate_async(tokens(0, 10), GREEDY)
    request.result(WAIT)

    async def main():
        return [output.outputs[0].token_ids_diff async for output in request]

    assert asyncio.run(main()) == [greedy_tokens(llm, tokens(0, 10), 60)]


def test_abort_mid_stream_leaves_the_others_alone(make_llm):
    llm = make_llm()

    async def main():
        request = llm.generate_async(tokens(0, 50), LONG)
        other = llm.generate_async(tokens(1, 70), GREEDY)
        count = 0
        async for output in request:
            last = output
            count += 1
            if count == 3:
                request.abort()
        return last, await other

    output, other = asyncio.run(main())
    completion = output.outputs[0]
    assert output.finished and completion.finish_reason == "abort"
    assert completion.token_ids == greedy_tokens(llm, tokens(0, 50), 450)[: len(completion.token_ids)]
    assert other.outputs[0].token_ids == greedy_tokens(llm, tokens(1, 70), 60)


def test_abort_before_the_first_step_and_after_the_last(make_llm):
    llm = make_llm(max_batch_size=1)
    gate = Gate(llm.engine, 0)
    first, second = (llm.generate_async(tokens(seed, 10), GREEDY) for seed in range(2))
    assert gate.reached.wait(WAIT)
    second.cancel()
    second.cancel()
    gate.opened.set()
    assert outcome(second) == ("abort", [])
    assert outcome(first) == ("length", greedy_tokens(llm, tokens(0, 10), 60))
    first.abort()
    assert outcome(first)[0] == "length"


def test_a_cancelled_task_cancels_its_request(make_llm):
    llm = make_llm()
    gate = Gate(llm.engine, 5)

    async def main():
        iterated, awaited = (llm.generate_async(tokens(seed, 10), LONG) for seed in range(2))

        async def read():
            async for _ in iterated:
                pass

        tasks = [asyncio.create_task(read()), asyncio.create_task(awaited._wait_for_end())]
        await asyncio.to_thread(gate.reached.wait, WAIT)
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        gate.opened.set()
        return iterated, awaited

    for request in asyncio.run(main()):
        assert outcome(request)[0] == "abort"


def test_an_exception_in_a_step_fails_its_batch_and_the_loop_lives_on(make_llm):
    llm = make_llm(max_batch_size=2)
    start, gate = Gate(llm.engine, 0), Gate(llm.engine, 3, RuntimeError("the device is on fire"))
    requests = [llm.generate_async(tokens(seed, 10), GREEDY) for seed in range(3)]
    for held in (start, gate):
        assert held.reached.wait(WAIT)
        held.opened.set()
    for seed, request in enumerate(requests[:2]):
        completion = request.result(WAIT).outputs[0]
        assert (completion.finish_reason, completion.stop_reason) == ("error", "RuntimeError: the device is on fire")
        # The second request may have come too late for the first step.
        assert 3 - seed <= len(completion.token_ids) <= 3
        assert completion.token_ids == greedy_tokens(llm, tokens(seed, 10), 60)[: len(completion.token_ids)]
    assert outcome(requests[2]) == ("length", greedy_tokens(llm, tokens(2, 10), 60))
    assert outcome(llm.generate_async(tokens(0, 10), GREEDY)) == ("length", greedy_tokens(llm, tokens(0, 10), 60))


def test_an_engine_that_is_lost_ends_every_request_and_takes_no_more(make_llm):
    llm = make_llm(max_batch_size=2)
    start, gate = Gate(llm.engine, 0), Gate(llm.engine, 3, EngineLost("rank 1 is gone"))
    requests = [llm.generate_async(tokens(seed, 10), GREEDY) for seed in range(3)]
    assert start.reached.wait(WAIT)
    start.opened.set()
    assert gate.reached.wait(WAIT)
    requests.append(llm.generate_async(tokens(3, 10), GREEDY))  # on its way to the engine thread
    assert llm.failure is None
    gate.opened.set()
    for request in requests:
        completion = request.result(WAIT).outputs[0]
        assert (completion.finish_reason, completion.stop_reason) == ("error", "rank 1 is gone")
    assert llm.failure == "rank 1 is gone"
    with pytest.raises(UserError, match="rank 1 is gone"):
        llm.generate_async(tokens(0, 10), GREEDY)


def test_blocks_that_could_not_be_compressed_are_not_found_later(make_llm):
    llm = make_llm()
    compress = llm.engine.compress

    def fail(*_):
        llm.engine.compress = compress
        raise ValueError("no")

    llm.engine.compress = fail
    assert outcome(llm.generate_async(tokens(0, 300), GREEDY))[0] == "error"
    assert outcome(llm.generate_async(tokens(0, 300), GREEDY)) == ("length", greedy_tokens(llm, tokens(0, 300), 60))


def test_deadlines(make_llm):
    llm = make_llm(max_batch_size=1)
    gate = Gate(llm.engine, 4)
    running = llm.generate_async(tokens(0, 10), GREEDY, timeout=0.2)
    waiting = llm.generate_async(tokens(1, 10), GREEDY, timeout=0.2)
    patient = llm.generate_async(tokens(2, 10), GREEDY, timeout=600)
    assert gate.reached.wait(WAIT)
    time.sleep(0.25)
    gate.opened.set()
    assert outcome(waiting) == ("timeout", [])
    reason, ids = outcome(running)
    assert reason == "timeout" and ids == greedy_tokens(llm, tokens(0, 10), 60)[: len(ids)] and len(ids) <= 5
    assert outcome(patient) == ("length", greedy_tokens(llm, tokens(2, 10), 60))


def test_priorities_decide_who_is_next(make_llm):
    llm = make_llm(max_batch_size=1)
    gate = Gate(llm.engine, 0)
    order = []
    step = llm._runner.step

    def recorded_step():
        updates = step()
        order.extend(update.job for update in updates if update.finished)
        return updates

    llm._runner.step = recorded_step
    first = llm.generate_async(tokens(9, 10), GREEDY)
    assert gate.reached.wait(WAIT)
    requests = [llm.generate_async(tokens(9, 10), GREEDY, priority=priority) for priority in (0, 1, -1, 0)]
    gate.opened.set()
    for request in requests:
        request.result(WAIT)
    assert order == [request._generation for request in (first, *(requests[index] for index in (2, 0, 3, 1)))]


def test_prefixes_and_salts(make_llm):
    llm = make_llm()

    def cached(**options):
        return llm.generate_async(tokens(0, 200), GREEDY, **options).result(WAIT).num_cached_tokens

    assert [cached(), cached(), cached(cache_salt="a"), cached(cache_salt="a"), cached(cache_salt="b")] == [
        0,
        192,
        0,
        192,
        0,
    ]
    prompt = {"prompt_token_ids": tokens(0, 200), "cache_salt": "b"}
    assert llm.generate(prompt, GREEDY)[0].num_cached_tokens == 192
    assert llm.statistics.hit_tokens == 3 * 192 and llm.statistics.lookup_tokens == 6 * 200
    assert llm.statistics.hit_rate == pytest.approx(0.48)


def test_synchronous_calls_share_the_loop(make_llm):
    llm = make_llm(tokenizer=FakeTokenizer())
    expected = make_llm().score([tokens(3, 200)], [150])
    request = llm.generate_async(tokens(0, 10), LONG)
    events = []
    outputs = llm.generate([tokens(1, 10), tokens(2, 20)], GREEDY, on_token=events.append)
    for seed, output in zip((1, 2), outputs, strict=True):
        assert output.outputs[0].token_ids == greedy_tokens(llm, output.prompt_token_ids, 60)
        mine = [event.token_id for event in events if event.request_id == output.request_id]
        assert mine == output.outputs[0].token_ids, seed
    assert (llm.score([tokens(3, 200)], [150])[0] == expected[0]).all()
    text = "".join(llm.generate_stream("abc", GREEDY))
    stream = llm.generate_stream("abc", LONG)
    next(stream)
    stream.close()
    assert text == llm.generate("abc", GREEDY)[0].outputs[0].text
    with pytest.raises(ZeroDivisionError):
        llm.generate("abc", GREEDY, on_token=lambda _: 1 / 0)
    assert outcome(request) == ("length", greedy_tokens(llm, tokens(0, 10), 450))


def test_an_open_stream_keeps_the_loop_out(make_llm):
    llm = make_llm(tokenizer=FakeTokenizer())
    stream = llm.generate_stream("abc", LONG)
    next(stream)
    with pytest.raises(UserError, match="another generation is still running"):
        llm.generate_async("abc")
    stream.close()
    assert outcome(llm.generate_async("abc", GREEDY))[0] == "length"


@pytest.mark.parametrize("drain", [True, False])
def test_shutdown(make_llm, drain):
    llm = make_llm(max_batch_size=2)
    gate = Gate(llm.engine, 4)
    requests = [llm.generate_async(tokens(seed, 10), GREEDY) for seed in range(4)]
    assert gate.reached.wait(WAIT)
    threading.Timer(0.1, gate.opened.set).start()
    assert llm.shutdown(drain=drain, timeout=WAIT) == drain
    assert all(request.finished for request in requests)
    assert {outcome(request)[0] for request in requests} == {"length" if drain else "abort"}
    with pytest.raises(UserError, match="shutting down"):
        llm.generate_async([1])


def test_shutdown_aborts_what_does_not_end_in_time(make_llm):
    with make_llm() as llm:
        gate = Gate(llm.engine, 4)
        request = llm.generate_async(tokens(0, 10), LONG)
        assert gate.reached.wait(WAIT)
        threading.Timer(0.2, gate.opened.set).start()
        assert not llm.shutdown(timeout=0.05)
        assert outcome(request)[0] == "abort"


def test_a_prompt_that_fills_the_engine_needs_no_step(make_llm):
    llm = make_llm(max_seq_len=100)
    assert outcome(llm.generate_async(tokens(0, 100), GREEDY)) == ("length", [])

    async def main():
        return [output async for output in llm.generate_async(tokens(0, 100), GREEDY)]

    assert [output.finished for output in asyncio.run(main())] == [True]
    assert llm.engine.num_steps == 0


def test_a_closed_event_loop_aborts_its_request(make_llm):
    llm = make_llm(tokenizer=bpe_tokenizer())
    gate = Gate(llm.engine, 5)
    request = llm.generate_async(tokens(0, 10), LONG)
    assert gate.reached.wait(WAIT)  # no step wakes the loop before it is closed
    loop = asyncio.new_event_loop()
    request._waiting.append((loop, loop.create_future()))
    loop.close()
    gate.opened.set()
    assert outcome(request)[0] == "abort"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout: expected a positive finite number"),
        ({"timeout": float("nan")}, "timeout: expected a positive finite number"),
        ({"priority": 0.5}, "priority: expected a whole number, got 0.5"),
        ({"cache_salt": ""}, "cache_salt: expected text that is not empty"),
        ({"prompt": [[1], [2]]}, "expected one prompt, got 2"),
        ({"prompt": [48]}, "expected token ids from 0 to 47"),
        ({"prompt": {"prompt_token_ids": [1], "cache_salt": 3}}, "cache_salt: expected text that is not empty, got 3"),
    ],
)
def test_bad_requests_are_refused(make_llm, options, message):
    llm = make_llm()
    with pytest.raises(UserError, match=message):
        llm.generate_async(**{"prompt": [1], **options})
    assert llm.engine.num_steps == 0


def test_result_can_give_up(make_llm):
    llm = make_llm()
    gate = Gate(llm.engine, 0)
    request = llm.generate_async([1], GREEDY)
    with pytest.raises(TimeoutError, match=r"request 0 did not end within 0\.01 seconds"):
        request.result(0.01)
    gate.opened.set()
    assert outcome(request)[0] == "length"
