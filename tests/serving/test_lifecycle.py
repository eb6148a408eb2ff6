"""Clients that leave, queues that are full, servers that stop. Engines are held by gates, never waited for by time."""

import json
import socket
import threading

import httpx
import openai
import pytest

from minicache_trt.runtime.async_request import AsyncRequest
from minicache_trt.serving import middleware, streaming
from tests.runtime.fake_engine import Gate
from tests.serving.live import MODEL, WAIT, Live, check_idle, fake_llm

PROMPT = list(range(2, 60))
BODY = {"model": MODEL, "prompt": PROMPT, "temperature": 0}
LONG = {**BODY, "max_tokens": 400, "ignore_eos": True}


class Calls:
    """Counts the calls of a method that returned, and waits for them."""

    def __init__(self, owner: object, name: str) -> None:
        self._method = getattr(owner, name)
        self._changed = threading.Condition()
        self._count = 0
        setattr(owner, name, self)

    def __call__(self, *arguments, **options):
        result = self._method(*arguments, **options)
        with self._changed:
            self._count += 1
            self._changed.notify_all()
        return result

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._count >= count, WAIT)


def wait_for_ends(live: Live, count: int, reason: str) -> None:
    """So many requests have ended, all of them with this reason."""
    assert live.service.admission.wait_until_idle(WAIT)
    counts = live.service.metrics.outcomes()
    assert counts == {**dict.fromkeys(counts, 0.0), reason: count}


def send(live: Live, body: dict, path: str = "/v1/completions") -> socket.socket:
    """A request on a connection of its own."""
    data = json.dumps(body).encode()
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), WAIT)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


def in_background(function, *arguments, **options):
    """Run a call in a thread; the returned function waits for what it returned."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments, **options)), daemon=True)
    thread.start()

    def result():
        thread.join(WAIT)
        return results[0]

    return result


def settled(live: Live) -> None:
    """Everything has been given back; the engine thread does so before it goes to sleep."""
    assert live.service.admission.wait_until_idle(WAIT)
    loop = live.llm._loop
    with loop._changed:
        assert loop._changed.wait_for(lambda: loop._thread is None, WAIT)
    check_idle(live)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("step", [0, 5])
def test_a_client_that_leaves_cancels_its_requests(serve, monkeypatch, stream, step):
    live = serve(fake_llm(max_batch_size=2))
    gate = Gate(live.llm.engine, step)
    connection = send(live, {**LONG, "n": 3, "stream": stream})
    assert gate.reached.wait(WAIT)
    aborted, seen = threading.Event(), set()

    def watched(request):
        request._cancel(request._generation)
        seen.add(request)
        if len(seen) == 3:
            aborted.set()

    monkeypatch.setattr(AsyncRequest, "abort", watched)
    connection.close()
    assert aborted.wait(WAIT)
    gate.opened.set()
    wait_for_ends(live, 3, "abort")
    settled(live)
    assert live.openai.completions.create(**BODY, max_tokens=3).usage.completion_tokens == 3


def test_a_client_that_leaves_before_its_request_is_prepared(serve, monkeypatch):
    live = serve(fake_llm())
    entered, opened = threading.Event(), threading.Event()
    submit = live.service.submit

    def held(*arguments):
        entered.set()
        assert opened.wait(WAIT)
        return submit(*arguments)

    monkeypatch.setattr(live.service, "submit", held)
    gone = threading.Event()
    until_disconnect = streaming._disconnect

    async def watched(receive):
        await until_disconnect(receive)
        gone.set()

    monkeypatch.setattr(streaming, "_disconnect", watched)
    connection = send(live, LONG)
    assert entered.wait(WAIT)
    connection.close()
    assert gone.wait(WAIT)
    opened.set()
    wait_for_ends(live, 1, "abort")
    settled(live)


def test_a_full_queue_refuses_with_429(serve):
    live = serve(fake_llm(max_batch_size=1), max_queue_size=2)
    gate, admit = Gate(live.llm.engine, 0), Calls(live.service, "admit")
    admitted = [in_background(live.http.post, "/v1/completions", json={**BODY, "max_tokens": 4})]
    assert gate.reached.wait(WAIT)
    admitted.append(in_background(live.http.post, "/v1/completions", json={**BODY, "max_tokens": 4, "n": 2}))
    admit.wait(2)
    response = live.http.post("/v1/completions", json=BODY)
    assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["message"].startswith("the queue is full: 3 of 3")
    with pytest.raises(openai.RateLimitError):
        live.openai.completions.create(**BODY)
    assert live.metrics()["requests_rejected_total", (("status", "429"),)] == 2
    assert live.http.get("/ready").status_code == 200
    gate.opened.set()
    answers = [answer().json() for answer in admitted]
    assert [len(answer["choices"]) for answer in answers] == [1, 2]
    too_many = live.http.post("/v1/completions", json={**BODY, "n": 4})
    assert too_many.status_code == 400 and "asks for 4 sequences" in too_many.text
    settled(live)


def test_a_refused_request_gives_its_places_back(serve):
    live = serve(fake_llm(max_batch_size=1), max_queue_size=1)
    for _ in range(5):
        assert live.http.post("/v1/completions", json={"prompt": [5000]}).status_code == 400
        assert live.http.post("/v1/completions", json={"prompt": [[5], [5000]]}).status_code == 400
        assert live.http.post("/v1/completions", json={**BODY, "guided_regex": "a("}).status_code == 400
        assert (
            live.http.post("/v1/chat/completions", json={"messages": [{"role": "a"}], "max_tokens": 0}).status_code
            == 400
        )
    settled(live)


def test_api_keys(serve):
    live = serve(fake_llm(), http={"api_keys": ("secret", "other")})
    for header in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic secret"},
        {"Authorization": "Bearer"},
    ):
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            response = live.http.post(path, json=BODY, headers=header)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key", (header, path)
        assert live.http.get("/v1/models", headers=header).status_code == 401
    for key in ("secret", "other"):
        client = live.openai.with_options(api_key=key)
        assert client.completions.create(**BODY, max_tokens=2).usage.completion_tokens == 2
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        live.openai.models.list()
    assert live.http.get("/v1/models", headers={"Authorization": "Bearer schlüssel".encode()}).status_code == 401
    for path in ("/health", "/ready", "/metrics", "/version", "/", "/status", "/status.json"):
        assert live.http.get(path).status_code == 200, path


def test_bodies_are_limited(serve, monkeypatch):
    live = serve(fake_llm(), http={"max_body_bytes": 1000})
    large = json.dumps({**BODY, "user": "x" * 2000}).encode()
    headers = {"Content-Type": "application/json"}
    response = live.http.post("/v1/completions", content=large, headers=headers)
    assert response.status_code == 413 and response.json()["error"]["code"] == "too_large"
    assert (
        live.http.post("/v1/completions", content=iter([large[:900], large[900:]]), headers=headers).status_code == 413
    )
    assert (
        live.http.post("/v1/completions", content=iter([json.dumps(BODY).encode()]), headers=headers).status_code == 200
    )
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.05)
    connection = send(live, BODY)  # everything but the last byte that was promised
    connection.close()
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), WAIT) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_reader_that_reads_nothing_holds_nobody_up(serve, monkeypatch):
    live = serve(fake_llm(), send_buffer=4096)
    submit = Calls(live.service, "submit")
    host, port = live.url.removeprefix("http://").split(":")
    connections = []
    for _ in range(3):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((host, int(port)))
        data = json.dumps({**LONG, "stream": True, "logprobs": 20}).encode()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(data) + data
        )
        connections.append(connection)
    submit.wait(3)
    wait_for_ends(live, 3, "length")  # the engine does not wait for its readers
    assert live.openai.completions.create(**BODY, max_tokens=5).usage.completion_tokens == 5
    text = b""
    while b"[DONE]" not in text:  # and what they read late is whole
        text += connections[0].recv(1 << 16)
    events = [line for line in text.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data: {")]
    assert sum(event.count(b'"finish_reason":"length"') for event in events) == 1
    for connection in connections:
        connection.close()
    settled(live)


def test_a_reader_that_has_stalled_is_dropped(serve, monkeypatch):
    monkeypatch.setattr(streaming, "STALL_SECONDS", 0.05)
    live = serve(fake_llm(), send_buffer=4096)
    dropped = threading.Event()
    call = streaming.EventStream.__call__

    async def watched(self, scope, receive, send):
        await call(self, scope, receive, send)
        dropped.set()

    monkeypatch.setattr(streaming.EventStream, "__call__", watched)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    host, port = live.url.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    data = json.dumps({**LONG, "n": 4, "stream": True, "logprobs": 20}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    connection.sendall(head % len(data) + data)
    assert dropped.wait(WAIT)
    connection.close()
    settled(live)


def test_a_draining_server_finishes_what_runs_and_takes_nothing_new(serve):
    live = serve(fake_llm(max_batch_size=1))
    gate, submit = Gate(live.llm.engine, 3), Calls(live.service, "submit")
    running = in_background(httpx.post, f"{live.url}/v1/completions", json={**LONG, "max_tokens": 30}, timeout=WAIT)
    assert gate.reached.wait(WAIT)
    waiting = in_background(httpx.post, f"{live.url}/v1/completions", json={**LONG, "max_tokens": 5}, timeout=WAIT)
    submit.wait(2)
    live.server.begin_drain()
    refused = live.http.post("/v1/completions", json=BODY)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
    assert live.http.get("/ready").status_code == 503
    assert live.http.get("/health").status_code == live.http.get("/metrics").status_code == 200
    gate.opened.set()
    assert running().json()["usage"]["completion_tokens"] == 30
    assert waiting().json()["usage"]["completion_tokens"] == 5
    live.thread.join(WAIT)
    assert not live.thread.is_alive() and live.server.drained
    with pytest.raises(httpx.ConnectError):
        httpx.get(live.url)


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_end_in_time_is_aborted_and_told(serve, stream):
    live = serve(fake_llm(), drain_timeout=0.05)
    gate = Gate(live.llm.engine, 3)
    body = {**LONG, "stream": stream}
    running = in_background(httpx.post, f"{live.url}/v1/completions", json=body, timeout=WAIT)
    assert gate.reached.wait(WAIT)
    aborted = threading.Event()
    cancel = live.llm._loop._cancel

    def watched(*jobs):
        cancel(*jobs)
        aborted.set()

    command = live.llm._loop._command

    def open_the_gate(do):
        command(do)
        gate.opened.set()

    live.llm._loop._command, live.llm._loop._cancel = open_the_gate, watched
    live.server.begin_drain()
    response = running()
    assert aborted.wait(WAIT)
    error = json.loads(response.text.split("data: ")[-2]) if stream else response.json()
    assert response.status_code == (200 if stream else 503)
    assert error["error"]["code"] == "aborted"
    live.thread.join(WAIT)
    assert live.server.drained is False


def test_an_error_of_the_engine_is_told(serve):
    live = serve(fake_llm())
    decode = live.llm.engine.decode

    def failing(batch):
        if live.llm.engine.num_steps == 2:
            live.llm.engine.num_steps += 1
            raise RuntimeError("the device is on fire")
        return decode(batch)

    live.llm.engine.decode = failing
    with pytest.raises(openai.InternalServerError, match="the device is on fire"):
        live.openai.completions.create(**BODY, max_tokens=30)
    assert live.http.get("/health").status_code == 200
    assert live.openai.completions.create(**BODY, max_tokens=3).usage.completion_tokens == 3


def test_an_engine_that_has_ended_is_told_to_the_orchestrator(serve):
    live = serve(fake_llm())
    assert live.openai.completions.create(**BODY, max_tokens=2).usage.completion_tokens == 2
    live.llm.shutdown()
    response = live.http.post("/v1/completions", json=BODY)
    assert response.status_code == 503 and response.json()["error"]["code"] == "engine_closed"
    assert live.http.get("/health").status_code == live.http.get("/ready").status_code == 503
