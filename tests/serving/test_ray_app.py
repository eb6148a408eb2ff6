"""Two replicas on Ray Serve; one is killed under load."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from minicache_trt.errors import UserError
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.sampling_params import SamplingParams
from tests.conftest import ROOT
from tests.support.engines import build
from tests.support.ray_cluster import MODEL, REPLICA, complete, replica_processes, serving

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.long

DEMO = ROOT / "examples" / "demo_model" / "checkpoint"
TOKENS = 60
PROMPTS = [f"def function_number_{i}(first, second):\n    " for i in range(16)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(DEMO, tmp_path_factory.mktemp("built") / "engine", "kivi4", max_seq_len=512)


@pytest.fixture(scope="module")
def expected(engine: Path) -> list[str]:
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    with LLM(engine, num_threads=1) as llm:
        return [output.outputs[0].text for output in llm.generate(PROMPTS, params)]


@pytest.fixture(scope="module")
def url(engine: Path) -> Iterator[str]:
    """Two replicas behind one address."""
    with serving(engine, 3, replicas="2") as address:
        yield address


def test_equal_beginnings_meet_on_one_replica_and_answers_are_right(url: str, expected: list[str]) -> None:
    seen: dict[int, set[str]] = {}
    for _ in range(2):
        for index, prompt in enumerate(PROMPTS):
            response = complete(url, prompt, TOKENS)
            assert response.json()["choices"][0]["text"] == expected[index]
            seen.setdefault(index, set()).add(response.headers[REPLICA])
    assert all(len(replicas) == 1 for replicas in seen.values())
    assert len(set.union(*seen.values())) == 2


def test_errors_of_a_replica_come_through(url: str) -> None:
    response = httpx.post(f"{url}/completions", json={"model": MODEL, "prompt": "a", "max_tokens": -1})
    assert response.status_code == 400 and "max_tokens" in response.json()["error"]["message"]


def test_no_request_that_has_not_begun_is_lost_with_its_replica(url: str, expected: list[str]) -> None:
    results: list[tuple[int, int, str]] = []
    streams: list[tuple[bool, bool]] = []
    stop = threading.Event()

    def wait_for_answers(number: int) -> None:
        index = number
        while not stop.is_set():
            index = (index + 1) % len(PROMPTS)
            response = complete(url, PROMPTS[index], TOKENS)
            text = response.json()["choices"][0]["text"] if response.status_code == 200 else response.text
            results.append((index, response.status_code, text))

    def stream(number: int) -> None:
        body = {"model": MODEL, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        index = number
        while not stop.is_set():
            index = (index + 3) % len(PROMPTS)
            begun = ended = False
            try:
                with httpx.stream(
                    "POST", f"{url}/completions", json={**body, "prompt": PROMPTS[index]}, timeout=120
                ) as response:
                    for line in response.iter_lines():
                        begun = begun or line.startswith("data:")
                        ended = ended or line == "data: [DONE]"
            except httpx.TransportError:
                pass
            streams.append((begun, ended))

    threads = [threading.Thread(target=wait_for_answers, args=(number,)) for number in range(4)]
    threads += [threading.Thread(target=stream, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    victim = replica_processes()[0]
    before = len(results)
    os.kill(victim, signal.SIGKILL)
    time.sleep(8)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(results) > before
    failed = [(status, text) for index, status, text in results if status != 200 or text != expected[index]]
    assert not failed, f"{len(failed)} of {len(results)}: {failed[:2]}"
    assert all(begun for begun, _ in streams)
    assert sum(not ended for _, ended in streams) <= 4  # those that were being read when it died


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "engine"),
        ({"engine": "/nowhere"}, "no such directory"),
        ({"engine": "/nowhere", "replica": 2}, "unknown argument 'replica'"),
        ({"engine": "/nowhere", "replicas": 0}, "replicas: expected a number of at least 1"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(arguments: dict[str, object], message: str) -> None:
    from minicache_trt.serving.ray_app import app

    with pytest.raises(UserError, match=message):
        app(arguments)
