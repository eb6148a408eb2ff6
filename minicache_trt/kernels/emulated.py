"""The emulated GPU of ``build_plugins.sh --emulated``: what can be asked of it beside running kernels."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class EmulatedRuntime:
    """The CUDA runtime inside an emulated library, which runs the kernels' PTX on the CPU.

    Parameters
    ----------
    library : Path
        ``libminicache_emulated.so`` or another library with the emulator in it.
    """

    def __init__(self, library: Path) -> None:
        self._functions = ctypes.CDLL(str(library))
        self._functions.emulator_allow.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self._functions.emulator_statistics.restype = ctypes.c_char_p

    def allow(self, address: int, num_bytes: int) -> None:
        """Let kernels use this memory; once any is named, they fault at all other until `allow_all`."""
        self._functions.emulator_allow(address, num_bytes)

    def allow_all(self) -> None:
        self._functions.emulator_allow_all()

    def run_blocks_in_reverse(self, reverse: bool) -> None:
        """Thread blocks run from the last to the first; a GPU promises no order."""
        self._functions.emulator_reverse(int(reverse))

    def last_error(self) -> int:
        """What ``cudaGetLastError`` would return; 0: no error is left behind."""
        return int(self._functions.emulator_last_error())

    @contextmanager
    def device(self, processors: int = 1, block_kib: int = 227, processor_kib: int = 228) -> Iterator[None]:
        """Another GPU for a while: its multiprocessors, shared memory of a thread block and of a multiprocessor.

        The defaults are a Hopper's, of which one multiprocessor is enough; Ada has 99 and 100 KiB.
        """
        numbers = (ctypes.c_int32 * 3)(processors, block_kib << 10, processor_kib << 10)
        self._functions.emulator_exchange_device(numbers)
        try:
            yield
        finally:
            self._functions.emulator_exchange_device(numbers)

    def statistics(self) -> dict[str, dict[str, Any]]:
        """What each kernel did since `reset`, by its mangled name: counts, as in ``plugins/emulator/statistics.h``."""
        result: dict[str, dict[str, Any]] = json.loads(self._functions.emulator_statistics())
        return result

    def reset(self) -> None:
        self._functions.emulator_reset_statistics()
