"""How TensorRT is asked to build, beyond what every backend is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minicache_trt.errors import UserError


@dataclass(frozen=True)
class TensorRtOptions:
    """Settings of TensorRT's builder.

    Parameters
    ----------
    optimization_level : int, optional
        0 (fast to build) to 5; default: the builder's own.
    version_compatible : bool
        An engine that later minor versions of TensorRT run too (``tensorrt`` only).
    weight_streaming : bool
        Weights may stay in the machine's memory and be sent to the GPU as they are needed.
    timing_cache : Path, optional
        File of measured kernels, read if it exists and written after the build (``tensorrt`` only).
    debug_output : bool
        Attention outputs and residual streams are outputs of the decoder, for ``compare --layers``.
    """

    optimization_level: int | None = None
    version_compatible: bool = False
    weight_streaming: bool = False
    timing_cache: Path | None = None
    debug_output: bool = False

    def __post_init__(self) -> None:
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise ValueError(f"optimization_level: expected 0 to 5, got {self.optimization_level}")

    def check(self, backend: str) -> None:
        """Raises `UserError` for settings the backend has no use for."""
        if backend == "tensorrt":
            return
        only = {"--version-compatible": self.version_compatible, "--timing-cache": self.timing_cache is not None}
        if backend != "tensorrt-rtx":
            only["--weight-streaming"] = self.weight_streaming
            only["--enable-debug-output"] = self.debug_output
            only["--builder-optimization-level"] = self.optimization_level is not None
        given = [flag for flag, value in only.items() if value]
        if given:
            raise UserError(f"backend {backend} takes no {', '.join(given)}", "use --backend tensorrt, or leave it out")
