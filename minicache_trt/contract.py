"""The contract between builder, runtime, kernels and plugins: every tensor's name, dtype and shape, once.

Symbols: T tokens, S sequences and Nd decodes (one-token sequences, which come first) of a step; Sp = S - Nd prefill
chunks, Qm their longest, padded, P the longest uncompressed history before any of them; N rows of logits or blocks to
compress; Mf, Mc widths of the block tables; Wf, Wc blocks of each tier the decodes attend to; Nf, Nc blocks of the full
and the compressed tier; H KV heads; B tokens per block; D head_dim.

Positions of a sequence at one step::

    [0, c)    compressed tier, compressed_table[0 : c/B]           changed by demotion only, between steps
    [c, n)    full tier, full_table[0 : ceil((n - c) / B)]         appended to by the decoder

Block 0 of each pool is never allocated; padding of tables and slots points to it, and so do the first entries of tables
for blocks that are behind a sliding window: they are free and masked. Pools start at zero and hold only
finite numbers: the append writes zero in place of a non-finite one, so that nothing a block held before can leak into
another request through 0 * NaN.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import MODEL, Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import BLOCK_SIZE, ModelConfig

CONTRACT_VERSION = 2
PREFILL_TILE = 128
"""Queries of one prefill chunk attended at a time; Qm is at most this, or a multiple of it."""
BYTE_OFFSET = 128
"""Packed codes are stored as byte minus this. Unlike two's complement it is affine in every code, so a reader that
works in floating point needs no case distinction, and one that works on bits flips the top bit."""
DOMAIN = "minicache"
"""ONNX domain and TensorRT plugin namespace of the two custom ops."""
OP_VERSION = "1"

DECODER_INPUTS: dict[str, tuple[str, ...]] = {
    "input_ids": ("T",),
    "positions": ("T",),
    "query_start": ("S+1",),
    "context_len": ("S",),
    "compressed_len": ("S",),
    "slot_mapping": ("T",),
    "full_table": ("S", "Mf"),
    "compressed_table": ("S", "Mc"),
    "full_work": ("Wf",),
    "compressed_work": ("Wc",),
    "decode_rows": ("Nd",),
    "prefill_rows": ("Sp", "Qm"),
    "prefill_past": ("P",),
    "logit_index": ("N",),
}
"""int32 inputs of the decoder, in order.

query_start: prefix sums of the sequences' token counts. context_len: tokens of each sequence after this step.
slot_mapping: block * B + offset in the full tier for each new token. full_work, compressed_work: the blocks the decodes
attend to, as places s * M + m in the table, ascending (a kernel that walks the tables needs neither). decode_rows:
0 .. Nd-1. prefill_rows: packed row of each query of each prefill chunk, padded with T. prefill_past: zeros;
its length tells how many keys a tile of queries may see. logit_index: packed rows whose logits are wanted.
"""

COMPRESSED_INPUTS = ("compressed_len", "compressed_table", "compressed_work")
"""Decoder inputs that exist only in plans with a compressed tier."""

COMPRESSOR_INPUTS: dict[str, tuple[str, ...]] = {
    "source_blocks": ("N",),
    "target_blocks": ("N",),
    "block_index": ("N",),
}
"""int32 inputs of the compressor: full-tier block, compressed-tier block, and which block of its sequence it is."""

LOGITS = "logits"
"""Decoder output, float32 [N, vocab]."""


@dataclass(frozen=True)
class PoolSpec:
    """One pool tensor.

    Parameters
    ----------
    name : str
        Graph input; the aliased output is ``output_name``.
    dtype : str
        ``model`` (the compute type), ``int8`` or ``float16``.
    shape : tuple of int
        Shape of one block; the pool has the number of blocks in front.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def output_name(self) -> str:
        return f"{self.name}.out"

    def block_bytes(self, element_bytes: int) -> int:
        """Bytes of one block when ``model`` numbers take ``element_bytes``."""
        size = {"model": element_bytes, "int8": 1, "float16": 2}[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True)
class SegmentLayout:
    """Where one segment's numbers are.

    ``component``: first component of the latent vector. ``storage``: first number in the latent pool (``model``) or
    first byte in the code pool, per token and head. ``scale`` and ``minimum``: offsets into the params pool, per head;
    each holds ``ranges`` numbers: B (axis ``token``) or ``length`` (``channel``). Formats without them have ``ranges``
    0; ``fp8`` has no minimum.
    """

    segment: Segment
    component: int
    storage: int
    scale: int
    minimum: int
    ranges: int


@dataclass(frozen=True)
class StreamLayout:
    """Pools of one stream and the offsets inside them.

    ================  =========  ======================  ========================================================
    pool              dtype      shape of a block        holds
    ================  =========  ======================  ========================================================
    latent            model      [H, B, components]      segments in ``model`` format, side by side
    codes             int8       [H, B, bytes]           quantized segments, low bits first, byte - 128
    params            float16    [H, numbers]            per segment with ranges: scales, then minima
    norms             float16    [m, Hn, B]              ``slerp``: norm of each layer; Hn = H, or 1 for norm "token"
    norms             float16    [1, H, B]               gaussian segments: root mean square of the stored components
    residual          int8       [m, H, B, bytes]        ``slerp`` with residual: its codes, head_dim numbers each
    residual_params   float16    [m, H, 2 B]             its scales, then its minima, one per token
    exact             model      [m, H, R, D]            retained vectors of each layer in ``retained_format`` model
    exact             int8       [m, H, R, bytes]        ... or their codes
    exact_params      float16    [m, H, 2 R] or [m, H, R]  ... with scales, then minima (``fp8``: scales only)
    retained_index    int8       [Hn, R]                 their offsets in the block, ascending; unused ones, -1, last
    ================  =========  ======================  ========================================================

    ``config`` is the model as the stream's first layer knows it: in basis pre_rope, all of its layers rotate alike.

    A pool that would hold nothing does not exist. Heads are slots: with ``match_heads``, slot h holds another KV head
    in every layer of the group, in all pools alike.
    """

    index: int
    stream: Stream
    config: ModelConfig
    segments: tuple[SegmentLayout, ...]
    pools: dict[str, PoolSpec]

    @property
    def residual(self) -> Segment | None:
        """How residuals are stored, or None."""
        name = self.stream.residual
        return None if name == "none" else Segment(self.config.head_dim, name)

    @property
    def exact(self) -> Segment:
        """How retained vectors are stored."""
        return Segment(self.config.head_dim, self.stream.retained_format)


def stream_layout(index: int, stream: Stream, config: ModelConfig) -> StreamLayout:
    """Layout of stream number ``index`` of a plan."""
    component = latent = codes = params = 0
    segments = []
    for segment in stream.segments:
        ranges = (BLOCK_SIZE if segment.axis == "token" else segment.length) if segment.has_ranges else 0
        storage = latent if segment.kind == MODEL else codes
        segments.append(SegmentLayout(segment, component, storage, params, params + ranges, ranges))
        latent += segment.length if segment.kind == MODEL else 0
        codes += segment.code_bytes
        params += ranges * (2 if segment.has_minimum else 1)
        component += segment.length
    layout = StreamLayout(index, stream, config.at_layer(stream.layers[0]), tuple(segments), {})
    heads, members = config.num_kv_heads, len(stream.layers)
    norm_heads = heads if stream.norm == "head" else 1
    exact, residual = layout.exact, layout.residual
    quantized, retained = exact.kind != MODEL, stream.retained
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "latent": ("model", (heads, BLOCK_SIZE, latent)),
        "codes": ("int8", (heads, BLOCK_SIZE, codes)),
        "params": ("float16", (heads, params)),
        "norms": ("float16", _norms_shape(stream, heads, norm_heads)),
        "residual": ("int8", (members, heads, BLOCK_SIZE, residual.code_bytes if residual else 0)),
        "residual_params": ("float16", (members, heads, 2 * BLOCK_SIZE if residual else 0)),
        "exact": (
            "int8" if quantized else "model",
            (members, heads, retained, exact.code_bytes if quantized else config.head_dim),
        ),
        "exact_params": ("float16", (members, heads, retained * (exact.has_ranges + exact.has_minimum))),
        "retained_index": ("int8", (norm_heads, retained)),
    }
    for kind, (dtype, shape) in shapes.items():
        if 0 not in shape:
            layout.pools[kind] = PoolSpec(f"stream.{index}.{kind}", dtype, shape)
    return layout


def _norms_shape(stream: Stream, heads: int, norm_heads: int) -> tuple[int, ...]:
    if stream.merge == "slerp":
        return len(stream.layers), norm_heads, BLOCK_SIZE
    return (1, heads, BLOCK_SIZE) if stream.gaussian else (0,)


def plan_layout(plan: CompressionPlan, config: ModelConfig) -> tuple[StreamLayout, ...]:
    return tuple(stream_layout(i, stream, config) for i, stream in enumerate(plan.streams))


def full_pools(config: ModelConfig) -> tuple[PoolSpec, ...]:
    """Full tier: one pool per layer, keys (after RoPE) at [:, 0] and values at [:, 1]."""
    shape = (2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    return tuple(PoolSpec(f"kv.{layer}", "model", shape) for layer in range(config.num_layers))


def compressed_pools(plan: CompressionPlan, config: ModelConfig) -> tuple[PoolSpec, ...]:
    return tuple(pool for layout in plan_layout(plan, config) for pool in layout.pools.values())


def decoder_inputs(plan: CompressionPlan) -> dict[str, tuple[str, ...]]:
    """int32 decoder inputs of engines with this plan, name to symbolic shape."""
    return {name: shape for name, shape in DECODER_INPUTS.items() if plan.compresses or name not in COMPRESSED_INPUTS}


def full_block_bytes(config: ModelConfig, element_bytes: int) -> int:
    """Bytes of one block in every layer's pool of the full tier."""
    return sum(pool.block_bytes(element_bytes) for pool in full_pools(config))


def compressed_block_bytes(plan: CompressionPlan, config: ModelConfig, element_bytes: int) -> int:
    """Bytes of one block in every pool of the compressed tier."""
    return sum(pool.block_bytes(element_bytes) for pool in compressed_pools(plan, config))


def contract_hash(plan: CompressionPlan, config: ModelConfig) -> str:
    """Changes whenever an engine's tensors would."""

    def rows() -> Iterator[object]:
        yield CONTRACT_VERSION, BLOCK_SIZE, PREFILL_TILE
        yield sorted(decoder_inputs(plan).items()), sorted(COMPRESSOR_INPUTS.items())
        for pool in (*full_pools(config), *compressed_pools(plan, config)):
            yield pool.name, pool.dtype, pool.shape

    return hashlib.sha256(json.dumps(list(rows())).encode()).hexdigest()[:16]
