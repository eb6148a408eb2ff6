"""A model on a real tritonserver, through its clients' eyes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tests.support.tritonserver import TritonServer

PROMPTS = ["def main(argv):", "import os\n", "class Node:\n    def __init__(self", "for i in range("]
LONG = 400


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    from tests.support.tritonserver import TritonServer

    log = tmp_path_factory.mktemp("log") / "server.log"
    with TritonServer(repository, log, "--model-control-mode=explicit", "--load-model=demo") as running:
        running.wait_until_ready()
        yield running


def expected(llm: LLM, prompt: str, **params: Any) -> str:
    return llm.generate([prompt], SamplingParams(**({"temperature": 0.0} | params)))[0].outputs[0].text


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


def ask(prompt: str, max_tokens: int, **tensors: tuple[str, Any]) -> dict[str, tuple[str, Any]]:
    return {"text_input": ("BYTES", [prompt.encode()]), "max_tokens": ("INT32", [max_tokens]), **tensors}


STREAM = ("BOOL", [True])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_generate_over_http_is_what_the_llm_generates(server: TritonServer, llm: LLM, prompt: str) -> None:
    answer = server.generate("demo", text_input=prompt, max_tokens=40, return_finish_reason=True).json()
    output = llm.generate([prompt], SamplingParams(max_tokens=40, temperature=0))[0].outputs[0]
    assert (answer["text_output"], answer["finish_reason"]) == (output.text, output.finish_reason)


def test_both_dialects_mean_the_same(server: TritonServer, llm: LLM) -> None:
    sampled = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 7, "max_tokens": 30}
    bls = server.generate("demo", text_input=PROMPTS[0], stop_words=["zzz"], **sampled).json()
    llmapi = {f"sampling_param_{name}": value for name, value in sampled.items()}
    other = server.generate("demo", text_input=PROMPTS[0], sampling_param_stop=["zzz"], **llmapi).json()
    # float32 tensors: 0.9 is what a client's 0.9 becomes there
    import numpy as np

    params = sampled | {name: float(np.float32(sampled[name])) for name in ("temperature", "top_p")}
    assert bls["text_output"] == other["text_output"] == expected(llm, PROMPTS[0], **params)


def test_streams_over_http_join_to_the_whole(server: TritonServer, llm: LLM) -> None:
    text = expected(llm, PROMPTS[1], max_tokens=60)
    deltas = [
        e["text_output"] for e in server.generate_stream("demo", text_input=PROMPTS[1], max_tokens=60, stream=True)
    ]
    assert len(deltas) > 1 and "".join(deltas) == text
    events = server.generate_stream("demo", text_input=PROMPTS[1], sampling_param_max_tokens=60, streaming=True)
    so_far = [event["text_output"] for event in events]
    assert len(so_far) > 1 and so_far[-1] == text and all(text.startswith(part) for part in so_far)


def test_many_streams_over_grpc_at_once(server: TritonServer, llm: LLM) -> None:
    streams = [server.stream() for _ in PROMPTS]
    for stream, prompt in zip(streams, PROMPTS, strict=True):
        stream.send("demo", ask(prompt, 50, stream=STREAM, return_output_ids=STREAM, return_log_probs=STREAM))
    for stream, prompt in zip(streams, PROMPTS, strict=True):
        with stream:
            responses = stream.read_all()
        output = llm.generate([prompt], SamplingParams(max_tokens=50, temperature=0, logprobs=0))[0].outputs[0]
        assert b"".join(r["text_output"][0] for r in responses).decode() == output.text
        assert [token for r in responses for token in r["output_ids"][0]] == output.token_ids
        logprobs = [value for r in responses for value in r["output_log_probs"][0]]
        chosen = [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
        assert logprobs == pytest.approx(chosen, abs=1e-3)
        assert responses[-1]["cum_log_probs"][0] == pytest.approx(output.cumulative_logprob, abs=1e-2)


def test_token_ids_in_and_prompt_in_the_output(server: TritonServer, llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[0])
    answer = server.generate("demo", input_ids=ids, max_tokens=5, exclude_input_in_output=False)
    assert answer.json()["text_output"].endswith(PROMPTS[0] + expected(llm, PROMPTS[0], max_tokens=5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 3}, "text_input is missing"),
        ({"text_input": ["a", "b"]}, "text_input: expected one prompt, got 2"),
        ({"input_ids": [99999999]}, "expected token ids from 0"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens: expected a positive number, got 0"),
        ({"text_input": "a", "max_tokens": 3, "sampling_param_max_tokens": 3}, "given by another name"),
        ({"text_input": "a", "beam_width": 2}, "beam_width: expected 1, got 2"),
        ({"text_input": "a " * 600}, "max_seq_len 512"),
        ({"text_input": "a", "temperature": -1}, "temperature: expected a finite number"),
        ({"text_input": "a", "stop": True}, "the request has no id"),
    ],
)
def test_a_bad_request_is_told_why(server: TritonServer, fields: dict[str, Any], message: str) -> None:
    answer = server.generate("demo", **fields)
    assert answer.status_code >= 400
    assert message in answer.json()["error"], answer.text
    assert server.client.get("/models/demo/ready").status_code == 200


def test_wrong_types_and_names_over_grpc_are_errors(server: TritonServer) -> None:
    from tests.support.tritonserver import InferenceServerException

    for tensors in (ask("a", 3, top_k=("FP32", [1.0])), ask("a", 3, nonsense=STREAM), {"max_tokens": ("INT32", [3])}):
        with server.stream() as stream:
            stream.send("demo", tensors)
            with pytest.raises(InferenceServerException):
                stream.read_all()
    assert server.generate("demo", text_input="a", max_tokens=1).status_code == 200


def running(server: TritonServer) -> float:
    return server.total("minicache_requests_running") + server.total("minicache_requests_waiting")


def test_a_vanished_grpc_client_frees_its_place(server: TritonServer) -> None:
    aborted = server.total("minicache_requests_finished_total", 'reason="abort"')
    stream = server.stream()
    stream.send("demo", ask(PROMPTS[0], LONG, stream=STREAM, ignore_eos=STREAM))
    stream.read()
    stream.cancel()
    finished = "minicache_requests_finished_total"
    assert eventually(lambda: server.total(finished, 'reason="abort"') == aborted + 1)
    assert eventually(lambda: running(server) == 0)


def test_a_vanished_http_client_frees_its_place(server: TritonServer) -> None:
    aborted = server.total("minicache_requests_finished_total", 'reason="abort"')
    events = server.generate_stream("demo", text_input=PROMPTS[0], max_tokens=LONG, stream=True, ignore_eos=True)
    next(events)
    events.close()
    finished = "minicache_requests_finished_total"
    assert eventually(lambda: server.total(finished, 'reason="abort"') == aborted + 1)
    assert eventually(lambda: running(server) == 0)


def test_stop_ends_the_request_of_that_id(server: TritonServer) -> None:
    from tests.support.tritonserver import InferenceServerException

    with server.stream() as one, server.stream() as other:
        one.send("demo", ask(PROMPTS[0], LONG, stream=STREAM, ignore_eos=STREAM), request_id="7")
        one.read()
        other.send("demo", {"text_input": ("BYTES", [b""]), "stop": STREAM}, request_id="7")
        with pytest.raises(InferenceServerException, match="cancelled"):
            one.read_all()


def test_a_full_queue_refuses_and_goes_on(server: TritonServer) -> None:
    from tests.support.tritonserver import InferenceServerException

    streams = [server.stream() for _ in range(8)]  # 4 run, 2 wait
    for stream in streams:
        stream.send("demo", ask(PROMPTS[0], 150, ignore_eos=STREAM))
    refused = 0
    texts = set()
    for stream in streams:
        with stream:
            try:
                texts.add(stream.read_all()[0]["text_output"][0])
            except InferenceServerException as error:
                assert "the queue is full" in str(error)
                refused += 1
    assert refused == 2 and len(texts) == 1


def test_metrics_tell_what_happened(server: TritonServer, llm: LLM) -> None:
    time.sleep(1)
    before = server.total("minicache_generation_tokens_total")
    server.generate("demo", text_input=PROMPTS[0], max_tokens=200, ignore_eos=True)
    assert eventually(lambda: server.total("minicache_generation_tokens_total") == before + 200)
    assert server.total("minicache_kv_cache_bytes") == llm.cache_sizes.num_bytes
    assert server.total("minicache_demoted_blocks_total") >= 2
    for tier, blocks in (("full", llm.cache_sizes.full_blocks), ("compressed", llm.cache_sizes.compressed_blocks)):
        assert server.total("minicache_kv_cache_blocks", f'tier="{tier}"') == blocks - 1
    assert server.total("minicache_kv_cache_compression_ratio") > 1
    assert server.total("minicache_prefix_cache_queries_total") >= server.total("minicache_prefix_cache_hits_total")
    assert server.total("minicache_requests_finished_total", 'reason="length"') >= 1


def test_a_damaged_engine_fails_at_load_with_cause_and_remedy(
    server: TritonServer, repository: Path, engine: Path, packages: tuple[Path, ...]
) -> None:
    from minicache_trt.serving.triton.repository import deploy
    from minicache_trt.serving.triton.settings import ModelSettings

    version = deploy(engine, repository, ModelSettings("damaged"), packages=packages, copy=True).directory
    (version / "engine" / "decoder.onnx").unlink()
    try:
        answer = server.load("damaged")
    finally:
        shutil.rmtree(version.parent)  # servers of other tests load every model there
    assert answer.status_code >= 400
    message = "decoder.onnx is missing (build the engine again with minicache-trt build)"
    assert message in answer.json()["error"] and message in server.log.read_text()
    assert server.generate("demo", text_input="a", max_tokens=1).status_code == 200
