"""The load generator's command against a server over real sockets: its reports, its files, and what it refuses."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Invoke, assert_refused
from tests.support.fake_server import Answer, FakeServer, completion_events, fake_server

Refused = Callable[..., None]
MODELS = Answer(body={"data": [{"id": "first"}, {"id": "second"}]})
SMALL = ["--num-prompts", "6", "--num-warmups", "2", "--input-len", "30", "--output-len", "5"]


def honest(path: str, body: Any, index: int) -> Answer:
    if path == "/v1/models":
        return MODELS
    return Answer(completion_events(body["max_tokens"], body.get("prompt", ""))) if body else Answer(status=404)


def some_fail(path: str, body: Any, index: int) -> Answer:
    """The probes and the warm-up succeed; of six prompts one is refused, one broken off."""
    if path == "/v1/models" or index < 5:
        return honest(path, body, index)
    refusals = {6: Answer(status=429, body={"error": {"message": "queue is full"}}), 8: Answer(("{}",), cut=True)}
    return refusals.get(index) or honest(path, body, index)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server(honest) as running:
        yield running


def _json(invoke: Invoke, *arguments: object) -> Any:
    result = invoke("bench", "serve", *arguments, "--json")
    assert result.code == 0 and result.err == "", result
    return json.loads(result.out)


def test_report_agrees_with_the_server(invoke: Invoke, server: FakeServer) -> None:
    """Counts are the server's; times lie within what causes allow: nothing arrives before it left."""
    flags = ["--url", f"{server.url}/v1", "--dataset", "random", "--max-concurrency", "1,3", "--detailed", *SMALL]
    data = _json(invoke, *flags, "--api-key", "secret", "--header", "X-Who=me")
    assert (data["model"], data["api"], data["lengths_by"]) == ("first", "openai", "server")
    posts = [seen for seen in server.seen if seen.path == "/v1/completions"]
    probes, warm_up, first, second = posts[:2], posts[2:4], posts[4:10], posts[10:]
    assert [len(seen.body["prompt"].split()) for seen in probes] == [16, 64] and len(warm_up) == 2
    assert all(len(seen.body["prompt"].split()) == 10 for seen in first + second), "30 tokens, three a word"
    assert len({seen.body["prompt"] for seen in posts}) == len(posts)
    assert all(
        seen.headers["authorization"] == "Bearer secret" and seen.headers["x-who"] == "me" for seen in server.seen
    )
    for point, limit in zip(data["points"], (1, 3), strict=True):
        assert point["max_concurrency"] == limit and point["peak_concurrency"] <= limit
        assert (point["completed"], point["failed"], point["total_output_tokens"]) == (6, 0, 30)
        assert point["total_input_tokens"] == 6 * 35
        for record in point["requests"]:
            assert record["due"] <= record["sent"] <= record["chunks"][0] <= record["finished"]
            assert record["chunks"] == sorted(record["chunks"]) and len(record["chunks"]) == 5
    for record, log in zip(data["points"][0]["requests"], first, strict=True):
        serving = log.left[-1] - log.came
        assert record["finished"] - record["sent"] >= serving > 0


def test_tables_csv_and_plots(invoke: Invoke, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minicache_trt.cli.console.stdout._width", 160)
    flags = ["--csv", "points.csv", "--plot", "a/plots", "--slo", "ttft=10s", "--max-concurrency", "1", *SMALL]
    with fake_server(some_fail) as server:
        result = invoke("bench", "serve", "--url", server.url, *flags)
    assert result.code == 0 and result.err == "", result
    for part in (
        "requests/s",
        "good/s",
        "TTFT",
        "TPOT",
        "ITL",
        "E2EL",
        "p95",
        "http_429",
        "queue is full",
        "disconnect",
    ):
        assert part in result.out, part
    with (workspace / "points.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["completed"], row["failed"], row["errors"]) == ("4", "2", "disconnect=1 http_429=1")
    assert float(row["p50_ttft_ms"]) <= float(row["p99_ttft_ms"]) and row["good_requests"] == "4"
    assert sorted(path.name for path in (workspace / "a/plots").iterdir()) == [
        "distribution.png", "latency.png", "throughput.png",
    ]  # fmt: skip


def test_nothing_succeeds(invoke: Invoke) -> None:
    def fail_later(path: str, body: Any, index: int) -> Answer:
        return honest(path, body, index) if index < 3 else Answer(status=500, body={"detail": "broken"})

    with fake_server(fail_later) as server:
        result = invoke("bench", "serve", "--url", server.url, *SMALL, "--json")
    assert result.code == 1
    assert json.loads(result.out)["points"][0]["errors"] == {"http_500": 6}


def test_seeds(invoke: Invoke) -> None:
    """The same seed sends the same requests, whatever else runs; another one sends others."""
    sent = []
    for seed in (3, 3, 4):
        with fake_server(honest) as server:
            _json(invoke, "--url", server.url, "--seed", seed, "--request-rate", "500", *SMALL)
        bodies = [seen.body for seen in server.seen if seen.body]
        sent.append(Counter((body["prompt"], body["max_tokens"]) for body in bodies))
    assert sent[0] == sent[1] and not sent[0] & sent[2]


def test_chat_and_a_file(invoke: Invoke, workspace: Path) -> None:
    def chat(path: str, body: Any, index: int) -> Answer:
        assert path == "/v1/chat/completions" and body["model"] == "mine", "a model that is named is not looked for"
        return Answer((json.dumps({"choices": [{"delta": {"content": "hello"}}]}), "[DONE]"))

    def serve(path: str, body: Any, index: int) -> Answer:
        return Answer(status=404) if path == "/" else chat(path, body, index)

    (workspace / "prompts.jsonl").write_text('{"prompt": "one", "output_len": 3}\n{"prompt": "two", "output_len": 4}\n')
    flags = [
        "--api",
        "openai-chat",
        "--model",
        "mine",
        "--dataset-path",
        "prompts.jsonl",
        "--ignore_eos",
        "--num-prompts",
        2,
    ]
    with fake_server(serve) as server:
        data = _json(invoke, "--url", server.url, *flags, "--num-warmups", 0, "--extra-body", '{"top_k": 1}')
    bodies = [seen.body for seen in server.seen if seen.body][2:]
    assert {(body["messages"][0]["content"], body["max_tokens"]) for body in bodies} == {("one", 3), ("two", 4)}
    assert all(body["ignore_eos"] is True and body["top_k"] == 1 for body in bodies)
    assert (data["lengths_by"], data["dataset"], data["points"][0]["total_output_tokens"]) == (
        "words",
        "prompts.jsonl",
        2,
    )


def test_triton(invoke: Invoke) -> None:
    def triton(path: str, body: Any, index: int) -> Answer:
        if path != "/v2/models/ensemble/generate_stream":
            return Answer(status=404)
        return Answer(tuple(json.dumps({"text_output": "a"}) for _ in range(body["max_tokens"])))

    with fake_server(triton) as server:
        flags = ["--url", server.url, "--api", "triton", "--model", "ensemble", "--dataset", "random"]
        data = _json(invoke, *flags, *SMALL)
    assert data["points"][0]["completed"] == 6 and data["points"][0]["total_output_tokens"] == 30


def _answers(answer: Answer) -> Callable[[str, Any, int], Answer]:
    return lambda path, body, index: answer


@pytest.mark.parametrize(
    ("answer", "flags", "parts"),
    [
        (_answers(Answer(status=401, body={"error": "no key"})), [], ["refuses the key: no key", "OPENAI_API_KEY"]),
        (_answers(Answer(status=404)), [], ["/v1/models names no model (HTTP 404)", "--model"]),
        (_answers(Answer(body={"data": []})), [], ["/v1/models names no model (HTTP 200)"]),
        (
            _answers(Answer(status=404, body={"detail": "Not Found"})),
            ["--model", "m"],
            ["http_404: Not Found", "--endpoint"],
        ),
        (_answers(Answer(status=401, body={"error": "no key"})), ["--model", "m"], ["http_401: no key", "--api-key"]),
        (_answers(Answer(("[1]",))), ["--model", "m"], ["the first request", "malformed"]),
        (honest, ["--model", "m", "--api", "triton"], ["the first request", "malformed"]),
        (honest, ["--api", "triton"], ["--api triton needs --model"]),
        (honest, ["--tokenizer", "nowhere/x/y"], ["--tokenizer: cannot load nowhere/x/y"]),
        (honest, ["--dataset-path", "nowhere"], ["--dataset-path: cannot read nowhere"]),
    ],
)
def test_servers_that_will_not_do(
    refused: Refused, answer: Callable[[str, Any, int], Answer], flags: list[object], parts: list[str]
) -> None:
    with fake_server(answer) as server:
        refused(["bench", "serve", "--url", server.url, *SMALL, *flags], *parts)


def test_nobody_there(invoke: Invoke, refused: Refused) -> None:
    with fake_server(honest) as server:
        pass
    for flags in ([], ["--model", "m"], ["--api", "triton", "--model", "m"]):
        refused(["bench", "serve", "--url", server.url, *flags], f"cannot connect to {server.url}", "start the server")
    assert_refused(invoke("bench", "serve", "--url", "http://127.0.0.1:1"), "cannot connect to http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--url", "127.0.0.1:8000"], ["--url: expected an address such as http://127.0.0.1:8000"]),
        (["--url", "http://[1"], ["--url"]),
        (["--api", "grpc"], ["--api: expected one of openai, openai-chat, triton, got grpc"]),
        (["--max-concurrency", "1,x"], ["--max-concurrency: expected positive numbers"]),
        (["--request-rate", "fast"], ["--request-rate: expected numbers or inf"]),
        (["--request-rate", "0"], ["--request-rate: expected a positive number"]),
        (["--burstiness", "0"], ["--burstiness: expected a positive number"]),
        (["--num-prompts", "0"], ["--num-prompts: expected at least 1"]),
        (["--seed", "-1"], ["--seed: expected at least 0"]),
        (["--timeout", "0"], ["--timeout: expected a positive number"]),
        (["--dataset", "sonnet"], ["--dataset-name: expected one of sharegpt-like"]),
        (["--range-ratio", "1"], ["--range-ratio: expected a number in [0, 1)"]),
        (["--slo", "ttft"], ["--slo: expected limits", "metrics: ttft"]),
        (["--extra-body", "{"], ["--extra-body: not JSON"]),
        (["--extra-body", "[1]"], ["--extra-body: expected a JSON object"]),
        (["--header", "X"], ["--header: expected NAME=VALUE"]),
        (["--header", "X=\u00e9"], ["expected printable ASCII"]),
        (["--csv", "no/such/points.csv"], ["--csv: cannot write"]),
    ],
)
def test_bad_flags(refused: Refused, flags: list[object], parts: list[str]) -> None:
    refused(["bench", "serve", *flags], *parts)


def test_a_missing_package_is_named(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == "httpx" else find(wanted))
    refused(["bench", "serve"], "needs the package httpx", "pip install 'minicache-trt[load]'")


def test_other_verbs_do_without_it() -> None:
    """Loading the command line does not load the client."""
    code = "import sys, minicache_trt.cli.app; sys.exit('httpx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bench_itself(refused: Refused) -> None:
    refused(["bench", "--threads", "1"], "bench: missing option --engine", "bench serve --url URL")
    refused(["bench", "-e", "engine", "serve"], "--engine does not belong before serve")
