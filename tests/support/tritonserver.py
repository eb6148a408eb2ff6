"""A real tritonserver on 127.0.0.1, and what its clients send."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "build_scripts" / "get_tritonserver.sh"
FOLDER = ROOT / "build" / "tritonserver"
PACKAGES = FOLDER / "python"
START_SECONDS = 300
TYPES = {"BYTES": np.object_, "BOOL": np.bool_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32}


def fetch_tritonserver() -> str | None:
    """Get the server; why that is impossible, or None."""
    command = [SCRIPT, "--python", sys.executable]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return None if result.returncode == 0 else result.stderr.strip().splitlines()[-2]


def free_ports(count: int) -> list[int]:
    """Ports nobody listened on a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class TritonServer:
    """A process; ends with the ``with`` block.

    Parameters
    ----------
    repository : Path
    log : Path
        What the server says.
    arguments : str
        More of the command line.
    prefix : tuple of str
        Goes before it.
    """

    def __init__(self, repository: Path, log: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> None:
        self.log = log
        self.http, self.grpc, self.metrics_port = free_ports(3)
        command = [*prefix, str(FOLDER / "tritonserver"), f"--model-repository={repository}", "--exit-timeout-secs=5"]
        for kind, port in (("http", self.http), ("grpc", self.grpc), ("metrics", self.metrics_port)):
            command += [f"--{kind}-address=127.0.0.1", f"--{kind}-port={port}"]
        # Models run in the environment their repository names, whatever this process has been told.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with log.open("wb") as file:
            self.process = subprocess.Popen([*command, *arguments], stdout=file, stderr=file, env=environment)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.http}/v2", timeout=60)

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.terminate()
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_until_live(self) -> None:
        """Wait for the server; in explicit mode that is before any model."""
        self._wait("/health/live")

    def wait_until_ready(self) -> None:
        """Wait for all models of its start."""
        self._wait("/health/ready")

    def load(self, model: str) -> httpx.Response:
        """Load a model, or what is new of it (``--model-control-mode=explicit``)."""
        return self.client.post(f"/repository/models/{model}/load", json={}, timeout=START_SECONDS)

    def generate(self, model: str, **fields: Any) -> httpx.Response:
        return self.client.post(f"/models/{model}/generate", json=fields)

    def generate_stream(self, model: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Events of a stream over HTTP."""
        with self.client.stream("POST", f"/models/{model}/generate_stream", json=fields) as response:
            for line in response.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))

    def metrics(self) -> dict[str, float]:
        """All values, by name and labels as they are written."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics").text
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    def total(self, metric: str, *labels: str) -> float:
        """Sum of a metric's values that have all ``labels``, such as ``tier="full"``."""
        return sum(v for k, v in self.metrics().items() if k.startswith(metric + "{") and all(x in k for x in labels))

    def stream(self) -> GrpcStream:
        """A gRPC connection with one stream on it."""
        return GrpcStream(self.grpc)

    def _wait(self, path: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.client.get(path).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        text = self.log.read_text()
        problems = [line for line in text.splitlines() if line.startswith(("E", "W", "error:")) or "Error" in line]
        raise RuntimeError("\n".join(["the server did not start:", text[-4000:], "warnings and errors:", *problems]))


class GrpcStream:
    """A bidirectional stream: send requests, read what comes back. Ends with the ``with`` block."""

    def __init__(self, port: int) -> None:
        self._client = grpc.InferenceServerClient(f"127.0.0.1:{port}")
        self._results: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(callback=lambda result, error: self._results.put((result, error)))

    def __enter__(self) -> GrpcStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Drop the stream with all its requests."""
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def send(self, model: str, tensors: Mapping[str, tuple[str, Any]], request_id: str = "", version: str = "") -> None:
        """Send one request; each tensor is a Triton type and values."""
        self._client.async_stream_infer(
            model, inputs(tensors), model_version=version, request_id=request_id, enable_empty_final_response=True
        )

    def read(self) -> tuple[dict[str, Any] | None, bool]:
        """The next response, None for an empty one, and whether it is the last of its request.

        Raises
        ------
        InferenceServerException
            When it is an error.
        """
        result, error = self._results.get(timeout=60)
        if error is not None:
            raise error
        response = result.get_response()
        final = response.parameters["triton_final_response"].bool_param
        names = [output.name for output in response.outputs]
        return ({name: result.as_numpy(name) for name in names} or None), final

    def read_all(self) -> list[dict[str, Any]]:
        """Responses of one request up to its last."""
        responses: list[dict[str, Any]] = []
        while True:
            response, final = self.read()
            if response is not None:
                responses.append(response)
            if final:
                return responses


def inputs(tensors: Mapping[str, tuple[str, Any]]) -> list[Any]:
    """Tensors as tritonclient wants them."""
    made = []
    for name, (kind, values) in tensors.items():
        array = np.array(values, TYPES[kind])
        tensor = grpc.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


__all__ = ["GrpcStream", "InferenceServerException", "TritonServer", "fetch_tritonserver", "free_ports", "inputs"]
