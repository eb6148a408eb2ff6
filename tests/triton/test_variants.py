"""Other ways to deploy, and repositories that cannot be loaded, on a real tritonserver."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from minicache_trt.config import KvCacheConfig
from minicache_trt.engine_directory import FORMAT_VERSION
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.sampling_params import SamplingParams
from minicache_trt.serving.triton.repository import deploy
from minicache_trt.serving.triton.settings import InstanceSettings, ModelSettings

if TYPE_CHECKING:
    from tests.support.tritonserver import TritonServer

pytestmark = pytest.mark.long

Packages = tuple[Path, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("variants") / "repository"


@pytest.fixture(scope="module")
def server(folder: Path, engine: Path, packages: Packages) -> Iterator[TritonServer]:
    """``pair``: two instances, a batch dimension, one response for each request."""
    from tests.support.tritonserver import TritonServer

    instance = InstanceSettings(num_threads=1)
    settings = ModelSettings("pair", instance, instance_count=2, max_batch_size=4, decoupled=False)
    deploy(engine, folder, settings, packages=packages)
    arguments = ("--model-control-mode=explicit", "--load-model=pair")
    with TritonServer(folder, folder.parent / "server.log", *arguments) as running:
        running.wait_until_ready()
        yield running


def test_rows_of_one_request_and_ragged_outputs(server: TritonServer, llm: LLM) -> None:
    prompts, lengths = ["def main(argv):", "import os\n"], [5, 9]
    answer = server.client.post(
        "/models/pair/infer",
        json={
            "inputs": [
                {"name": "text_input", "shape": [2, 1], "datatype": "BYTES", "data": prompts},
                {"name": "max_tokens", "shape": [2, 1], "datatype": "INT32", "data": lengths},
                {"name": "return_output_ids", "shape": [2, 1], "datatype": "BOOL", "data": [True, True]},
            ]
        },
    ).json()
    outputs = {output["name"]: output for output in answer["outputs"]}
    params = [SamplingParams(max_tokens=n, temperature=0) for n in lengths]
    expected = [output.outputs[0] for output in llm.generate(prompts, params)]
    assert outputs["text_output"]["shape"] == [2, 1]
    assert outputs["text_output"]["data"] == [output.text for output in expected]
    assert outputs["output_ids"]["shape"] == [2, 1, 9]
    ids = outputs["output_ids"]["data"]
    assert (ids[:5], ids[5:9], ids[9:]) == (expected[0].token_ids, [0] * 4, expected[1].token_ids)


def test_both_instances_work_and_none_loses_a_request(server: TritonServer, llm: LLM) -> None:
    prompts = [f"def f{i}(argv):" for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda p: server.generate("pair", text_input=p, max_tokens=20).json(), prompts))
    expected = llm.generate(prompts, SamplingParams(max_tokens=20, temperature=0))
    assert [answer["text_output"] for answer in answers] == [output.outputs[0].text for output in expected]
    import time

    time.sleep(1.5)
    finished = "minicache_requests_finished_total"
    counts = [server.total(finished, f'instance="pair_0_{i}"', 'reason="length"') for i in range(2)]
    assert min(counts) >= 5, counts


def test_it_does_not_stream(server: TritonServer) -> None:
    assert "stream: this model answers once" in server.generate("pair", text_input="a", stream=True).text


def _other_format(version: Path) -> None:
    path = version / "engine" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1}))


def _no_engine(version: Path) -> None:
    (version / "engine").rename(version / "elsewhere")


def _bad_parameter(version: Path) -> None:
    path = version.parent / "config.pbtxt"
    text = path.read_text().replace('key: "max_queue_size" value { string_value: "0" }', "")
    text = text.replace("parameters { }\n", "")
    path.write_text(text + 'parameters { key: "max_queue_size" value { string_value: "many" } }\n')


def _no_package(version: Path) -> None:
    lines = (version / "packages.pth").read_text().splitlines()
    (version / "packages.pth").write_text(lines[0] + "\n")  # NumPy only


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_format, f"has engine format version 1, this release reads {FORMAT_VERSION} (build the engine again"),
        (_no_engine, "engine: no such directory (give the directory that build wrote)"),
        (_bad_parameter, "config.pbtxt: parameter max_queue_size: expected a whole number, got 'many'"),
        (_no_package, "minicache-trt cannot be imported"),
        (None, "of KV cache cannot hold one sequence of max_seq_len 512"),
    ],
)
def test_what_cannot_be_loaded_says_why(
    server: TritonServer, folder: Path, engine: Path, packages: Packages, damage, message: str
) -> None:
    name = "small" if damage is None else damage.__name__.strip("_")
    cache = KvCacheConfig(max_bytes=1000) if damage is None else KvCacheConfig()
    settings = ModelSettings(name, InstanceSettings(kv_cache=cache))
    version = deploy(engine, folder, settings, packages=packages, copy=True).directory
    if damage is not None:
        damage(version)
    answer = server.load(name)
    assert answer.status_code >= 400
    assert message in answer.json()["error"]
    assert message in server.log.read_text()
