"""Our application on a Ray of this process's own, on 127.0.0.1 and the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

MODEL = "demo"
REPLICA = "x-minicache-replica"


@contextmanager
def serving(engine: Path, num_cpus: int, **arguments: str) -> Iterator[str]:
    """The application's ``/v1``; ``num_cpus`` are logical, whatever the machine has. Ray ends with the block."""
    import ray
    from ray import serve

    from minicache_trt.serving.ray_app import app
    from tests.support.tritonserver import free_ports

    (port,) = free_ports(1)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray's sockets lie below this folder, and a socket's path has at most 107 bytes.
    with TemporaryDirectory(prefix="ray-") as folder:
        try:
            ray.init(
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=128 << 20,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(app({"engine": str(engine), "model_name": MODEL, "num_threads": "1", **arguments}))
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            if ray.is_initialized():
                serve.shutdown()
            ray.shutdown()


def complete(url: str, prompt: str, max_tokens: int) -> httpx.Response:
    """One completion, greedy, of exactly so many tokens."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{url}/completions", json=body, timeout=120)


def processes(*words: str) -> dict[int, int]:
    """Descendants of this process whose command line has all ``words``, each with its parent."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                status = (path / "stat").read_text().rsplit(")", 1)[1].split()
                names[int(path.name)] = (path / "cmdline").read_bytes().decode(errors="replace")
                parents[int(path.name)] = int(status[1])
            except OSError:
                continue

    def mine(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and pid > 1 and mine(parents[pid]))

    return {pid: parents[pid] for pid, name in names.items() if all(word in name for word in words) and mine(pid)}


def replica_processes() -> list[int]:
    """Processes of engine replicas, by the name Ray gives them."""
    return list(processes("ServeReplica", "engine"))


def rank_processes() -> dict[int, int]:
    """Processes of ranks, each with that of its replica."""
    return processes("minicache_trt.parallel.worker")
