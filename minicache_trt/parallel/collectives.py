"""What ranks tell each other within a step."""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist
from torch import Tensor, empty

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before PyTorch 2.13


class Collectives(Protocol):
    """Operations every rank takes part in, in the same order."""

    def sum(self, x: Tensor) -> Tensor:
        """The ranks' tensors added up; ``x`` may be overwritten."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """The ranks' ``[rows, columns]`` side by side, in the order of ranks: ``[rows, size * columns]``."""
        ...


class Alone:
    """`Collectives` of a single rank."""

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x


class ProcessGroup:
    """`Collectives` over the default process group of `torch.distributed`: gloo on CPUs, NCCL on GPUs.

    Sums are taken in the compute type; gloo and NCCL add the ranks' tensors in an order of their own.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        parts = empty(self._size * rows, columns, dtype=x.dtype, device=x.device)
        _all_gather(parts, x.contiguous())
        return parts.view(self._size, rows, columns).transpose(0, 1).reshape(rows, -1)


ALONE = Alone()
