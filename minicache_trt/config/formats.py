"""Weight formats, compute types, and which backend has which."""

from __future__ import annotations

WEIGHT_TYPES = {"fp16": "float16", "bf16": "bfloat16"}
"""Weight formats whose files hold floats of this type."""
WEIGHT_BITS = {"int8": 8, "int4": 4, "int4_awq": 4, "fp8": 8}
"""Bits of a code in the weight-only formats; fp8 is for TensorRT alone."""
ROW_FORMATS = ("int8", "fp8")
"""Of them those that have a scale for each output with TensorRT, and not for each group of its inputs."""
WEIGHT_FORMATS = ("fp32", *WEIGHT_TYPES, *WEIGHT_BITS)
"""Weight formats; fp32 takes the checkpoint's numbers as they are, in its own files."""
CALIBRATED_WEIGHTS = "int4_awq"
"""The weight format that is calibrated on text."""
GROUP_SIZES = (32, 64, 128)
"""Inputs that may share a scale in the weight-only formats."""

COMPUTE_DTYPES = ("float32", "float16", "bfloat16")
"""Types an engine's activations, weights and exact cache can have."""
BACKEND_DTYPES = {
    "onnxruntime": ("float32", "float16"),
    "torch": ("float32",),
    "host-kernels": ("float32",),
    "cuda": ("float16", "bfloat16"),
    "tensorrt": COMPUTE_DTYPES,
    "tensorrt-rtx": COMPUTE_DTYPES,
}
"""Compute types by backend."""
TENSORRT_BACKENDS = ("tensorrt", "tensorrt-rtx")
GPU_BACKENDS = ("cuda", *TENSORRT_BACKENDS)
GRAPH_BACKENDS = ("onnxruntime", *TENSORRT_BACKENDS)
"""Backends that run an engine's graphs, or what is built from them."""
AUTO = "auto"
