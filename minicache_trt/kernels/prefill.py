"""Attention of a step's prefill chunks."""

from __future__ import annotations

import ctypes

from torch import Tensor

from minicache_trt.kernels.library import KernelError, KernelLibrary, address, stream_of
from minicache_trt.kernels.structs import AttentionArguments


def prefill_workspace(library: KernelLibrary, arguments: AttentionArguments) -> int:
    """Recommended bytes of workspace; they depend on shapes only.

    `prefill_attention` also takes less, down to one block of restored history per chunk and the state of all rows: it
    then restores the history in smaller pieces, with the same result.

    Raises
    ------
    KernelError
        The shapes are not supported.
    """
    size = library.size("prefill_workspace", ctypes.byref(arguments))
    if size < 0:
        raise KernelError(library.last_error())
    return size


def prefill_attention(library: KernelLibrary, arguments: AttentionArguments, workspace: Tensor) -> None:
    """Attend the rows of the step's chunks of more than one token; rows of its decodes stay as they are.

    Parameters
    ----------
    library : KernelLibrary
    arguments : AttentionArguments
        The step's keys and values are in the full tier already.
    workspace : Tensor
        Contiguous scratch memory; its contents do not matter.

    Raises
    ------
    KernelError
        An argument is missing, misaligned, too small or not supported; the message names it.
    """
    size = workspace.numel() * workspace.element_size()
    library.call("prefill_attention", ctypes.byref(arguments), address(workspace), size, stream_of(workspace))
