"""Does a model on Triton lose requests, grow, or cost more than our own server?

Clients stream completions over gRPC and over HTTP, and every tenth leaves in the middle: every other text must be
complete and what `LLM.generate` says. Thousands of short requests follow, while the memory of the server's processes is
read. Then Triton and ``minicache-trt serve`` get the same load over HTTP in turn.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from common import CACHE_DIR, REPOSITORY, CacheDir, alternate, engine_directory, run
from reporting import JsonFile, write_report

sys.path.insert(0, str(REPOSITORY))
from minicache_trt.cli.console import stderr
from minicache_trt.config import BuildConfig
from minicache_trt.errors import UserError
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.sampling_params import SamplingParams
from minicache_trt.serving.triton.repository import deploy, this_environment
from minicache_trt.serving.triton.settings import InstanceSettings, ModelSettings
from tests.support.tritonserver import PACKAGES, TritonServer, fetch_tritonserver, free_ports

CHECKPOINT = REPOSITORY / "examples" / "demo_model" / "checkpoint"
LEAVE_AFTER = 3
"""Responses a client that leaves waits for."""
MODEL = "benchmark"

Outcome = str | None
"""The text of a request, or None when its client has left."""
Ask = Callable[[str, bool], Awaitable[Outcome]]


def main(
    requests: Annotated[int, typer.Option(help="Streamed requests, over each protocol.")] = 200,
    clients: Annotated[int, typer.Option(help="Clients at a time.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 64,
    short_requests: Annotated[int, typer.Option(help="Requests of two tokens, for the memory.")] = 5000,
    rounds: Annotated[int, typer.Option(help="Of Triton and our server in turn.")] = 5,
    checkpoint: Annotated[Path, typer.Option(help="Llama checkpoint with a tokenizer.")] = CHECKPOINT,
    wrap: Annotated[str, typer.Option(help="Put before the servers' commands, such as 'taskset -c 1'.")] = "",
    cache_dir: CacheDir = CACHE_DIR,
    json_file: JsonFile = None,
) -> None:
    """Complete and equal, flat in memory, and how fast beside our own server."""
    problem = fetch_tritonserver()
    if problem is not None:
        raise UserError(f"no tritonserver: {problem}")
    engine = engine_directory(cache_dir, checkpoint, "kivi4", BuildConfig(max_batch_size=clients, max_seq_len=512))
    prompts = snippets(requests)
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    with LLM(engine, num_threads=1) as llm:
        expected = [output.outputs[0].text for output in llm.generate(prompts, params)]
    prefix = tuple(shlex.split(wrap))
    repository = cache_dir / "triton-repository"
    settings = ModelSettings(MODEL, InstanceSettings(num_threads=1))
    deploy(engine, repository, settings, packages=(PACKAGES, *this_environment()), overwrite=True)
    data: dict[str, Any] = {"requests": requests, "clients": clients, "max_tokens": max_tokens}
    rows: list[tuple[str, str]] = []
    with ExitStack() as stack:
        triton = stack.enter_context(TritonServer(repository, cache_dir / "triton.log", prefix=prefix))
        ours = stack.enter_context(OwnServer(engine, prefix, cache_dir / "serve.log"))
        triton.wait_until_ready()
        ours.wait_until_ready()
        for name, ask in (("gRPC", grpc_ask(triton, max_tokens)), ("HTTP", http_ask(triton, max_tokens))):
            outcomes = asyncio.run(load(prompts, ask, clients, leave=lambda index: index % 10 == 9))
            data[name] = counts = judge(outcomes, expected)
            rows.append((f"requests over {name}", ", ".join(f"{count} {what}" for what, count in counts.items())))
        if short_requests:
            data["memory_mib"] = memory = memory_over(triton, short_requests, clients)
            values = ", ".join(f"{mib} after {count}" for count, mib in memory.items())
            rows.append(("MiB of the server's processes", values))
        if rounds:
            contenders = {
                "triton": partial(tokens_per_second, prompts, http_ask(triton, max_tokens), clients, max_tokens),
                "serve": partial(tokens_per_second, prompts, ours.ask(max_tokens), clients, max_tokens),
            }
            speeds = alternate(contenders, rounds)
            ratios = [a / b for a, b in zip(speeds["triton"], speeds["serve"], strict=True)]
            data |= {"tokens_per_second": speeds, "ratio": statistics.median(ratios), "ratios": ratios}
            span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            rows.append(("tokens/s over HTTP, Triton over our server", span))
    write_report("Triton", ("what", "value"), rows, data, json_file)


class OwnServer:
    """``minicache-trt serve`` on the same engine; ends with the ``with`` block."""

    def __init__(self, engine: Path, prefix: tuple[str, ...], log: Path) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        code = "from minicache_trt.cli import main; main()"
        command = [*prefix, sys.executable, "-c", code, "serve", "--engine", str(engine), "--port", str(port)]
        command += ["--threads", "1", "--served-model-name", MODEL]
        with log.open("wb") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=file)

    def __enter__(self) -> OwnServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)

    def wait_until_ready(self) -> None:
        for _ in range(600):
            try:
                if httpx.get(f"{self.url}/v1/models").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise UserError("minicache-trt serve did not start")

    def ask(self, max_tokens: int) -> Ask:
        fields = {"model": MODEL, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        return http_stream(f"{self.url}/v1/completions", "prompt", fields, lambda e: e["choices"][0]["text"])


def http_ask(server: TritonServer, max_tokens: int) -> Ask:
    fields = {"max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    url = f"http://127.0.0.1:{server.http}/v2/models/{MODEL}/generate_stream"
    return http_stream(url, "text_input", fields, lambda event: event["text_output"])


def http_stream(url: str, prompt_field: str, fields: dict[str, Any], text_of: Callable[[Any], str]) -> Ask:
    """Requests over server-sent events, a connection each."""

    async def ask(prompt: str, leave: bool) -> Outcome:
        pieces: list[str] = []
        async with (
            httpx.AsyncClient(timeout=120) as client,
            client.stream("POST", url, json={prompt_field: prompt, **fields}) as response,
        ):
            async for line in response.aiter_lines():
                if line.startswith("data:") and "[DONE]" not in line:
                    pieces.append(text_of(json.loads(line.removeprefix("data:"))))
                    if leave and len(pieces) == LEAVE_AFTER:
                        return None
        return "".join(pieces)

    return ask


def grpc_ask(server: TritonServer, max_tokens: int) -> Ask:
    """Requests over gRPC, a stream each, in threads."""

    def ask(prompt: str, leave: bool) -> Outcome:
        tensors = {
            "text_input": ("BYTES", [prompt.encode()]),
            "max_tokens": ("INT32", [max_tokens]),
            "stream": ("BOOL", [True]),
            "ignore_eos": ("BOOL", [True]),
        }
        with server.stream() as stream:
            stream.send(MODEL, tensors)
            if not leave:
                return b"".join(response["text_output"][0] for response in stream.read_all()).decode()
            for _ in range(LEAVE_AFTER):
                if stream.read()[1]:
                    break
        return None

    return lambda prompt, leave: asyncio.to_thread(ask, prompt, leave)


async def load(prompts: list[str], ask: Ask, clients: int, leave: Callable[[int], bool]) -> list[Outcome]:
    """All prompts, ``clients`` at a time; outcomes in their order."""
    outcomes: list[Outcome] = [None] * len(prompts)
    waiting = iter(range(len(prompts)))

    async def client() -> None:
        for index in waiting:
            outcomes[index] = await ask(prompts[index], leave(index))

    await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes


def judge(outcomes: list[Outcome], expected: list[str]) -> dict[str, int]:
    pairs = list(zip(outcomes, expected, strict=True))
    return {
        "equal": sum(text == wanted for text, wanted in pairs),
        "left": sum(text is None for text, _ in pairs),
        "wrong": sum(text is not None and text != wanted for text, wanted in pairs),
    }


def tokens_per_second(prompts: list[str], ask: Ask, clients: int, max_tokens: int) -> float:
    start = time.perf_counter()
    asyncio.run(load(prompts, ask, clients, leave=lambda index: False))
    return len(prompts) * max_tokens / (time.perf_counter() - start)


def memory_over(server: TritonServer, requests: int, clients: int) -> dict[int, int]:
    """MiB resident in the server and its models' processes, after so many short requests."""
    url = f"http://127.0.0.1:{server.http}/v2/models/{MODEL}/generate"
    tenth = max(1, requests // 10)
    prompts = snippets(requests)

    async def batch(part: list[str]) -> None:
        async with httpx.AsyncClient(timeout=120) as client:

            async def ask(prompt: str, leave: bool) -> Outcome:
                response = await client.post(url, json={"text_input": prompt, "max_tokens": 2})
                return str(response.raise_for_status().json()["text_output"])

            await load(part, ask, clients, leave=lambda index: False)

    memory: dict[int, int] = {}
    for start in range(0, requests, tenth):
        asyncio.run(batch(prompts[start : start + tenth]))
        memory[start + tenth] = resident_mib(server.process.pid)
        stderr.print(f"{start + tenth} short requests: {memory[start + tenth]} MiB")
    return memory


def resident_mib(pid: int) -> int:
    """Resident memory of a process and its children."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += sum(resident_mib(int(child)) for child in (task / "children").read_text().split())
    status = Path(f"/proc/{pid}/status").read_text()
    return total + int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) // 1024


def snippets(count: int) -> list[str]:
    """Beginnings of lines of this package's sources, all different."""
    sources = sorted((REPOSITORY / "minicache_trt").rglob("*.py"))
    lines = dict.fromkeys(line.strip() for path in sources for line in path.read_text().splitlines())
    usable = [line for line in lines if len(line) >= 12][:count]
    return [usable[i % len(usable)] + " " * (i // len(usable)) for i in range(count)]


if __name__ == "__main__":
    run(main)
