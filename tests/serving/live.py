"""Servers in this process, on engines that compute and on engines that can be held."""

from __future__ import annotations

import socket
import threading
from typing import Any

import httpx
from openai import OpenAI

from minicache_trt.config import KvCacheConfig
from minicache_trt.runtime.llm import LLM
from minicache_trt.serving.app import HttpConfig, create_app
from minicache_trt.serving.history import History
from minicache_trt.serving.server import Server, bind
from minicache_trt.serving.service import Service
from tests.runtime.bpe import VOCAB, bpe_tokenizer
from tests.runtime.fake_engine import FakeEngine, small_build

WAIT = 20
MODEL = "test-model"
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Live:
    """A server that listens, in a thread of its own."""

    def __init__(
        self,
        llm: LLM,
        *,
        http: dict[str, Any] | None = None,
        drain_timeout: float = WAIT,
        send_buffer: int | None = None,
        **service: Any,
    ) -> None:
        self.llm = llm
        options = {"max_queue_size": 64, **service}
        self.service = Service(llm, (MODEL, "alias"), **options)
        self.history = History(self.service)
        config = HttpConfig(**{"chat_template": TEMPLATE, **(http or {})})
        self.server = Server(create_app(self.service, config, self.history), self.service, self.history, drain_timeout)
        listener = bind("127.0.0.1", 0)
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # connections inherit it
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        assert self.server.ready.wait(WAIT)
        self.http = httpx.Client(base_url=self.url, timeout=WAIT)
        self.openai = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=WAIT)

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Values by name and labels, as Prometheus' own parser reads them."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return {
            (
                sample.name.removeprefix("minicache_"),
                tuple(sorted((k, v) for k, v in sample.labels.items() if k != "model_name")),
            ): sample.value
            for family in families
            for sample in family.samples
        }

    def close(self) -> None:
        """Drain, and check that nothing is left behind."""
        if self.thread.is_alive():
            if not self.service.admission.draining:
                self.server.begin_drain()
            self.thread.join(WAIT)
            assert not self.thread.is_alive()
        self.http.close()
        self.openai.close()
        check_idle(self)


def check_idle(live: Live) -> None:
    """Every place and every block has been given back."""
    assert live.service.admission.in_flight == 0
    live.llm.check_integrity()
    load = live.llm.load
    assert load.running == load.waiting == load.full.used == load.compressed.used == 0


def fake_llm(tokenizer: Any = None, memory: int | None = None, **build: Any) -> LLM:
    """An engine whose logits are hashes, with a tokenizer of 300 tokens; `Gate` holds it."""
    engine = FakeEngine(small_build(**build), eos_token_ids=(1,), vocab=VOCAB)
    return LLM.from_engine(engine, tokenizer=tokenizer or bpe_tokenizer(), kv_cache_config=KvCacheConfig(memory))
