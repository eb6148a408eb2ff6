"""Independent reference: Hugging Face's own model with the two-tier cache in plain PyTorch.

Engines, ONNX functions and the PyTorch twin are tested against this package. It shares nothing with them but the
plan's dataclasses, and prefers the obvious formulation to the fast one.
"""

from minicache_trt.reference.codec import EncodedBlocks, EncodedSegment, encode, restore
from minicache_trt.reference.history import compressed_length
from minicache_trt.reference.model import Reference

__all__ = ["EncodedBlocks", "EncodedSegment", "Reference", "compressed_length", "encode", "restore"]
