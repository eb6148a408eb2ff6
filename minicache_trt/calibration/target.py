"""What a plan has to reach: a size or a loss."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from minicache_trt.compression.size import BASELINE_BYTES, baseline_sequence_bytes, held_blocks
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import full_block_bytes
from minicache_trt.errors import UserError

LARGEST_PERCENT = 100.0


@dataclass(frozen=True)
class Sizes:
    """Bytes of a sequence of ``context`` tokens as a function of those of its compressed blocks."""

    config: ModelConfig
    context: int
    window: int

    def __post_init__(self) -> None:
        if self._split[0] < 1:
            raise UserError(
                f"--context: at {self.context} tokens nothing is compressed yet",
                f"expected at least {self.window + BLOCK_SIZE}: the exact window and a block",
            )

    @property
    def _split(self) -> tuple[int, int]:
        """Compressed blocks the sequence holds, and bytes of the full ones."""
        demoted = max(0, self.context - self.window) // BLOCK_SIZE
        blocks, full = held_blocks(self.config, self.context, demoted)
        return blocks, full * full_block_bytes(self.config, BASELINE_BYTES)

    def ratio(self, block_bytes: int) -> float:
        """How many times smaller the cache is than in 16 bits."""
        blocks, full = self._split
        return baseline_sequence_bytes(self.config, self.context) / (blocks * block_bytes + full)

    def budget(self, ratio: float) -> int:
        """Most bytes per compressed block at which the ratio is reached; may be negative."""
        blocks, full = self._split
        return math.floor((baseline_sequence_bytes(self.config, self.context) / ratio - full) / blocks)

    def bits(self, block_bytes: int) -> float:
        """Bits per number of the compressed tier."""
        return 8 * BASELINE_BYTES * block_bytes / full_block_bytes(self.config, BASELINE_BYTES)


def parse_percent(text: str, flag: str) -> float:
    """``0.5%`` or ``0.5`` (percent as well) as 0.005; ``flag`` names the option in errors."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*%?\s*", text)
    value = float(match[1]) if match else -1.0
    if not 0 < value <= LARGEST_PERCENT:
        raise UserError(f"{flag}: expected a percentage such as 0.5%, above 0 and at most 100 %, got {text!r}")
    return value / 100
