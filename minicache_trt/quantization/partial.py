"""Where a build keeps what it would be a pity to compute again, should it be killed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from minicache_trt.staging import locked


class Partial:
    """A directory beside ``output``, made when it is first asked for and locked from then on.

    Parameters
    ----------
    output : Path
        What is built.
    private : Path
        Takes the directory's place where another build of the same output has it.
    """

    def __init__(self, output: Path, private: Path) -> None:
        self._shared, self._private = output.with_name(f".{output.name}.partial"), private
        self._locks = ExitStack()
        self._free: bool | None = None

    def directory(self) -> Path:
        """The directory, with what a killed build left in it."""
        if self._free is None:
            self._shared.mkdir(exist_ok=True)
            self._free = self._locks.enter_context(locked(self._shared))
        directory = self._shared if self._free else self._private
        directory.mkdir(exist_ok=True)
        return directory

    def close(self, keep: bool) -> None:
        """Give the directory up; without ``keep`` it is removed, even if all of it is a killed build's."""
        with self._locks:
            if not keep and self._free is None and self._shared.is_dir():
                with suppress(OSError):
                    self._free = self._locks.enter_context(locked(self._shared))
            if not keep and self._free:
                shutil.rmtree(self._shared, ignore_errors=True)


@contextmanager
def kept_if_killed(output: Path, private: Path) -> Iterator[Partial]:
    """A `Partial` that is removed when the block ends, well or by an error; an interrupted or killed one stays."""
    partial, keep = Partial(output, private), False
    try:
        yield partial
    except Exception:
        raise
    except BaseException:
        keep = True
        raise
    finally:
        partial.close(keep)
