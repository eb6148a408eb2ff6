"""An engine's keys and values on some prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minicache_trt.errors import UserError
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.prompts import parse_prompts
from minicache_trt.tracing.recording import RecordingEngine, check_finite
from minicache_trt.tracing.similarity import StreamStatistics, stream_statistics


def measure_streams(
    llm: LLM, recording: RecordingEngine, prompts: Sequence[str | list[int]], progress: Callable[[int, int], None]
) -> StreamStatistics:
    """Prefill prompts and measure the keys and values they leave.

    Parameters
    ----------
    llm : LLM
        Running ``recording``.
    recording : RecordingEngine
        See `minicache_trt.tracing.recording.keys_and_values`.
    prompts : sequence of str or list of int
    progress : callable
        Called with prompts done and prompts in all.

    Raises
    ------
    UserError
        A prompt cannot be used, the model has one layer only, or it computes numbers that are not finite.
    """
    engine = llm.engine
    if engine.model.num_layers < 2:
        raise UserError("a model of one layer has no neighbouring layers to compare")
    parsed = parse_prompts(list(prompts), llm.tokenizer, engine.model.vocab_size, engine.build.max_seq_len)
    traces = []
    for done, prompt in enumerate(parsed):
        progress(done, len(parsed))
        trace, _ = recording.record(llm, prompt.token_ids, len(prompt.token_ids))
        check_finite(trace)
        traces.append(trace)
    progress(len(parsed), len(parsed))
    return stream_statistics(traces, engine.plan, engine.model.num_layers)
