"""One instance of a Triton model: an engine, the requests it runs, its end."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import threading
from pathlib import Path
from typing import Any

from minicache_trt.build import load_engine
from minicache_trt.engine_directory import CHECKPOINT
from minicache_trt.errors import UserError
from minicache_trt.runtime.llm import LLM
from minicache_trt.serving.triton.calls import Call
from minicache_trt.serving.triton.metrics import InstanceMetrics
from minicache_trt.serving.triton.parameters import as_tensors, read_request
from minicache_trt.serving.triton.settings import InstanceSettings

ENGINE = "engine"
"""Folder of the engine below a version's."""
CHECK_SECONDS = 0.1
"""How often clients that have gone are looked for."""
METRICS_SECONDS = 0.5


class TritonModel:
    """Loads the engine beside ``model.py`` and runs all requests together, as they come.

    Requests are served by one thread with an event loop, steps run in the engine's own thread. Triton's thread only
    hands requests over.

    Parameters
    ----------
    args : dict
        What Triton gives ``initialize``.
    pb_utils : module
        Triton's ``triton_python_backend_utils``.

    Raises
    ------
    TritonModelException
        With cause and remedy, when the engine cannot be loaded.
    """

    def __init__(self, args: dict[str, Any], pb_utils: Any) -> None:
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        self._pb_utils = pb_utils
        self._batched = config["max_batch_size"] > 0
        self._streams = bool(config.get("model_transaction_policy", {}).get("decoupled"))
        if args["model_instance_kind"] == "GPU":
            _use_only_gpu(int(args["model_instance_device_id"]))
        directory = Path(args["model_repository"]) / args["model_version"] / ENGINE
        try:
            self._settings = InstanceSettings.from_parameters(parameters)
            self._llm = _load(directory, self._settings)
        except UserError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        labels = args["model_name"], args["model_version"], args["model_instance_name"]
        self._metrics = InstanceMetrics(pb_utils, self._llm, *labels)
        self._calls: dict[Call, asyncio.Task[None]] = {}  # touched by the loop's thread only
        self._ending = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="minicache-trt-requests", daemon=True)
        self._thread.start()
        self._watch = asyncio.run_coroutine_threadsafe(self._watch_calls(), self._loop)

    def execute(self, requests: list[Any]) -> None:
        """Take requests and return at once."""
        for request in requests:
            self._loop.call_soon_threadsafe(self._begin, request)

    def is_ready(self) -> bool:
        """Whether the engine computes; one that has lost a rank never does again."""
        return self._llm.failure is None

    def finalize(self) -> None:
        """Wait until all requests have ended, then give everything back."""
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result()
        self._watch.result()
        self._llm.shutdown()
        self._metrics.update()
        self._metrics.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        gc.collect()  # requests and senders in reference cycles: they too need the stub's memory to be destroyed

    def _begin(self, request: Any) -> None:
        call = Call(self._pb_utils, request)
        self._calls[call] = self._loop.create_task(self._serve(call, request))

    async def _serve(self, call: Call, request: Any) -> None:
        errors = self._pb_utils.TritonError
        try:
            ask = read_request(as_tensors(request.inputs()), self._batched, self._settings, self._streams)
            if ask.stop:
                self._stop(call)
            elif self._is_full(len(ask.rows)):
                self._metrics.finished("rejected")
                limit = self._settings.max_queue_size
                call.fail(f"the queue is full: {limit} requests wait already (try again later)", errors.UNAVAILABLE)
            else:
                await call.run(self._llm, ask, self._batched)
        except UserError as error:
            self._metrics.finished("rejected")
            call.fail(str(error), errors.INVALID_ARG)
        except Exception as error:
            call.abort()
            self._pb_utils.Logger.log_error(f"request {call.request_id!r}: {type(error).__name__}: {error}")
            call.fail(f"the model failed: {type(error).__name__}: {error}", errors.INTERNAL)
        finally:
            for reason in call.finish_reasons():
                self._metrics.finished(reason)
            del self._calls[call]

    def _stop(self, call: Call) -> None:
        """End the calls of the same id, as TensorRT-LLM's ``stop`` does."""
        errors = self._pb_utils.TritonError
        if not call.request_id:
            call.fail("stop: the request has no id (send it with the id of the one to stop)", errors.INVALID_ARG)
            return
        for other in tuple(self._calls):
            if other is not call and other.request_id == call.request_id:
                other.abort()
        call.fail("the request was cancelled", errors.CANCELLED)

    def _is_full(self, num_new: int) -> bool:
        limit = self._settings.max_queue_size
        places = self._llm.engine.build.max_batch_size + limit
        return limit > 0 and sum(call.num_sequences for call in self._calls) + num_new > places

    async def _watch_calls(self) -> None:
        updated = 0.0
        while not self._ending:
            await asyncio.sleep(CHECK_SECONDS)
            for call in tuple(self._calls):
                call.abort_if_cancelled()
            if self._loop.time() - updated >= METRICS_SECONDS:
                updated = self._loop.time()
                self._metrics.update()

    async def _drain(self) -> None:
        while self._calls:
            await asyncio.gather(*self._calls.values())
        self._ending = True


def _load(directory: Path, settings: InstanceSettings) -> LLM:
    engine = load_engine(directory, settings.num_threads, settings.backend)
    llm = LLM.from_engine(engine, tokenizer=directory / CHECKPOINT, kv_cache_config=settings.kv_cache)
    if llm.tokenizer is None:
        raise UserError(
            f"{directory} has no tokenizer, so it takes no text",
            "add tokenizer.json to the checkpoint and build the engine again",
        )
    return llm


def _use_only_gpu(device: int) -> None:
    """Before anything touches CUDA: this process sees one device, the one Triton has chosen for the instance."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device] if visible else str(device)
