"""Event loops are woken once for a whole step, and while the engine computes the next one."""

import asyncio

from bpe import bpe_tokenizer
from fake_engine import FakeEngine, small_build

from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams
from minicache_trt.runtime.wakeups import Wakeups


def test_a_loop_is_woken_once_for_all_its_futures():
    async def main():
        loop, wakeups, gone = asyncio.get_running_loop(), Wakeups(), []
        calls, call = [], loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *arguments: (calls.append(arguments), call(*arguments))
        futures = [loop.create_future() for _ in range(3)]
        for index, future in enumerate(futures):
            wakeups.add(loop, future, lambda index=index: gone.append(index))
        futures[1].cancel()
        assert not calls
        wakeups.flush()
        wakeups.flush()
        await asyncio.gather(futures[0], futures[2])
        assert len(calls) == 1 and not gone

    asyncio.run(main())


def test_those_of_a_closed_loop_are_told_about():
    wakeups, gone = Wakeups(), []
    closed = asyncio.new_event_loop()
    for index in range(2):
        wakeups.add(closed, closed.create_future(), lambda index=index: gone.append(index))
    closed.close()
    wakeups.flush()
    assert gone == [0, 1]
    wakeups.flush()
    assert gone == [0, 1]


def test_nobody_is_woken_between_steps():
    """Every wake-up comes just before the engine computes, but for those of the last step."""
    engine = FakeEngine(small_build())
    llm, order = LLM.from_engine(engine, tokenizer=bpe_tokenizer()), []
    flush, decode, sampled = llm._wakeups.flush, engine.decode, llm._runner.scheduler.update

    def watch(name, call):
        def watched(*arguments):
            order.append(name)
            return call(*arguments)

        return watched

    def flushing():
        if llm._wakeups._pending:
            order.append("wake")
        flush()

    llm._wakeups.flush = flushing
    engine.decode, llm._runner.scheduler.update = watch("decode", decode), watch("update", sampled)

    async def main():
        params = SamplingParams(max_tokens=20, temperature=0)
        return await asyncio.gather(*(llm.generate_async([token + 1], params) for token in range(4)))

    assert all(output.finished for output in asyncio.run(main()))
    assert llm.shutdown()
    followers = {order[index + 1] if index + 1 < len(order) else "end" for index, x in enumerate(order) if x == "wake"}
    assert "wake" in order and followers <= {"decode", "end"}
