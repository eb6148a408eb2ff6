"""``minicache-trt serve``: refusals before anything is loaded, a server in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

WAIT = 120


def test_what_to_serve_must_be_said_once(refused: Callable[..., None], engine: Path) -> None:
    refused(["serve", "--port", "0"], "expected one model to serve, got 0", "--model")
    refused(["serve", engine, "--engine", engine], "expected one model to serve, got 2")
    refused(["serve", engine, "--method", "kivi4"], "--method and --plan are for a --model")
    refused(["serve", "nowhere"], "nowhere: no such directory")
    refused(["serve", "--model", "nowhere", "--port", "0"], "nowhere")


def test_a_port_in_use(refused: Callable[..., None], engine: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused(
            ["serve", engine, "--port", port], f"cannot listen on 127.0.0.1:{port}: Address already in use", "--port"
        )
    refused(["serve", engine, "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:8000")


def test_options_that_cannot_be_used(refused: Callable[..., None], engine: Path, workspace: Path) -> None:
    refused(["serve", engine, "--chat-template", "missing.jinja"], "--chat-template: cannot read missing.jinja")
    refused(["serve", engine, "--max-body-size", "huge"], "--max-body-size: expected a size such as")
    refused(["serve", engine, "--max-body-size", "0"], "--max-body-bytes: expected a positive number")
    refused(["serve", engine, "--api-key", ""], "--api-keys: expected keys that are not empty")
    refused(["serve", engine, "--kv-cache-memory", "1", "--port", "0"], "cannot hold one sequence")


@pytest.mark.parametrize("name", ["fastapi", "uvicorn", "prometheus_client"])
def test_missing_packages_are_named(
    refused: Callable[..., None], engine: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else find(wanted))
    refused(["serve", engine], f"packages that are not installed: {name}", "pip install 'minicache-trt[serve]'")


@pytest.fixture
def started() -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """``started(arguments)``: the command in a process, and the address it prints."""
    processes = []

    def start(*arguments: object) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", "from minicache_trt.cli import main; main()", "serve", *map(str, arguments)]
        process = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        line = process.stdout.readline() if process.stdout else ""
        assert "is served at http://" in line
        return process, line.split("served at ")[1].split("/v1")[0]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_lets_running_requests_end(
    started: Callable[..., tuple[subprocess.Popen[str], str]], engine: Path, number: signal.Signals
) -> None:
    process, url = started(engine, "--served-model-name", "one", "--served-model-name", "two")
    names = [model["id"] for model in httpx.get(f"{url}/v1/models", timeout=WAIT).json()["data"]]
    assert names == ["one", "two"]
    body = {"prompt": "the cat", "max_tokens": 150, "stream": True, "ignore_eos": True}
    events = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=WAIT) as response:
        for line in response.iter_lines():
            if line and not events:
                process.send_signal(number)
            if line:
                events.append(line.removeprefix("data: "))
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert process.wait(WAIT) == 0


def test_a_model_that_is_built_first_with_audits(
    started: Callable[..., tuple[subprocess.Popen[str], str]], checkpoint: Path
) -> None:
    process, url = started(
        "--model", checkpoint, "--method", "kivi2", "--max-seq-len", 192, "--audit-rate", 1, "--api-key", "secret"
    )
    report = httpx.get(f"{url}/status.json", timeout=WAIT).json()
    assert report["engine"]["method"] == "kivi2" and report["engine"]["max_seq_len"] == 192 and report["auditing"]
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=WAIT).status_code == 401
    headers = {"Authorization": "Bearer secret"}
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, headers=headers, timeout=WAIT).status_code == 200
    process.terminate()
    assert process.wait(WAIT) == 0
