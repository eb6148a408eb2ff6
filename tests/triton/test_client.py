"""The example client, unchanged, as its users run it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tests.support.tritonserver import TritonServer

CLIENT = Path(__file__).parents[2] / "examples" / "triton" / "client.py"
PROMPT = "def main(argv):"
LLMAPI = {"text_input", "streaming", "sampling_param_max_tokens", "sampling_param_exclude_input_from_output"}
"""Tensors of TensorRT-LLM's llmapi model, as its config.pbtxt has them."""


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    from tests.support.tritonserver import TritonServer

    with TritonServer(repository, tmp_path_factory.mktemp("log") / "server.log") as running:
        running.wait_until_ready()
        yield running


def start(server: TritonServer, *arguments: str, prompt: str = PROMPT) -> subprocess.Popen[str]:
    command = [sys.executable, str(CLIENT), prompt, "--url", f"127.0.0.1:{server.grpc}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_it_has_thirty_lines_and_sends_llmapi_tensors_only() -> None:
    source = CLIENT.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 30
    assert all(f'"{name}"' in source for name in LLMAPI)
    assert source.count("np.array([") + source.count("np.int32([") == len(LLMAPI)


def test_it_prints_what_the_llm_generates(server: TritonServer, llm: LLM) -> None:
    out, err = start(server, "--model", "demo", "--max-tokens", "30").communicate(timeout=120)
    params = SamplingParams(max_tokens=30, temperature=0)
    assert (out, err) == (llm.generate([PROMPT], params)[0].outputs[0].text + "\n", "")


def test_ctrl_c_cancels_the_request(server: TritonServer) -> None:
    before = server.total("minicache_requests_finished_total", 'reason="abort"')
    # A prompt the model does not end by itself soon.
    client = start(server, "--model", "demo", "--max-tokens", "400", prompt="import os\n")
    assert client.stdout is not None
    client.stdout.read(1)
    client.send_signal(signal.SIGINT)
    _, err = client.communicate(timeout=60)
    assert client.returncode == 1 and err.startswith("error: ") and len(err.splitlines()) == 1
    for _ in range(100):
        if server.total("minicache_requests_finished_total", 'reason="abort"') == before + 1:
            return
        time.sleep(0.1)
    pytest.fail("the request was not cancelled")


@pytest.mark.parametrize(
    ("arguments", "cause"), [(["--model", "no"], "unknown model"), (["--model", "demo"], "prompt")]
)
def test_errors_are_one_line(server: TritonServer, arguments: list[str], cause: str) -> None:
    client = start(server, *arguments, prompt=PROMPT * 1000)
    _, err = client.communicate(timeout=120)
    assert client.returncode == 1 and err.startswith("error: ") and cause in err and len(err.splitlines()) == 1
