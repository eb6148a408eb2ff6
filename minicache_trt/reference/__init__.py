"""Independent reference: Hugging Face's own model with the two-tier cache in plain PyTorch.

Engines, ONNX functions and the PyTorch twin are tested against this package. It shares nothing with them but the
plan's dataclasses, and prefers the obvious formulation to the fast one.
"""

from minicache_trt.reference.codec import EncodedBlocks, encode, restore
from minicache_trt.reference.constants import Constants
from minicache_trt.reference.history import compressed_length
from minicache_trt.reference.model import Reference
from minicache_trt.reference.segments import EncodedSegment

__all__ = ["Constants", "EncodedBlocks", "EncodedSegment", "Reference", "compressed_length", "encode", "restore"]
