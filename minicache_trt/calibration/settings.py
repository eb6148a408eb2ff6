"""What a calibration is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from minicache_trt.config import BLOCK_SIZE

READ_COSTS = ("any", "free")
GROUP_SIZES = (1, 2, 4)


@dataclass(frozen=True)
class CalibrationSettings:
    """Sizes of the samples, what may be chosen, and what is optimised.

    Parameters
    ----------
    length : int
        Tokens of a sequence, a multiple of the block size, above ``window`` + two blocks.
    moment_sequences, gradient_sequences, search_sequences, verify_sequences : int
        Sequences that second moments, sensitivities, the losses of single streams and the losses of whole plans are
        taken from. The last two sets are disjoint from the others.
    recall_share : float
        Share of synthetic recall sequences in every set, and weight of their divergence in the loss, in [0, 1).
    groups : tuple of int
        Group sizes to consider, among 1, 2 and 4; 1 is always allowed.
    read_cost : str
        ``any``, or ``free``: no streams whose keys have to be rotated again when they are read (``pre_rope``).
    damping : float
        Share of the mean sensitivity that is added to every direction before the joint KLT.
    rounds : int
        Rounds of solving, measuring what was chosen and solving again.
    window : int
        Most recent tokens kept exact.
    seed : int
        Of synthetic sequences and sampled labels.
    """

    length: int = 512
    moment_sequences: int = 96
    gradient_sequences: int = 24
    search_sequences: int = 8
    verify_sequences: int = 16
    recall_share: float = 0.3
    groups: tuple[int, ...] = (1, 2)
    read_cost: str = "any"
    damping: float = 0.05
    rounds: int = 4
    window: int = BLOCK_SIZE
    seed: int = 0

    def __post_init__(self) -> None:
        least = self.window + 2 * BLOCK_SIZE
        if self.length % BLOCK_SIZE or self.length < least:
            raise ValueError(f"length: expected a multiple of {BLOCK_SIZE}, at least {least}, got {self.length}")
        for name in ("moment_sequences", "gradient_sequences", "search_sequences", "verify_sequences"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: expected at least 2, got {getattr(self, name)}")
        if not 0 <= self.recall_share < 1:
            raise ValueError(f"recall_share: expected a number in [0, 1), got {self.recall_share}")
        if not self.groups or not set(self.groups) <= set(GROUP_SIZES):
            raise ValueError(f"groups: expected sizes among {', '.join(map(str, GROUP_SIZES))}, got {self.groups}")
        if self.read_cost not in READ_COSTS:
            raise ValueError(f"read_cost: expected one of {', '.join(READ_COSTS)}, got {self.read_cost!r}")
        if self.damping <= 0:
            raise ValueError(f"damping: expected a positive number, got {self.damping}")
        if self.rounds < 1:
            raise ValueError(f"rounds: expected a positive number, got {self.rounds}")

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Ascending, 1 among them."""
        return tuple(sorted({1, *self.groups}))
