"""The ``minicache-trt`` command."""

from __future__ import annotations

import os
import sys

from minicache_trt.errors import UserError


def main() -> None:
    """Entry point: run the command; a `UserError` becomes one line (and a hint) on stderr and exit code 2."""
    from minicache_trt.cli.app import app

    try:
        app()
    except UserError as error:
        from minicache_trt.cli.console import print_error

        print_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (a pager, head); there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
