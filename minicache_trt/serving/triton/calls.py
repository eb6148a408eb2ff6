"""One request of Triton, from its arrival to its last response."""

from __future__ import annotations

import asyncio
from time import monotonic_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicache_trt.errors import UserError
from minicache_trt.runtime.async_request import AsyncRequest
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import RequestOutput
from minicache_trt.serving.triton.answers import Times, row_tensors, stack
from minicache_trt.serving.triton.parameters import Ask, Row


class Call:
    """Sends exactly one final response, whatever happens. Used by one thread.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    request : InferenceRequest
        Triton's.
    """

    def __init__(self, pb_utils: Any, request: Any) -> None:
        self._pb_utils = pb_utils
        self._request = request
        self._sender = request.get_response_sender()
        self._requests: list[AsyncRequest] = []
        self._ended = False
        self.request_id: str = request.request_id()
        self.times = Times(arrival=monotonic_ns())

    @property
    def num_sequences(self) -> int:
        """Sequences of this call that the engine has not ended."""
        return sum(not request.finished for request in self._requests)

    def finish_reasons(self) -> list[str]:
        """Why its sequences have ended."""
        ended = (request.result().outputs[0].finish_reason for request in self._requests if request.finished)
        return [reason for reason in ended if reason is not None]

    def abort_if_cancelled(self) -> None:
        """End its sequences when its client has gone or does not want it any more."""
        if not self._ended and self._request.is_cancelled():
            self.abort()

    def abort(self) -> None:
        """End its sequences soon; it is answered then."""
        for request in self._requests:
            request.abort()

    async def run(self, llm: LLM, ask: Ask, batched: bool) -> None:
        """Complete all rows and respond."""
        timeout = self._request.timeout() / 1e6 or None
        try:
            for row in ask.rows:
                self._requests.append(_start(llm, row, timeout))
        except UserError:
            self.abort()
            raise
        prompts = [_prompt_text(llm, row) if ask.returns.prompt else "" for row in ask.rows]
        if ask.returns.stream:
            await self._stream(ask, prompts[0], batched)
            return
        outputs = await asyncio.gather(*(self._whole(request) for request in self._requests))
        if self._complete(outputs):
            rows = [
                row_tensors(output, ask.returns, prompt, self.times)
                for output, prompt in zip(outputs, prompts, strict=True)
            ]
            self._send(stack(rows) if batched else rows[0], final=True)

    def fail(self, message: str, code: int) -> None:
        """Respond with an error."""
        if not self._ended:
            error = self._pb_utils.TritonError(message, code)
            self._respond(self._pb_utils.InferenceResponse(output_tensors=[], error=error), final=True)

    async def _whole(self, request: AsyncRequest) -> RequestOutput:
        async for _ in request:
            self.times.tokens_came(monotonic_ns())
        return await request

    async def _stream(self, ask: Ask, prompt: str, batched: bool) -> None:
        async for output in self._requests[0]:
            self.times.tokens_came(monotonic_ns())
            if output.finished and not self._complete([output]):
                return
            row = row_tensors(output, ask.returns, prompt, self.times)
            if not ask.returns.accumulate:
                prompt = ""
            self._send(stack([row]) if batched else row, output.finished)

    def _complete(self, outputs: list[RequestOutput]) -> bool:
        """Whether all rows came to a proper end; if not, the error has been sent."""
        for output in outputs:
            completion = output.outputs[0]
            if completion.finish_reason == "abort":
                self.fail("the request was cancelled", self._pb_utils.TritonError.CANCELLED)
            elif completion.finish_reason == "error":
                self.fail(f"the request ended early: {completion.stop_reason}", self._pb_utils.TritonError.INTERNAL)
        return not self._ended

    def _send(self, tensors: dict[str, NDArray[Any]], final: bool) -> None:
        made = [self._pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in tensors.items()]
        self._respond(self._pb_utils.InferenceResponse(output_tensors=made), final)

    def _respond(self, response: Any, final: bool) -> None:
        self._ended = final
        self._sender.send(response, flags=self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)


def _start(llm: LLM, row: Row, timeout: float | None) -> AsyncRequest:
    return llm.generate_async(row.prompt, row.params, priority=row.priority, cache_salt=row.cache_salt, timeout=timeout)


def _prompt_text(llm: LLM, row: Row) -> str:
    if isinstance(row.prompt, str):
        return row.prompt
    if llm.tokenizer is None:
        return ""
    return llm.tokenizer.decode(row.prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
