"""Replicas of two ranks each on Ray Serve; one rank is killed under load, another while nothing runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minicache_trt.engine_directory import CHECKPOINT, read_engine
from minicache_trt.errors import UserError
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.sampling_params import SamplingParams
from tests.conftest import ROOT
from tests.support.engines import build
from tests.support.ray_cluster import REPLICA, complete, rank_processes, replica_processes, serving

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.long

DEMO = ROOT / "examples" / "demo_model" / "checkpoint"
TOKENS = 16
PROMPTS = [f"def function_number_{i}(first, second):\n    " for i in range(8)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        DEMO, tmp_path_factory.mktemp("built") / "engine", "kivi4", max_seq_len=512, backend="torch", tp_size=2
    )


@pytest.fixture(scope="module")
def expected(engine: Path) -> list[str]:
    """What one rank makes of the same engine."""
    from minicache_trt.backends.torch_reference import TorchEngine

    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    llm = LLM.from_engine(TorchEngine(engine, read_engine(engine), 1), tokenizer=engine / CHECKPOINT)
    return [output.outputs[0].text for output in llm.generate(PROMPTS, params)]


@pytest.fixture(scope="module")
def url(engine: Path) -> Iterator[str]:
    with serving(engine, 5, replicas="2") as address:
        yield address
    assert not rank_processes()


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def are_complete() -> bool:
    """Two replicas, each the parent of two ranks."""
    replicas, parents = replica_processes(), list(rank_processes().values())
    return len(replicas) == 2 and all(parents.count(replica) == 2 for replica in replicas)


def test_each_replica_computes_with_its_own_ranks(url: str, expected: list[str]) -> None:
    assert are_complete()
    answers = [complete(url, prompt, TOKENS) for prompt in PROMPTS]
    assert [answer.json()["choices"][0]["text"] for answer in answers] == expected
    assert len({answer.headers[REPLICA] for answer in answers}) == 2


def test_a_lost_rank_costs_its_replica_and_no_request(url: str, expected: list[str]) -> None:
    results: list[tuple[int, int, str]] = []
    stop = threading.Event()

    def ask(index: int) -> None:
        while not stop.is_set():
            response = complete(url, PROMPTS[index], TOKENS)
            text = response.json()["choices"][0]["text"] if response.status_code == 200 else response.text
            results.append((index, response.status_code, text))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(results) > 4)
    victim, replica = next(iter(rank_processes().items()))
    before = len(results)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: replica not in replica_processes())
    wait_until(lambda: len(results) > before + 4)
    stop.set()
    for thread in threads:
        thread.join()
    failed = [(status, text) for index, status, text in results if status != 200 or text != expected[index]]
    assert not failed, f"{len(failed)} of {len(results)}: {failed[:2]}"


def test_the_loss_of_an_idle_rank_is_noticed(url: str, expected: list[str]) -> None:
    wait_until(are_complete)
    victim, replica = next(iter(rank_processes().items()))
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: replica not in replica_processes())
    wait_until(are_complete)
    answer = complete(url, PROMPTS[0], TOKENS)
    assert answer.json()["choices"][0]["text"] == expected[0]


def test_a_rank_without_a_gpu_is_refused(engine: Path) -> None:
    from minicache_trt.serving.ray_app import app

    with pytest.raises(UserError, match=r"num_gpus: backend cuda needs one for each rank, got 0\.5"):
        app({"engine": str(engine), "backend": "cuda", "num_gpus": "0.5"})
