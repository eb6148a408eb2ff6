"""A better engine takes over under load."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from minicache_trt.build import build_engine
from minicache_trt.compression.methods import make_plan
from minicache_trt.config import BuildConfig
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.sampling_params import SamplingParams
from minicache_trt.serving.triton.repository import deploy
from minicache_trt.serving.triton.settings import InstanceSettings, ModelSettings
from tests.triton.conftest import CHECKPOINT

pytestmark = pytest.mark.long

SOURCE = Path(__file__).read_text(encoding="utf-8")
PROMPTS = [SOURCE[200 * i :][:600] for i in range(10)]  # long enough for history to be compressed
TOKENS, TEMPERATURE, SEED = 100, 1.0, 5


@pytest.fixture(scope="module")
def other_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, its cache in 2 bits: it says other things."""
    output = tmp_path_factory.mktemp("built") / "engine"
    limits = BuildConfig(max_batch_size=4, max_seq_len=512)
    return build_engine(str(CHECKPOINT), output, lambda config: (make_plan(config, "kivi2"), limits)).directory


def texts(engine: Path) -> list[str]:
    params = SamplingParams(max_tokens=TOKENS, temperature=TEMPERATURE, seed=SEED, ignore_eos=True)
    with LLM(engine, num_threads=1) as llm:
        return [output.outputs[0].text for output in llm.generate(PROMPTS, params)]


def test_no_request_is_lost_when_the_next_version_takes_over(
    engine: Path, other_engine: Path, packages: tuple[Path, ...], tmp_path: Path
) -> None:
    from tests.support.tritonserver import TritonServer

    expected = {"1": texts(engine), "2": texts(other_engine)}
    assert expected["1"] != expected["2"]
    repository = tmp_path / "repository"
    settings = ModelSettings("demo", InstanceSettings(num_threads=1))
    deploy(engine, repository, settings, packages=packages)
    answers: list[tuple[int, str, str]] = []
    failures: list[str] = []
    stop = threading.Event()
    arguments = ("--model-control-mode=explicit", "--load-model=demo")

    def client(server: TritonServer, number: int) -> None:
        index = number
        while not stop.is_set():
            index = (index + 1) % len(PROMPTS)
            try:
                sampling = {"max_tokens": TOKENS, "temperature": TEMPERATURE, "seed": SEED, "ignore_eos": True}
                events = server.generate_stream("demo", text_input=PROMPTS[index], stream=True, **sampling)
                parts = [(event["text_output"], event["model_version"]) for event in events]
                answers.append((index, "".join(text for text, _ in parts), parts[-1][1]))
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")

    with TritonServer(repository, tmp_path / "server.log", *arguments) as server:
        server.wait_until_ready()
        threads = [threading.Thread(target=client, args=(server, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(2)
        deploy(other_engine, repository, settings, 2, packages=packages)
        answer = server.load("demo")
        assert answer.status_code == 200, answer.text
        time.sleep(3)
        stop.set()
        for thread in threads:
            thread.join()
        assert server.generate("demo", text_input="a", max_tokens=1).json()["model_version"] == "2"
        deadline = time.monotonic() + 120  # on a busy machine the end of a process takes a while
        while time.monotonic() < deadline and "unloaded 'demo' version 1" not in server.log.read_text():
            time.sleep(0.2)
        assert "unloaded 'demo' version 1" in server.log.read_text()
    assert not failures
    assert {version for _, _, version in answers} == {"1", "2"}
    wrong = [(index, version) for index, text, version in answers if text != expected[version][index]]
    assert not wrong, f"{len(wrong)} of {len(answers)}: {wrong[:5]}"
