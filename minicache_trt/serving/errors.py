"""Refusals as OpenAI's clients expect them."""

from __future__ import annotations

from minicache_trt.errors import UserError


class ApiError(Exception):
    """A refusal with its HTTP status.

    Parameters
    ----------
    status : int
        HTTP status.
    message : str
        One line: what is wrong, and what to do.
    kind, code : str
        ``type`` and ``code`` of OpenAI's error object.
    param : str, optional
        Field of the request that is wrong.
    retry_after : int, optional
        Seconds, for the header of that name.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @classmethod
    def of(cls, error: UserError | ValueError) -> ApiError:
        """A request the engine refused; messages that begin with a field's name give it as ``param``."""
        message = " ".join(str(error).split())
        name = message.partition(":")[0]
        return cls(400, message, param=name if name.isidentifier() else None)

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def draining() -> ApiError:
    """The answer to what comes after a signal to stop."""
    return ApiError(503, "the server is shutting down and takes no more requests", "service_unavailable", "draining")
