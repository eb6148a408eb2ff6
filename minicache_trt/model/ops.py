"""The vocabulary a decoder is written in; one implementation computes, another emits a graph."""

from __future__ import annotations

from typing import Protocol, TypeVar

from minicache_trt.config import RopeConfig

T = TypeVar("T")


class Ops(Protocol[T]):
    """Operations on packed tokens. Weights are named as in `minicache_trt.checkpoint`, without their last component.

    Shapes: ``x`` is ``[T, hidden]``; ``heads`` vectors of head_dim lie side by side in ``[T, heads * head_dim]``.
    """

    def embed(self, ids: T) -> T:
        """Rows of the embedding table, ``[T, hidden]``."""
        ...

    def linear(self, x: T, name: str) -> T:
        """``x @ W.T (+ bias)``, W ``[out, in]``."""
        ...

    def scale(self, x: T, factor: float) -> T:
        """``x`` times a number, which is rounded to the type of ``x``."""
        ...

    def softcap(self, x: T, cap: float) -> T:
        """``cap * tanh(x / cap)``."""
        ...

    def rms_norm(self, x: T, name: str) -> T: ...

    def head_norm(self, x: T, name: str, heads: int) -> T:
        """`rms_norm` of each head's vector, all with the same weights ``[head_dim]``."""
        ...

    def rotation(self, positions: T, rope: RopeConfig) -> tuple[T, T]:
        """Cosines and sines ``[T, rotary_dim / 2]`` of a rotary embedding."""
        ...

    def rotary(self, x: T, rotation: tuple[T, T], heads: int) -> T:
        """Rotate the first ``rotary_dim`` components of each head, halves paired (the convention of Hugging Face)."""
        ...

    def paged_attention(self, q: T, k: T, v: T, layer: int) -> T:
        """Append k and v to the full tier, attend over both tiers; ``[T, num_heads * head_dim]``."""
        ...

    def add(self, a: T, b: T) -> T: ...

    def gated(self, gate: T, up: T) -> T:
        """The model's activation of ``gate``, times ``up``."""
        ...

    def moe(self, x: T, name: str) -> T:
        """Mixture of experts: each token's most likely experts, their gated MLPs weighed by the router's softmax.

        The weights of the ``experts_per_token`` chosen ones are made to add up to one (arXiv 2401.04088). Experts no
        token is sent to are not computed.
        """
        ...

    def take(self, x: T, rows: T) -> T:
        """Rows of ``x``."""
        ...
