"""The ``minicache-trt`` command."""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from minicache_trt.errors import UserError


def main() -> None:
    """Entry point: run the command; a `UserError` becomes one line (and a hint) on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, _terminate)
    atexit.register(_silence_stderr)  # the first to register is the last to be called
    # ONNX Runtime reports its use to its makers unless told not to before it is imported; whoever wants that can set 0.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever a model says, in whatever encoding
    try:
        from minicache_trt.cli.app import app

        try:
            app(prog_name="minicache-trt")
        finally:
            sys.stdout.flush()
    except UserError as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (a pager, head); there is nobody left to tell.
        _discard_stdout()
        sys.exit(141)
    except OSError as error:
        _discard_stdout()
        _fail(UserError(": ".join(str(part) for part in (error.filename, error.strerror or error) if part)))
    except MemoryError:
        _fail(UserError("this machine has too little memory for that"))


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave through every ``finally``, so that nothing temporary stays behind."""
    sys.exit(128 + number)


def _fail(error: UserError) -> None:
    from minicache_trt.cli.console import print_error

    print_error(error)
    sys.exit(2)


def _discard_stdout() -> None:
    """What could not be written must not be tried again when the interpreter ends."""
    _discard(sys.stdout.fileno())


def _silence_stderr() -> None:
    """All is said: what is left is libraries' own bookkeeping, as Triton 3.9's list of what it leaked."""
    with suppress(OSError, ValueError):
        sys.stderr.flush()
        _discard(2)


def _discard(descriptor: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
