"""The structs of ``plugins/src/api.h`` and ``plugins/include/minicache/layout.cuh``, field by field."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

MAX_GROUP = 8


class StreamPools(Structure):
    """Pools of one stream; null where it has none."""

    _fields_ = [
        (name, c_void_p)
        for name in (
            "latent",
            "codes",
            "params",
            "norms",
            "residual",
            "residual_params",
            "exact",
            "exact_params",
            "retained_index",
        )
    ]


class ReadMaps(Structure):
    """Linear maps of one layer's reading; null where they are the identity."""

    _fields_ = [
        ("map", c_void_p),
        ("residual_map", c_void_p),
        ("offset", c_void_p),
        ("heads", c_void_p),
        ("slots", c_void_p),
        ("map_heads", c_int32),
    ]


class WriteMaps(Structure):
    """Linear maps of a stream's writing; null where they are the identity."""

    _fields_ = [
        ("transform", c_void_p),
        ("align", c_void_p),
        ("encode", c_void_p),
        ("bias", c_void_p),
        ("heads", c_void_p),
        ("map", c_void_p * MAX_GROUP),
        ("offset", c_void_p * MAX_GROUP),
    ]


class StreamView(Structure):
    """One stream as a layer reads it."""

    _fields_ = [("shape", c_void_p), ("pools", StreamPools), ("maps", ReadMaps)]


class Step(Structure):
    """Device pointers of a step's int32 tensors, and their sizes."""

    _fields_ = [
        ("query_start", c_void_p),
        ("context_len", c_void_p),
        ("compressed_len", c_void_p),
        ("slot_mapping", c_void_p),
        ("full_table", c_void_p),
        ("compressed_table", c_void_p),
        ("tokens", c_int32),
        ("sequences", c_int32),
        ("decodes", c_int32),
        ("full_columns", c_int32),
        ("compressed_columns", c_int32),
        ("longest_chunk", c_int32),
    ]


class AttentionShape(Structure):
    """Query heads, KV heads, head_dim, scale and soft cap of logits, rotary frequencies."""

    _fields_ = [
        ("query_heads", c_int32),
        ("heads", c_int32),
        ("dim", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("inverse_frequencies", c_void_p),
    ]


class AttentionArguments(Structure):
    """What attention works on."""

    _fields_ = [
        ("type", c_int32),
        ("shape", AttentionShape),
        ("step", Step),
        ("kv", c_void_p),
        ("full_blocks", c_int32),
        ("sliding_window", c_int32),
        ("key", StreamView),
        ("value", StreamView),
        ("q", c_void_p),
        ("out", c_void_p),
        ("q_stride", c_int64),
        ("out_stride", c_int64),
    ]


_I32, _I64, _P = c_int32, c_int64, c_void_p
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "last_error": (ctypes.c_char_p, ()),
    "version": (ctypes.c_char_p, ()),
    "stream_create": (_P, (_P, _I32, _P, _I32, _I32, _I32)),
    "stream_destroy": (None, (_P,)),
    "append_kv": (_I32, (_I32, _P, _I32, _I32, _I32, _P, _P, _I64, _I64, _P, _I32, _P)),
    "compress_blocks": (_I32, (_I32, _P, _P, _P, _P, _P, _I32, _P, _P, _P, _P, _I64, _P)),
    "compress_workspace": (_I64, (_I32, _P, _I32)),
    "restore_blocks": (_I32, (_I32, _P, _P, _P, _I32, _P, _P, _P, _I64, _P)),
    "restore_workspace": (_I64, (_I32, _P, _I32)),
    "decode_workspace": (_I64, (_P,)),
    "decode_attention": (_I32, (_P, _P, _I64, _P)),
    "prefill_workspace": (_I64, (_P,)),
    "prefill_attention": (_I32, (_P, _P, _I64, _P)),
}
SIGNATURES = {f"minicache_{name}": signature for name, signature in _SIGNATURES.items()}
"""Result and arguments of every function of the C ABI."""
