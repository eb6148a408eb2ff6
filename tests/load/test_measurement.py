"""What is reported, against what the endpoint did, in virtual time: every number has one right value."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from minicache_trt.load.apis import APIS, Sampling
from minicache_trt.load.exchange import Endpoint
from minicache_trt.load.generator import send_all
from minicache_trt.load.loads import Load
from minicache_trt.load.metrics import Point, evaluate
from minicache_trt.load.record import Record
from minicache_trt.load.requests import Request
from minicache_trt.load.slo import parse_slo
from tests.load import virtual_time
from tests.load.virtual_time import Log, Script, chat, completion, usage

START = 1000.0


def random_script(rng: np.random.Generator, counts: bool) -> Script:
    """A few pieces of text at random times; with ``counts``, the endpoint says how many tokens they were."""
    pieces = int(rng.integers(1, 9))
    events = [(float(rng.uniform(0.01, 0.5)), completion("word ")) for _ in range(pieces)]
    events.insert(0, (float(rng.uniform(0.01, 0.1)), completion("")))  # no text, no token
    if counts:
        events.append((0.003, usage(int(rng.integers(5, 50)), pieces + int(rng.integers(0, 4)))))
    return Script([*events, (0.002, "[DONE]")])


def send(
    scripts: list[Script],
    arrivals: list[float] | None = None,
    max_concurrency: int | None = None,
    api: str = "openai",
    timeout: float = 600.0,
    refuse: tuple[int, ...] = (),
) -> tuple[list[Record], list[Log]]:
    served = virtual_time.Endpoint(scripts, refuse)
    target = Endpoint("http://test", APIS[api], "model", Sampling(), timeout)
    requests = [Request(f"prompt {index}", 10 + index) for index in range(len(scripts))]

    async def main() -> list[Record]:
        async with served.client() as client:
            return await send_all(client, target, requests, arrivals or [0.0] * len(scripts), max_concurrency)

    return virtual_time.run(main()), served.logs


def percentile(samples: list[float], percent: float) -> float:
    """Linear interpolation between the order statistics, written out."""
    ordered, place = sorted(samples), (len(samples) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(samples) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def check_distribution(point: Point, name: str, seconds: list[float]) -> None:
    found = point.latencies[name]
    assert found is not None
    assert found.mean == pytest.approx(1000 * sum(seconds) / len(seconds))
    for percent, value in found.percentiles:
        assert value == pytest.approx(1000 * percentile(seconds, percent)), (name, percent)


@pytest.mark.parametrize("limit", [None, 1, 3])
@pytest.mark.parametrize("counts", [False, True])
def test_every_number_follows_from_what_the_endpoint_did(limit: int | None, counts: bool) -> None:
    rng = np.random.default_rng(5)
    load = Load(4.0, 1.0, limit)
    scripts = [random_script(rng, counts) for _ in range(40)]
    arrivals = load.arrivals(rng, len(scripts))
    records, logs = send(scripts, arrivals, limit)
    point = evaluate(load, records, parse_slo(["ttft=400ms,e2el=1.5s"]))

    texts = [[time for time, data in log.events if "word" in data] for log in logs]
    tokens = [len(times) for times in texts]
    prompts = [0] * len(logs)
    if counts:
        said = [json.loads(log.events[-2][1])["usage"] for log in logs]
        tokens, prompts = [item["completion_tokens"] for item in said], [item["prompt_tokens"] for item in said]
    ended = [log.events[-1][0] for log in logs]
    first = [times[0] - log.came for times, log in zip(texts, logs, strict=True)]
    whole = [end - log.came for end, log in zip(ended, logs, strict=True)]
    gaps = [after - before for times in texts for before, after in pairwise(times)]
    per_token = [
        (times[-1] - times[0]) / (count - 1) for times, count in zip(texts, tokens, strict=True) if len(times) > 1
    ]
    duration = max(ended) - START

    check_distribution(point, "ttft", first)
    check_distribution(point, "itl", gaps)
    check_distribution(point, "tpot", per_token)
    check_distribution(point, "e2el", whole)
    row = point.to_json()
    assert row["completed"] == len(scripts) and row["failed"] == 0 and row["errors"] == {}
    assert row["duration"] == pytest.approx(duration)
    assert row["request_throughput"] == pytest.approx(len(scripts) / duration)
    assert row["total_output_tokens"] == sum(tokens) and row["total_input_tokens"] == sum(prompts)
    assert row["output_throughput"] == pytest.approx(sum(tokens) / duration)
    assert row["total_token_throughput"] == pytest.approx(sum(tokens + prompts) / duration)
    good = sum(a <= 0.4 and b <= 1.5 for a, b in zip(first, whole, strict=True))
    assert 0 < good < len(scripts) and row["good_requests"] == good
    assert row["request_goodput"] == pytest.approx(good / duration)

    levels = [
        sum(log.came <= time < end for log, end in zip(logs, ended, strict=True)) for time in [x.came for x in logs]
    ]
    assert row["peak_concurrency"] == max(levels)
    if limit is None:
        assert [log.came - START for log in logs] == pytest.approx(arrivals)
        assert row["max_delay_ms"] == pytest.approx(0, abs=1e-6)
    else:
        assert max(levels) == limit
        delays = [log.came - START - due for log, due in zip(logs, arrivals, strict=True)]
        assert min(delays) >= -1e-9 and row["max_delay_ms"] == pytest.approx(1000 * max(delays), abs=1e-6)


def test_requests_say_what_is_wanted() -> None:
    _, logs = send([Script([(0.1, "[DONE]")])])
    assert logs[0].path == "/v1/completions" and logs[0].headers["accept"] == "text/event-stream"
    assert logs[0].body == {
        "model": "model", "prompt": "prompt 0", "max_tokens": 10, "temperature": 0.0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    _, logs = send([Script([(0.1, "[DONE]")])], api="openai-chat")
    assert logs[0].path == "/v1/chat/completions"
    assert logs[0].body["messages"] == [{"role": "user", "content": "prompt 0"}]
    _, logs = send([Script([])], api="triton")
    assert logs[0].path == "/v2/models/model/generate_stream"
    assert logs[0].body == {"text_input": "prompt 0", "max_tokens": 10, "stream": True, "temperature": 0.0}


def test_options_reach_the_body() -> None:
    sampling = Sampling(0.7, True, 3, {"top_k": 5, "max_tokens": 2})
    for api in APIS.values():
        body = api.body("m", Request("p", 10), sampling)
        assert body["temperature"] == 0.7 and body["ignore_eos"] is True and body["top_k"] == 5
        assert body["max_tokens"] == 2 and 3 in (body.get("seed"), body.get("random_seed"))


def test_chat_role_is_no_token() -> None:
    events = [
        (0.1, chat(role="assistant", content="")), (0.2, chat(reasoning_content="hm")), (0.3, chat(content="yes")),
        (0.0, "[DONE]"),
    ]  # fmt: skip
    (record,), _ = send([Script(events)], api="openai-chat")
    assert record.error is None and record.output_tokens == 2
    assert record.text == "hmyes" and record.ttft == pytest.approx(0.3) and record.itl == pytest.approx([0.3])


def test_triton_ends_with_its_response() -> None:
    events = [(0.1, '{"text_output": "a"}'), (0.2, '{"text_output": ["b"]}'), (0.1, '{"text_output": ""}')]
    (record,), _ = send([Script(events)], api="triton")
    assert record.error is None and record.output_tokens == 2
    assert (record.ttft, record.e2el) == pytest.approx((0.1, 0.4))
    (record,), _ = send([Script([(0.1, '{"error": "no such model"}')])], api="triton")
    assert (record.error, record.message) == ("stream_error", "no such model")


def test_no_text_at_all() -> None:
    """Special tokens only: the first token is as late as the end, and there is nothing between tokens."""
    (record,), _ = send([Script([(0.2, completion("")), (0.1, usage(3, 2)), (0.1, "[DONE]")])])
    assert record.error is None and record.output_tokens == 2
    assert record.ttft == pytest.approx(0.4) and record.itl == [] and record.tpot is None


FAILURES = [
    ("http_429", "come back later", Script([], 429, body=b'{"error": {"message": "come back\\nlater"}}')),
    ("http_503", "draining", Script([], 503, body=b'{"detail": "draining"}')),
    ("http_500", "<p>oh</p>", Script([], 500, body=b"<p>oh</p>")),
    ("http_400", "bad", Script([], 400, body=b'{"error": "bad"}')),
    ("disconnect", "connection reset by peer", Script([(0.1, completion("a"))], end="reset")),
    ("disconnect", "the stream ended before [DONE]", Script([(0.1, completion("a"))])),
    ("timeout", "no end within 5 s", Script([(0.1, completion("a"))], end="hang")),
    ("timeout", "no end within 5 s", Script([(1.0, completion("a"))] * 9)),
    ("stream_error", "broke", Script([(0.1, completion("a")), (0.1, '{"error": {"message": "broke"}}')])),
    ("malformed", "not of this protocol", Script([(0.1, "{nonsense")])),
    ("malformed", "not of this protocol", Script([(0.1, "[1]")])),
]


def test_failures_by_kind() -> None:
    good = Script([(0.1, completion("a")), (0.2, completion("b")), (0.0, "[DONE]")])
    scripts = [*(script for _, _, script in FAILURES), good, good]
    records, _ = send(scripts, timeout=5.0, refuse=(len(scripts) - 1,))
    for record, (kind, message, _) in zip(records, FAILURES, strict=False):
        assert record.error == kind and message in record.message, record
    assert records[-1].error == "connect" and records[-2].error is None
    point = evaluate(Load(), records, parse_slo(["ttft:1000"]))
    assert point.errors == {
        "connect": 1, "disconnect": 2, "http_400": 1, "http_429": 1, "http_500": 1, "http_503": 1, "malformed": 2,
        "stream_error": 1, "timeout": 2,
    }  # fmt: skip
    row = point.to_json()
    assert (row["completed"], row["failed"], row["total_output_tokens"], row["good_requests"]) == (1, 12, 2, 1)
    assert row["duration"] == pytest.approx(5.0), "the longest one is the one that was given up"
    assert row["mean_ttft_ms"] == pytest.approx(100) and row["p99_itl_ms"] == pytest.approx(200)
    assert records[6].finished == pytest.approx(5.0)


def test_nothing_succeeded() -> None:
    records, _ = send([Script([], 500)] * 3)
    row = evaluate(Load(), records).to_json()
    assert row["completed"] == 0 and row["request_throughput"] == 0 and row["request_goodput"] is None
    assert all(row[f"{kind}_{name}_ms"] is None for kind in ("mean", "p50") for name in ("ttft", "tpot", "itl", "e2el"))
