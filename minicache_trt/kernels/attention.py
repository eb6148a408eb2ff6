"""Attention over the two-tier cache by the kernels: their arguments, and the decodes of a step."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from torch import Tensor

from minicache_trt.config import ModelConfig
from minicache_trt.kernels.library import TYPES, KernelLibrary, address, stream_of
from minicache_trt.kernels.structs import AttentionArguments, AttentionShape, Step, StreamView


@dataclass(frozen=True)
class StepTensors:
    """A step's int32 tensors on the device, contiguous, by their names in `minicache_trt.contract.DECODER_INPUTS`.

    Parameters
    ----------
    query_start : Tensor
        ``[S + 1]``.
    context_len : Tensor
        ``[S]``.
    slot_mapping : Tensor
        ``[T]``.
    full_table : Tensor
        ``[S, Mf]``.
    compressed_len, compressed_table : Tensor, optional
        ``[S]`` and ``[S, Mc]``; None without a compressed tier.
    decodes : int
        One-token sequences, which come first.
    longest_chunk : int
        Queries of the longest prefill chunk (an upper bound), 0 without any.
    """

    query_start: Tensor
    context_len: Tensor
    slot_mapping: Tensor
    full_table: Tensor
    compressed_len: Tensor | None
    compressed_table: Tensor | None
    decodes: int
    longest_chunk: int = 0

    def struct(self) -> Step:
        """Pointers to the tensors, which must outlive it."""
        compressed = self.compressed_table
        return Step(
            address(self.query_start),
            address(self.context_len),
            address(self.compressed_len),
            address(self.slot_mapping),
            address(self.full_table),
            address(compressed),
            self.slot_mapping.shape[0],
            self.context_len.shape[0],
            self.decodes,
            self.full_table.shape[1],
            0 if compressed is None else compressed.shape[1],
            self.longest_chunk,
        )


def attention_arguments(
    config: ModelConfig,
    step: StepTensors,
    kv: Tensor,
    q: Tensor,
    out: Tensor,
    key: StreamView | None = None,
    value: StreamView | None = None,
    inverse_frequencies: Tensor | None = None,
    sliding_window: int = 0,
) -> AttentionArguments:
    """Arguments of one layer's attention; every tensor must outlive them.

    Parameters
    ----------
    config : ModelConfig
    step : StepTensors
    kv : Tensor
        Full tier of the layer, ``[Nf, 2, H, B, D]``, with the step's keys and values already appended.
    q, out : Tensor
        ``[T, Hq * D]`` in the type of ``kv``; rows may lie further apart than they are long.
    key, value : StreamView, optional
        The layer's streams (`minicache_trt.kernels.library.stream_view`); None without a compressed tier.
    inverse_frequencies : Tensor, optional
        float32 ``[D / 2]``, of keys in the pre_rope basis.
    sliding_window : int
        Tokens a query sees, itself included; 0: all of them.
    """
    shape = AttentionShape(
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.attention_scale,
        config.attention_softcap or 0.0,
        address(inverse_frequencies),
    )
    return AttentionArguments(
        TYPES[kv.dtype],
        shape,
        step.struct(),
        address(kv),
        len(kv),
        sliding_window,
        StreamView() if key is None else key,
        StreamView() if value is None else value,
        address(q),
        address(out),
        q.stride(0),
        out.stride(0),
    )


def decode_workspace(library: KernelLibrary, arguments: AttentionArguments) -> int:
    """Bytes of workspace `decode_attention` takes; depends on shapes only, 0 for arguments it would refuse."""
    return library.size("decode_workspace", ctypes.byref(arguments))


def decode_attention(library: KernelLibrary, arguments: AttentionArguments, workspace: Tensor) -> None:
    """Attend the step's decodes: write rows 0 to ``decodes`` - 1 of ``out`` and no others.

    Parameters
    ----------
    library : KernelLibrary
    arguments : AttentionArguments
    workspace : Tensor
        int8, at least `decode_workspace` of them, aligned to 16 bytes; on a GPU its device's current stream is used.

    Raises
    ------
    KernelError
        An argument is invalid, or the kernels could not be launched.
    """
    library.call(
        "decode_attention", ctypes.byref(arguments), workspace.data_ptr(), workspace.numel(), stream_of(workspace)
    )
